"""A run of fine-tuning on disk: stopped anywhere and started again, ended early, and under classes and guidance."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import metaflowmaps as mfm
from metaflowmaps.checkpoint import CheckpointStore, resolve_checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import meters
from metaflowmaps.finetuning.meters import Meters, Watched
from metaflowmaps.finetuning.tune import TuningContext, make_problem, run_finetuning
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.mlp import MLP, MLPConfig
from metaflowmaps.training.loop import Interrupted
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.train_config import OptimizerConfig

load_map = MetaFlowMap.from_pretrained

REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8]), -1.0, 1.5)
CLASSES, SCALE = 3, 2.5
DISTIL = {"batch_size": 8, "pool": 64, "pool_steps": 2}


def base(num_classes: int = 0) -> mfm.MetaFlowMap:
    """A small map that is right about nothing and a function of everything, its conditions included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPConfig(width=8, depth=2, num_classes=num_classes, guidance=bool(num_classes)).network((2,))
        for name, weight in network.named_parameters():
            if name == "output.weight" or "label" in name or name == "guidance":  # zero, or nearly, at first
                nn.init.normal_(weight, std=0.3)
    return mfm.MetaFlowMap(network, mfm.LinearPath(), data_std=1.5)


def small(**changes) -> FinetuneConfig:
    """A run of a few steps a stage, with odd intervals: checkpoints, records, measurements and replay never line up."""
    data = {
        "threads": 1, "steps": 5, "batch_size": 8, "distil": {"steps": 4, **DISTIL},
        "checkpoint_every": 3, "log_every": 1, "keep_best": False, "meters": {"every": 2, "samples": 8, "steps": 2},
        "states": {"pool": 64, "pool_steps": 1, "replay": 0.5, "replay_pool": 64, "replay_steps": 2,
                   "refresh_every": 2},
        **changes,
    }  # fmt: skip
    about = {"checkpoint": "base", "checkpoint_sha256": "", "reward": "a line"}
    return resolved(about, (2,), {name: value for name, value in data.items() if name not in about})


def tune(config: FinetuneConfig, out: Path, **options):
    torch.set_num_threads(1)
    watched = Watched(**{name: options.pop(name) for name in ("others", "picture") if name in options})
    context = TuningContext(**options, watched=watched)
    return run_finetuning(config, base(CLASSES if config.guidance != 1 else 0), REWARD, out, context)


def fingerprint(out: Path) -> dict[str, str]:
    """The hash of every file that must not depend on interruptions; a kill may leave one half written, of no name."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "timings.jsonl" and p.suffix != ".tmp"]
    assert files
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "meters.jsonl").read_text().splitlines()]


def weights(run: Path, step: int, name: str = "ema.safetensors") -> bytes:
    return (CheckpointStore(run / "checkpoints").path(step) / name).read_bytes()


class Killed(Exception):
    """What takes a run away without warning."""


@pytest.fixture
def no_sync(monkeypatch):
    """A process that ends leaves its files to the system: fsync is for power cuts, and most of a short run's time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# -- stopped and started again -----------------------------------------------------------------------------------------

KINDS = {
    "running": {"baseline": {"kind": "running"}},
    "learned": {"baseline": {"kind": "learned", "width": 4}},
    "draws": {"baseline": {"kind": "draws"}, "form": "gradient"},
    "none": {"baseline": {"kind": "none"}, "form": "gradient-free"},
    "self-normalised": {"method": "self-normalised"},
    "direct": {"map": "direct", "baseline": {"kind": "learned", "width": 4}},
    "adjoint-matching": {"method": "adjoint-matching", "adjoint_steps": 4, "map": "none"},
    "draft": {"method": "draft", "map": "none"},
    "tilt-matching": {"method": {"name": "tilt-matching", "levels": 2, "share": 0.9, "pool": 64, "pool_steps": 2}},
    "ram": {"method": {"name": "ram", "pool": 64, "pool_steps": 2, "refresh_every": 2}, "map": "none"},
    "low rank": {"low_rank": 1},
    "with classes": {"guidance": SCALE},
    "adam and micro-batches": {"optimizer": {"name": "adam"}, "micro_batches": 2},
    "best and last": {"keep_best": True, "keep_last": 1},
}


