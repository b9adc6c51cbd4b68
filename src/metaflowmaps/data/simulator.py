"""Pairs (θ, x) of a simulator as data: the target is θ, the one observation x. Simulation-based inference."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.data.context_source import ContextSource, Fitted
from metaflowmaps.data.data_source import SampleSource
from metaflowmaps.data.paths import Pairs
from metaflowmaps.errors import InputError, warn_caller
from metaflowmaps.random import stream
from metaflowmaps.work.choices import PickOutside, outside

Simulate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
UNLIKE = 10.0  # spreads of θ's coordinates so far apart are warned of


class Simulator(ContextSource):
    """Pairs (θ, x) of a simulator: the target is θ, the one observation x. Simulation-based inference."""

    name: ClassVar[str] = "simulator"

    # file.py:name of simulate(n, generator) -> (θ (n, d), x (n, k))
    simulate: Annotated[Simulate | None, PickOutside()] = None
    num: int = Field(10_000, ge=2)  # simulations to train on, once for all

    def pairs(self) -> tuple[Pairs, Pairs]:
        """Simulations to train on, and a tenth as many held out; the simulator is called once for each."""
        if self.simulate is None:
            raise InputError("a simulator is a function (n, generator) -> (θ, x): --data file.py:name")
        return _simulated(self.simulate, self.num)

    def moved(self, path: str) -> Self:
        """The simulator that ``file.py:name`` is."""
        return self.given(outside(path), Path())

    def given(self, data: Any, folder: Path) -> Self:
        """A function (n, generator) -> (θ, x), or where it is."""
        if isinstance(data, str):
            return self.moved(data)
        if not callable(data):
            raise InputError(f"a simulator is a function (n, generator) -> (θ, x), got {type(data).__name__}")
        return self.model_copy(update={"simulate": data})

    def samples(self) -> SampleSource:
        """The simulations to train on."""
        return self.pairs()[0]

    def held_out(self) -> Pairs:
        """The simulations held out."""
        return self.pairs()[1]

    def event_shape(self) -> tuple[int, ...]:
        """Of θ."""
        return tuple(self.pairs()[0].theta.shape[1:])

    def network_options(self) -> dict[str, Any]:
        """One observation, of the shape of x."""
        shape = tuple(self.pairs()[0].x.shape[1:])
        return {"max_observations": 1, "stationary": False, "nodes": 1, "observed_shape": shape}

    def fit(self, nodes: int) -> Fitted:
        """θ at the one node."""
        train = self.pairs()[0]
        spread = train.theta.std(0)
        if not bool((spread > 0).all()):
            raise InputError("a coordinate of θ is the same in all simulations: leave it out")
        if float(spread.max() / spread.min()) > UNLIKE:
            warn_caller(
                f"coordinates of θ spread from {float(spread.min()):.3g} to {float(spread.max()):.3g}, and one scale "
                "serves all: let simulate return them in units in which they spread alike"
            )
        return Fitted(torch.zeros(1), train.theta[:, None], 1, train.x)

    def describe(self) -> str:
        """How many simulations, of what."""
        train = self.pairs()[0]
        return f"{self.num:,} simulations: θ {tuple(train.theta.shape[1:])}, x {tuple(train.x.shape[1:])}"


@lru_cache(maxsize=1)
def _simulated(simulate: Simulate, num: int) -> tuple[Pairs, Pairs]:
    train, held = (_checked(simulate(n, stream(0, "simulate", part))) for part, n in enumerate((num, num // 10 + 1)))
    return train, held


def _checked(made: object) -> Pairs:
    """What a simulator returned, as pairs."""
    if not isinstance(made, tuple) or len(made) != 2:
        raise InputError(f"simulate must return (θ, x), got {type(made).__name__}")
    theta, x = (torch.as_tensor(part) for part in made)
    if theta.ndim < 2 or x.ndim < 2 or len(theta) != len(x):
        raise InputError(f"simulate must return θ (n, d) and x (n, k), got {tuple(theta.shape)}, {tuple(x.shape)}")
    theta, x = theta.float(), x.float()
    bad = int((~(theta.isfinite().flatten(1).all(1) & x.isfinite().flatten(1).all(1))).sum())
    if bad:
        raise InputError(f"{bad:,} of {len(theta):,} simulations are not finite: let simulate leave such pairs out")
    return Pairs(theta, x)
