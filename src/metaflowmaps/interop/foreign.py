r"""Networks trained elsewhere as drifts: ``wrap`` turns any flow or diffusion network into a model that steers.

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
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Time, as_numbers, batch_time, check_state, check_time, expand_time, positive
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import CONDITIONS, Cond
from metaflowmaps.path import Path, as_path, make_path

PREDICTS = ("velocity", "noise", "data", "score", "v")
TIMES = ("data-at-1", "data-at-0")
SMALLEST = 1e-3


class View(NamedTuple):
    """What a network sees at one information: weights of noise and data, its clock, and their rates by that clock."""

    a: Tensor
    b: Tensor
    clock: Tensor
    rates: tuple[Tensor, Tensor] | None = None


class Schedule(Protocol):
    """Where a network finds a ratio of data to noise; ``velocity``: whether its clock has rates."""

    velocity: bool

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        """The view with b/a = beta/alpha: (B,) tensors, alpha² + beta² = 1."""
        ...


class PathSchedule:
    """One of our paths, its clock running to data or from it."""

    velocity = True

    def __init__(self, path: Path, data_at_1: bool) -> None:
        self.path, self.data_at_1 = path, data_at_1

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        path, t = self.path, self.path.time_of_ratio(beta, alpha)
        sign = 1 if self.data_at_1 else -1
        rates = (sign * path.alpha_dot(t), sign * path.beta_dot(t))
        return View(path.alpha(t), path.beta(t), t if self.data_at_1 else 1 - t, rates)


class TableSchedule:
    """Diffusion steps k with ᾱ_k, ``y = √ᾱ_k x_1 + √(1−ᾱ_k) ε``; between steps log(b/a) is linear in k."""

    velocity = False

    def __init__(self, alphas_cumprod: Tensor, data_at_1: bool) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().cpu().clone()
        noisy, beside = (0, 1) if data_at_1 else (-1, -2)
        if len(table) >= 2 and table[noisy] < 1e-6:  # a last step of pure noise may be lifted past the one before it
            table[noisy] = torch.minimum(table[noisy], table[beside] / 2)
        inside = bool(((table >= 0) & (table < 1)).all()) and len(table) >= 2
        steps = table.diff()
        if not inside or not bool((steps < 0).all() if not data_at_1 else (steps > 0).all()):
            order = "rise" if data_at_1 else "fall"
            raise InputError(
                f"a schedule of diffusion steps must {order} within [0, 1) for time='data-at-{int(data_at_1)}': "
                "give alphas_cumprod with the other time, or check the numbers"
            )
        table = table.clamp_min(1e-12)  # a last step of pure noise
        self.logs = (table / (1 - table)).log() / 2
        self.rising = data_at_1

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        logs, last = self.logs.to(beta.device), len(self.logs) - 1
        logs = logs if self.rising else logs.flip(0)
        wanted = (beta.double().clamp_min(1e-30).log() - alpha.double().clamp_min(1e-30).log()).clamp(logs[0], logs[-1])
        left = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, last - 1)
        k = left + (wanted - logs[left]) / (logs[left + 1] - logs[left])
        b = torch.sigmoid(2 * wanted).sqrt()
        a = torch.sigmoid(-2 * wanted).sqrt()
        clock = k if self.rising else last - k
        return View(a.to(beta), b.to(beta), clock.to(beta))


class ExplodingSchedule:
    """``y = x_1 + σ ε`` with σ as the clock (EDM, variance exploding), up to ``largest``."""

    velocity = False

    def __init__(self, largest: float = 80.0, smallest: float = 2e-3) -> None:
        self.largest, self.smallest = largest, smallest

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        sigma = (alpha / beta.clamp_min(1e-30)).clamp(self.smallest, self.largest)
        return View(sigma, torch.ones_like(sigma), sigma)


class _Network(nn.Module):
    """The callable with its clock scaled, its label named and its output unwrapped: a module, for the meter.

    It is fed in the dtype of its weights, and answers in that of the state.
    """

    def __init__(self, network: Callable[..., Any], scale: float, label: str, fixed: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.scale, self.label, self.fixed = network, scale, label, fixed
        self.named_clock = _takes(network, "timestep")  # in diffusers it is not always the second

    def forward(self, y: Tensor, clock: Tensor, label: Tensor | None) -> Tensor:
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), y.dtype)
        named = {} if label is None else {self.label: label}
        named |= {name: _rows(value, len(y)) for name, value in self.fixed.items()}
        clock = clock * self.scale
        if self.named_clock:  # which embeds it in float32
            out = self.network(y.to(own), timestep=clock, **named)
        else:
            out = self.network(y.to(own), clock.to(own), **named)
        out = getattr(out, "sample", out)  # diffusers' own wrapper
        out = out[0] if isinstance(out, tuple | list) and out else out
        if not isinstance(out, Tensor) or out.shape[:1] != y.shape[:1]:
            raise InputError(
                f"the wrapped network must return a tensor or an object with .sample, got {type(out).__name__}"
            )
        if (
            out.ndim == y.ndim and out.shape[1] == 2 * y.shape[1]
        ):  # a learned variance, as DiT has: the mean comes first
            out = out[:, : y.shape[1]]
        if out.shape != y.shape:
            raise InputError(f"the wrapped network returns {tuple(out.shape)} for states of {tuple(y.shape)}")
        return out.to(y.dtype)


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
    """A drift of our conventions around a network of others: what ``steer`` and GLASS ask of a model.

    With classes, ``cond`` may hold "label" (``num_classes`` is the null class) and "guidance" w, by which the drift is
    guided, ``b_∅ + w (b_y − b_∅)``.
    """

    def __init__(
        self,
        network: _Network,
        predicts: str,
        schedule: Schedule,
        path: Path,
        event_shape: tuple[int, ...] | None,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.network, self.predicts, self.schedule = network, predicts, schedule
        self.path, self.num_classes = path, num_classes
        self._event_shape = event_shape

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
        """b_t(x), guided where ``cond`` says so: (B, *event)."""
        check_state(x, "x", self._event_shape)
        check_time(t)
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # weights need more than eight bits
        return self._guided(batch_time(t, x), x, cond).to(given)

    def _guided(self, t: Tensor, x: Tensor, cond: Cond) -> Tensor:
        for key, value in (cond or {}).items():
            if key not in CONDITIONS:
                raise unknown("condition", key, CONDITIONS)
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"condition {key!r} must be a tensor of shape ({len(x)},), got {shown}")
        label, scale = (cond or {}).get("label"), (cond or {}).get("guidance")
        if label is None:
            if scale is not None:
                raise InputError("guidance needs a label to guide towards: give cond['label'] too")
            null = torch.full_like(t, self.num_classes, dtype=torch.int64) if self.num_classes else None
            return self._drift(t, x, null)
        if not self.num_classes:
            raise InputError("this network was wrapped without classes: wrap(…, num_classes=N), or leave the label out")
        if label.is_floating_point() or bool(((label < 0) | (label > self.num_classes)).any()):
            raise InputError(
                f"labels must be whole numbers in 0..{self.num_classes} ({self.num_classes} is the null class)"
            )
        out = self._drift(t, x, label)
        if scale is None or bool((scale == 1).all()):
            return out
        null = self._drift(t, x, torch.full_like(label, self.num_classes))
        return null + expand_time(scale, x) * (out - null)

    def means(self, t: Tensor, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E[ε | x] and E[x_1 | x] at (t, x)."""
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        length = (alpha**2 + beta**2).sqrt()
        alpha, beta = alpha / length, beta / length
        if self.predicts in ("data", "score"):
            alpha = alpha.clamp_min(SMALLEST)
        if self.predicts in ("noise", "score"):
            beta = beta.clamp_min(SMALLEST)
        view = self.schedule.at(alpha, beta)
        a, b = expand_time(view.a, x), expand_time(view.b, x)
        y = x * (a**2 + b**2).sqrt() / expand_time(length, x)
        f = self.network(y, view.clock, label)
        if self.predicts == "data":
            return (y - b * f) / a, f
        if self.predicts == "v":
            return (a * y + b * f) / (a**2 + b**2), (b * y - a * f) / (a**2 + b**2)
        if self.predicts == "velocity":
            assert view.rates is not None, "wrap refuses schedules without rates"
            a_dot, b_dot = (expand_time(rate, x) for rate in view.rates)
            area = a * b_dot - a_dot * b
            return (b_dot * y - b * f) / area, (a * f - a_dot * y) / area
        noise = f if self.predicts == "noise" else -a * f
        return noise, (y - a * noise) / b

    def _drift(self, t: Tensor, x: Tensor, label: Tensor | None) -> Tensor:
        noise, data = self.means(t, x, label)
        return expand_time(self.path.alpha_dot(t), x) * noise + expand_time(self.path.beta_dot(t), x) * data


