"""The GPU benchmark, rehearsed on a processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