# they keep nothing that another does not: a learned baseline is in "direct", its distilled map in "running", and
# optimizers are resumed in tests/training
ALIKE = ("none", "self-normalised", "draft", "low rank", "with classes", "learned", "draws", "adam and micro-batches")


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.attack] if k in ALIKE else []) for k in KINDS])
def test_stopped_at_every_step_a_run_ends_as_if_it_never_was(tmp_path, kind):
    """In turn by a signal, which saves, and by an exception, which does not; all files but the timings are the same."""
    config = small(**KINDS[kind])
    seen = []
    whole = tune(config, tmp_path / "whole", report=lambda stage, record: seen.append((stage, record.step)))
    assert len(seen) == config.steps + (config.distil.steps if config.map == "distil" else 0)
    for i, moment in enumerate(seen[:-1]):  # at the last step nothing is left to be stopped
        by_signal = i % 2 == 0 and moment[0] == seen[i + 1][0]  # at a stage's last step: the next test

        def stop(stage, record, moment=moment, by_signal=by_signal):
            if (stage, record.step) == moment:
                if not by_signal:
                    raise Killed
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted if by_signal else Killed):
            tune(config, tmp_path / "stopped", report=stop)
    again = tune(config, tmp_path / "stopped")
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    assert again.calls == whole.calls  # the bill too: what was paid for twice is on it once


@pytest.mark.usefixtures("no_sync")
def test_a_signal_at_the_last_step_of_a_stage_is_not_lost(tmp_path):
    """What it stops is the run, which has another stage before it, or its judgement."""
    tune(small(), tmp_path / "whole")
    for moment in (("drift", 5), ("map", 4)):

        def stop(stage, record, moment=moment):
            if (stage, record.step) == moment:
                signal.raise_signal(signal.SIGTERM)

        with pytest.raises(Interrupted, match="state saved"):
            tune(small(), tmp_path / "stopped", report=stop)
    tune(small(), tmp_path / "stopped")
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def worker(data: dict, out: str, started) -> None:
    torch.set_num_threads(1)
    started.set()
    try:
        tune(FinetuneConfig.model_validate(data), Path(out))
    except Interrupted:
        os._exit(130)
    os._exit(0)


@pytest.mark.attack
def test_killed_at_random_moments(tmp_path):
    """A process of its own, killed some times between two steps, while measuring or while writing."""
    config = small(steps=60, distil={"steps": 40, **DISTIL}, baseline={"kind": "learned", "width": 4}, keep_last=1)
    tune(config, tmp_path / "whole")
    context, out, chance = multiprocessing.get_context("forkserver"), tmp_path / "killed", random.Random(1)
    # the optimizer imports torch._dynamo when it first steps: seconds that every child would pay for again
    context.set_forkserver_preload(["metaflowmaps.finetuning.tune", "torch._dynamo", "pytest"])
    kills = 0
    for _ in range(40):
        started = context.Event()
        process = context.Process(target=worker, args=(config.model_dump(), str(out), started))
        process.start()
        assert started.wait(60)
        if kills < 4:
            time.sleep(chance.uniform(0.05, 0.3))
            if process.is_alive():
                os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                kills += 1
        process.join(120)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert kills >= 2, "the run must be long enough to be killed"
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def raise_killed(*arguments):
    raise Killed


def killed_at(step, config, out):
    """A run that ends when it reports this step."""

    def stop(stage, record):
        if record.step == step:
            raise Killed

    with pytest.raises(Killed):
        tune(config, out, report=stop)


@pytest.mark.usefixtures("no_sync")
def test_a_run_in_the_middle_of_its_measurements_is_cut_back(tmp_path):
    """What was measured after the last checkpoint is measured again; a line that a full disk tore apart is dropped."""
    config = small(map="none", checkpoint_every=2, meters={"every": 1, "samples": 8, "steps": 2})
    tune(config, tmp_path / "whole")
    killed_at(4, config, tmp_path / "torn")
    file = tmp_path / "torn" / "meters.jsonl"
    assert [r["step"] for r in records(file.parent)] == [0, 1, 2, 3, 4]
    file.write_text(file.read_text()[:-9])
    tune(config, tmp_path / "torn")
    assert fingerprint(tmp_path / "torn") == fingerprint(tmp_path / "whole")


