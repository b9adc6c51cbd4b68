"""mfm bench: a map's figures, and how the batch is chosen."""

import json

import pytest
import torch

from metaflowmaps.lab import throughput
from metaflowmaps.lab.throughput import peak_flops, rates

CPU = torch.device("cpu")
QUICK = ("--seconds", "0.001", "--steps", "2", "--calls", "2", "--batch-size", "4")


def test_a_shipped_map_is_measured(command, tmp_path):
    code, text, said = command("bench", "digits", *QUICK, "--out", tmp_path / "one", "--json")
    assert code == 0, said
    results = json.loads(text)
    assert results == {**json.loads((tmp_path / "one" / "results.json").read_text()), "out": results["out"]}
    metrics = results["metrics"]
    assert metrics["compiled"] is None  # on a processor, by default
    for name, calls in (("samples", 2), ("draws", 1), ("steered", 2 * (1 + 3))):
        each = metrics["by_work"][name]
        # steering: a step is a drift and a draw, which is differentiated: 1 + (1 + 2)
        assert each["calls_per_row"] == calls
        assert each["batch"] in (1, 4)
        assert metrics[f"{name}_per_second"] == each["per_second"] > 0
        assert each["tflops"] == pytest.approx(each["per_second"] * calls * metrics["gflops_per_call"] / 1e3)
        assert each["mfu"] is None  # nobody knows a processor's peak
        assert each["latency_seconds"] > 0
    assert "samples a second" in said
    code, text, said = command("bench", "digits", *QUICK, "--out", tmp_path / "one")
    assert (code, said) == (0, "")  # complete
    assert "Throughput" in text


def test_vectors_are_measured_in_half_precision(command, run, tmp_path):
    code, text, said = command("bench", run, *QUICK, "--precision", "bf16", "--out", tmp_path / "one", "--json")
    assert code == 0, said
    assert json.loads(text)["config"]["precision"] == "bf16"


def test_counted_before_it_is_measured(command, tmp_path):
    code, text, _ = command("bench", "digits", "--dry-run", "--json", "--out", tmp_path / "one")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert json.loads(text)["metrics"]["parameters"] > 0


def seconds_of(monkeypatch, seconds):
    """Work that takes what a function of its rows says."""
    monkeypatch.setattr(throughput, "timed", lambda do, device, budget: seconds(do()))
    return lambda rows: lambda: rows


@pytest.mark.parametrize(
    ("seconds", "tried"),
    [
        (lambda rows: 1.0, [1, 4, 16, 64, 256, 1000]),  # ever more in the same time
        (lambda rows: max(1.0, rows / 16), [1, 4, 16, 64]),  # the fourth brings nothing
        (lambda rows: rows, [1, 4]),
    ],
)
def test_batches_grow_while_it_pays(seconds, tried, monkeypatch):
    make = seconds_of(monkeypatch, seconds)
    assert [rate.rows for rate in rates(make, CPU, 1000, 1.0)] == tried


def test_batches_grow_as_far_as_memory_goes(monkeypatch):
    seconds_of(monkeypatch, lambda rows: 1.0)

    def make(rows):
        def do():
            if rows > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rows

        return do

    assert [rate.rows for rate in rates(make, CPU, 1000, 1.0)] == [1, 4, 16]

    def broken(rows):
        def do():
            raise RuntimeError("shapes differ")

        return do

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(rates(broken, CPU, 1000, 1.0))


def test_the_peak_of_a_device_is_by_its_name(monkeypatch):
    assert peak_flops(CPU) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Something", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
