"""Times as one says them: whole seconds or minutes, and of what is not over yet a range."""

import os

SPREAD = 1.5  # an estimate is told as from a 1.5th to 1.5 times itself: steps of one run scatter by about a third
MINUTE, HOUR, DAY = 60, 3600, 86400


def spoken(seconds: float) -> str:
    """A duration: "under a second", "12 seconds", "3 minutes", "1.5 hours", "2.1 days"."""
    if seconds < 1:
        return "under a second"
    number, unit = _scaled(seconds)
    return f"{number} {unit}"


def spoken_range(seconds: float) -> str:
    """An estimate: "20 to 45 seconds", "1 to 3 minutes"."""
    if seconds < 1:
        return "a second or two"
    _, unit = _scaled(seconds * SPREAD)
    low, high = (_in_unit(part, unit.rstrip("s")) for part in (seconds / SPREAD, seconds * SPREAD))
    return f"{low} to {high} {unit}" if low != high else f"{high} {unit}"


def _scaled(seconds: float) -> tuple[str, str]:
    """A number and its unit, which is singular where the number is one."""
    unit = "second" if seconds < 2 * MINUTE else "minute" if seconds < 2 * HOUR else "hour"
    unit = "day" if seconds >= 2 * DAY else unit
    number = _in_unit(seconds, unit)
    return number, unit if number == "1" else f"{unit}s"


def _in_unit(seconds: float, unit: str) -> str:
    """Whole seconds and minutes, tenths of hours and days."""
    size = {"second": 1, "minute": MINUTE, "hour": HOUR, "day": DAY}[unit]
    return f"{max(1, round(seconds / size))}" if size <= MINUTE else f"{seconds / size:.1f}".removesuffix(".0")


def busy() -> str | None:
    """What to warn of where other work takes the processor: an estimate holds for this load alone."""
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return None
    return f"the machine is busy (load {load:.1f} on {cores} cores): it will take longer than where it is idle"
