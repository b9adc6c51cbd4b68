"""The examples run as they stand, and what they print is true."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


SCRIPT = EXAMPLES / "mfm_in_100_lines.py"


def test_the_whole_method_fits_on_one_screen_and_needs_torch_alone():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 100
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"sys", "torch"}
    compile(text, SCRIPT.name, "exec")


def run_example(monkeypatch, capsys, name, *arguments):
    """What an example prints, run in this process."""
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    state = torch.get_rng_state()  # a script may seed the global generator
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["own_network.py", "chain.py"])
def test_examples_of_own_networks_fit_on_a_screen(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 100


def test_steered_chains_have_the_energy_of_eight_draws(monkeypatch, capsys):
    printed = run_example(monkeypatch, capsys, "chain.py", 32)
    assert "check: None" in printed
    energies = re.findall(r"energy in kT free ([\d.]+), repelling ([\d.]+), steered ([\d.]+)", printed)
    assert len(energies) == 3
    free, exact, steered = torch.tensor([[float(n) for n in row] for row in energies]).sum(0)
    assert exact < free
    # 640 chains of each length have 3.13, where the whole tilt has 2.50; the means of 32, with deviations of .70, .95
    # and 1.25, scatter by .30 in sum. Half the reward gives 5.03, twice the reward 1.53
    assert float(steered) == pytest.approx(3.13, abs=4 * 0.30)


def test_the_own_network_tutorial_runs(monkeypatch, capsys, tmp_path):
    """Everything happens in a few steps; nothing is learned, and the check says so."""
    printed = run_example(monkeypatch, capsys, "own_network.py", tmp_path / "run", 0.002)
    assert "check: predicted data miss the data" in printed
    assert len(re.findall(r"Fréchet distance to digits [\d.]+", printed)) == 6
    assert len(re.findall(r"\d+% sevens", printed)) == 2


@pytest.mark.attack
def test_the_whole_method_agrees_with_closed_forms():
    """800 of 2,000 steps: weights then miss by .06 and the gradient by .2; at 200 steps by .18 and .4."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, SCRIPT, "800"], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    posterior, steered, gradient, exact = (
        torch.tensor([float(n) for n in re.findall(r"-?\d+\.\d+", line)]) for line in ran.stdout.splitlines()
    )
    # method.md §7: the tilted law has the weights .5716, .3665, .0619
    torch.testing.assert_close(steered[3:], torch.tensor([0.5716, 0.3665, 0.0619]), atol=6e-4, rtol=0)
    for weights in (posterior, steered):
        assert weights[:3].sum() == pytest.approx(1, abs=2e-3)
        torch.testing.assert_close(weights[:3], weights[3:], atol=0.12, rtol=0)
    torch.testing.assert_close(gradient, exact, atol=0.35, rtol=0)