@pytest.mark.usefixtures("no_sync")
def test_measurements_outlive_a_kill_while_they_are_cut_back(tmp_path, monkeypatch):
    """A full disk, or a kill, at the start of a resumed run: what was measured before must not be lost by it."""
    config = small(map="none", checkpoint_every=2, meters={"every": 1, "samples": 8, "steps": 2})
    tune(config, tmp_path / "whole")
    killed_at(4, config, tmp_path / "killed")
    write = meters.write_whole

    def cut_short(path, data):
        """Killed while the disk is waited for, before the new file has its name."""
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", raise_killed)
            write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(meters, "write_whole", cut_short)
        with pytest.raises(Killed):
            tune(config, tmp_path / "killed")
    tune(config, tmp_path / "killed")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")


@pytest.mark.usefixtures("no_sync")
def test_the_averaged_weights_are_measured(tmp_path):
    """The last record holds the figures of the map that the run's checkpoint loads as."""
    config = small(map="none", meters={"every": 5, "samples": 64, "steps": 2})
    tune(config, tmp_path)
    meters = Meters(make_problem(config, base(), REWARD), config.meters, config.seed, tmp_path / "elsewhere")
    last = records(tmp_path)[-1]
    assert last.pop("step") == config.steps
    assert meters.measure(load_map(tmp_path)) == last
    assert meters.measure(load_map(tmp_path, weights="raw")) != last


def test_averaged_weights_are_there_while_they_are_looked_at():
    """In evaluation mode; then the live ones are back, in training mode, even if the look went wrong."""
    model = base().train()
    state = TrainState(model, OptimizerConfig(ema=0.5))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    state.average()
    live, averaged = ({k: v.clone() for k, v in held.items()} for held in (model.state_dict(), state.ema))
    assert not torch.equal(live["network.output.bias"], averaged["network.output.bias"])
    for error in (None, Killed):
        with contextlib.suppress(Killed), state.averaged():
            assert not model.training
            assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
            if error:
                raise error
        assert model.training
        assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("no_sync")
def test_looking_on_changes_neither_the_model_nor_the_bill(tmp_path):
    """Measurements and pictures on the way are made with averaged weights, and these are put back."""
    blind = tune(small(meters={"every": 0}), tmp_path / "blind")
    looked = tune(small(), tmp_path / "looked", picture=lambda x, file: None)
    for stage, step in (("drift", 5), (".", 4)):
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            assert weights(tmp_path / "looked" / stage, step, name) == weights(tmp_path / "blind" / stage, step, name)
    assert looked.calls == blind.calls


@pytest.mark.usefixtures("no_sync")
def test_eigenvectors_that_float32_does_not_find_do_not_end_a_run(tmp_path, monkeypatch):
    """LAPACK gives up on some matrices of low rank, as the gradients of small batches have; not so in float64."""
    eigh = torch.linalg.eigh

    def gives_up(matrix, *rest):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return eigh(matrix, *rest)

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    tuned = tune(small(map="none"), tmp_path)
    assert all(bool(value.isfinite().all()) for value in load_map(tuned.result.checkpoint).state_dict().values())


# -- ended early -------------------------------------------------------------------------------------------------------


def measured_every_step(**changes) -> FinetuneConfig:
    """Ten steps of the drift that are measured and kept, one and all."""
    usual = {"steps": 10, "checkpoint_every": 1, "keep_last": 20, "meters": {"every": 1, "samples": 8, "steps": 2}}
    return small(**{**usual, **changes})


@pytest.mark.usefixtures("no_sync")
def test_a_run_that_ends_early_is_the_beginning_of_one_that_does_not(tmp_path):
    """It ends at the first measurement past the bound, with the weights that the whole run had then."""
    config = measured_every_step(map="none")
    tune(config, tmp_path / "whole")
    seen = [r["distance_to_base"] for r in records(tmp_path / "whole")]
    bound = (max(seen[:5]) + max(seen)) / 2
    first = next(i for i, value in enumerate(seen) if value > bound)
    assert 5 <= first < 10, "the bound must be passed on the way"
    rule = f"distance_to_base>{bound:.12f}"
    early = tune(config.model_copy(update={"stop": rule}), tmp_path / "early")
    assert early.result.step == first
    assert [r["distance_to_base"] for r in records(tmp_path / "early")] == seen[: first + 1]
    for name in ("ema.safetensors", "model.safetensors", "optimizer.safetensors", "objective.safetensors"):
        assert weights(tmp_path / "early", first, name) == weights(tmp_path / "whole", first, name)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("moment", ["before its checkpoint", "after its checkpoint", "in the next stage", "never"])
