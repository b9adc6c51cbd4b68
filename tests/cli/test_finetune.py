"""mfm finetune as a newcomer meets it: bad input, interruption, what it leaves behind, and what opens it afterwards."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import mfm_command as mfm
from metaflowmaps import _files, cli
from metaflowmaps.checkpoint import writing
from metaflowmaps.data import Mixture
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate import on_mixtures
from metaflowmaps.lab.evaluate.steering_error import ExactJudge
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.labelled import LabelledLaw
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.sliced_w2 import Curves, curves
from metaflowmaps.random import randn, stream
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.rewards import LinearGaussian
from metaflowmaps.training.train_config import TrainConfig
from metaflowmaps.training.training_run import run_training
from metaflowmaps.work.config import validated

# a map that is hardly trained, steered in a few steps: a single draw may well carry all the weight
# and warnings are seen on stderr, as at a terminal
pytestmark = [
    pytest.mark.filterwarnings("ignore:one draw carries all the weight"), pytest.mark.filterwarnings("always:λ ="),
    pytest.mark.usefixtures("quick_judgement"),
]  # fmt: skip


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


# some steps a stage on few samples
QUICK = sets(
    "threads=1", "states.pool=64", "states.pool_steps=1", "batch_size=16", "distil_batch_size=16", "distil_pool=64",
    "distil_pool_steps=2", "meters.samples=16", "meters.steps=2", "log_every=1",
)  # fmt: skip
QUIET = sets("meters.every=0")

REWARDS = '''
import torch
import metaflowmaps as mfm
from metaflowmaps.lab.evaluate import on_mixtures
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject

def right(x):
    return x[:, 0]

def high(x):
    return 1000 + x[:, 0]

def low(x):
    return x[:, 0] - 1000

def constant(x):
    return 0 * x[:, 0] + 3

def nan(x):
    return x[:, 0] * float("nan")

def infinite(x):
    return torch.where(x[:, 0] > 0, torch.inf, 0.0)

def forbidden(x):
    return torch.full_like(x[:, 0], -torch.inf)

def wide(x):
    return x

def half_plane(x):
    """A hard constraint on half of the plane, and a slope on the other."""
    return torch.where(x[:, 0] > 0, x[:, 1], -torch.inf)

def steps(x):
    return (x[:, 0] > 0).float()

def by_numpy(x):
    return torch.from_numpy(x.numpy()[:, 0].copy())

def of_the_class(x, cond):
    return x[:, 0] * (1 + cond["label"])

black = mfm.rewards.BlackBox(lambda x: x[:, 0].numpy())
number = 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base of the gmm, hardly trained, one with classes and guidance, and rewards.py."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "rewards.py").write_text(REWARDS)
    plain = gmm().model_dump()
    plain["model"]["network"].update(width=8, depth=2)
    plain.update(steps=20, batch_size=64, threads=1)
    run_training(validated(TrainConfig, plain), folder / "base")
    data = {**plain["data"], "weights": [0.6, 0.3, 0.1], "labels": [0, 1, 2]}
    network = {**plain["model"]["network"], "num_classes": 3, "guidance": True}
    labelled = {
        **plain, "data": data, "condition": {"guidance": [1.0, 2.5]}, "model": {**plain["model"], "network": network}
    }  # fmt: skip
    run_training(validated(TrainConfig, labelled), folder / "classes")
    return folder


def command(place, *arguments, base="base", steps=3, out="out") -> list:
    """Arguments in which rewards are named by their function alone."""
    named = [f"{place}/rewards.py:{a[1:]}" if isinstance(a, str) and a.startswith(":") else a for a in arguments]
    return ["finetune", place / base, *QUICK, "--max-steps", steps, "--out", out, *named]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fitting(text: str) -> float:
    """The strength that a message recommends."""
    found = re.search(r"--strength (\S+) (?:fits|leaves)", text)
    assert found, text
    return float(found[1])


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "unknown method": (["--method", "mfmft"], "did you mean 'mfm-ft'"),
    "unknown map": (["--map", "distill"], "'distil' or 'none'"),
    "unknown form": (sets("form=gradinet"), "'gradient'"),
    "unknown baseline": (sets("method.baseline=runing"), "'running'"),
    "unknown setting": (sets("metod.form=blend"), "did you mean 'method.form'"),
    "option of another method": (["--method", "draft", "--num-draws", "4"], "unknown option of draft 'num_draws'"),
    "unknown setting of states": (sets("states.pol=64"), "did you mean 'pool'"),
    "direct with another method": (["--map", "direct", "--method", "adjoint-matching"], "it takes method=mfm-ft"),
    "draft with a map to distil": (["--method", "draft", "--map", "distil"], "set map=none"),
    "a constant sigma in the blend": (sets("sigma_squared=200"), "form=gradient"),
    "no states": (sets("states.base=0", "states.tilted=0"), "states.base=1 will do"),
    "a rule without meters": (["--stop", "distance<2", *QUIET], "set meters.every above 0"),
    "a rule that is none": (["--stop", "distance"], "a stop rule is NAME>NUMBER"),
    "no strength": (["--strength", "0"], "greater than 0"),
    "negative strength": (["--strength", "-1"], "strength"),
    "strength that is no number": (["--strength", "nan"], "strength"),
    "strength by the back door": (sets("strength=2"), "--strength"),
    "reward by the back door": (sets("reward=other"), "--reward"),
    "checkpoint by the back door": (sets("checkpoint=other"), "checkpoint"),
    "no draws": (["--num-draws", "0"], "--num-draws"),
    "no steps": (["--max-steps", "0"], "--max-steps"),
    "guidance without classes": (["--guidance", "2.5"], "needs a base with classes"),
    "guidance by the back door": (sets("guidance=2.5"), "needs a base with classes"),
    "rank too large": (sets("low_rank=8"), "lower it"),
    "negative rank": (sets("low_rank=-1"), "low_rank"),
    "no such file": (["--reward", "nowhere.py:f"], "no file nowhere.py"),
    "no such function": (["--reward", ":nothing"], "unknown name in"),
    "no function named": (["--reward", "rewards.py"], "name the function too"),
    "reward of another space": (["--reward", "mixture-16d"], "mixture-16d is of samples (16,) and this map makes (2,)"),
    "constant reward": (["--reward", ":constant"], "check the reward"),
    "reward NaN": (["--reward", ":nan"], "it must be finite"),
    "reward infinite": (["--reward", ":infinite"], "it must be finite"),
    "nothing left without a baseline": (["--reward", ":low", *sets("baseline.kind=none")], "method.baseline=running"),
    "everything forbidden": (["--reward", ":forbidden"], "finite on none"),
    "reward of a wrong shape": (["--reward", ":wide"], "one number a sample"),
    "reward that is no function": (["--reward", ":number"], "a reward is a function"),
    "data for a mixture": (sets("data=/tmp"), "give it as --data"),
    "resume from elsewhere": (["--resume", "/no/such"], "auto or none"),
    "no such device": (["--device", "tpu9"], "auto, cpu or cuda"),
    "output is a file": (["--out", __file__], "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_fix_and_nothing_is_begun(capsys, place, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, says = BAD[name]
    code, out, err = mfm(capsys, *command(place, *arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_the_checkpoints_of_another_run_is_left_alone(capsys, place, tmp_path):
    """Such as the base's own: going on from them would train the base on, and prune what it has."""
    run = shutil.copytree(place / "base", tmp_path / "run")
    before = contents(run)
    code, out, err = mfm(capsys, *command(place, *QUIET, "--map", "none", steps=30, out=run))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "choose another" in err
    assert contents(run) == before


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [("/no/such/place", "no such file or directory"), ("digits-guide", "a 'meta-flow-map' is needed here")],
)
def test_what_is_no_map_is_refused(capsys, tmp_path, monkeypatch, checkpoint, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = mfm(capsys, "finetune", checkpoint)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert list(tmp_path.iterdir()) == []


# what shows only when the run is under way
LATE = {
    "a rule about what is not measured": (["--stop", "distanse<2"], "did you mean 'distance'"),
    "a black box and its gradient": (["--reward", ":black", *sets("form=gradient")], "form=gradient-free"),
    "a black box in the blend": (["--reward", ":black", *sets("form=blend")], "form=gradient-free"),
    "a black box for the adjoint": (["--reward", ":black", "--method", "adjoint-matching"], "method=mfm-ft"),
    "a black box for draft": (["--reward", ":black", "--method", "draft"], "method=mfm-ft"),
    "a reward without slope": (["--reward", ":steps"], "form=gradient-free"),
    "a reward by numpy": (["--reward", ":by_numpy"], "BlackBox"),
    "fewer rows than steps of the adjoint": (["--method", "adjoint-matching"], "batch_size >= method.steps"),
    "steps that explode": (["--reward", ":right", *sets("optimizer.lr=1e30")], "optimizer.lr"),
    "weights that explode": (["--reward", ":right", "--strength", "1000"], "--strength"),
    "strength beyond all resolution": (["--reward", ":right", "--strength", "1e10"], "--strength"),
}


ALIKE = ("a black box in the blend", "a black box for draft", "weights that explode")  # in `make attack`


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.attack] if n in ALIKE else []) for n in LATE])
def test_a_start_that_fails_says_why_and_does_not_occupy_the_directory(capsys, place, tmp_path, name):
    """One line after what was noted on the way; then a command that is right takes the same --out."""
    arguments, says = LATE[name]
    code, out, err = mfm(capsys, *command(place, *arguments, out=tmp_path / "out"))
    assert code in (1, 2)
    assert (out, "Traceback" in err) == ("", False), err
    assert [line.startswith("error: ") for line in err.splitlines()].count(True) == 1, err
    assert says in err.splitlines()[-1]
    assert mfm(capsys, *command(place, *QUIET, "--reward", ":right", "--map", "none", out=tmp_path / "out"))[0] == 0


