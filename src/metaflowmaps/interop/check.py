r"""Does a wrapped network speak the convention that it was wrapped in?

Of all functions of x_t the posterior mean E[x_1 | x_t] comes nearest to x_1. So a network that was trained well misses
its data by less when it is read as it was trained than when it is read in any other way: with its output negated or
taken for another kind of prediction, its time reversed, its clock scaled by 1000. All of these readings are tried on
noised examples; one that misses by far less than the given one is what was meant. Without examples the check sees less:
at the noise end nothing is known of the data, so predicted data may not follow the noise, and the network's own
samples, noised, must come back nearer than their mean is.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, expand_time, select_cond
from metaflowmaps.errors import InputError
from metaflowmaps.interop.foreign import PREDICTIONS, ForeignModel, Prediction, _Network
from metaflowmaps.interop.schedules import PathSchedule
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.checked import MOODY

TIMES = (0.3, 0.5, 0.8)
EXAMPLES = 64
STEPS = 20  # of the samples that are looked at
CLEARLY_LESS = 0.75  # an exact network misses least as it was trained; one half trained may do so by a hair elsewhere
NEARLY_NOISE, FOLLOWS = 0.03, 0.8  # there ∂D/∂x is (β/α²) Var: .03 for data of spread 1, .8 for a spread of 5
WORSE_THAN_THE_MEAN = 1.5  # of the data's variance; their mean alone misses by 1
OUT_OF_RANGE = 3.0  # of the data's own reach


class Reading(NamedTuple):
    """One convention: the model that reads the network so, and what one would type for it."""

    model: ForeignModel
    fix: str


@torch.no_grad()
def looks_wrong(model: ForeignModel, data: Tensor | None = None, cond: Cond = None) -> str | None:
    """What looks wrong in a wrapped model, in one line; None where nothing does.

    Args:
        model: as ``mfm.wrap`` made it.
        data: examples (n, *event), or None.
        cond: their conditions.
    """
    if any(module.training and isinstance(module, MOODY) for module in model.network.modules()):
        return "the network is in training mode, where dropout draws at random: call network.eval()"
    made = None if data is not None and model._event_shape is None else _samples(model, data, cond)
    if made is not None and not bool(made.isfinite().all()):
        return (
            f"the drift carries noise to numbers that are not finite: check predicts, time and schedule {_said(model)}"
        )
    examples = made if data is None else data[:EXAMPLES].to(model.device, model.dtype)
    assert examples is not None
    if data is not None and tuple(examples.shape[1:]) != tuple(model._event_shape or examples.shape[1:]):
        raise InputError(f"examples have shape {tuple(examples.shape[1:])}, the model's samples {model.event_shape}")
    cond = select_cond(cond, slice(len(examples)))
    if data is not None and (better := _better(model, examples, cond)) is not None:
        return better
    own, what = _miss(model, examples, cond), "its own samples" if data is None else "the data"
    if not own < WORSE_THAN_THE_MEAN:
        return (
            f"predicted data miss {what} by {own:.2g} of their variance, which is worse than their mean {_said(model)}"
        )
    if data is None:
        return _follows(model, examples, cond)
    return None if made is None else _against(made, examples)


def _better(model: ForeignModel, examples: Tensor, cond: Cond) -> str | None:
    """Is there a reading that misses the data by far less?"""
    own, misses = _miss(model, examples, cond), {}
    for reading in _readings(model):
        with suppress(Exception):  # a network may refuse the clock of another reading
            misses[reading.fix] = _miss(reading.model, examples, cond)
    best = min((miss for miss in misses.values() if miss == miss), default=math.inf)
    if not best < CLEARLY_LESS * own:
        return None
    # of those that are as good, the one that changes least
    fix = min((fix for fix, miss in misses.items() if miss < 1.1 * best), key=lambda fix: fix.count(","))
    return f"predicted data miss the data by {own:.2g} of their variance, with {fix} by {best:.2g}: wrap it so"


def _follows(model: ForeignModel, like: Tensor, cond: Cond) -> str | None:
    """Do predicted data follow the noise where there is hardly anything else?"""
    noise = randn(tuple(like.shape), stream(0, "check-end"), like.dtype, like.device)
    t, (label, _) = (
        torch.full((len(like),), NEARLY_NOISE, dtype=like.dtype, device=like.device),
        model._conditions(cond, like),
    )
    data = model.means(t, noise, label, (cond or {}).get("mask"))[1]
    slope = float(((data - data.mean(0)) * noise).mean())
    if abs(slope) < FOLLOWS:
        return None
    return (
        f"where x is noise, predicted data follow it with slope {slope:.2g}, not 0: is the output negated, the time "
        f"reversed, time_scale 1 or 1000? {_said(model)}; check(data) tells which"
    )


def _samples(model: ForeignModel, data: Tensor | None, cond: Cond) -> Tensor:
    """What the drift carries noise to."""
    n = EXAMPLES if data is None else min(len(data), EXAMPLES)
    return model.generate(n, STEPS, stream(0, "check"), select_cond(cond, slice(n)))


def _against(made: Tensor, examples: Tensor) -> str | None:
    """Samples against examples: do they lie where these lie?"""
    middle, spread = examples.mean(), examples.std()
    reach, theirs = (made - middle).abs().max(), (examples - middle).abs().max()
    if reach > OUT_OF_RANGE * theirs:
        low, high = float(examples.min()), float(examples.max())
        return (
            f"the drift carries noise as far as {float(reach):.3g} from the mean, the data reach {float(theirs):.3g}: "
            f"check schedule, or hold predicted data in their range with clip=({low:.3g}, {high:.3g})"
        )
    if (made.mean() - middle).abs() > spread or not spread / OUT_OF_RANGE < made.std() < OUT_OF_RANGE * spread:
        return (
            f"the drift carries noise to mean {float(made.mean()):.3g} and spread {float(made.std()):.3g}, the data "
            f"have {float(middle):.3g} and {float(spread):.3g}: check time and schedule, and the scale of the data"
        )
    return None


def _miss(model: ForeignModel, x_1: Tensor, cond: Cond) -> float:
    """E‖D − x_1‖² over the variance of x_1, a mean over times."""
    g, total = stream(0, "check-noise"), 0.0
    label, _ = model._conditions(cond, x_1)
    variance = (x_1 - x_1.mean(0)).square().mean().clamp_min(1e-12)
    for time in TIMES:
        t = torch.full((len(x_1),), time, dtype=x_1.dtype, device=x_1.device)
        noise = randn(tuple(x_1.shape), g, x_1.dtype, x_1.device)
        x_t = expand_time(model.path.alpha(t), x_1) * noise + expand_time(model.path.beta(t), x_1) * x_1
        data = model.means(t, x_t, label, (cond or {}).get("mask"))[1]
        total += float((data - x_1).square().mean() / variance)
    return total / len(TIMES)


def _readings(model: ForeignModel) -> Iterator[Reading]:
    """Every other reading of the same network."""
    given, schedule, network = model.prediction, model.schedule, model.network
    if not isinstance(network, _Network):  # of two times: its convention is an object's
        return
    times = [(schedule, "")]
    if isinstance(schedule, PathSchedule):
        other = PathSchedule(schedule.path, not schedule.data_at_1)
        times.append((other, f"time='data-at-{int(other.data_at_1)}'"))
    for read, time in times:
        for factor in (1.0, 1000.0, 1e-3):
            scale = f"time_scale={network.scale * factor:g}" if factor != 1 else ""
            with_clock = _remembering(network, network.scale * factor)
            for name, prediction in PREDICTIONS.items():
                if name == "velocity" and not read.velocity:
                    continue
                kind = "" if prediction is given else f"predicts='{name}'"
                for negated in (False, True):
                    sign = "its output negated" if negated else ""
                    fix = ", ".join(part for part in (kind, time, scale, sign) if part)
                    if fix:
                        yield Reading(
                            _read(model, with_clock, _signed(prediction) if negated else prediction, read), fix
                        )


def _remembering(network: _Network, scale: float) -> Any:
    """The network at another scale of its clock, evaluated once for all readings of one input."""
    return _Remembering(network.network, scale, network.fixed)


class _Remembering(_Network):
    """A network whose last answers are kept: readings of its output share them."""

    def __init__(self, network: Any, scale: float, fixed: Any) -> None:
        super().__init__(network, scale, fixed)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, y: Tensor, clock: Tensor, label: Tensor | None, mask: Tensor | None = None) -> Tensor:
        for at, time, out in self._kept:
            if torch.equal(at, y) and torch.equal(time, clock):
                return out
        out = super().forward(y, clock, label, mask)
        self._kept.append((y, clock, out))
        return out


def _read(model: ForeignModel, network: Any, prediction: Prediction, schedule: Any) -> ForeignModel:
    made = ForeignModel(network, prediction, schedule, model._event_shape, model.num_classes)
    made.path = model.path
    return made


def _signed(prediction: Prediction) -> Prediction:
    return prediction._replace(means=lambda y, f, view: prediction.means(y, -f, view))


def _said(model: ForeignModel) -> str:
    """The reading that was given."""
    name = next((name for name, known in PREDICTIONS.items() if known is model.prediction), "?")
    return f"(predicts={name!r}, time_scale={getattr(model.network, 'scale', 1.0):g})"