def test_a_run_that_ended_early_stays_ended(tmp_path, monkeypatch, moment):
    """Wherever it is killed after the rule fired: the same command neither trains the drift on nor changes a byte."""
    # at the first measurement, of step 1; no checkpoint is due then
    config = measured_every_step(stop="distance_to_base>-1", checkpoint_every=50)
    tune(config, tmp_path / "whole")
    assert max(r["step"] for r in records(tmp_path / "whole" / "drift")) == 1
    assert max(r["step"] for r in records(tmp_path / "whole")) == config.distil.steps  # the map's stage has no rule

    def stop(stage, record):
        if (stage, record.step) == {"before its checkpoint": ("drift", 1), "in the next stage": ("map", 2)}.get(moment):
            raise Killed

    with monkeypatch.context() as patched:
        if moment == "after its checkpoint":
            patched.setattr("metaflowmaps.finetuning.tune.distillation", raise_killed)
        if moment == "never":
            tune(config, tmp_path / "killed")
        else:
            with pytest.raises(Killed):
                tune(config, tmp_path / "killed", report=stop)
    steps = []
    tune(config, tmp_path / "killed", report=lambda stage, record: steps.append((stage, record.step)))
    assert [step for stage, step in steps if stage == "drift"] == ([1] if moment == "before its checkpoint" else [])
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(
    ("rule", "says"), [("distanse<2", "did you mean 'distance'"), ("margin>1", "allowed are .*reward")]
)
def test_a_rule_about_what_is_not_measured_is_refused_before_a_step(tmp_path, rule, says):
    steps = []
    with pytest.raises(InputError, match=says) as error:
        tune(small(stop=rule), tmp_path, report=lambda stage, record: steps.append(record.step))
    assert "\n" not in str(error.value)
    assert steps == []
    assert not list(tmp_path.rglob("manifest.json"))


def test_rewards_that_are_watched_can_end_a_run(tmp_path):
    watched = {"height": lambda x: x[:, 1]}
    tuned = tune(small(map="none", stop="height>-1e9"), tmp_path, others=watched)
    assert tuned.result.step == 2  # meters.every
    assert math.isfinite(records(tmp_path)[0]["height"])


# -- under classes and guidance ----------------------------------------------------------------------------------------

GUIDED = {
    "blend, replay, draws": {"baseline": {"kind": "draws"}},
    "gradient-free": {"form": "gradient-free"},
    "direct": {"map": "direct"},
    "direct, its own velocity": {
        "map": "direct", "loss": {"diagonal": "data", "consistency": "semigroup"}
    },
    "distilled by the Eulerian loss": {"loss": {"consistency": "eulerian"}},
    "adjoint-matching": {"method": "adjoint-matching", "adjoint_steps": 4},
    "draft": {"method": "draft", "map": "none"},
    "tilt-matching": {"method": {"name": "tilt-matching", "levels": 2, "share": 0.9, "pool": 64, "pool_steps": 2}},
    "ram": {"method": {"name": "ram", "pool": 64, "pool_steps": 2, "refresh_every": 2}, "map": "none"},
}  # fmt: skip


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("kind", GUIDED)
def test_every_call_has_a_label_and_the_one_scale(tmp_path, monkeypatch, kind):
    """In pools, drifts, draws, replay, teachers, losses and meters: w where there is a class, 1 where there is none."""
    forward, calls = MLP.forward, []

    def spied(self, z, a, b, context, context_time, label=None, guidance=None):
        if self.num_classes:
            calls.append((label, guidance))
        return forward(self, z, a, b, context, context_time, label=label, guidance=guidance)

    monkeypatch.setattr(MLP, "forward", spied)
    tune(small(guidance=SCALE, null_share=0.25, **GUIDED[kind]), tmp_path)
    assert len(calls) > 15
    assert all(label is not None and guidance is not None for label, guidance in calls)
    label, guidance = (torch.cat(parts) for parts in zip(*calls, strict=True))
    assert set(label.tolist()) == set(range(CLASSES + 1))  # every class and the null class, which is the last
    null = label == CLASSES
    assert bool((guidance[null] == 1).all())
    assert bool((guidance[~null] == SCALE).all())
    # a quarter of those in the pool; a share of all calls strays no further than this from it
    assert 0.1 < float(null.float().mean()) < 0.4


