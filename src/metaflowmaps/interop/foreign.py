r"""Networks trained elsewhere as models: ``wrap`` turns any flow or diffusion network into one that steers.

Every such network looks at a mixture ``y = a ε + b x_1`` of noise and data, in weights (a, b) of its own, told by a
clock of its own, and predicts some combination of the two. Ours is ``x = α_t ε + β_t x_1``. Both hold the same
information where the ratios agree, ``b/a = β_t/α_t``; there

    y = c x,   c = √(a² + b²)/√(α_t² + β_t²)

and from its prediction f at (y, clock) follow the posterior means E = E[ε | x] and D = E[x_1 | x]:

    data      D = f                            E = (y − b D)/a
    noise     E = f                            D = (y − a E)/b
    score     E = −a f                         D = (y − a E)/b
    v         D = (b y − a f)/(a² + b²)        E = (a y + b f)/(a² + b²)          f = b E − a D
    velocity  D = (a f − ȧ y)/(a ḃ − ȧ b)      E = (ḃ y − b f)/(a ḃ − ȧ b)        f = ȧ E + ḃ D, dots by its clock

and the drift ``b_t(x) = α̇_t E + β̇_t D``, without a division by α or β of ours. Where a form divides by a (data), by b
(noise), or is infinite at both ends (score), the weights are held at 1e-3 or more: no network is trained beyond.

**Padding.** Samples of unlike sizes lie in one event shape, padded, with a ``mask`` in ``cond``, (B, *event) or its
first dimensions, that is 1 where a sample is. What is padded is data that are always 0: there D = 0 and E = x/α, and
the network sees 0. It is handed the mask where it has such an argument.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, Time, batch_time, check_count, check_state, check_time, expand_time, mask_over
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.interop.clipping import Clip, clip_of
from metaflowmaps.interop.schedules import Schedule, View, schedule_of
from metaflowmaps.path import LinearPath, Path
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import randn
from metaflowmaps.sampling import integrate, uniform_grid

TIMES = ("data-at-1", "data-at-0")
CONDITIONS = ("guidance", "label", "mask")
KINDS = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}  # as schedulers of diffusers call predictions
SMALLEST_WEIGHT = 1e-3
TINY = 1e-12
GLASS_STEPS = 30
LABELS = ("label", "class_labels", "y", "labels")  # what networks call the class that they are given


class Prediction(NamedTuple):
    """What a network predicts: ``means(y, f, view)`` are E and D, ``view`` holding the weights a and b.

    ``divides_by`` names the weights that it may not be without.
    """

    means: Callable[[Tensor, Tensor, View], tuple[Tensor, Tensor]]
    divides_by: str = ""


def _of_velocity(y: Tensor, f: Tensor, view: View) -> tuple[Tensor, Tensor]:
    a, b = view.a, view.b
    assert view.rates is not None, "wrap refuses schedules without rates"
    a_dot, b_dot = view.rates
    area = a * b_dot - a_dot * b
    return (b_dot * y - b * f) / area, (a * f - a_dot * y) / area


def _of_noise(y: Tensor, noise: Tensor, view: View) -> tuple[Tensor, Tensor]:
    return noise, (y - view.a * noise) / view.b


def _of_v(y: Tensor, f: Tensor, view: View) -> tuple[Tensor, Tensor]:
    a, b = view.a, view.b
    return (a * y + b * f) / (a**2 + b**2), (b * y - a * f) / (a**2 + b**2)


PREDICTIONS = {
    "velocity": Prediction(_of_velocity),
    "noise": Prediction(_of_noise, divides_by="b"),
    "data": Prediction(lambda y, f, view: ((y - view.b * f) / view.a, f), divides_by="a"),
    "score": Prediction(lambda y, f, view: _of_noise(y, -view.a * f, view), divides_by="ab"),
    "v": Prediction(_of_v),
}


class _Network(nn.Module):
    """The callable with its clock scaled, its label named and its output unwrapped: a module, for the meter.

    It is fed in the dtype of its weights, and answers in that of the state.
    """

    def __init__(self, network: Callable[..., Any], scale: float, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.scale, self.fixed = network, scale, fixed
        self.named_clock = _takes(network, "timestep")  # in diffusers it is not always the second
        self.label = next((name for name in LABELS if _takes(network, name)), LABELS[0])
        self.takes_mask = _takes(network, "mask")

    def forward(self, y: Tensor, clock: Tensor, label: Tensor | None, mask: Tensor | None = None) -> Tensor:
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), y.dtype)
        named = {} if label is None else {self.label: label}
        if mask is not None and self.takes_mask:
            named["mask"] = mask
        named |= {name: _rows(value, len(y)) for name, value in self.fixed.items()}
        clock = clock * self.scale
        if self.named_clock:  # which embeds it in float32
            out = self.network(y.to(own), timestep=clock, **named)
        else:
            out = self.network(y.to(own), clock.to(own), **named)
        return answer(out, y)


def answer(out: Any, y: Tensor) -> Tensor:
    """A network's answer to states y, unwrapped, in their dtype: (B, *event)."""
    out = getattr(out, "sample", out)  # diffusers' own wrapper
    out = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(out, Tensor) or out.shape[:1] != y.shape[:1]:
        raise InputError(
            f"the wrapped network must return a tensor or an object with .sample, got {type(out).__name__}"
        )
    if out.ndim == y.ndim and out.shape[1] == 2 * y.shape[1]:  # a learned variance: the mean comes first
        out = out[:, : y.shape[1]]
    if out.shape != y.shape:
        raise InputError(f"the wrapped network returns {tuple(out.shape)} for states of {tuple(y.shape)}")
    plain: Tensor = out.to(y.dtype)
    return plain


