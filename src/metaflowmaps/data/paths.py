r"""Paths seen at times, from which contexts and targets are drawn; pairs of a target and one observation.

A sample is a path, a time r of it at which it was seen, and observations of it at other times, chosen by a law: how
many (uniform from ``least`` to ``most``), and where,

    any       anywhere in the window: interpolation and extrapolation both ways
    before    anywhere before r: forecasts from irregular observations
    latest    the last ones up to a lead before r, one after the other: the forecast of a series

X_r is the target. What is missing (NaN) is neither target nor observation. Drawing is a function of the generator.
"""

from functools import cached_property
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from metaflowmaps.context import Context, beside
from metaflowmaps.errors import InputError
from metaflowmaps.work.config import Config


class ContextLaw(Config):
    """How many observations a context has, and where they lie."""

    least: int = Field(0, ge=0)
    most: int = Field(4, ge=1, le=4096)
    place: Literal["any", "before", "latest"] = "any"
    window: int | None = Field(None, ge=2)  # consecutive times among which a context lies; None: all
    lead: int = Field(1, ge=1)  # latest: r is up to so many times after the last observation

    @model_validator(mode="after")
    def _possible(self) -> "ContextLaw":
        if self.least > self.most:
            raise ValueError(f"least={self.least} observations are more than most={self.most}")
        return self


class Given(NamedTuple):
    """Targets and the contexts they were seen in."""

    x_1: Tensor
    context: Context


class Paths:
    """n paths, each seen at T times in order, NaN where it was not.

    Args:
        values: (n, T, *event).
        times: (T,) or (n, T), increasing.
        law: of contexts.
        first_target: the first place that a context may ask for.
    """

    def __init__(self, values: Tensor, times: Tensor, law: ContextLaw, first_target: int = 0) -> None:
        self.values, self.times, self.law = values, times.expand(values.shape[:2]), law
        self.first_target = first_target
        self.shared = times.ndim == 1 or len(times) == 1  # the times are those of all paths
        self.event_shape = tuple(values.shape[2:])
        self.window = min(law.window or values.shape[1], values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def seen(self) -> Tensor:
        """Where a path was seen, (n, T)."""
        return self.values.isfinite().flatten(2).all(2)

    @cached_property
    def targets(self) -> Tensor:
        """The (path, place) pairs that a context may ask for, (k, 2): those with as many observations as it takes."""
        late = torch.arange(self.values.shape[1]) >= self.first_target
        found = (self.seen & late & (self._fewest() >= self.law.least)).nonzero()
        if not len(found):
            raise InputError(
                f"no path was seen {self.law.least} times where a context may lie, and once more: lower "
                "data.contexts.least, or widen data.contexts.window"
            )
        return found

    def _fewest(self) -> Tensor:
        """Of how many observations a context of each place can have, the fewest: (n, T)."""
        law, width, length = self.law, self.window, self.values.shape[1]
        till = functional.pad(self.seen.cumsum(1), (1, 0))  # how many were seen before a place
        if law.place != "any":
            place = torch.arange(length)
            end = (place + 1 - (law.lead if law.place == "latest" else 1)).clamp_min(0)
            return till[:, end] - till[:, torch.minimum((place - width + 1).clamp_min(0), end)]
        # the poorest of the windows that hold a place, by doubling; no window begins before the first or ends after
        fewest, merged = functional.pad(till[:, width:] - till[:, :-width], (width - 1, width - 1), value=length), 1
        while merged < width:
            step = min(merged, width - merged)
            fewest, merged = torch.minimum(fewest[:, step:], fewest[:, :-step]), merged + step
        return fewest - 1

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Targets alone, (n, *event)."""
        return self.sample_given(n, generator).x_1

    def sample_given(self, n: int, generator: torch.Generator | None = None) -> Given:
        """n targets with their contexts."""
        law = self.law
        path, asked = self.targets[torch.randint(len(self.targets), (n,), generator=generator)].unbind(1)
        count = torch.randint(law.least, law.most + 1, (n,), generator=generator)
        places, allowed = self._window(path, asked, generator)
        order = -places.float() if law.place == "latest" else torch.rand(places.shape, generator=generator)
        chosen = torch.where(allowed, order, torch.inf).argsort(1)[:, : law.most]
        mask = allowed.gather(1, chosen) & (torch.arange(chosen.shape[1]) < count[:, None])
        place, row = places.gather(1, chosen), path[:, None]
        values = self.values[row, place]
        values = torch.where(beside(mask, values), values, torch.zeros_like(values))
        return Given(self.values[path, asked], Context(values, self.times[row, place], mask, self.times[path, asked]))

    def _window(self, path: Tensor, asked: Tensor, g: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The places of a window for each target, and those that may be observed: (n, window) each."""
        start = (asked - self.window + 1).clamp_min(0)
        if self.law.place == "any":  # of forecasts r is the last
            room = asked.clamp_max(self.values.shape[1] - self.window) - start + 1
            start = start + torch.minimum((torch.rand(len(asked), generator=g) * room).long(), room - 1)
        places, last = start[:, None] + torch.arange(self.window), asked
        if self.law.place == "latest":
            last = asked + 1 - torch.randint(1, self.law.lead + 1, asked.shape, generator=g)
        allowed = places != asked[:, None] if self.law.place == "any" else places < last[:, None]
        return places, allowed & self.seen[path[:, None], places]

    def at(self, path: Tensor, times: Tensor) -> Tensor:
        """Paths (k,) at times (k, K), linear between those seen and constant beyond: (k, K, *event)."""
        grid, row = self.times[0] if self.shared else self.times[path], path[:, None]
        after = torch.searchsorted(grid.contiguous(), times.contiguous(), right=True).clamp(1, self.values.shape[1] - 1)
        left, right = (table[row, at] for table, at in zip(self._nearest_seen, (after - 1, after), strict=True))
        start, end = self.times[row, left], self.times[row, right]
        part = beside(((times - start) / (end - start).clamp_min(1e-30)).clamp(0, 1), self.values)
        return torch.lerp(self.values[row, left], self.values[row, right], part.to(self.values))

    @cached_property
    def _nearest_seen(self) -> tuple[Tensor, Tensor]:
        """The last place seen up to each place, and the first from there on; beyond the ends the end."""
        place, length = torch.arange(self.values.shape[1]), self.values.shape[1]
        before = torch.where(self.seen, place, -1).cummax(1).values
        after = torch.where(self.seen, place, length).flip(1).cummin(1).values.flip(1)
        first, last = after[:, :1].expand_as(after), before[:, -1:].expand_as(before)
        return torch.where(before < 0, first, before), torch.where(after == length, last, after)


class Pairs:
    """Simulated pairs, each a target θ with one observation x at time 0.

    Args:
        theta: (n, *event).
        x: (n, *observed).
    """

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        self.theta, self.x = theta, x

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Targets alone, (n, *event)."""
        return self.sample_given(n, generator).x_1

    def sample_given(self, n: int, generator: torch.Generator | None = None) -> Given:
        """n pairs, drawn with replacement."""
        index = torch.randint(len(self.x), (n,), generator=generator)
        return Given(self.theta[index], Context(self.x[index][:, None], torch.zeros(1), None, 0.0))