def wrap(
    network: Callable[..., Any],
    predicts: str = "velocity",
    time: str = "data-at-1",
    schedule: Any = "linear",
    *,
    event_shape: tuple[int, ...] | None = None,
    num_classes: int = 0,
    label: str = "label",
    time_scale: float = 1.0,
    path: Path | str = "linear",
    **fixed: Any,
) -> ForeignModel:
    """A model that drift-only methods steer, and maps can be distilled from, around ``network(x, time, …)``.

    - ``predicts``: "velocity" (by the network's clock), "noise", "data", "score" or "v"
    - ``time``: at which end its clock has the data
    - ``schedule``: "linear", "trigonometric" or a path; "ddpm" (1,000 steps, β from 1e-4 to .02), other
      ``alphas_cumprod``, or what has them, such as a diffusers scheduler; "exploding" (the clock is σ), or
      ("exploding", largest σ)
    - ``time_scale`` multiplies the clock (1000 for the flow transformers of diffusers)
    - ``label`` is the argument that labels are passed as; ``fixed`` are others, always the same, tensors (1, …) for
      every row; ``path`` is ours
    - ``event_shape`` may be left out for networks of diffusers, whose configuration has it
    """
    if predicts not in PREDICTS:
        raise unknown("prediction", predicts, PREDICTS)
    if time not in TIMES:
        raise unknown("time", time, TIMES)
    if not callable(network):
        raise InputError(f"network must be callable as network(x, time), got {type(network).__name__}")
    found = _schedule(schedule, time)
    if predicts == "velocity" and not found.velocity:
        raise InputError(
            "a velocity is by a clock in [0, 1] on a path: for diffusion steps or σ, predicts='v' or 'noise'"
        )
    if not isinstance(time_scale, int | float) or not math.isfinite(time_scale) or time_scale == 0:
        raise InputError(f"time_scale must be a finite number other than 0, got {time_scale}")
    if not isinstance(num_classes, int) or num_classes < 0:
        raise InputError(f"num_classes must be a whole number >= 0, got {num_classes!r}")
    return ForeignModel(
        _Network(network, float(time_scale), label, fixed),
        predicts,
        found,
        make_path(path) if isinstance(path, str) else as_path(path),
        _event_shape(network) if event_shape is None else tuple(event_shape),
        num_classes,
    )