def _takes(network: Any, name: str) -> bool:
    """Has the callable an argument of that name?"""
    try:
        taken = inspect.signature(network.forward if isinstance(network, nn.Module) else network).parameters
    except (TypeError, ValueError):  # some callables do not say
        return False
    return name in taken


def _rows(value: Any, rows: int) -> Any:
    """What is given once, for every row: a tensor (1, …) as (rows, …)."""
    once = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
    return value.expand(rows, *value.shape[1:]) if once else value


class ForeignModel(nn.Module):
    """A model of our conventions around a network of others.

    It steers and can be distilled by its ``drift``, draws from posteriors by GLASS and generates by its ODE. With
    classes, ``cond`` may hold "label" (``num_classes`` is the null class) and "guidance" w, by which the drift is
    guided, ``b_∅ + w (b_y − b_∅)``. :func:`wrap` makes it. Its ``path`` is linear, and may be set to another one.

    Args:
        network: what is called at every time, with its labels and fixed arguments bound.
        prediction: what the network predicts.
        schedule: how its clock and its noise are ours.
        event_shape: the shape of one sample; None where it is not known.
        num_classes: how many classes it knows; the number itself is the null class.
        clip: holds the predicted data in their range; None leaves them.

    Examples:
        >>> model = mfm.wrap(lambda x, t: 0 * x, "velocity", event_shape=(2,))
        >>> type(model).__name__, model.drift(0.5, torch.ones(3, 2)).shape
        ('ForeignModel', torch.Size([3, 2]))
    """

    def __init__(
        self,
        network: nn.Module,
        prediction: Prediction,
        schedule: Schedule,
        event_shape: tuple[int, ...] | None,
        num_classes: int,
        clip: Clip | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.network, self.prediction, self.schedule = network, prediction, schedule
        self.path: Path = LinearPath()
        self.num_classes, self._event_shape = num_classes, event_shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        if self._event_shape is None:
            raise InputError("this network does not say the shape of its samples: wrap(…, event_shape=(C, H, W))")
        return self._event_shape

    @property
    def metered(self) -> nn.Module:
        """What is evaluated: twice for a guided drift."""
        return self.network

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states: that of the weights, where there are any, but float32 at least."""
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else torch.promote_types(first.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """The drift b_t(x), guided where ``cond`` says so.

        Args:
            t: A number, or (B,).
            x: (B, *event).
            cond: "label" (B,), "guidance" (B,) and "mask" (B, …), or None.

        Returns:
            (B, *event).
        """
        check_state(x, "x", self._event_shape)
        check_time(t)
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # weights need more than eight bits
        label, scale = self._conditions(cond, x)
        times, mask = batch_time(t, x), (cond or {}).get("mask")
        out = self._drift(times, x, label, mask)
        if scale is not None and not bool((scale == 1).all()):
            null = self._drift(times, x, None if label is None else torch.full_like(label, self.num_classes), mask)
            out = null + expand_time(scale, x) * (out - null)
        return out.to(given)

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        steps: int = GLASS_STEPS,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """Draws from p_{1|t}(· | x_t) by the drift's GLASS ODE, of ``steps`` evaluations: (num_draws, B, *event)."""
        draws = GlassPosterior(self.path, self.drift, steps).draw(t, x_t, num_draws, generator, cond)
        return _masked(draws, cond)

    @torch.no_grad()
    def generate(
        self, n: int, steps: int = GLASS_STEPS, generator: torch.Generator | None = None, cond: Cond = None
    ) -> Tensor:
        """Samples by the ODE of the drift, in Euler steps: (n, *event)."""
        check_count(n, "n")
        noise = randn((n, *self.event_shape), generator, self.dtype, self.device)
        return _masked(integrate(lambda t, x: self.drift(t, x, cond), noise, uniform_grid(steps)), cond)

    def check(self, data: Tensor | None = None, cond: Cond = None) -> str | None:
        """What looks wrong in the convention that the network was wrapped in, in one line; None where nothing does.

        Some twenty evaluations of each example (:mod:`metaflowmaps.interop.check`).

        Args:
            data: (n, *event), some dozens of examples like those of its training; None: samples of its own, which
                tell less.
            cond: conditions of these examples.
        """
        from metaflowmaps.interop.check import looks_wrong

        return looks_wrong(self, data, cond)

    def means(
        self, t: Tensor, x: Tensor, label: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E[ε | x] and E[x_1 | x] at t (B,) and x (B, *event)."""
        if mask is not None:
            kept = mask_over(mask, x)
            noise, data = self._means(t, x * kept, label, mask)
            padding = x * (1 - kept) / expand_time(self.path.alpha(t).clamp_min(TINY), x)
            return noise * kept + padding, data * kept
        return self._means(t, x, label)

    def _means(self, t: Tensor, x: Tensor, label: Tensor | None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        length = (alpha**2 + beta**2).sqrt()
        alpha, beta = alpha / length, beta / length
        if "a" in self.prediction.divides_by:
            alpha = alpha.clamp_min(SMALLEST_WEIGHT)
        if "b" in self.prediction.divides_by:
            beta = beta.clamp_min(SMALLEST_WEIGHT)
        view = self.schedule.at(alpha, beta).over(x)
        y = x * (view.a**2 + view.b**2).sqrt() / expand_time(length, x)
        noise, data = self.prediction.means(y, self.network(y, view.clock, label, mask), view)
        if self.clip is None:
            return noise, data
        data = self.clip(data)
        return (y - view.b * data) / view.a.clamp_min(SMALLEST_WEIGHT), data

    def _drift(self, t: Tensor, x: Tensor, label: Tensor | None, mask: Tensor | None = None) -> Tensor:
        noise, data = self.means(t, x, label, mask)
        return expand_time(self.path.alpha_dot(t), x) * noise + expand_time(self.path.beta_dot(t), x) * data

    def _conditions(self, cond: Cond, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The label, by default the null class where there are classes, and the scale of guidance."""
        for key, value in (cond or {}).items():
            if key not in CONDITIONS:
                raise unknown("condition", key, CONDITIONS)
            if key == "mask":
                mask_over(value, x)  # its shape
            elif not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"condition {key!r} must be a tensor of shape ({len(x)},), got {shown}")
        label, scale = (cond or {}).get("label"), (cond or {}).get("guidance")
        if label is None:
            if scale is not None:
                raise InputError("guidance needs a label to guide towards: give cond['label'] too")
            null = torch.full((len(x),), self.num_classes, device=x.device)
            return null if self.num_classes else None, None
        if not self.num_classes:
            raise InputError("this network was wrapped without classes: wrap(…, num_classes=N), or leave the label out")
        if label.is_floating_point() or bool(((label < 0) | (label > self.num_classes)).any()):
            raise InputError(
                f"labels must be whole numbers in 0..{self.num_classes} ({self.num_classes} is the null class)"
            )
        return label, scale


def _masked(x: Tensor, cond: Cond) -> Tensor:
    """Samples (…, B, *event) with 0 where they are padded."""
    mask = (cond or {}).get("mask")
    return x if mask is None else x * mask_over(mask, x if len(mask) == len(x) else x[0])


def wrap(
    network: Callable[..., Any],
    predicts: str = "velocity",
    time: str = "data-at-1",
    schedule: Any = None,
    *,
    event_shape: tuple[int, ...] | None = None,
    num_classes: int = 0,
    time_scale: float = 1.0,
    clip: Any = None,
    flow_map: Any = False,
    **fixed: Any,
) -> ForeignModel:
    """A model of any flow or diffusion network: to steer, to draw from by GLASS, to generate with, to distil.

    Args:
        network: ``network(x, time, …)``; networks of diffusers are called by their argument names.
        predicts: "velocity" (by the network's clock), "noise", "data", "score" or "v".
        time: The end at which its clock has the data, "data-at-1" or "data-at-0".
        schedule: How it mixes noise and data; a velocity's is "linear" where nothing is said, other predictions need
            one. "linear", "trigonometric" or a path; "ddpm" (1,000 steps, β from 1e-4 to .02), other
            ``alphas_cumprod``, or what has them, such as a diffusers scheduler; "exploding" (the clock is σ), or
            ("exploding", largest σ).
        event_shape: The shape of one sample; may be left out for networks of diffusers, whose configuration has it.
        num_classes: How many classes it knows; the number itself is the null class. They are passed as the argument
            ``label``, ``class_labels``, ``y`` or ``labels`` that it has.
        time_scale: Multiplies the clock (1000 for the flow transformers of diffusers).
        clip: Holds the predicted data in their range: c for [−c, c], (low, high), or ``mfm.DynamicThreshold()``.
        flow_map: For a network of two times, in place of predicts, time, schedule and time_scale: True where its
            arguments tell how it is called, an object of :mod:`metaflowmaps.interop.flow_maps`, such as
            ``MeanFlow(order="tr")``, or its name.
        fixed: Other arguments of the network, always the same; tensors (1, …) go to every row.

    Returns:
        A model whose drift is ``b_t(x) = α̇_t E[ε | x] + β̇_t E[x_1 | x]``; of a network of two times also with ``jump``,
        its map X_{s,u}.

    Examples:
        >>> def network(x, t):  # yours; here the velocity of data N(0, Id)
        ...     return ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None] * x
        >>> model = mfm.wrap(network, "velocity", time="data-at-1", event_shape=(2,))
        >>> model.generate(16, steps=4).shape
        torch.Size([16, 2])
        >>> method = mfm.Glass(num_draws=2, glass_steps=4)
        >>> result = mfm.steer(model, lambda x: x[:, 0], 16, method, mfm.ODE(steps=5), seed=0)
    """
    if flow_map is not False and flow_map is not None:
        conventions = (predicts, time, schedule, time_scale)
        return _flow_map(network, flow_map, conventions, event_shape, num_classes, fixed)
    if predicts not in PREDICTIONS:
        raise unknown("prediction", predicts, PREDICTIONS)
    if time not in TIMES:
        raise unknown("time", time, TIMES)
    if not callable(network):
        raise InputError(f"network must be callable as network(x, time), got {type(network).__name__}")
    if not isinstance(time_scale, int | float) or not math.isfinite(time_scale) or time_scale == 0:
        raise InputError(f"time_scale must be a finite number other than 0, got {time_scale}")
    if not isinstance(num_classes, int) or num_classes < 0:
        raise InputError(f"num_classes must be a whole number >= 0, got {num_classes!r}")
    if schedule is None and predicts != "velocity":
        raise InputError(
            f"predicts={predicts!r} does not say how the network mixes noise and data: give schedule=, a diffusers "
            "scheduler, 'ddpm', its alphas_cumprod, 'linear', 'trigonometric' or 'exploding'"
        )
    named = KINDS.get(str(getattr(getattr(schedule, "config", None), "prediction_type", None)), predicts)
    if named != predicts:
        raise InputError(f"this scheduler belongs to a network that predicts {named!r}: predicts={named!r}")
    chosen = schedule_of("linear" if schedule is None else schedule, time)
    if predicts == "velocity" and not chosen.velocity:
        raise InputError(
            "a velocity is by a clock in [0, 1] on a path: for diffusion steps or σ, predicts='v' or 'noise'"
        )
    return ForeignModel(
        _Network(network, float(time_scale), fixed),
        PREDICTIONS[predicts],
        chosen,
        _event_shape(network) if event_shape is None else tuple(event_shape),
        num_classes,
        clip_of(clip),
    )


def _flow_map(
    network: Callable[..., Any],
    flow_map: Any,
    conventions: tuple[Any, ...],
    event_shape: tuple[int, ...] | None,
    num_classes: int,
    fixed: Mapping[str, Any],
) -> ForeignModel:
    """The model of a two-time network, whose conventions are an object's."""
    from metaflowmaps.interop.flow_maps import convention_of  # which is built on this module
    from metaflowmaps.interop.flow_maps.model import FlowMap

    usual = tuple(inspect.signature(wrap).parameters[name].default for name in ("predicts", "time", "schedule"))
    if conventions != (*usual, 1.0):
        raise InputError(
            "a flow map's convention says what it predicts and how its times run: leave out predicts, time, schedule "
            "and time_scale, and give flow_map= an object, such as metaflowmaps.interop.flow_maps.MeanFlow(scale=1000)"
        )
    if not callable(network):
        raise InputError(f"network must be callable, got {type(network).__name__}")
    shape = _event_shape(network) if event_shape is None else tuple(event_shape)
    return FlowMap(network, convention_of(flow_map, network), shape, num_classes, fixed)


def _event_shape(network: Any) -> tuple[int, ...] | None:
    """(channels, side, side), as networks of diffusers have them in their configuration."""
    config = getattr(network, "config", None)
    channels, side = (getattr(config, name, None) for name in ("in_channels", "sample_size"))
    if not isinstance(channels, int) or side is None:
        return None
    return (channels, *side) if isinstance(side, tuple | list) else (channels, side, side)
