"""Steered samples of one cell of an image experiment: a variant, run on a setup, cut to size."""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.setup import ImageSetup
from metaflowmaps.lab.evaluate.variants import Variant, variant
from metaflowmaps.path import LinearPath
from metaflowmaps.steering import ODE, Method, Process, SteerResult, steer
from metaflowmaps.steering.diagnostics import without_pilot_pool

PARTICLES = 64  # of a system, where nobody says
CHUNK = 64  # rows of state at a time on a processor: with their draws they should stay in its cache


def image_variant(name: str) -> Variant:
    """A variant as image experiments run it: particles in systems of their own size, whatever fits on a device."""
    v = variant(name)
    if v.method.exact:
        raise InputError(f"{name!r} needs a model that knows its value function, and no map of images does")
    return v.using({"particles": PARTICLES}) if v.method.system is None else v


def labels_of(name: str, labels: Tensor | None) -> Tensor | None:
    """The class of each returned sample: a particle system has one, that of its first."""
    system = image_variant(name).method.system or 1
    if labels is None or system == 1:
        return labels
    systems = -(-len(labels) // system)
    return labels[:systems].repeat_interleave(system)[: len(labels)]


def run(
    setup: ImageSetup,
    v: Variant,
    reward: Any,
    n: int,
    process: Process,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> tuple[Tensor, SteerResult]:
    """Samples of a variant, cut to n: a particle system comes whole. ``labels``: as :func:`labels_of` gives them."""
    system = v.method.system or 1
    whole = -(-n // system) * system
    small = setup.model.device.type == "cpu" or setup.latent
    rows = CHUNK * v.method.copies if small else None
    if system > 1 and labels is not None:  # rows of several systems would lie interleaved
        rows = system
        labels = torch.cat([labels, labels[-1:].expand(whole - n)])
    with setup.autocast():
        result = quiet_steer(
            setup.model,
            reward,
            whole,
            v.method,
            v.process(process),
            cond=setup.cond(labels, whole),
            seed=generator,
            batch_size=rows,
        )
    return result.samples[:n], result


class _Toy(nn.Module):
    """A network of one number, to count a method's calls on."""

    event_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, z: Tensor, *_: Tensor) -> Tensor:
        return self.weight * z


def calls(v: Variant, n: int, steps: int) -> int:
    """Network evaluations of n samples: counts grow by a constant a step and a row, told by two trials."""
    rows = v.method.system or 1
    three, four = (_trial(v.method, v.process(ODE(steps=k)), rows) for k in (3, 4))
    return -(-n // rows) * (three + (steps - 3) * (four - three))


@cache
def _trial(method: Method, process: Process, rows: int) -> int:
    toy = MetaFlowMap(_Toy(), LinearPath())
    result = quiet_steer(toy, lambda x: 1e-3 * x.flatten(1).sum(1), rows, method, process, seed=0)
    return int(result.cost["forwards"])


def quiet_steer(*args: Any, **kwargs: Any) -> SteerResult:
    """``steer`` for one cell of many: whole or interrupted, and without its warnings, which the tables answer."""
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore", UserWarning)
        result = steer(*args, **kwargs)
    if result.interrupted:  # it returns what is finished; here a cell is whole or there is none
        raise KeyboardInterrupt
    return result
