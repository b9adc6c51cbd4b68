"""Look whether this installation is sound: versions, extras, device, folders, and a self-test of a few seconds."""

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from metaflowmaps.cli.context import Context, Options, Results
from metaflowmaps.errors import InputError
from metaflowmaps.work.durations import busy

PACKAGE = "metaflowmaps"
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)[^;<>=]*(?:>=(?P<least>[\d.]+))?[^;]*(?:;.*extra == ['\"](?P<extra>\w+)['\"])?"
)
UNNAMED_EXTRAS = ("dev", "docs")  # of those who work on the package
LEAST_FREE_BYTES = 2**30


class Finding(NamedTuple):
    """What was looked at, what is there, and where that is wrong what to do about it."""

    what: str
    says: str
    fault: str | None = None


class Doctor(Options):
    """No options of its own."""

    shared = ("device", "as_json")

    def next_command(self, results: Results, folder: str) -> str:
        """What shows most in the least time."""
        return "" if results.get("failed") else "mfm demo"


def run(config: Doctor, context: Context) -> Results:
    """What was found; each fault is one line, and the exit code is 1 where there is one."""
    began = time.perf_counter()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "device": lambda: _device(context.device),
        "folders": _folders,
        "self-test": lambda: _self_test(context.device),
    }
    found = [finding for what, check in checks.items() for finding in _looked(what, check)]
    faults = [f"{finding.what}: {finding.fault}" for finding in found if finding.fault is not None]
    for fault in faults:
        context.say(f"fault: {fault}")
    metrics = {**{finding.what: finding.says for finding in found}, "faults": faults}
    # the self-test promises seconds of an idle processor: on a busy one the clock says more
    cost = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time()}
    return {"schema": 1, "command": "doctor", "config": {}, "metrics": metrics, "cost": cost, "failed": bool(faults)}


def _looked(what: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; one that breaks is a fault."""
    try:
        yield from check()
    except Exception as error:
        text = " ".join(str(error).split())
        fix = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}: install {PACKAGE} anew"
        yield Finding(what, "broken", fix)


# -- checks ----------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    """Python, what the package needs, and what its extras bring."""
    from metaflowmaps import __version__

    yield Finding("python", platform.python_version())
    yield Finding(PACKAGE, __version__)
    extras: dict[str, tuple[list[str], list[str]]] = {}  # what is there, what is missing
    for name, least, extra in _requirements():
        if extra in UNNAMED_EXTRAS:
            continue
        finding = _package(name, least)
        if extra is None:
            yield finding
            continue
        present, missing = extras.setdefault(extra, ([], []))
        if finding.fault is None:
            present.append(f"{name} {finding.says}")
        else:
            missing.append(name)
    for extra, (present, missing) in extras.items():
        lacks = [f"without {', '.join(missing)}: pip install '{PACKAGE}[{extra}]'"] if missing else []
        yield Finding(f"extra {extra}", ", ".join(present + lacks))


def _requirements() -> Iterator[tuple[str, str | None, str | None]]:
    """Of each requirement of the distribution: the package, its lowest version, and the extra that asks for it."""
    try:
        listed = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        listed = []
    for line in listed:
        if match := REQUIREMENT.match(line):
            yield match["name"], match["least"], match["extra"]


def _package(name: str, least: str | None) -> Finding:
    """The version of a package; one that is missing or too old is a fault."""
    wanted = f"{name}>={least}" if least else name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", f"it is not installed: pip install '{wanted}'")
    old = least is not None and _numbers(version) < _numbers(least)
    return Finding(name, version, f"{version} is too old: pip install '{wanted}'" if old else None)


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _device(name: str) -> Iterator[Finding]:
    """What ``--device`` means here, and how busy the processor is."""
    import torch

    from metaflowmaps.work.devices import pick_device

    device = pick_device(name)
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        yield Finding("device", f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB")
    else:
        yield Finding("device", device.type)
    yield Finding("processor", f"{threads}; {busy() or 'idle enough'}")


def _folders() -> Iterator[Finding]:
    """What is written to: results here, downloads, and what this user has typed."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from metaflowmaps.work.own_code import remembered

    for what, folder, fix in (
        ("results", Path("runs"), "go to a folder of yours, or give --out"),
        ("downloads", Path(HF_HUB_CACHE), "set HF_HOME to a folder of yours"),
        ("own code", remembered(), "set XDG_STATE_HOME to a folder of yours"),
    ):
        there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
        free = shutil.disk_usage(there).free
        fault = None if _writable(there) else f"{there} cannot be written to: {fix}"
        if fault is None and free < LEAST_FREE_BYTES:
            fault = f"{there} has less than {LEAST_FREE_BYTES / 2**30:.0f} GiB free: make room, or {fix}"
        yield Finding(f"folder of {what}", f"{folder}, {free / 2**30:.0f} GiB free", fault)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _self_test(device: str) -> Iterator[Finding]:
    """A value and its gradient against closed forms, and the shipped map on the device against the processor."""
    from metaflowmaps.lab.self_test import DEVICE_TOLERANCE, MOST_ERRORS, device_error, value_error
    from metaflowmaps.work.devices import pick_device

    off = value_error()
    wrong = f"{off:.1f} standard errors off: this torch computes wrongly, install the one of constraints.txt"
    yield Finding(
        "value and gradient",
        f"{off:.1f} standard errors from their closed forms",
        wrong if not off < MOST_ERRORS else None,
    )
    apart = device_error(pick_device(device))
    wrong = f"the shipped map differs by {apart:.2g} from the processor's: use --device cpu, and update the driver"
    yield Finding("shipped map", f"within {apart:.2g} of the processor's", None if apart < DEVICE_TOLERANCE else wrong)