@pytest.mark.parametrize(("reward", "strength"), [(":high", 1), (":high", 0.3), (":right", 40), (":right", 8)])
def test_without_a_baseline_the_strength_that_is_said_to_fit_does(capsys, place, tmp_path, reward, strength):
    """Also where it is rounded to two digits, and for more than the samples that it was read off."""
    bare = ["--reward", reward, "--map", "none", *QUIET, *sets("baseline.kind=none", "batch_size=512")]
    code, out, err = mfm(capsys, *command(place, *bare, "--strength", strength, out=tmp_path / "no"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "keep a baseline" in err
    assert not (tmp_path / "no").exists()
    fits = fitting(err)
    assert 0 < fits < strength
    code, _, err = mfm(capsys, *command(place, *bare, "--strength", fits, out=tmp_path / "yes"))
    assert code == 0, err


def effective(capsys, place, *arguments) -> float:
    """How many base samples a tilt rests on, by a dry run that has nothing to warn of."""
    code, text, err = mfm(capsys, *command(place, *arguments), "--dry-run", "--json")
    assert (code, err) == (0, "")
    return json.loads(text)["metrics"]["effective_base_samples"]


@pytest.mark.parametrize(("reward", "strength"), [(":right", "1e35"), ("gmm-inverse", "1e35"), (":right", "1e25")])
def test_a_strength_beyond_all_numbers_is_refused_with_one_that_fits(capsys, place, tmp_path, reward, strength):
    arguments = ["--reward", reward, "--map", "none", *QUIET]
    code, out, err = mfm(capsys, *command(place, *arguments, "--strength", strength, out=tmp_path / "no"))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    fits = fitting(err)
    # the tilt rests on 2% of 1024 then; two digits of λ leave room
    assert 15 < effective(capsys, place, *arguments, "--strength", fits) < 25
    code, _, err = mfm(capsys, *command(place, *arguments, "--strength", fits, out=tmp_path / "yes"))
    assert code == 0, err


@pytest.mark.parametrize("strength", [20, 1e6])
def test_a_tilt_that_rests_on_few_samples_is_warned_of_with_a_strength_that_rests_on_more(capsys, place, strength):
    arguments = ["--reward", ":right", "--strength", strength]
    code, text, err = mfm(capsys, *command(place, *arguments), "--dry-run", "--json")
    assert (code, err.count("\n")) == (0, 1), err
    assert json.loads(text)["metrics"]["effective_base_samples"] < 4
    assert 15 < effective(capsys, place, "--reward", ":right", "--strength", fitting(err)) < 25


@pytest.mark.parametrize("kind", ["none", "running", "learned", "draws"])
def test_hard_constraints_are_no_obstacle(capsys, place, tmp_path, kind):
    """Where every draw is forbidden the weight is 0, whatever it is divided by."""
    arguments = ["--reward", ":half_plane", *sets(f"method.baseline={kind}"), "--num-draws", 1]
    code, _, err = mfm(capsys, *command(place, *arguments, "--map", "none", *QUIET, out=tmp_path / "out"))
    assert code == 0, err
    assert "Traceback" not in err


def test_a_batch_may_come_in_more_pieces_than_it_has_rows(capsys, place, tmp_path):
    """Adjoint matching leaves the first time of each trajectory out: 15 rows of 16."""
    arguments = ["--method", "adjoint-matching", "--map", "none", *QUIET]
    pieces = sets("adjoint_steps=16", "micro_batches=16")
    code, _, err = mfm(capsys, *command(place, *arguments, *pieces, out=tmp_path / "out"))
    assert code == 0, err


def test_a_black_box_is_tuned_to_without_its_gradient(capsys, place, tmp_path):
    code, text, err = mfm(capsys, *command(place, "--reward", ":black", *QUIET, out=tmp_path / "out"), "--json")
    assert code == 0, err
    cost = json.loads(text)["cost"]
    assert cost["reward_calls"] > 0
    assert cost["reward_backwards"] == 0


# -- what a run leaves -------------------------------------------------------------------------------------------------


def finished(arguments) -> None:
    """A command that succeeds, without a test's own capture: for fixtures of the module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["mfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 0


@pytest.fixture(scope="module")
def tuned(quick_judgement, place, tmp_path_factory) -> Path:
    """A finished run in both stages, measured on the way."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    finished(command(place, *sets("meters.every=2"), steps=4, out=out))
    return out


def test_results_have_the_agreed_keys_and_the_pictures_are_there(tuned):
    results = json.loads((tuned / "results.json").read_text())
    assert (results["schema"], results["command"]) == (1, "finetune")
    metrics, cost = results["metrics"], results["cost"]
    assert set(metrics["samplers"]) == {"map-1", "map-4", "ode-3"}
    assert set(metrics["base"]) == {"map-1", "ode-3"}
    for cell in (*metrics["samplers"].values(), *metrics["base"].values()):
        assert cell.keys() >= {"calls", "reward", "ratio", "mode_l1", "distance"}
    assert metrics["target"]["ratio"] < 2  # exact samples against exact samples; 1 on average
    assert cost["seconds"] > 0
    assert set(cost["seconds_by_stage"]) == {"drift", "map"}
    assert cost["steps"] == 4
    calls = ["forwards", "backwards", "reward_calls", "reward_backwards"]
    assert all(cost[name] > 0 for name in calls)
    assert cost["nfe"] == sum(cost[name] for name in calls)
    assert metrics["parameters"] == metrics["trained_parameters"]
    assert {p.name for p in tuned.glob("*.png")} == {"samples.png", "posteriors.png", "training.png", "meters.png"}
    steps = [json.loads(line)["step"] for line in (tuned / "drift" / "meters.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4]
    assert results["config"]["law"] is not None
    assert metrics["before"]["step"] == 0
    assert metrics["after"]["step"] == 4


def test_the_report_shows_a_run_with_its_tables_and_pictures(capsys, tuned, tmp_path):
    assert mfm(capsys, "report", tuned, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    results = json.loads((tuned / "results.json").read_text())
    for title, table in results["metrics"]["tables"].items():
        assert title in page
        assert all(word in page for word in table["head"])
    assert "map, 4 steps" in page
    assert results["metrics"]["summary"].split(":")[0] in page
    assert page.count("data:image/png;base64,") >= 4


def test_a_complete_run_says_so_and_another_is_refused(capsys, place, tuned):
    before = contents(tuned)
    arguments = command(place, *sets("meters.every=2"), steps=4, out=tuned)
    code, text, err = mfm(capsys, *arguments, "--json")
    assert (code, "is complete" in err) == (0, True)
    assert json.loads(text)["metrics"] == json.loads(before["results.json"])["metrics"]
    for other, says in (
        (["--strength", "0.5"], "holds another run"), (["--seed", "7"], "config.seed: 0 ≠ 7"),
        (["--map", "none"], "config.map: 'distil' ≠ 'none'"),
    ):  # fmt: skip
        code, out, err = mfm(capsys, *arguments, *other)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert says in err
    assert contents(tuned) == before


def test_json_is_one_document_and_a_dry_run_writes_nothing(capsys, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = mfm(capsys, *command(place, *QUIET, "--map", "none"), "--json")
    assert code == 0, err
    results = json.loads(text)
    assert results["out"] == "out/results.json"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"] == results["metrics"]
    before = contents(tmp_path)
    code, text, err = mfm(capsys, *command(place, "--strength", "0.5", *sets("low_rank=1")), "--dry-run", "--json")
    assert (code, err) == (0, "")
    metrics = json.loads(text)["metrics"]
    assert 0 < metrics["trained_parameters"] < metrics["parameters"]
    assert 0 < metrics["effective_base_samples"] <= 1024
    assert metrics["expected_seconds"] == pytest.approx(3 * metrics["seconds_per_step"])
    code, text, _ = mfm(capsys, *command(place, "--strength", "0.5"), "--dry-run")
    assert (code, "effective base samples" in text) == (0, True)
    assert contents(tmp_path) == before


def test_max_steps_bounds_both_stages_and_raises_neither(capsys, place, tmp_path):
    for asked, bounded in (((4, 2), (3, 2)), ((2, 5), (2, 3))):
        steps = sets(f"steps={asked[0]}", f"distil_steps={asked[1]}")
        code, text, err = mfm(capsys, *command(place, *steps, steps=3, out=tmp_path / "x"), "--dry-run", "--json")
        assert code == 0, err
        config = json.loads(text)["config"]
        assert (config["steps"], config["distil"]["steps"]) == bounded


def test_a_run_without_a_place_goes_beside_its_base(capsys, place, tuned, tmp_path, monkeypatch):
    """Into the run of its base where there is one, else under runs/; named by reward and strength."""
    monkeypatch.chdir(tmp_path)
    for base, parent in ((tuned, tuned), ("base", Path("runs"))):
        arguments = [*QUIET, "--map", "none", "--reward", ":right", "--strength", "0.5", "--json"]
        own = command(place, *arguments, base=base)
        del own[own.index("--out") : own.index("--out") + 2]
        code, text, err = mfm(capsys, *own)
        assert code == 0, err
        out = Path(json.loads(text)["out"]).parent
        assert out.parent == parent
        assert "right" in out.name
        assert "0.5" in out.name
        shutil.rmtree(out)


# -- what opens it afterwards ------------------------------------------------------------------------------------------


LAW = gmm().data.law()
REWARD = LinearGaussian(torch.tensor([1.2, -0.8]), -1.0, 0.2)


def same_law(mine: GaussianMixture, expected: GaussianMixture) -> None:
    x = randn((50, 2), stream(0, "x"), torch.float64)
    # float64, through two eigendecompositions of matrices whose eigenvalues are 50 apart
    torch.testing.assert_close(mine.log_prob(x), expected.log_prob(x), rtol=1e-8, atol=1e-8)


def test_the_tuned_map_is_a_map_like_any_other(capsys, tuned, tmp_path, monkeypatch):
    """Drawn from, conditioned, steered, and judged by its own law, which is p_1 e^r."""
    few = sets("steps=4", "seeds=1", "num_draws=[2]", 'methods=["none","mfm-g","exact"]')
    small = sets("contexts=2", "sets=2", "other_contexts=1", "times=[0.5]", "glass_steps=[1]", "map_steps=[1]")
    tiny = sets("states=8", "num_draws=4", "glass_steps=[1]", "map_steps=[1]", "times=[0.5]")
    laws = []
    for name in ("posterior", "steering", "value"):
        judge = getattr(on_mixtures, f"evaluate_{name}")
        monkeypatch.setattr(
            on_mixtures,
            judge.__name__,
            lambda model, law, *rest, judge=judge: laws.append(law) or judge(model, law, *rest),
        )
    for name, arguments in {
        "sample": ["sample", tuned, "--num", "64"],
        "posterior": ["posterior", tuned, "--num-draws", "64"],
        "steer": ["steer", tuned, "--num", "16", "--steps", "3"],
        "steer-exact": ["steer", tuned, "--num", "16", "--steps", "3", "--method", "exact"],
        "eval-posterior": ["eval", "posterior", tuned, "--samples", "64", *small],
        "eval-steering": ["eval", "steering", tuned, "--task", "gmm-inverse", "--samples", "64", *few],
        "eval-value": ["eval", "value", tuned, *tiny],
    }.items():
        code, text, err = mfm(capsys, *arguments, "--out", tmp_path / name, "--json")
        assert code == 0, err
        assert json.loads(text)["schema"] == 1
    kept = load_file(tmp_path / "sample" / "samples.safetensors")["samples"]
    assert kept.shape == (64, 2)
    assert bool(kept.isfinite().all())
    assert len(laws) == 3
    for law in laws:
        same_law(law, LAW.tilt(REWARD))


def test_tuned_again_its_law_is_tilted_again(capsys, place, tuned, tmp_path):
    """To λ = 0.5 after λ = 1: p_1 e^{1.5 r}."""
    own = json.loads((tuned / "results.json").read_text())["config"]["law"]
    same_law(validated(Mixture, own).law(), LAW.tilt(REWARD))
    again = command(place, *QUIET, "--map", "none", "--strength", "0.5", base=tuned, out=tmp_path / "again")
    code, text, err = mfm(capsys, *again, "--json")
    assert code == 0, err
    law = validated(Mixture, json.loads(text)["config"]["law"]).law()
    same_law(law, LAW.tilt(LinearGaussian(REWARD.A, -1.0, 0.2, strength=1.5)))


def test_the_strength_multiplies_the_reward_that_is_tuned_to_and_reported(capsys, place, tmp_path):
    """The one that is tried first, those of the first step's draws, and those that are measured and judged."""
    figures_of = []
    for strength in ("1", "0.25"):
        out = tmp_path / strength
        arguments = ["--map", "none", "--reward", ":right", "--strength", strength, *sets("states.tilted=0")]
        code, text, err = mfm(capsys, *command(place, *arguments, out=out), "--json")
        assert code == 0, err
        metrics = json.loads(text)["metrics"]
        drawn = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["reward_of_draws"]
        judged, tried, measured = metrics["base"]["map-1"], metrics["probe"], metrics["before"]
        figures_of.append([drawn, judged["reward"], tried["mean"], measured["reward"]])
    whole, quarter = figures_of
    assert quarter == pytest.approx([value / 4 for value in whole], rel=1e-4)  # float32 sums of other numbers


def test_without_an_exact_law_nothing_is_held_against_it(capsys, place, tmp_path):
    out = tmp_path / "right"
    assert mfm(capsys, *command(place, *QUIET, "--reward", ":right", out=out))[0] == 0
    for arguments in (["eval", "posterior", out], ["eval", "steering", out], ["eval", "value", out]):
        code, text, err = mfm(capsys, *arguments, "--out", tmp_path / "x")
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert "tilted law nobody knows" in err
    code, text, err = mfm(capsys, *command(place, *QUIET, "--map", "none", base=out, out=tmp_path / "again"), "--json")
    assert code == 0, err
    assert json.loads(text)["config"]["law"] is None  # tilted by something unknown first


def test_a_tuned_drift_without_a_map_is_not_drawn_from(capsys, place, tuned, tmp_path):
    """One line that names the fix; its ODE, and methods without draws, are open. So it is with a run's first stage."""
    out = tmp_path / "drift"
    assert mfm(capsys, *command(place, *QUIET, "--map", "none", out=out))[0] == 0
    for run in (out, tuned / "drift"):
        for arguments in (
            ["sample", run], ["posterior", run], ["steer", run], ["eval", "posterior", run], ["eval", "steering", run],
            ["eval", "value", run], ["finetune", run, *QUICK],
        ):  # fmt: skip
            code, text, err = mfm(capsys, *arguments, "--out", tmp_path / "x")
            assert (code, text, err.count("\n")) == (2, "", 1), (arguments, err)
            assert "--method ode" in err
            assert "--map distil" in err
        assert not (tmp_path / "x").exists()
        for i, arguments in enumerate((
            ["sample", run, "--method", "ode", "--steps", "3", "--num", "8"],
            *(["steer", run, "--method", method, "--steps", "3", "--num", "8"] for method in ("none", "dps", "tds")),
        )):  # fmt: skip
            code, _, err = mfm(capsys, *arguments, "--out", tmp_path / f"{run.parent.name}-{i}")
            assert code == 0, (arguments, err)


def test_draft_leaves_a_map_to_draw_from_and_no_drift(capsys, place, tmp_path):
    out = tmp_path / "draft"
    code, text, err = mfm(capsys, *command(place, *QUIET, "--method", "draft", out=out), "--json")
    assert code == 0, err
    assert set(json.loads(text)["metrics"]["samplers"]) == {"map-1", "map-4"}
    assert mfm(capsys, "sample", out, "--num", "8", "--out", tmp_path / "s")[0] == 0


# -- classes and guidance ----------------------------------------------------------------------------------------------


def test_scales_that_the_base_does_not_know_are_refused(capsys, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in (["--guidance", "3"], ["--guidance", "0"], sets("guidance=3")):
        code, out, err = mfm(capsys, *command(place, *arguments, base="classes"))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "1, 2.5" in err
    assert list(tmp_path.iterdir()) == []


def test_a_map_tuned_at_a_scale_is_tuned_again_at_that_scale_alone(capsys, place, tmp_path):
    """Its labelled rows saw no other."""
    out = tmp_path / "guided"
    guided = [*QUIET, "--reward", ":right", "--guidance", "2.5"]
    assert mfm(capsys, *command(place, *guided, base="classes", out=out))[0] == 0
    code, _, err = mfm(capsys, *command(place, *guided, base=out, out=tmp_path / "again"))
    assert code == 0, err
    code, _, err = mfm(capsys, *command(place, *guided[:-1], "1", base=out, out=tmp_path / "no"))
    assert (code, "2.5" in err, err.count("\n")) == (2, True, 1), err


def test_a_reward_of_the_class_is_asked_with_the_class_throughout(capsys, place, tmp_path):
    arguments = command(place, "--reward", ":of_the_class", "--strength", "0.2", base="classes", out=tmp_path / "out")
    code, _, err = mfm(capsys, *arguments)
    assert code == 0, err


def test_exact_answers_of_a_base_with_classes_are_not_called_wrong(capsys, place, tmp_path):
    """Every class is tilted by itself and the classes are drawn alike: that is not p_1 e^r, where weights differ.

    So either samples are judged by a law that exact ones pass, or by none.
    """
    code, text, err = mfm(capsys, *command(place, *QUIET, base="classes", out=tmp_path / "out"), "--json")
    assert code == 0, err
    results = json.loads(text)
    law = LabelledLaw(GaussianMixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]]), 0.5, [0.6, 0.3, 0.1]), [0, 1, 2])
    reward, n = LinearGaussian(torch.tensor([1.2, -0.8]), -1.0, 0.2), 4096
    each = torch.stack([one.tilt(reward).sample(n, stream(0, "exact")) for one in law.classes])
    exact = each[torch.randint(3, (n,), generator=stream(0, "label")), torch.arange(n)]
    judge = ExactJudge(law.law, reward)
    apart = judge.exact(n).floor()
    mine = Curves()
    mine.add(curves(exact, judge.along))
    assert mine.squared_distance(judge.exact(n)) > 25 * apart  # exact samples of the classes, by the law's tilt
    assert all("ratio" not in cell for cell in results["metrics"]["samplers"].values())


# -- interruption ------------------------------------------------------------------------------------------------------


def begin(arguments, **options) -> subprocess.Popen:
    """A process of its own, in which Ctrl-C means what it means at a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "metaflowmaps.cli", *map(str, arguments)], text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        **options,
    )  # fmt: skip


@pytest.mark.attack
def test_ctrl_c_saves_and_the_same_command_goes_on(capsys, place, tmp_path):
    """Stopped in a process of its own while it tunes, and gone on with in this one: every step is there once."""
    out, steps = tmp_path / "run", 150
    arguments = command(
        place, *QUIET, *sets(f"steps={steps}"), "--map", "none", "--reward", ":right", steps=steps, out=out
    )  # fmt: skip
    process = begin(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert text == ""
    assert "state saved" in err.splitlines()[-1]
    [saved] = (out / "checkpoints").iterdir()
    assert 0 < int(saved.name.removeprefix("step-")) < steps
    assert not (out / "results.json").exists()
    code, _, err = mfm(capsys, *arguments)
    assert code == 0, err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert json.loads((out / "results.json").read_text())["cost"]["steps"] == steps


@pytest.mark.attack
def test_a_reader_that_leaves_does_not_hurt_the_run(place, tuned, tmp_path):
    """A complete run prints what it has; nobody reads it: no traceback, and nothing is changed."""
    run = shutil.copytree(tuned, tmp_path / "run")  # this process holds the other's lock
    before = contents(run)
    reading, writing = os.pipe()
    os.close(reading)
    process = begin(
        command(place, *sets("meters.every=2"), steps=4, out=run), stdout=writing, stderr=subprocess.PIPE
    )  # fmt: skip
    os.close(writing)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert contents(run) == before


@pytest.fixture(scope="module")
def undisturbed(quick_judgement, place, tmp_path_factory):
    """The weights of a run on a disk with room, and its arguments."""
    arguments, out = [*sets("meters.every=2"), "--map", "none"], tmp_path_factory.mktemp("room") / "run"
    finished(command(place, *arguments, out=out))
    return MetaFlowMap.from_pretrained(out).state_dict(), arguments


MORE = [pytest.param(where, marks=pytest.mark.attack) for where in ("the measurements", "a picture")]


@pytest.mark.parametrize("where", ["the checkpoint", "results.json", *MORE])
def test_a_full_disk_is_one_line_and_the_same_command_ends_the_run(
    capsys, place, tmp_path, monkeypatch, undisturbed, where
):  # fmt: skip
    whole, arguments = undisturbed
    full = OSError(errno.ENOSPC, "No space left on device")
    write_new, opened = _files.write_new, Path.open

    def fails(*_, **__):
        raise full

    def no_new_results(path, data, **options):
        if path.name.startswith(".results.json-"):
            raise full
        write_new(path, data, **options)

    def no_more_measurements(path, mode="r", **options):
        if (path.name, mode) == ("meters.jsonl", "a"):
            raise full
        return opened(path, mode, **options)

    writer = {
        "the checkpoint": (writing, "write_new", fails),
        "the measurements": (Path, "open", no_more_measurements),
        "a picture": (figures, "save", fails),
        "results.json": (_files, "write_new", no_new_results),
    }
    with monkeypatch.context() as patched:
        patched.setattr(*writer[where])
        code, text, err = mfm(capsys, *command(place, *arguments, out=tmp_path / "full"))
    assert (code, text) == (1, ""), err
    assert "Traceback" not in err
    assert "no space left" in err.splitlines()[-1].lower()
    assert mfm(capsys, *command(place, *arguments, out=tmp_path / "full"))[0] == 0
    again = MetaFlowMap.from_pretrained(tmp_path / "full").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
