"""mfm doctor: what is installed, and one line for each fault."""

import json
from collections.abc import Callable
from importlib import metadata

import torch

from metaflowmaps.cli import doctor
from metaflowmaps.lab import self_test

Command = Callable[..., tuple[int, str, str]]


def test_a_sound_installation_passes_its_self_test(command: Command):
    code, out, err = command("doctor", "--json")
    assert (code, err) == (0, "")
    metrics = json.loads(out)["metrics"]
    assert metrics["torch"] == torch.__version__
    assert "diffusers" in metrics["extra latent"]
    assert "of the processor's" in metrics["shipped map"]
    assert metrics["faults"] == []


def test_an_extra_names_once_what_brings_all_it_lacks(monkeypatch):
    wanted = [("numpy", "1.0", "some"), ("no-such-package", None, "some"), ("nor-this", None, "some")]
    monkeypatch.setattr(doctor, "_requirements", lambda: wanted)
    found = list(doctor._versions())[-1]
    lacks = "without no-such-package, nor-this: pip install 'metaflowmaps[some]'"
    assert (found.what, found.says) == ("extra some", f"numpy {metadata.version('numpy')}, {lacks}")


def test_each_fault_is_a_line_that_names_the_fix(command: Command, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.9" if name == "numpy" else version(name))
    monkeypatch.setattr(doctor, "_writable", lambda folder: False)
    monkeypatch.setattr(self_test, "value_error", lambda: float("nan"))
    monkeypatch.setattr(self_test, "device_error", lambda device: 0.5)
    code, out, err = command("doctor")
    assert code == 1
    assert "next" not in out
    lines = err.splitlines()
    assert lines[0] == "fault: numpy: 1.2.9 is too old: pip install 'numpy>=1.26'"
    assert [line for line in lines if "set HF_HOME" in line]
    assert [line for line in lines if "nan standard errors off" in line]
    assert "use --device cpu" in lines[-1]
    assert len(lines) == 6  # three folders


def test_a_check_that_breaks_is_a_fault(command: Command, monkeypatch):
    def broken() -> float:
        raise OSError("no such library")

    monkeypatch.setattr(self_test, "value_error", broken)
    code, _, err = command("doctor", "--device", "cuda:9")
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == "fault: device: --device cuda:9: this machine has no such GPU; use --device cpu"
    assert lines[1] == "fault: self-test: OSError: no such library: install metaflowmaps anew"


def test_a_wrong_gradient_is_seen(monkeypatch):
    assert self_test.value_error() < self_test.MOST_ERRORS
    estimate = self_test.value_gradient
    monkeypatch.setattr(
        self_test, "value_gradient", lambda *given: (e := estimate(*given))._replace(gradient=1.2 * e.gradient)
    )
    assert self_test.value_error() > self_test.MOST_ERRORS
