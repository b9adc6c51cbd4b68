"""Notebooks run from top to bottom, in this process, and are stored with what they show."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SHORT = ("01_posterior", "02_steering", "03_own_reward")
LONG = ("04_own_network", "05_finetuning")


def cells(name):
    """The code cells of a notebook."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name):
    """Every cell in turn; the names that are there at the end."""
    names: dict = {"__name__": name}
    for cell in cells(name):
        exec(compile("".join(cell["source"]), name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Figures go nowhere; a notebook may seed the global generator."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    matplotlib.use("agg")
    with torch.random.fork_rng(devices=[]):
        yield
    matplotlib.pyplot.close("all")


def test_the_posterior(capsys):
    names = run("01_posterior")
    assert names["draws"].shape == (200, 1, 1, 8, 8)
    spread = names["spread"]
    assert spread == sorted(spread, reverse=True)  # less is open, the later it is
    assert spread[-1] < spread[0] / 4


@pytest.mark.filterwarnings("ignore")
def test_steering(capsys):
    names = run("02_steering")
    plain, steered = names["seven"](names["plain"]).mean(), names["result"].rewards.mean()
    assert steered > 10 > 0 > plain  # log-odds of a seven
    torch.testing.assert_close(names["again"].samples[0], names["result"].samples[3], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_reward_of_ones_own(capsys):
    names = run("03_own_reward")
    made = names["made"].samples
    for reward in (names["reward"], names["box"]):
        assert reward(made).mean() > reward(names["plain"]).mean()  # both at once
    assert "Use " in capsys.readouterr().out


@pytest.mark.attack
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_ones_own(capsys):
    names = run("04_own_network")
    assert "check: None" in capsys.readouterr().out
    # mean of the data's first coordinate is 0; e^{3x} moves it by over .5 whichever model is steered
    assert float(names["made"].samples[:, 0].mean()) > 0.5


@pytest.mark.attack
def test_fine_tuning(capsys):
    after = run("05_finetuning")["after"]
    # four standard errors of 2000 samples, and .03 for so short a training
    assert abs(float(after[:, 0].mean()) - 0.25 / 0.34) < 4 * 0.26 / 2000**0.5 + 0.03


@pytest.mark.parametrize("name", SHORT + LONG)
def test_a_notebook_is_stored_with_what_it_shows(name):
    stored = cells(name)
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(SHORT + LONG)
    # by `make notebooks`, in one go
    assert [cell["execution_count"] for cell in stored] == list(range(1, len(stored) + 1))
    outputs = [output for cell in stored for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps(outputs)
    assert not re.search(r"/home/|/root/|/work/|/tmp/", text), "outputs name a folder of the machine they were made on"
