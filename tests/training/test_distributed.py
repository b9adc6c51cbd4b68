"""Many ranks train what one rank trains, and leave a checkpoint that any number of ranks, and everybody else, can read.

In float64 two correct runs differ by the order of their sums: 16 rows, some hundred terms a sum, a few eps = 2e-16 a
step relative to a gradient's size. The central difference divides by 2h = 1e-2 and Adam by its own gradient, so a few
digits may go: EXACT = 1e-11 leaves four, where leaving out a rank's rows, or a mean for a sum, changes the second digit
of a step that moves each weight by about its learning rate, 1e-2. Losses are added up in float32: 1e-6 of them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_worker import FORMS, Looks, build, config_of, go, go_all, launch, outcome

from metaflowmaps.checkpoint import CheckpointStore, read_checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.training.distributed import check_division, ranks_a_copy, told
from metaflowmaps.training.starting import starting_point
from metaflowmaps.work import ranks

load_map = MetaFlowMap.from_pretrained

EXACT = 1e-11
PARTS = ("weights", "average", "optimizer")


def difference(a: dict, b: dict, part: str) -> float:
    assert a[part].keys() == b[part].keys()
    return max(float((a[part][name].double() - b[part][name].double()).abs().max()) for name in a[part])


def assert_same(run: dict, alone: dict) -> None:
    """Step by step and in all that is kept."""
    assert run["steps"] == alone["steps"]
    torch.testing.assert_close(run["loss"], alone["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(run["norm"], alone["norm"], rtol=EXACT, atol=0)
    for part in PARTS:
        assert difference(run, alone, part) < EXACT, part


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(kind, form) -> what one rank makes of it, and where; made once."""
    root, made = tmp_path_factory.mktemp("alone"), {}

    def find(kind: str, form: str, **changes):
        key = f"{kind}-{form}" + "".join(f"-{name}-{value}" for name, value in changes.items())
        if key not in made:
            go(kind, config_of(form, **changes).model_dump(), str(root / key))
            made[key] = outcome(root / key)
        return made[key]

    return find


# -- the same training -------------------------------------------------------------------------------------------------


def test_the_yardstick(alone):
    """One rank, its batch in one piece or in four: what the order of sums does; and steps that are worth comparing."""
    whole, pieces = (alone("mlp", "lagrangian-difference", micro_batches=n) for n in (1, 4))
    assert 0 < difference(whole, pieces, "weights") < EXACT
    start = build("mlp").state_dict()
    moved = [float((value - start[name]).abs().max()) for name, value in whole["weights"].items() if value.ndim]
    assert min(moved) > 1e-3


MOST = ("eulerian", "lagrangian", "lagrangian-difference", "semigroup")


@pytest.mark.parametrize(
    ("kind", "size", "shard"),
    [
        ("mlp", 2, 0),
        pytest.param("dit", 2, 0, marks=pytest.mark.attack),
        pytest.param("mlp", 2, 1, marks=pytest.mark.attack),
        pytest.param("mlp", 4, 2, marks=pytest.mark.attack),
    ],
)
def test_every_loss_form_on_many_ranks(tmp_path, alone, kind, size, shard):
    """Sharded over all ranks, copied, and both: all as on one rank. Two cases take the forms that differ MOST:

    forward-mode derivatives without and with a gradient through them, several calls in one graph.
    """
    forms = FORMS if kind == "mlp" and (size, shard) != (2, 0) else MOST
    runs = [(config_of(form, shard=shard, checkpoint_every=4).model_dump(), str(tmp_path / form)) for form in forms]
    assert launch(size, go_all, kind, runs) == [0] * size
    for form in forms:
        run = outcome(tmp_path / form)
        assert_same(run, alone(kind, form))


@pytest.mark.attack
def test_blocks_computed_again_in_the_backward_pass(tmp_path, alone):
    """A sharded block that is recomputed is gathered once more; the gradient is that of a remembered one."""
    config = config_of("semigroup", shard=0, checkpoint_activations=True, checkpoint_every=4).model_dump()
    assert launch(2, go, "dit", config, str(tmp_path / "run")) == [0, 0]
    assert_same(outcome(tmp_path / "run"), alone("dit", "semigroup"))


