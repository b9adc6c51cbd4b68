"""The command line on images: train on digits and on own files, every measurement, and what goes wrong."""

import errno
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import mfm_command as mfm
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures import result_figures as pictures

# a map that is hardly trained, steered in two steps: a single draw may well carry all the weight
pytestmark = pytest.mark.filterwarnings("ignore:one draw carries all the weight")

SMALL = ["model.network.width=16", "model.network.depth=2", "batch_size=32", "drift_batch_size=32", "threads=1"]
SMALL += ["sample_every=0"]
FLAT = ['model.network={"name":"mlp","width":16,"depth":1}', "threads=1", "batch_size=4", "drift_batch_size=4"]


def sets(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def train(*arguments) -> None:
    """In this process, without a test's own capture: for fixtures of a module."""
    import sys

    from metaflowmaps import cli

    before = sys.argv
    sys.argv = ["mfm", "train", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = before
    assert caught.value.code == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A map of digits and its two classifiers, hardly trained."""
    folder = tmp_path_factory.mktemp("digits")
    train("digits", *sets(*SMALL), "--max-steps", "10", "--out", folder / "digits")
    for role in ("guide", "judge"):
        network = "network.width=8"
        train(f"digits-{role}", *sets(network, "threads=1"), "--max-steps", "5", "--out", folder / f"digits-{role}")
    return folder


def draw(folder: Path, size: int, classes: int, count: int = 24, channels: int = 1) -> Path:
    """PNGs of a bright bar on noise, in one subfolder a class or all in one."""
    generator = np.random.default_rng(size)
    for i in range(count):
        shape = (size, size) if channels == 1 else (size, size, channels)
        pixels = generator.integers(0, 80, shape).astype(np.uint8)
        pixels[:, i % max(classes, 4)] = 230
        place = folder / f"kind-{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A map of own images in subfolders, trained without their classes, beside classifiers trained with them."""
    folder = tmp_path_factory.mktemp("own")
    files = draw(folder / "pictures", 8, 3)
    train("images", "--data", files, *sets(*SMALL[4:], "batch_size=8", "drift_batch_size=8"), "--max-steps", "3",
          "--out", folder / "images")  # fmt: skip
    for role in ("guide", "judge"):
        train(f"images-{role}", "--data", files, *sets("network.width=8", "threads=1"), "--max-steps", "3",
              "--out", folder / f"images-{role}")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A map of coloured images without classes, and no classifiers."""
    folder = tmp_path_factory.mktemp("plain")
    files = draw(folder / "pictures", 20, 0, channels=3)
    train("images", "--data", files, *sets(*FLAT, "data.hold_out=6"),
          "--max-steps", "2", "--out", folder / "images")  # fmt: skip
    return folder


def refused(capsys, *arguments) -> str:
    """The one line of bad input."""
    code, out, err = mfm(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    return err


def is_png(file: Path) -> bool:
    with Image.open(file) as image:
        image.load()  # decodes all of it
        return image.format == "PNG" and min(image.size) > 50


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_on_digits(capsys, runs):
    results = json.loads((runs / "digits" / "results.json").read_text())
    assert results["cost"]["steps"] == 10
    assert results["metrics"].keys() >= {"loss", "parameters"}
    assert is_png(runs / "digits" / "posteriors.png")
    assert is_png(runs / "digits" / "training.png")
    judge = json.loads((runs / "digits-judge" / "results.json").read_text())["metrics"]
    assert 0 <= judge["accuracy"] <= 1
    steps = [
        json.loads(line)["step"] for line in (runs / "digits" / "drift" / "metrics.jsonl").read_text().splitlines()
    ]
    assert max(steps) == 10  # --max-steps is the drift's bound too
    code, _, err = mfm(capsys, "train", "digits", *sets(*SMALL), "--max-steps", "10", "--out", runs / "digits")
    assert (code, "is complete" in err) == (0, True)


@pytest.mark.parametrize(("size", "classes", "channels"), [(8, 3, 1), (20, 0, 3)])
def test_a_dry_run_on_own_images(capsys, tmp_path, monkeypatch, size, classes, channels):
    files = draw(tmp_path / "pictures", size, classes, channels=channels)
    monkeypatch.chdir(tmp_path)
    code, out, err = mfm(capsys, "train", "images", "--data", files, "--dry-run", "--json", *sets("batch_size=4"))
    assert code == 0, err
    config = json.loads(out)["config"]
    assert (config["data"]["size"], config["data"]["channels"]) == (size, channels)
    assert config["model"]["network"]["name"] == ("mlp" if size == 8 else "unet")
    assert 0.1 < config["model"]["data_std"] < 0.7
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


def test_classes_of_subfolders_are_trained_when_asked_for(capsys, tmp_path):
    files = draw(tmp_path / "pictures", 8, 3)
    code, out, err = mfm(
        capsys, "train", "images", "--data", files, "--dry-run", "--json", *sets("data.labels=true", "batch_size=8")
    )
    assert code == 0, err
    assert json.loads(out)["config"]["model"]["network"]["num_classes"] == 3
    flat = draw(tmp_path / "flat", 8, 0)
    for recipe in ("images-guide", "images-judge"):
        err = refused(capsys, "train", recipe, "--data", flat, "--out", tmp_path / "x")
        assert "lies in none" in err
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_goes_on(capsys, tmp_path, monkeypatch):
    """Ctrl-C while a picture is drawn on the way: state saved; the same command ends where a whole run does."""
    files = draw(tmp_path / "pictures", 8, 0)
    few = [
        "--data",
        files,
        *sets("threads=1", "batch_size=8", "drift_batch_size=8", "sample_every=3"),
        "--max-steps",
        "6",
    ]
    monkeypatch.setattr(pictures, "draws_picture", lambda *_: None)
    assert mfm(capsys, "train", "images", *few, "--out", tmp_path / "whole")[0] == 0
    monkeypatch.setattr(pictures, "draws_picture", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = mfm(capsys, "train", "images", *few, "--out", tmp_path / "stopped")
    assert (code, "at step 3 of 6; state saved" in err, "Traceback" in err) == (130, True, False)
    monkeypatch.setattr(pictures, "draws_picture", lambda *_: None)
    assert mfm(capsys, "train", "images", *few, "--out", tmp_path / "stopped")[0] == 0
    weights = [
        load_file(tmp_path / run / "checkpoints" / "step-00000006" / "ema.safetensors") for run in ("whole", "stopped")
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_missing_and_damaged_files_are_one_line(capsys, tmp_path):
    out = ["--out", tmp_path / "x"]
    assert "there is no file /no/such/place: --set data.path=FOLDER" in refused(
        capsys, "train", "images", "--data", "/no/such/place", *out
    )
    assert "need to know where they are" in refused(capsys, "train", "images", *out)
    assert "IDX" in refused(capsys, "train", "mnist", *out)
    (tmp_path / "empty").mkdir()
    assert "at least 2 are needed" in refused(capsys, "train", "images", "--data", tmp_path / "empty", *out)
    files = draw(tmp_path / "pictures", 8, 0)
    whole = (files / "05.png").read_bytes()
    (files / "05.png").write_bytes(whole[: len(whole) // 2])
    assert "05.png cannot be read" in refused(capsys, "train", "images", "--data", files, *out)
    np.save(tmp_path / "broken.npy", np.full((9, 8, 8), np.nan))
    assert "NaN" in refused(capsys, "train", "images", "--data", tmp_path / "broken.npy", *out)
    assert "takes no files" in refused(capsys, "train", "digits", "--data", files, *out)
    assert not (tmp_path / "x").exists()


# -- measuring ---------------------------------------------------------------------------------------------------------

GUIDED = ["steps=2", 'methods=["none","mfm-gf-4"]']
EXPERIMENTS = {
    "posterior": (
        ["posterior", "--samples", "16",
         *sets("times=[0.5]", "glass_steps=[1]", "map_steps=[1]", "draws=2", "images=4")],
        {"frechet", "floor", "spread_ratio", "cost_per_draw", "samples", "space"},
        {"draws.png", "spread.png", "frechet-against-calls.png"},
    ),
    "value": (
        ["value", *sets("states=4", "times=[0.2]", "num_draws=[1,2]", "glass_steps=[1]", "map_steps=[1]",
                        "rollout_steps=2", "rollout_particles=3")],
        {"by_sampler", "seconds_per_draw", "value_std", "reward"},
        {"value-against-calls.png"},
    ),
    "generation": (
        ["generation", "--samples", "16", *sets("refine_steps=[1,3]", "compose_steps=[2]", "ode_steps=[3]")],
        {"by_sampler", "floor", "samples", "space"},
        {"frechet-against-calls.png", "samples.png"},
    ),
    "class-mixture": (
        ["steering", "--task", "class-mixture", "--samples", "32", *sets(*GUIDED)],
        {"methods", "target", "weighted_base", "steps"},
        {"frequencies.png", "samples.png"},
    ),
    "race": (
        ["steering", "--task", "race", "--samples", "64", *sets(
            "steps=2", "base_steps=2", "pool=256", "best_of=[1,100]", "strengths=[2]", "rescales=[1]",
            'methods=["mfm-g-1","dps"]', 'rewards=["margin","slant"]',
        )],
        {"rewards", "steps", "base_steps", "pool", "space"},
        {"reward-against-distance.png", "reward-against-frechet.png", "samples-margin.png", "samples-slant.png"},
    ),
    "inverse": (
        ["steering", "--task", "inverse", *sets("steps=2", "images=8", "draws=3", 'methods=["mfm-gf-4","tds-64"]',
                                                'problems=["inpaint","sr2"]')],
        {"problems", "images", "draws", "noise_std"},
        {"inpaint.png", "inpaint-ranks.png", "sr2.png", "sr2-ranks.png"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_on_digits(capsys, runs, tmp_path, name):
    command, keys, drawn = EXPERIMENTS[name]
    out = tmp_path / "out"
    code, text, err = mfm(capsys, "eval", command[0], runs / "digits", *command[1:], *sets("seed=3"), "--out", out)
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == f"eval {command[0]}"
    assert results["config"]["experiment"] == name
    assert results["config"].keys() >= {"checkpoint", "guide", "judge", "drift"}
    assert results["config"]["guide"] != results["config"]["judge"]
    assert results["environment"]["seed"] == results["config"]["seed"] == 3
    metrics = results["metrics"]
    assert metrics.keys() == keys | {"tables", "summary", "captions"}
    assert {p.name for p in out.glob("*.png")} == drawn == metrics["captions"].keys()
    assert all(is_png(out / file) for file in drawn)
    for title, table in metrics["tables"].items():
        assert f"\n{title}\n" in text
        assert all(len(row) == len(table["head"]) for row in table["rows"])
    assert results["cost"]["seconds"] > 0
    assert results["metrics"].get("space", "features of the judging classifier") == "features of the judging classifier"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    code, again, err = mfm(capsys, "eval", command[0], runs / "digits", *command[1:], *sets("seed=3"), "--out", out)
    assert (code, "is complete" in err) == (0, True)
    assert again == text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    err = refused(capsys, "eval", command[0], runs / "digits", *command[1:], "--seed", "4", "--out", out)
    assert "holds another run" in err


def test_figures_that_found_no_room_are_drawn_by_the_same_command(capsys, runs, tmp_path, monkeypatch):
    command, _, drawn = EXPERIMENTS["posterior"]
    arguments = ["eval", command[0], runs / "digits", *command[1:], "--out", tmp_path / "out"]
    save = figures.save

    def full(figure, path):
        if path.name == "spread.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(figure, path)

    monkeypatch.setattr(figures, "save", full)
    code, _, err = mfm(capsys, *arguments)
    assert (code, "no space left" in err, "Traceback" in err) == (1, True, False)
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["floor"] > 0
    )  # what was measured is kept
    monkeypatch.setattr(figures, "save", save)
    assert mfm(capsys, *arguments)[0] == 0
    assert all(is_png(tmp_path / "out" / file) for file in drawn)


@pytest.mark.parametrize("name", ["class-mixture", "inverse", "value"])
def test_ctrl_c_ends_an_experiment(capsys, runs, tmp_path, monkeypatch, name):
    """steer keeps what is finished when Ctrl-C comes: the experiment must end all the same, without results."""
    from metaflowmaps.flow_map import MetaFlowMap

    push, calls = MetaFlowMap.push, []

    def stopping(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return push(self, *arguments, **options)

    monkeypatch.setattr(MetaFlowMap, "push", stopping)
    command = EXPERIMENTS[name][0]
    code, out, err = mfm(capsys, "eval", command[0], runs / "digits", *command[1:], "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; finished files are kept"
    assert "Traceback" not in err
    assert len(calls) == 2  # no cell after the one that was stopped
    assert not (tmp_path / "out" / "results.json").exists()


def test_what_judges_is_checked_first(capsys, runs, own, tmp_path):
    posterior = EXPERIMENTS["posterior"][0]
    for setting, says in (
        (f"judge={runs / 'digits-guide'}", "one and the same classifier"),
        (f"judge={runs / 'digits'}", "a 'classifier' is needed here"),
        (f"judge={runs / 'nowhere'}", "no such file or directory"),
        (f"judge={own / 'images-judge'}", "the judge knows 3 classes, the images have 10"),
        (f"drift={runs / 'digits-judge'}", "a 'meta-flow-map' is needed here"),
        ("data=/no/such/place", "takes no files"),
        ("times=[1.0]", "times must lie in [0, 1)"),
        ("glass_step=[1]", "did you mean 'glass_steps'"),
    ):
        err = refused(
            capsys, "eval", "posterior", runs / "digits", *posterior[1:], *sets(setting), "--out", tmp_path / "x"
        )
        assert says in err
    for arguments, says in (
        (["steering", "--task", "rac"], "did you mean 'race'"),
        (["steering", "--task", "race", *sets('methods=["mfm-h-1"]')], "did you mean 'mfm-g'"),
        (["steering", "--task", "race", *sets('rewards=["slnt"]')], "did you mean 'slant'"),
        (["steering", "--task", "inverse", *sets('problems=["inpain"]')], "did you mean 'inpaint'"),
        (["value", *sets("reward=margin:10")], "one of 0 … 9"),
    ):
        err = refused(capsys, "eval", arguments[0], runs / "digits", *arguments[1:], "--out", tmp_path / "y")
        assert says in err
    assert not (tmp_path / "x").exists()
    shapes = refused(capsys, "eval", "posterior", own / "images", *posterior[1:],
                     *sets(f"judge={runs / 'digits-judge'}"), "--out", tmp_path / "x")  # fmt: skip
    assert "the judge knows 10 classes" in shapes


def test_images_of_another_shape_are_refused(capsys, runs, plain, tmp_path):
    err = refused(
        capsys, "eval", "generation", plain / "images", *sets(f"judge={runs / 'digits-judge'}"), "--out", tmp_path
    )
    assert "takes images of shape (1, 8, 8), the map's are (3, 20, 20)" in err


@pytest.mark.attack
def test_without_classifiers(capsys, plain, tmp_path):
    """Principal components judge; slant, ink and half reward; what needs a classifier says how to have one."""
    command = EXPERIMENTS["generation"][0]
    code, text, err = mfm(capsys, "eval", "generation", plain / "images", *command[1:], "--out", tmp_path / "g")
    assert code == 0, err
    assert "17 principal components" in text  # 18 images span 17 dimensions
    race = [*EXPERIMENTS["race"][0][:-2], *sets('rewards=["slant","half","ink"]', "samples=64")]
    code, text, err = mfm(capsys, "eval", race[0], plain / "images", *race[1:], "--out", tmp_path / "race")
    assert code == 0, err
    assert is_png(tmp_path / "race" / "samples-half.png")
    inverse = EXPERIMENTS["inverse"][0]
    code, text, err = mfm(capsys, "eval", inverse[0], plain / "images", *inverse[1:], "--out", tmp_path / "inverse")
    assert code == 0, err
    cell = json.loads((tmp_path / "inverse" / "results.json").read_text())["metrics"]["problems"]["sr2"]["tds-64"]
    assert "accuracy" not in cell
    for arguments in (["steering"], ["steering", "--task", "race"], ["value"]):
        err = refused(capsys, "eval", arguments[0], plain / "images", *arguments[1:], "--out", tmp_path / "x")
        assert "mfm train images-guide" in err
        assert "slant, ink and half need none" in err
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"run.json", ".lock"}  # a claim that occupies nothing:
    steps = sets("refine_steps=[3]", "compose_steps=[]", "ode_steps=[3]")  # none of those usually shown
    generation = ["eval", "generation", plain / "images", "--samples", "16", *steps, "--out", tmp_path / "x"]
    assert mfm(capsys, *generation)[0] == 0
    assert is_png(tmp_path / "x" / "samples.png")


def test_classes_of_own_images_come_with_their_classifiers(capsys, own, tmp_path):
    """The map was trained without classes; the experiments find them where the classifiers did."""
    command = EXPERIMENTS["class-mixture"][0]
    code, _, err = mfm(capsys, "eval", "steering", own / "images", *command[1:], "--out", tmp_path / "mixture")
    assert code == 0, err
    metrics = json.loads((tmp_path / "mixture" / "results.json").read_text())["metrics"]
    assert metrics["target"] == [0, 1, 0]  # w = 0, 1, 0 of the paper's pattern
    out = ["--num", "6", "--steps", "2", "--out"]
    code, _, err = mfm(capsys, "steer", own / "images", "--reward", "margin:2", *out, tmp_path / "steer")
    assert code == 0, err
    assert "one of 0 … 2" in refused(capsys, "steer", own / "images", "--reward", "margin:3", *out, tmp_path / "no")


def test_images_that_moved(capsys, own, plain, tmp_path):
    """Files are looked for where they were; the refusal says how to say where they are, and that works."""
    copy = tmp_path / "copy"
    shutil.copytree(own, copy)
    for place in (*copy.glob("images*/run.json"), *copy.glob("images*/checkpoints/*/config.json")):
        assert str(own / "pictures") in place.read_text()
    (own / "pictures").rename(own / "elsewhere")
    try:
        generation = ["eval", "generation", own / "images", *EXPERIMENTS["generation"][0][1:], "--out"]
        err = refused(capsys, *generation, tmp_path / "x")
        assert re.search(r"there is no .*/pictures: --set data=FOLDER", err)
        moved = sets(f"data={own / 'elsewhere'}")
        assert mfm(capsys, *generation, tmp_path / "g", *moved)[0] == 0
        steer = ["steer", own / "images", "--num", "4", "--steps", "2", "--reward"]
        assert "--set data=FOLDER" in refused(capsys, *steer, "half", "--out", tmp_path / "y")
        assert mfm(capsys, *steer, "half", *moved, "--out", tmp_path / "half")[0] == 0
        assert mfm(capsys, *steer, "slant", "--out", tmp_path / "slant")[0] == 0  # made of no files
        # another folder is other data: they are brought to the map's size, and are another run
        other = draw(tmp_path / "others", 20, 3, channels=3)
        err = refused(capsys, *generation, tmp_path / "g", *sets(f"data={other}"))
        assert "holds another run" in err
        assert mfm(capsys, *generation, tmp_path / "o", *sets(f"data={other}"))[0] == 0
    finally:
        (own / "elsewhere").rename(own / "pictures")


def test_too_few_images_to_judge(capsys, tmp_path):
    files = draw(tmp_path / "pictures", 8, 0, count=9)
    few = sets("threads=1", "batch_size=4", "drift_batch_size=4")
    assert mfm(capsys, "train", "images", "--data", files, *few, "--max-steps", "2", "--out", tmp_path / "run")[0] == 0
    err = refused(capsys, "eval", "generation", tmp_path / "run", "--out", tmp_path / "x")
    assert "one image held out" in err
    assert "--set data.hold_out=" in err


def test_a_map_of_points_has_no_images(capsys, runs, tmp_path):
    few = sets("model.network.width=4", "model.network.depth=1", "batch_size=8", "threads=1")
    assert mfm(capsys, "train", "gmm", *few, "--max-steps", "2", "--out", tmp_path / "gmm")[0] == 0
    for arguments, says in (
        (["eval", "generation", tmp_path / "gmm"], "was not trained on images"),
        (["eval", "steering", tmp_path / "gmm", "--task", "race"], "allowed are gmm-inverse"),
        (["steer", tmp_path / "gmm", "--reward", "slant"], "unknown"),
    ):
        assert says in refused(capsys, *arguments, "--out", tmp_path / "x")


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_sample_posterior_and_steer_write_pictures_and_seeds(capsys, runs, tmp_path):
    code, _, err = mfm(capsys, "sample", runs / "digits", "--num", "20", "--steps", "2", "--out", tmp_path / "s")
    assert code == 0, err
    whole = load_file(tmp_path / "s" / "samples.safetensors")
    assert whole["samples"].shape == (20, 1, 8, 8)
    seed = int(whole["seeds"][7])
    code, _, err = mfm(capsys, "sample", runs / "digits", "--only", seed, "--steps", "2", "--out", tmp_path / "one")
    assert code == 0, err
    alone = load_file(tmp_path / "one" / "samples.safetensors")["samples"]
    torch.testing.assert_close(alone[0], whole["samples"][7], rtol=1e-4, atol=1e-5)
    options = ["--num-draws", "12", "--t", "0.3", "--out", tmp_path / "p"]
    code, _, err = mfm(capsys, "posterior", runs / "digits", *options)
    assert code == 0, err
    assert load_file(tmp_path / "p" / "draws.safetensors")["draws"].shape == (12, 1, 8, 8)
    options = [
        "--reward",
        "margin:7",
        "--num",
        "6",
        "--steps",
        "3",
        "--method",
        "mfm-gf",
        "--out",
        tmp_path / "m",
    ]
    code, text, err = mfm(capsys, "steer", runs / "digits", *options, "--json")
    assert code == 0, err
    assert json.loads(text)["config"]["reward"] == "margin:7"
    assert load_file(tmp_path / "m" / "samples.safetensors").keys() == {"samples", "rewards", "seeds"}
    for file in ("s/samples.png", "one/samples.png", "p/posteriors.png", "m/samples.png"):
        assert is_png(tmp_path / file)


def test_rewards_of_the_command_line(capsys, runs, tmp_path):
    own_reward = tmp_path / "mine.py"
    own_reward.write_text("def bright(x):\n    return x.flatten(1).mean(1)\n")
    steer = ["steer", runs / "digits", "--num", "4", "--steps", "2", "--reward"]
    code, text, err = mfm(capsys, *steer, f"{own_reward}:bright", "--out", tmp_path / "own", "--json")
    assert code == 0, err
    assert "reward_sha256" in json.loads(text)["config"]
    for number, strength in enumerate(("1", "5")):
        code, text, err = mfm(
            capsys,
            *steer,
            "ink",
            "--strength",
            strength,
            "--out",
            tmp_path / f"ink{number}",
            "--json",
            "--method",
            "none",
        )
        assert code == 0, err
    rewards = [load_file(tmp_path / f"ink{i}" / "samples.safetensors")["rewards"] for i in (0, 1)]
    torch.testing.assert_close(rewards[1], 5 * rewards[0])  # the strength is the reward's
    for reward, says in (
        ("margin:12", "one of 0 … 9"),
        ("slant:3", "did you mean 'slant'"),
        ("slnt", "did you mean 'slant'"),
        ("mine.py", "name the function too"),
        (f"{own_reward}:dark", "unknown name in"),
        ("nowhere.py:f", "no file nowhere.py"),
    ):
        assert says in refused(capsys, *steer, reward, "--out", tmp_path / "no")
    moved = sets("data=/somewhere")
    assert "leave it out" in refused(capsys, *steer, f"{own_reward}:bright", *moved, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_help_names_what_there_is(capsys):
    for command, says in (
        (["eval", "steering"], "class-mixture, race, inverse"), (["steer"], "margin[:CLASS]"), (["train"], "--data"),
        (["eval", "generation"], "refinement"),
    ):  # fmt: skip
        code, out, _ = mfm(capsys, *command, "--help")
        assert code == 0
        assert says in " ".join(re.sub(r"[│╭╮╰╯─\s]+", " ", out).split())


def test_classes_and_guidance_from_the_command_line(capsys, tmp_path):
    """The number of classes is that of the data; a network sized to them takes its own settings, and guidance."""
    guided = sets("data.labels=true", "condition.guidance=[1.0,2.5]")
    folder = draw(tmp_path / "own", 8, classes=3)
    own = ["train", "images", "--data", folder, *guided, *sets("model.network.width=16", "threads=1"), "--dry-run"]
    digits = ["train", "digits", *guided, *sets("model.network.guidance=true", "threads=1"), "--dry-run"]
    for arguments, classes in ((own, 3), (digits, 10)):
        code, text, err = mfm(capsys, *arguments, "--json")
        assert code == 0, err
        network = json.loads(text)["config"]["model"]["network"]
        assert (network["num_classes"], network["guidance"]) == (classes, True)
    assert json.loads(mfm(capsys, *own, "--json")[1])["config"]["model"]["network"]["width"] == 16
    code, _, err = mfm(capsys, *own, "--set", "model.network.widht=16")
    assert (code, err.count("\n"), "width" in err) == (2, 1, True)
