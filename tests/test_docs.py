"""The documented examples run as they stand, and say what they claim."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "steering.md"


def test_the_steering_page_runs_and_is_right(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    mean = names["result"].samples.mean(0)
    # tilted mean of the first coordinate: 1 · .25/(.25 + .09); four standard errors of 512 samples of spread .26, .5,
    # and .02 for what 50 steps and few draws leave
    assert abs(float(mean[0]) - 0.25 / 0.34) < 4 * 0.26 / 512**0.5 + 0.02
    assert abs(float(mean[1])) < 4 * 0.5 / 512**0.5 + 0.02
    # another batch size rounds otherwise in float32
    torch.testing.assert_close(names["again"].samples[0], names["result"].samples[7], rtol=1e-4, atol=1e-5)
    samples, exact = names["steered"].samples, names["exact"]
    spread = exact.variance.sqrt()
    # four standard errors of 2048 samples, and .1 for what 50 steps with 4 draws leave (docs/benchmarks.md)
    assert bool(((samples.mean(0) - exact.mean).abs() < 4 * spread / 2048**0.5 + 0.1).all())
    estimate = names["estimate"]
    truth = names["law"].value(names["path"], 0.4, torch.zeros(8, 2), names["observed"])
    # eight estimates, each within five of its own standard errors
    assert bool(((estimate.value - truth).abs() < 5 * estimate.std_err).all())
    assert "tensor" in capsys.readouterr().out


def test_the_guide_to_methods_runs_and_is_right(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "which-method.md").read_text(), re.S)
    names: dict = {}
    exec(compile(block, "which-method.md", "exec"), names)
    assert names["advice"].method.name == "rejection"  # one sample in nine is accepted
    assert names["advice"].pilot.evaluations == 4640
    exact, samples = names["law"].tilt(names["reward"]), names["result"].samples
    # four standard errors of 256 samples
    assert bool(((samples.mean(0) - exact.mean).abs() < 4 * exact.variance.sqrt() / 256**0.5).all())
    assert "→ rejection" in capsys.readouterr().out


def test_the_images_page_runs_and_is_right(capsys):
    digits, emoji = re.findall(r"```python\n(.*?)```", (DOCS / "images.md").read_text(), re.S)
    names: dict = {}
    exec(compile(digits, "images.md", "exec"), names)
    assert names["digits"].shape == (8, 4, 1, 8, 8)
    # of 16 samples steered to be sevens the judge, which errs on 1 % of digits, calls most so
    assert int((names["judge"](names["steered"].samples).argmax(1) == 7).sum()) >= 12
    torch.testing.assert_close(names["again"].samples[0], names["steered"].samples[3], rtol=1e-4, atol=1e-4)
    assert "tensor" in capsys.readouterr().out
    exec(compile(emoji, "images.md", "exec"), names)
    assert "[4, 3, 32, 32]" in capsys.readouterr().out
    assert names["steered"].rewards.min() > 0  # bluer than grey


def tuned_by_the_page(block):
    """The samples that a fine-tuning page's code ends with."""
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, "finetuning.md", "exec"), names)
    return names["x"]


def test_the_fine_tuning_page_runs(capsys, monkeypatch, tmp_path):
    """A quarter of its steps: on the way from the base, whose mean is 0, to the tilted law's .735."""
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "finetuning.md").read_text(), re.S)
    shorter, count = re.subn(r'"steps": (\d+)', lambda steps: f'"steps": {int(steps[1]) // 4}', block)
    assert count == 2
    monkeypatch.chdir(tmp_path)
    x = tuned_by_the_page(shorter)
    assert float(x[:, 0].mean()) > 5 * 0.5 / 4096**0.5  # five standard errors of the base's
    assert "tensor" in capsys.readouterr().out


@pytest.mark.attack
def test_the_fine_tuning_page_is_right(monkeypatch, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "finetuning.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    x = tuned_by_the_page(block)
    # exact: mean 1 · .25/(.25 + .09), variance 1/(1/.25 + 1/.09); four standard errors of 4096 samples, and .03 for so
    # short a training
    assert abs(float(x[:, 0].mean()) - 0.25 / 0.34) < 4 * 0.26 / 4096**0.5 + 0.03
    assert abs(float(x[:, 1].mean())) < 4 * 0.5 / 4096**0.5 + 0.03
    assert abs(float(x[:, 0].std()) - (0.25 * 0.09 / 0.34) ** 0.5) < 0.03


def test_every_file_that_the_guides_name_is_there():
    """Files of the repository, or of the package, by their path; what is linked, by where the page stands."""
    root, missing = DOCS.parent, []
    pages = [*DOCS.rglob("*.md"), root / "README.md", root / "CONTRIBUTING.md"]
    for page in pages:
        if page.name == "log.md":  # which speaks of its day
            continue
        text = page.read_text()
        named = re.findall(r"`([\w/]+/\w+\.py)`", text)
        missing += [
            f"{page.name}: {n}"
            for n in named
            if not any((at / n).is_file() for at in (root, root / "src/metaflowmaps"))
        ]
        linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
        missing += [f"{page.name}: {n}" for n in linked if not (page.parent / n).exists()]
    assert not missing


def test_every_test_that_the_guides_name_is_there():
    root = DOCS.parent
    tests = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    pages = [*DOCS.rglob("*.md"), root / "README.md"]
    named = {name for page in pages if page.name != "log.md" for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert named
    assert named - set(re.findall(r"def (test_\w+)\(", tests)) == set()
