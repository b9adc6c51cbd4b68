"""What holds for a run of the suite as a whole, on any machine: one thread and at most 2 GiB a worker, no GPU unasked.

Its last lines say how much memory each worker took, and what was skipped and why.
"""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import other_processor

MAX_BYTES = 2 * 2**30
DEVICES = "CUDA_VISIBLE_DEVICES"

# commands set the threads that their recipes name: two of them in two workers would wait for each other
_set_threads = torch.set_num_threads
torch.set_num_threads = lambda _threads: _set_threads(1)
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# and they import this checkout, installed or not
_source = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_source, os.environ.get("PYTHONPATH")]))

_memory: dict[str, str] = {}  # of each worker: its line
_has_gpu, _given = torch.cuda.is_available, os.environ.get(DEVICES)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of attacks that draw their damage: others by another seed. And a processor that rounds otherwise."""
    parser.addoption("--seed", type=int, default=0, help="of the damage that `make attack` does")
    parser.addoption("--rounding", action="store_true", help="round as other processors may: other_processor.py")


def pytest_configure(config: pytest.Config) -> None:
    """In each worker."""
    if config.getoption("--rounding"):
        other_processor.install()


# -- a GPU is there for the tests that are marked gpu ------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Show the GPU to tests marked ``gpu`` alone: elsewhere ``--device auto`` is the processor, as in a subprocess."""
    shown = item.get_closest_marker("gpu") is not None
    torch.cuda.is_available = _has_gpu if shown else (lambda: False)
    if not shown:
        os.environ[DEVICES] = ""
    elif _given is None:
        os.environ.pop(DEVICES, None)
    else:
        os.environ[DEVICES] = _given


# -- long files first: the last ones to begin are then short -----------------------------------------------------------

LONG = (
    "test_finetune.py", "test_latent_images.py", "test_distributed.py", "test_docs.py", "test_main.py",
    "test_sharding.py", "test_image_commands.py", "test_exact_guidance.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take files in this order, with ``--no-loadscope-reorder``."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: the garbage collector need not walk over it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000)  # of 700; of garbage in cycles alone, and the memory of a worker is watched below


# -- pictures ----------------------------------------------------------------------------------------------------------

_pictures: dict[tuple[str, float, float], bytes] = {}  # by name, width and height


@pytest.fixture(scope="session", autouse=True)
def _each_picture_is_drawn_once() -> Iterator[None]:
    """What commands save under one name and in one size is drawn once a worker, and copied: it took most of their time.

    The figures themselves are made every time, and what is on pictures is tested on them, in tests/report.
    """
    from metaflowmaps.lab.figures import plots

    def save(figure: Any, path: Path) -> Path:
        kept = (path.name, *figure.get_size_inches())
        if kept not in _pictures:
            _pictures[kept] = draw(figure, path).read_bytes()
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.write_whole(path, _pictures[kept], durable=False)
        return path

    draw = plots.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", save)
        yield


# -- memory ------------------------------------------------------------------------------------------------------------


class Peak:
    """The largest resident size of this process, or of a process that a test started, and the test that reached it.

    Sampled after every test: a meter may have set the process's own peak back on its way.
    """

    size, where = 0, "nowhere"

    def sample(self, test: str) -> bool:
        """Whether this test is the one that passed the limit."""
        before = self.size
        if resident() > before:
            self.size, self.where = resident(), test
        return before <= MAX_BYTES < self.size

    def __str__(self) -> str:
        return f"{self.size / 2**30:.2f} GiB, in {self.where}"


def resident() -> int:
    """The peak of this process or of a child of its, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else 1024 * peak


_peak = Peak()


@pytest.fixture(autouse=True)
def _at_most_two_gigabytes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if _peak.sample(request.node.nodeid):
        pytest.fail(f"a worker takes at most {MAX_BYTES / 2**30:g} GiB, and this is {_peak}", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells its peak."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is None:
        _memory.setdefault("main", str(_peak))
    else:
        output["memory"] = str(_peak)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The main process hears it."""
    _memory[node.gateway.id] = getattr(node, "workeroutput", {}).get("memory", "unknown: it died")


# -- the last lines ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Memory, and what was skipped and why."""
    workers = [name for name in sorted(_memory) if name != "main"] or ["main"]
    for name in workers:
        terminalreporter.write_line(f"peak memory of {name}: {_memory[name]}")
    _tell_attacks(terminalreporter)
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def _tell_attacks(terminalreporter: Any) -> None:
    """What was tried and what came of it, a line each and in total."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    counted = [dict(value) for report in reports for name, value in report.user_properties if name == "attack"]
    for counts in counted:
        terminalreporter.write_line(f"attack on {counts.pop('what')}: {counts}")
    if counted:
        names = dict.fromkeys(name for counts in counted for name in counts)
        total = {name: sum(counts.get(name, 0) for counts in counted) for name in names}
        terminalreporter.write_line(f"attacks in all: { ({'silent': 0, 'traceback': 0} | total) }")


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
