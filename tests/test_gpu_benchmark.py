"""The GPU benchmark, rehearsed on a processor."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metaflowmaps.recipes import recipe
from metaflowmaps.work.config import override

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_xl2(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return pytest.importorskip("benchmarks.gpu_xl2", reason="needs the repository, not the package alone")


@pytest.mark.attack
def test_a_rehearsal(tmp_path):
    out = tmp_path / "figures.json"
    command = ["-m", "benchmarks.gpu_xl2", "--size", "nano", "--device", "cpu", "--quick", "--json", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(out.read_text())
    assert figures["ceiling_tflops"] > 0
    named = ["forward", "flow-matching step", "MFM step", "one-step draws", "steered images"]
    assert [name for name in named if name in figures["results"] or name not in done.stdout] == named
    for name in named[:4]:
        assert figures["results"][name]["milliseconds"] > 0
        assert f"| {name} |" in done.stdout
    step = figures["results"]["MFM step"]
    # 8 rows: 6 on the diagonal with 3 forwards and a teacher's 1 or 2, 2 with 6 and the same
    forwards = step["tflops"] / figures["model_tflops"] * step["milliseconds"] / 1000 / 8
    assert 3 * 0.75 + 6 * 0.25 + 1 <= round(forwards, 6) <= 3 * 0.75 + 6 * 0.25 + 2
    assert "derivatives: difference (step 0.05)" in done.stdout
    assert len(figures["kernels"]) == 10


def test_no_device_is_said_in_a_line(gpu_xl2):
    with pytest.raises(SystemExit) as ended:
        gpu_xl2.main([])
    assert ended.value.code == "no CUDA device here: --size nano --device cpu --quick rehearses without one"


# -- everything for a bare machine -----------------------------------------------------------------------------------

SCRIPT = ROOT / "benchmarks" / "gpu.sh"
TOGETHER = {"mnist-judges", "mnist-eval", "images-eval"}  # parts of several commands, each with a name
PARTS = "install tests xl xl-compiled b b-compiled mnist mnist-judges mnist-eval mnist-steering images images-eval"


def script(*arguments, **environment):
    known = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["sh", str(SCRIPT), *map(str, arguments)], env=known, capture_output=True, text=True)


def test_every_part_says_what_it_runs(tmp_path):
    done = script("all", tmp_path, SAY="1", MNIST="/mnist", PICTURES="/pictures", WHEELS="/wheels")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {*PARTS.split(), "mnist-judge", "mnist-guide", "mnist-bench", "images-bench"} - TOGETHER <= set(lines)
    assert "--size XL --device cuda --budget 450" in lines["xl"]
    assert lines["xl-compiled"].endswith("--compile")
    assert not any(tmp_path.iterdir())
    settings = shlex.split(lines["images"].replace("{", "'{").replace("}", "}'"))
    network = next(word for word in settings if word.startswith("model.network="))
    config = override(recipe("images"), [network, "precision=bf16"])
    assert sum(p.numel() for p in config.model.network.network((3, 32, 32)).parameters()) >= 5_000_000


def test_all_goes_past_a_part_that_fails(tmp_path):
    done = script("all", tmp_path, SAY="1", MNIST="", PICTURES="/pictures", QUICK="1")
    assert done.returncode == 2
    assert "mnist needs MNIST" in done.stderr
    trained = next(line for line in done.stdout.splitlines() if line.startswith("images: "))
    assert "drift_steps=2 --set steps=2 " in trained


def test_a_part_is_rehearsed_without_a_gpu(tmp_path):
    done = script("xl", tmp_path, DEVICE="cpu", QUICK="1")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "xl.json").read_text())
    assert figures["ceiling_tflops"] > 0
    assert figures["results"]["forward"]["of_ceiling"] > 0
    assert "| forward | 8 |" in (tmp_path / "xl.log").read_text()


@pytest.mark.parametrize(
    ("part", "says"), [("nope", "no part is called nope"), ("mnist", "mnist needs MNIST, the data")]
)
def test_what_a_part_lacks_is_said_in_a_line(part, says, tmp_path):
    done = script(part, tmp_path, MNIST="")
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == 1


def test_a_part_that_fails_says_why_and_where(tmp_path):
    done = script("xl", tmp_path, DEVICE="cuda", PYTHON="false")
    assert done.returncode == 1
    assert f"xl ended with 1: see {tmp_path}/xl.log" in done.stderr
