"""Results that one can hold: samples read again whatever wrote them, figures of values, results.json in pandas."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.random import stream
from metaflowmaps.sample_files import write_samples

Command = Callable[..., tuple[int, str, str]]


def steered(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x = torch.randn(5, 2, generator=stream(0)).to(dtype)
    return {"samples": x, "rewards": x.float().sum(1), "seeds": torch.arange(5) + 2**60}


@pytest.mark.parametrize("form", ["safetensors", "npz"])
@pytest.mark.parametrize("path", ["", "results.json", "samples.{form}"], ids=["folder", "results", "file"])
def test_samples_are_read_again(form: str, path: str, tmp_path: Path):
    held = steered()
    (tmp_path / "results.json").write_text("{}")
    write_samples(tmp_path, "samples", held, form)
    samples, seeds, rewards = mfm.load_samples(tmp_path / path.format(form=form))
    assert torch.equal(samples, held["samples"])
    assert torch.equal(seeds, held["seeds"])
    assert torch.equal(rewards, held["rewards"])


def test_samples_of_half_precision_go_through_numpy(tmp_path: Path):
    held = steered(torch.bfloat16)
    write_samples(tmp_path, "samples", held, "npz")
    assert torch.equal(mfm.load_samples(tmp_path).samples, held["samples"].float())


def test_a_saved_result_of_steering_holds_samples_too(tmp_path: Path):
    held = steered()
    mfm.SteerResult(cost={"nfe": 1.0}, info={}, **held).save(tmp_path / "mine.safetensors")
    assert torch.equal(mfm.load_samples(tmp_path / "mine.safetensors").rewards, held["rewards"])


def test_what_holds_no_samples_is_refused_by_name(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    write_samples(tmp_path, "weights", {"w": torch.zeros(1)}, "npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "weights.npz").read_bytes()[:40])
    for name, says in (
        ("", "holds none of samples.safetensors"),
        ("nowhere", "there is no"),
        ("a.safetensors", "cannot be read as samples"),
        ("b.npz", "cannot be read as samples"),
        ("weights.npz", "holds no samples, but w"),
    ):
        with pytest.raises(mfm.InputError, match="mfm sample, steer or posterior") as caught:
            mfm.load_samples(tmp_path / name)
        assert says in str(caught.value)


def test_commands_write_the_format_that_is_asked_for(command: Command, run: Path, tmp_path: Path):
    asked = ("sample", run, "--num", 3, "--format")
    assert command(*asked, "npz", "--out", tmp_path / "npz")[0] == 0
    assert command(*asked, "safetensors", "--out", tmp_path / "st")[0] == 0
    one, other = mfm.load_samples(tmp_path / "npz"), mfm.load_samples(tmp_path / "st")
    assert torch.equal(one.samples, other.samples)
    assert one.rewards is None
    code, _, err = command(*asked, "png", "--out", tmp_path / "png")  # points of the plane are no pictures
    assert (code, "--format npz or safetensors" in err) == (2, True)
    assert command("posterior", run, "--num-draws", 3, "--format", "npz", "--out", tmp_path / "draws")[0] == 0
    assert mfm.load_samples(tmp_path / "draws").samples.shape == (3, 2)
    assert command("sample", "digits", "--num", 2, "--format", "png", "--out", tmp_path / "pictures")[0] == 0
    assert sorted(p.name for p in (tmp_path / "pictures/images").iterdir()) == ["000000.png", "000001.png"]
    assert mfm.load_samples(tmp_path / "pictures").samples.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("shape", [(2,), (3,), (1, 4, 4), (3, 4, 4)])
def test_values_plot_whatever_the_shape_of_draws(shape: tuple[int, ...]):
    draws = torch.randn(9, 2, *shape, generator=stream(0))
    rewards = draws.flatten(2).sum(2)
    errors = torch.full((2,), 0.1)
    value = mfm.ValueEstimate(rewards.mean(0), draws[0], 4 + errors, errors, errors, draws, rewards)
    figure = value.plot(row=1)
    assert len(figure.axes) >= 2
    assert figure.axes[1].get_title() == f"value {float(rewards[:, 1].mean()):.3g} ± 0.1"
    if len(shape) == 3:  # the draw of the highest reward comes first
        best = draws[rewards[:, 1].argmax(), 1]
        drawn = torch.as_tensor(figure.axes[0].images[0].get_array())[:4, :4].reshape(4, 4, -1)
        torch.testing.assert_close(drawn, ((best.permute(1, 2, 0) + 1) / 2).clamp(0, 1))


def test_results_are_a_row_of_a_table(tmp_path: Path):
    """The line of docs/commands.md, word for word."""
    line = next(
        line
        for line in Path("docs/commands.md").read_text().splitlines()
        if line.startswith("table = pandas.json_normalize")
    )
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        results = {"schema": 1, "command": "steer", "metrics": {"reward_mean": 2.5}, "cost": {"nfe": 9.0}}
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(results))
    import pandas

    names = {"pandas": pandas, "json": json, "Path": lambda folder: tmp_path / folder}
    exec(line, names)
    assert names["table"]["metrics.reward_mean"].tolist() == [2.5, 2.5]
    assert names["table"]["cost.nfe"].tolist() == [9.0, 9.0]
