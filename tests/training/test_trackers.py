"""A training run that is followed: its numbers and its pictures, by whatever follows runs."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from metaflowmaps.errors import InputError
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.loop import Watch
from metaflowmaps.training.training_run import run_training
from metaflowmaps.work.config import override

FEW = ("steps=6", "log_every=3", "sample_every=3", "batch_size=16", "threads=1", "model.network.width=8")
DOCS = Path(__file__).parents[2] / "docs/commands.md"


def followed(out: Path, track: str, *settings: str):
    """A tiny run; its pictures are squares."""
    config = override(gmm(), [*FEW, f"track={track}", *settings])

    def draw(model, step: int) -> Path:
        file = out / f"{step}.png"
        Image.new("RGB", (4, 4)).save(file)
        return file

    torch.set_num_threads(1)
    return run_training(config, out, watch=Watch(on_sample=draw))


def fake(told: list) -> SimpleNamespace:
    """A package with W&B's interface."""
    return SimpleNamespace(
        init=lambda **known: told.append(("init", known)),
        log=lambda values, step: told.append((step, values)),
        Image=lambda file: f"image {Path(file).name}",
        finish=lambda: told.append(("finish",)),
    )


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_run_tells_numbers_and_pictures(package: str, tmp_path: Path, monkeypatch):
    told: list = []
    monkeypatch.setitem(sys.modules, package, fake(told))
    monkeypatch.setenv(f"{package.upper()}_PROJECT", "mine")
    followed(tmp_path / "run", package)
    assert told[0][1]["project"] == "mine"
    assert told[0][1]["name"] == "run"
    assert told[0][1]["config"]["steps"] == 6
    assert [entry[0] for entry in told[1:]] == [3, 3, 6, 6, "finish"]
    assert {"loss", "lr"} <= {**told[1][1], **told[2][1]}.keys()
    assert {"map samples": "image 3.png"} in (told[1][1], told[2][1])
    first = dict(told[0][1])
    told.clear()
    followed(tmp_path / "run", package, "steps=9")  # goes on: the same run to the tracker
    assert {key: first[key] for key in first if key != "config"} == {
        key: told[0][1][key] for key in first if key != "config"
    }
    assert [entry[0] for entry in told[1:]] == [9, 9, "finish"]


@pytest.mark.parametrize(("track", "extra"), [("tensorboard", "track"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_tracker_that_is_not_installed_is_missed_before_the_first_step(track, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if track == "tensorboard" else track, None)
    with pytest.raises(InputError, match=rf"pip install 'metaflowmaps\[{extra}\]'"):
        followed(tmp_path, track)


def test_a_tracker_that_nobody_knows_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        followed(tmp_path, "tensorbord")


def test_a_tracker_of_ones_own_is_a_class_in_a_file(tmp_path: Path, capsys):
    """The one of docs/commands.md, word for word."""
    (block,) = [part for part in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "Tracker" in part]
    (tmp_path / "my.py").write_text(block)
    followed(tmp_path / "run", f"{tmp_path}/my.py:Mine")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert [line for line in lines if line == f"3 map samples {tmp_path / 'run' / '3.png'}"]


@pytest.mark.attack  # its package takes seconds to load
def test_tensorboard_has_the_numbers_and_the_pictures(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    followed(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6]
    assert [event.step for event in events.Images("map samples")] == [3, 6]