@pytest.mark.attack
def test_radam(tmp_path):
    """Its first steps are another rule than its later ones; from the sixth on, with these betas, it is adaptive."""
    config = config_of(shard=0, steps=12, optimizer={"name": "radam"}, checkpoint_every=12).model_dump()
    go("mlp", config, str(tmp_path / "one"))
    assert launch(2, go, "mlp", config, str(tmp_path / "two")) == [0, 0]
    assert_same(outcome(tmp_path / "two"), outcome(tmp_path / "one"))


@pytest.mark.attack
def test_soap_keeps_a_copy_each(tmp_path):
    """shard=0 is given up for whole matrices, and the copies are the same to the bit (the worker looks).

    With so few rows its matrices have no full rank, and their eigenvectors follow the rounding: on one rank too another
    order of sums moves weights by a fifth of a step. So only what comes before an update is held to one rank's.
    """
    config = config_of(shard=0, optimizer={"name": "soap"})
    go("mlp", config.model_dump(), str(tmp_path / "one"))
    assert launch(2, go, "mlp", config.model_dump(), str(tmp_path / "two")) == [0, 0]
    copies = config.model_copy(update={"shard": 1})
    assert launch(2, go, "mlp", copies.model_dump(), str(tmp_path / "copies")) == [0, 0]
    run, again, one = (outcome(tmp_path / name) for name in ("two", "copies", "one"))
    torch.testing.assert_close(run["norm"][0], one["norm"][0], rtol=EXACT, atol=0)
    torch.testing.assert_close(run["loss"], one["loss"], rtol=0.2, atol=0)
    assert difference(run, again, "weights") == 0


# -- going on on other ranks -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """ranks -> a run of an objective with a state, on so many ranks."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def find(size: int) -> Path:
        if size not in made:
            made[size] = root / str(size)
            config = config_of(shard=2, threads=1).model_dump()
            if size == 1:
                go("mlp", config, str(made[size]), remembers=True)
            else:
                assert launch(size, go, "mlp", config, str(made[size]), remembers=True) == [0] * size
        return made[size]

    return find


LATER = [pytest.param(*ranks, marks=pytest.mark.attack) for ranks in ((4, 2), (2, 4), (1, 4), (4, 1), (2, 2))]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), *LATER])
def test_resume_on_another_number_of_ranks(tmp_path, whole_runs, before, after):
    """Two steps on some, two on others: as four on one, with the objective's own memory. shard=2: HSDP on four."""
    out = tmp_path / "run"
    shutil.copytree(whole_runs(before), out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    config = config_of(shard=2).model_dump()
    if after == 1:
        go("mlp", config, str(out), remembers=True)
    else:
        assert launch(after, go, "mlp", config, str(out), remembers=True) == [0] * after
    run = outcome(out)
    assert_same(run, outcome(whole_runs(1)))
    if before == after:  # gloo adds up in a fixed order: to the bit
        assert all(difference(run, outcome(whole_runs(before)), part) == 0 for part in PARTS)
    newest = read_checkpoint(out / "checkpoints" / "step-00000004")
    [level] = newest.tensors("objective.safetensors").values()
    assert float(level) > 0
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.attack
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, alone):
    config = config_of(shard=0).model_dump()
    assert launch(2, go, "mlp", config, str(tmp_path), event=("signal", 2, 1)) == [130, 130]
    assert CheckpointStore(tmp_path / "checkpoints").steps() == [2, 3]
    assert launch(2, go, "mlp", config, str(tmp_path)) == [0, 0]
    assert_same(outcome(tmp_path), alone("mlp", "lagrangian-difference"))


@pytest.mark.parametrize("shard", [0, pytest.param(1, marks=pytest.mark.attack)])
def test_an_error_of_one_rank_ends_all(tmp_path, shard):
    codes = launch(2, go, "mlp", config_of(shard=shard).model_dump(), str(tmp_path), event=("error", 2, 1))
    assert 3 in codes
    assert all(code not in (0, -9) for code in codes), "-9 is what a rank ends with that hangs"
    found, skipped = CheckpointStore(tmp_path / "checkpoints").latest_valid()
    assert skipped == []
    assert found is not None
    assert found.document("position.json")["step"] == 2


def test_a_non_finite_loss_on_one_rank_is_found_by_all(tmp_path):
    config, said = config_of(shard=0).model_dump(), tmp_path / "said"
    assert launch(2, go, "mlp", config, str(tmp_path / "run"), event=("nan", 2, 1), said=said) == [3, 3]
    lines = [line for line in said.read_text().splitlines() if "NonFiniteLoss" in line]
    assert len(lines) == 2
    assert all("at step 2" in line and "in 8 of 16 rows" in line and "step 2 is untouched" in line for line in lines)