@pytest.mark.usefixtures("no_sync")
def test_rewards_see_the_labels_of_their_samples(tmp_path):
    """A reward of the label alone: wherever it is asked, its condition has the length of x and classes in range."""
    seen = []

    def reward(x, cond):
        assert set(cond) == {"label", "guidance"}
        seen.append(cond["label"])
        return x[:, 0] * (1 + cond["label"])

    run_finetuning(small(guidance=SCALE), base(CLASSES), reward, tmp_path)
    assert set(torch.cat(seen).tolist()) == set(range(CLASSES + 1))


# -- from Python -------------------------------------------------------------------------------------------------------


def settings() -> dict:
    """Those of small(), as mfm.finetune takes them."""
    return small().model_dump(
        include={"threads", "steps", "batch_size", "distil", "checkpoint_every", "meters", "states"}
    )


@pytest.mark.usefixtures("no_sync")
def test_from_python_the_same_call_goes_on_and_another_is_refused(tmp_path):
    model = base()
    tuned = mfm.finetune(model, REWARD, tmp_path / "run", **settings())
    again = mfm.finetune(model, REWARD, tmp_path / "run", **settings())
    stored = resolve_checkpoint(tmp_path / "run").tensors("ema.safetensors")
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, stored[name])
    moved = [n for n, value in tuned.named_parameters() if not torch.equal(value, model.get_parameter(n))]
    assert moved
    for changes in ({"seed": 1}, {"map": "direct"}, {"map": "none"}):
        with pytest.raises(InputError, match="holds another run") as error:
            mfm.finetune(model, REWARD, tmp_path / "run", **{**settings(), **changes})
        assert "\n" not in str(error.value)
    mfm.finetune(model, REWARD, tmp_path / "direct", **settings(), map="direct")
    with pytest.raises(InputError, match="holds another run"):  # or the map would go on from the other's
        mfm.finetune(model, REWARD, tmp_path / "direct", **settings())


@pytest.mark.usefixtures("no_sync")
def test_from_python_another_reward_of_the_same_name_is_another_run(tmp_path):
    """Of two lambdas nothing differs but what they say of samples."""
    mfm.finetune(base(), lambda x: x[:, 0], tmp_path / "run", **settings())
    with pytest.raises(InputError, match="holds another run") as error:
        mfm.finetune(base(), lambda x: -x[:, 0], tmp_path / "run", **settings())
    assert "\n" not in str(error.value)
    mfm.finetune(base(), lambda x: x[:, 0] * 1.0, tmp_path / "run", **settings())  # written anew, and the same


@pytest.mark.usefixtures("no_sync")
def test_from_python_the_given_model_is_left_as_it_was(tmp_path):
    model = base().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mfm.finetune(model, REWARD, tmp_path / "run", **settings())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_from_python_what_is_impossible_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place, changes, says in (
        ("file", {}, "is a file"),
        ("x", {"stepz": 3}, "did you mean 'steps'"),
        ("x", {"states": {"pol": 3}}, "option of mixture 'pol'"),
        ("x", {"guidance": 3.0}, "guidance"),
        ("x", {"strength": 3.0}, "strength"),  # it lives in the reward
        ("x", {"checkpoint": "another"}, "checkpoint"),
    ):
        with pytest.raises(InputError, match=says) as error:
            mfm.finetune(base(), REWARD, tmp_path / place, **{**settings(), **changes})
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_drift_on_its_way_to_a_map_says_so(tmp_path):
    """Its checkpoint loads, with the tuned drift and the base's map: it must not be taken for a whole map."""
    config = small()
    tune(config, tmp_path)
    held = resolve_checkpoint(tmp_path / "drift").config["training"]
    assert (held["recipe"], held["map"]) == ("finetune", "none")
    assert resolve_checkpoint(tmp_path).config["training"]["map"] == "distil"
    assert load_map(tmp_path / "drift").event_shape == (2,)


def test_a_run_may_begin_where_another_ended(tmp_path):
    """Its first stage goes on from the other's weights and steps; the other stays as it was."""
    tune(small(), tmp_path / "one")
    before = fingerprint(tmp_path / "one")
    tune(small(steps=8), tmp_path / "two", resume=str(tmp_path / "one"))
    logged = [
        json.loads(line)["step"] for line in (tmp_path / "two" / "drift" / "metrics.jsonl").read_text().splitlines()
    ]
    assert min(logged) == 6
    assert max(logged) == 8
    assert fingerprint(tmp_path / "one") == before
