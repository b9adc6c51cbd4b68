"""When to stop a run early, by what its meters say."""

import re
from collections.abc import Iterable
from typing import Self

from metaflowmaps.errors import unknown


class StopRule:
    """When to stop early: ``NAME>NUMBER``, ``NAME<NUMBER``, ``NAME stalls K`` (K measurements without a new best)."""

    NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    FORM = re.compile(rf"\s*([\w.:-]+?)(?:\s*([<>])\s*({NUMBER})|\s+stalls\s+([1-9]\d*))\s*")

    def __init__(self, name: str, sign: str, number: float) -> None:
        self.name, self.sign, self.number = name, sign, number

    @classmethod
    def of(cls, text: str) -> Self | None:
        """The rule that a text says; None for "none"."""
        if text == "none":
            return None
        parts = cls.FORM.fullmatch(text)
        if parts is None:
            raise ValueError("a stop rule is NAME>NUMBER, NAME<NUMBER or NAME stalls K, such as distance<2")
        name, sign, number, stalls = parts.groups()
        return cls(name, sign or "stalls", float(number if sign else stalls))

    def fires(self, records: list[dict[str, float]]) -> bool:
        """Do the measurements so far say stop?"""
        values = [record[self.name] for record in records if record.get(self.name) is not None]
        if not values:
            return False
        if self.sign == "stalls":
            return len(values) - 1 - max(range(len(values)), key=values.__getitem__) >= self.number
        return values[-1] > self.number if self.sign == ">" else values[-1] < self.number

    def check(self, measured: Iterable[str]) -> None:
        """Refuse a rule about what is not measured."""
        if self.name not in measured:
            raise unknown("stop: measurement", self.name, list(measured))