@pytest.mark.parametrize(
    ("event", "rank"),
    [pytest.param("killed while gathering", 1, marks=pytest.mark.attack), ("killed before the rename", 0)],
)
def test_killed_in_the_middle_of_a_save(tmp_path, alone, event, rank):
    """The checkpoint before it is whole, and the same command ends as if nothing had been."""
    config = config_of(shard=0).model_dump()
    codes = launch(2, go, "mlp", config, str(tmp_path), event=(event, 3, rank))
    assert codes[rank] == -9
    assert codes[1 - rank] not in (0, -9)
    assert any((tmp_path / "checkpoints").glob(".tmp-*")) == (rank == 0)  # the first rank writes
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == [2]
    assert store.latest_valid()[0] is not None
    assert launch(2, go, "mlp", config, str(tmp_path)) == [0, 0]
    assert not any((tmp_path / "checkpoints").glob(".tmp-*"))
    assert_same(outcome(tmp_path), alone("mlp", "lagrangian-difference"))


def test_a_full_disk_of_the_first_rank_is_everybodys(tmp_path):
    config, said = config_of(shard=0).model_dump(), tmp_path / "said"
    assert launch(2, go, "mlp", config, str(tmp_path / "run"), event=("disk full", 3, 0), said=said) == [3, 3]
    lines = [line for line in said.read_text().splitlines() if "CheckpointError" in line]
    assert len(lines) == 2
    assert all("no space left" in line for line in lines)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [2]
    assert not any((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_does_not_know_how_many_ranks_there_were(whole_runs):
    """The same files with tensors of the same names, shapes and types; they load like any other."""
    forms = []
    for size in (1, 2):
        held = read_checkpoint(whole_runs(size) / "checkpoints" / "step-00000004")
        names = sorted(file.name for file in held.path.iterdir())
        tensors = [held.tensors(name) for name in names if name.endswith(".safetensors")]
        forms.append((names, [{key: (value.shape, value.dtype) for key, value in each.items()} for each in tensors]))
    assert forms[0] == forms[1]
    run = outcome(whole_runs(2))
    averaged, raw = load_map(whole_runs(2)), load_map(whole_runs(2), weights="raw")
    torch.testing.assert_close(dict(averaged.state_dict()), run["average"], rtol=0, atol=0)
    torch.testing.assert_close(dict(raw.state_dict()), run["weights"], rtol=0, atol=0)
    assert difference({"m": run["average"]}, {"m": run["weights"]}, "m") > 1e-4


def test_a_damaged_newest_one_is_skipped_by_all_ranks(tmp_path, whole_runs):
    out = tmp_path / "run"
    shutil.copytree(whole_runs(2), out)
    file = out / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=r"optimizer\.safetensors"):
        start = starting_point(config_of(shard=2), out, "auto")
    assert start is not None
    assert start.document("position.json")["step"] == 2
    assert launch(2, go, "mlp", config_of(shard=2).model_dump(), str(out), remembers=True) == [0, 0]
    assert_same(outcome(out), outcome(whole_runs(1)))


# -- looking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [0, pytest.param(1, marks=pytest.mark.attack)])
def test_the_first_rank_looks_at_the_averaged_model_for_all(tmp_path, shard):
    config = config_of(shard=shard, sample_every=1, checkpoint_every=3).model_dump()
    looks = Looks(str(tmp_path / "seen"), last=3)
    assert launch(2, go, "mlp", config, str(tmp_path / "run"), looks=looks) == [0, 0]
    seen = sorted(file.name for file in (tmp_path / "seen").iterdir())
    assert seen == [f"{step}-rank0-False.pt" for step in (1, 2, 3)], "in evaluation mode, by one rank"
    run = outcome(tmp_path / "run")
    assert run["steps"] == [1, 2, 3], "enough for one is enough for all"
    last = torch.load(tmp_path / "seen" / seen[-1], weights_only=True)
    assert difference({"m": last}, {"m": run["average"]}, "m") == 0


# -- what cannot be shared ---------------------------------------------------------------------------------------------


def test_what_does_not_divide_is_refused_with_the_fix():
    check_division(config_of(), 4)
    with pytest.raises(InputError, match="3 ranks cannot share batch_size=16 equally: --set batch_size=15 or 18"):
        check_division(config_of("diagonal"), 3)
    with pytest.raises(
        InputError, match=r"8 ranks cannot share the 4 of 16 rows that are on the diagonal .*diagonal_share=0(\.5)?$"
    ):
        check_division(config_of(), 8)
    late = config_of()
    late = late.model_copy(update={"loss": late.loss.model_copy(update={"warmup_steps": 2})})
    with pytest.raises(InputError, match="on the diagonal"):  # only after the warm-up
        check_division(late, 8)
    learned = config_of(teacher="learned", drift_steps=2, drift_batch_size=18)
    with pytest.raises(InputError, match="drift_batch_size=16 or 20"):
        check_division(learned, 4)
    with pytest.raises(InputError, match=r"shard=3 does not divide 4 ranks"):
        check_division(config_of(shard=3), 4)


def test_how_many_ranks_share_a_copy():
    def copies(shard: int, size: int, name: str = "adam") -> int:
        return ranks_a_copy(config_of(shard=shard, optimizer={"name": name}), size)

    assert [copies(0, 4), copies(1, 4), copies(2, 4), copies(4, 4)] == [4, 1, 2, 4]
    assert [copies(4, 2), copies(2, 1), copies(0, 1)] == [2, 1, 1], "a run goes on on fewer ranks"
    assert copies(0, 4, "soap") == 1, "which needs whole matrices"
    with pytest.raises(InputError, match="soap needs whole matrices: --set shard=1"):
        copies(2, 4, "soap")
    assert "soap needs whole" in told(config_of(optimizer={"name": "soap"}), 2)
    assert told(config_of(shard=2), 4) == "4 ranks, 2 copies of the weights"


def test_every_row_is_somebodys_and_roles_are_kept():
    from ranks_worker import objective_of

    model, config = build("mlp"), config_of()
    batch = objective_of("mlp", config, model).batch(model, 0)
    shares = [batch.share(rank, 4) for rank in range(4)]
    assert [len(part) for part in shares] == [4] * 4
    assert [part.diagonal_rows for part in shares] == [1] * 4
    for name in ("t", "x_1", "a", "gamma"):
        both = torch.stack([getattr(part, name) for part in shares], 1).flatten(0, 1)
        assert torch.equal(both, getattr(batch, name))


# -- the command -------------------------------------------------------------------------------------------------------


def torchrun(*command: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call += ["-m", "metaflowmaps.cli", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, env=environment)


SETTINGS = ["--set", "batch_size=16", "--set", "threads=1", "--set", "model.network.width=8", "--device", "cpu"]


@pytest.mark.attack
def test_mfm_train_in_two_ranks(tmp_path):
    out = tmp_path / "run"
    command = [
        "train",
        "gmm",
        "--out",
        str(out),
        "--max-steps",
        "4",
        "--set",
        "optimizer.name=adam",
        *SETTINGS,
        "--json",
    ]
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert json.loads(line)["cost"]["steps"] == 4
    assert json.loads((out / "results.json").read_text())["metrics"]["loss"] > 0
    assert done.stderr.count("2 ranks, 1 copy of the weights") == 1
    assert done.stderr.count("step 4 of 4") == 1
    drawn = load_map(out).generate(4, generator=torch.Generator().manual_seed(0))
    assert bool(drawn.isfinite().all())


@pytest.mark.attack
def test_mfm_train_says_once_what_is_wrong(tmp_path):
    """On one line, before anything is claimed."""
    done = torchrun("train", "gmm", "--out", str(tmp_path / "run"), "--set", "batch_size=15", "--device", "cpu")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: 2 ranks cannot share batch_size=15 equally: --set batch_size=14 or 16"]
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.attack
def test_what_is_found_wrong_later_is_said_once_too(tmp_path):
    """Where to go on from, which each rank looks for itself."""
    command = ["train", "gmm", "--out", str(tmp_path / "run"), "--resume", str(tmp_path / "nowhere"), *SETTINGS]
    done = torchrun(*command)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'nowhere'}: no such file or directory" in line


def test_tuning_runs_in_one_process(monkeypatch):
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() == (0, 2, 0)
    from metaflowmaps.cli.context import Context
    from metaflowmaps.cli.finetune import Finetune, run

    with pytest.raises(InputError, match="mfm finetune runs in one process: start it without torchrun"):
        run(Finetune(checkpoint="digits"), Context())
