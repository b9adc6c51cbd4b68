"""In a Jupyter kernel, here a stand-in for one: the bar is below the cell, and a figure shows itself."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import metaflowmaps as mfm
from metaflowmaps.work.notebook import notebook_report

MODEL = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.25))


class Kernel:
    """What IPython is asked for, and what it was given to show."""

    def __init__(self, kernel):
        self.lines, self.shell = [], SimpleNamespace(kernel=kernel)

    def display(self, line, raw, display_id):
        self.update(line, raw)
        return self

    def update(self, line, raw):
        assert raw
        self.lines.append(line)


@pytest.fixture
def ipython(monkeypatch):
    """``ipython(kernel)``: IPython, in a kernel or on a terminal."""

    def started(kernel):
        made, package, display = Kernel(kernel), ModuleType("IPython"), ModuleType("IPython.display")
        package.get_ipython, display.display = lambda: made.shell, made.display
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", display)
        return made

    return started


def steered():
    return mfm.steer(MODEL, lambda x: 0 * x[:, 0], 4, mfm.Unsteered(), mfm.ODE(steps=6), seed=0, progress=True)


def test_progress_is_one_line_below_the_cell(ipython, capsys):
    kernel = ipython(object())
    steered()
    assert kernel.lines[0]["text/plain"] == "none: 0 of 6"
    assert kernel.lines[-1]["text/plain"] == "none: 6 of 6"
    assert '<progress value="6" max="6">' in kernel.lines[-1]["text/html"]
    assert capsys.readouterr() == ("", "")


def test_a_training_shows_a_line_a_stage(ipython):
    kernel, report = ipython(object()), notebook_report()
    for stage in ("drift", "map"):
        for step in (50, 100):
            report(stage, SimpleNamespace(step=step, steps=100))
    shown = [line["text/plain"] for line in kernel.lines]
    assert shown[-1] == "map: 100 of 100"
    assert "drift: 100 of 100" in shown
    assert any(line.startswith("map: 50 of 100, ") and line.endswith(" s left") for line in shown)
    kernel = ipython(None)
    report("map", SimpleNamespace(step=100, steps=100))
    assert not kernel.lines


def test_ipython_on_a_terminal_has_the_terminal_s_bar(ipython, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    kernel = ipython(None)
    steered()
    assert not kernel.lines
    assert "none" in capsys.readouterr().err


def test_a_figure_shows_itself():
    result = mfm.steer(MODEL, lambda x: 0 * x[:, 0], 4, mfm.Unsteered(), mfm.ODE(steps=2), seed=0)
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