def _event_shape(network: Any) -> tuple[int, ...] | None:
    """(channels, side, side), as networks of diffusers have them in their configuration."""
    config = getattr(network, "config", None)
    channels, side = (getattr(config, name, None) for name in ("in_channels", "sample_size"))
    if not isinstance(channels, int) or side is None:
        return None
    return (channels, *side) if isinstance(side, tuple | list) else (channels, side, side)


def _schedule(given: Any, time: str) -> Schedule:
    data_at_1 = time == "data-at-1"
    table = getattr(given, "alphas_cumprod", given)
    if isinstance(given, str) and given == "ddpm":
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    listed = isinstance(table, list | tuple) and len(table) and not isinstance(table[0], str)
    if isinstance(table, Tensor | np.ndarray) or listed:
        return TableSchedule(as_numbers(table, "alphas_cumprod"), data_at_1)
    if isinstance(given, Path):
        return PathSchedule(given, data_at_1)
    name, *options = given if isinstance(given, tuple) else (given,)
    if name == "exploding":
        if data_at_1:
            raise InputError("σ is 0 at the data: give time='data-at-0' with schedule='exploding'")
        if len(options) > 1:
            raise InputError(f"schedule=('exploding', largest σ) takes one number, got {len(options)}")
        return ExplodingSchedule(*(positive(option, "the largest σ") for option in options))
    if options or name not in ("linear", "trigonometric"):
        shown = given if isinstance(given, str | tuple) else type(given).__name__
        raise unknown("schedule", shown, ("linear", "trigonometric", "ddpm", "exploding", "a tensor alphas_cumprod"))
    return PathSchedule(make_path(name), data_at_1)
