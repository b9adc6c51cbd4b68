r"""Losses: regressions that make a network the flow map of the auxiliary process (Eq. 33).

Written for a **flow** ``F_{a,b}(z)`` in chart coordinates, with ``Z_{a,b}(z) = z + (b − a) F_{a,b}(z)``
(:mod:`metaflowmaps.parameterization`: in the plain chart these are s, u, x̄, v, X themselves). Z is the flow map of
``dz/da = c_a(z)`` if and only if ``F_{a,a} = c_a`` and any one of

    Eulerian      ∂_a Z_{a,b} + c_a · ∇Z_{a,b} = 0     ⇔   F = c + (b − a)(∂_a + c·∇) F
    Lagrangian    ∂_b Z_{a,b}(z) = c_b(Z_{a,b}(z))
    semigroup     Z_{a,b} = Z_{w,b} ∘ Z_{a,w}

Each function returns ``‖prediction − sg[target]‖²`` per sample, (B,). Where the velocity c comes from is an argument:
a tensor of values at the sampled points (data targets ``α̇ ε + β̇ x̂``; a teacher; the flow itself), or, where the loss
needs it at a point that depends on the flow, a callable ``velocity(a, z)``.

A :class:`Consistency` is one of them as an object, its options its fields; a loss of your own derives from it.

Forward-mode AD: Eulerian takes its JVP under no_grad and regresses with an ordinary forward; Lagrangian must keep the
gradient through its JVP (with a stop-gradient there it is less accurate and can diverge). Both have a form by
differences that needs no JVP at all; its step h weighs h² of truncation against rounding/h (measured: docs/scale.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import event_sum, expand_time
from metaflowmaps.flow_map import Flow
from metaflowmaps.work.choices import Choice

Velocity = Callable[[Tensor, Tensor], Tensor]
Source = Literal["data", "teacher", "self"]  # of a velocity: data targets, a frozen teacher, the flow's own diagonal
Derivative = Literal["auto", "forward", "fused", "difference"]
Differentiates = Literal["no", "detached", "through", "differences"]
DifferenceStep = Annotated[float, Field(gt=0, lt=0.5)]


def diagonal(flow: Flow, a: Tensor, z: Tensor, target: Tensor) -> Tensor:
    """‖F_{a,a}(z) − c‖²."""
    return event_sum((flow(a, a, z) - target.detach()).square())


def eulerian(flow: Flow, a: Tensor, b: Tensor, z: Tensor, target: Tensor, h: float | None = None) -> Tensor:
    """‖F_{a,b}(z) − sg[c + (b−a)(∂_a + c·∇)F_{a,b}]‖²; with c = data it is MeanFlow (unbiased: linear in c).

    The derivative along (1, c) by JVP, or by differences of step h.
    """
    c = target.detach()
    if h is None:
        with torch.no_grad():
            _, tangent = _jvp(lambda a, z: flow(a, b, z), (a, z), (torch.ones_like(a), c))
        f = flow(a, b, z)
    else:
        f = flow(a, b, z)
        with torch.no_grad():
            tangent = _difference_along(flow, a, b, z, c, f.detach(), h)
    goal = c + expand_time(b - a, z) * tangent
    return event_sum((f - goal).square())


def _difference_along(flow: Flow, a: Tensor, b: Tensor, z: Tensor, c: Tensor, f: Tensor, h: float) -> Tensor:
    """(∂_a + c·∇)F_{a,b}(z) from f = F_{a,b}(z) and two more values in one call, error O(h²).

    With G(k) = F_{a+k,b}(z + k c) the parabola through G(0), G(p), G(q) has slope
    [(G(p) − G(0)) q/p − (G(q) − G(0)) p/q]/(q − p) at 0. The nodes are ∓k, the central difference, in which G(0)
    cancels; at an end of [0, b] they are both inside it, k and 2k or −k and −2k. So a jump is never asked for backwards
    or from before the noise. k = h, or b/3 where there is no room for more.
    """
    k = torch.minimum(torch.full_like(b, h), b / 3).clamp_min(torch.finfo(b.dtype).tiny ** 0.25)
    p, q = torch.where(a < k, 2 * k, -k), torch.where(a > b - k, -2 * k, k)
    states = torch.cat([z + expand_time(p, z) * c, z + expand_time(q, z) * c])
    starts = torch.minimum(torch.cat([a + p, a + q]).clamp_min(0), torch.cat([b, b]))  # rounding
    at_p, at_q = (flow(starts, torch.cat([b, b]), states) - torch.cat([f, f])).chunk(2)
    p, q = expand_time(p, z), expand_time(q, z)
    return (at_p * (q / p) - at_q * (p / q)) / (q - p)


def lagrangian(flow: Flow, a: Tensor, b: Tensor, z: Tensor, velocity: Velocity) -> Tensor:
    """‖∂_b Z_{a,b}(z) − sg c_b(sg Z_{a,b}(z))‖², ∂_b Z = F + (b−a) ∂_b F by JVP, gradient kept."""
    f, tangent = _jvp(lambda b: flow(a, b, z), (b,), (torch.ones_like(b),))
    jump = expand_time(b - a, z)
    with torch.no_grad():
        goal = velocity(b, z + jump * f)
    return event_sum((f + jump * tangent - goal).square())


def lagrangian_difference(flow: Flow, a: Tensor, b: Tensor, z: Tensor, velocity: Velocity, h: float = 5e-3) -> Tensor:
    """The same with ∂_b Z = (Z_{a,b+h} − Z_{a,b−h})/2h: two ordinary forwards in one call, error O(h²).

    The step shrinks so that b ± h stays in [a, 1]. Where b = a or b = 1 leaves no room, b itself moves inward by h
    (at most half of 1 − a): the identity holds at every b, so nothing is lost but the point.
    """
    room = (1 - a) / 2
    step = torch.minimum(torch.full_like(b, h), room)
    b = torch.minimum(torch.maximum(b, a + step), 1 - step)
    ahead, behind = flow(
        torch.cat([a, a]),
        torch.cat([torch.clamp_max(b + step, 1), torch.maximum(b - step, a)]),
        torch.cat([z, z]),
    ).chunk(2)
    step, jump = expand_time(step.clamp_min(1e-9), z), expand_time(b - a, z)
    # (Z_{b+h} − Z_{b−h})/2h, with z and the common part of the jumps cancelled by hand
    mean = (ahead + behind) / 2
    derivative = mean + jump * (ahead - behind) / (2 * step)
    with torch.no_grad():
        goal = velocity(b, z + jump * mean)
    return event_sum((derivative - goal).square())


def semigroup(flow: Flow, a: Tensor, b: Tensor, z: Tensor, gamma: Tensor) -> Tensor:
    """‖F_{a,b}(z) − sg[γ F_{a,w}(z) + (1−γ) F_{w,b}(Z_{a,w}(z))]‖², w = a + γ(b − a)."""
    w = a + gamma * (b - a)
    with torch.no_grad():
        first = flow(a, w, z)
        second = flow(w, b, z + expand_time(w - a, z) * first)
        g = expand_time(gamma, z)
        goal = g * first + (1 - g) * second
    return event_sum((flow(a, b, z) - goal).square())


def _jvp(f: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """f and its derivative along a direction, by forward-mode AD."""
    value, tangent = torch.func.jvp(f, at, along)[:2]
    return value, tangent


def adaptive_weight(loss: Tensor, c: float = 0.01, p: float = 0.5) -> Tensor:
    """sg[1/(‖Δ‖² + c)^p] (Eq. 73), for a (B,) tensor of squared errors."""
    return (loss.detach() + c) ** -p


# -- as objects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jumps:
    """Where a consistency loss looks: jumps from (a, z) to b.

    a, b and gamma (uniform on [0, 1], for losses that stop on the way) are (B,), z is (B, *event). ``h`` is the step of
    differences, None where derivatives are taken in forward mode.
    """

    a: Tensor
    b: Tensor
    z: Tensor
    gamma: Tensor
    h: float | None = None


class Consistency(Choice, ABC):
    """One of the identities that make a flow a flow map: a frozen dataclass whose fields are its options."""

    kind: ClassVar[str] = "consistency loss"
    # how it differentiates the network: not at all, by a JVP without or with a gradient through it, by differences
    differentiates: ClassVar[Differentiates] = "no"
    moves: ClassVar[bool] = False  # asks for the velocity at points that depend on the flow: no data target is one
    holds_diagonal: ClassVar[bool] = False  # at b = a it is the diagonal loss itself
    trains: ClassVar[bool] = True  # False: the diagonal alone is trained

    @property
    def source(self) -> Source | None:
        """Which velocity it asks for; None asks for none."""
        return None

    @abstractmethod
    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """The loss of each row.

        Args:
            flow: ``flow(a, b, z) -> F_{a,b}(z)``.
            jumps: where to look.
            velocity: ``velocity(a, z) -> c_a(z)`` from :attr:`source`; of data it is known at the jumps' start alone.

        Returns:
            (B,) squared errors, summed over a sample.
        """


@dataclass(frozen=True)
class NoConsistency(Consistency):
    """The diagonal alone: flow matching."""

    name = "none"
    trains = False

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """Zero, (B,)."""
        return torch.zeros_like(jumps.a)


@dataclass(frozen=True)
class Eulerian(Consistency):
    """:func:`eulerian` on a teacher's velocity or on the flow's own."""

    name = "eulerian"
    differentiates = "detached"

    velocity: Literal["teacher", "self"] = "teacher"
    derivative: Derivative = "auto"
    h: DifferenceStep | None = None  # None: 5e-3 in float32, 5e-2 in bf16

    @property
    def source(self) -> Source:
        """Its option ``velocity``."""
        return self.velocity

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """‖F_{a,b}(z) − sg[c + (b−a)(∂_a + c·∇)F_{a,b}]‖², (B,)."""
        with torch.no_grad():
            target = velocity(jumps.a, jumps.z)
        return eulerian(flow, jumps.a, jumps.b, jumps.z, target, jumps.h)


@dataclass(frozen=True)
class MeanFlow(Consistency):
    """:func:`eulerian` on data targets, in which it is linear: unbiased."""

    name = "mean-flow"
    differentiates = "detached"

    derivative: Derivative = "auto"
    h: DifferenceStep | None = None

    @property
    def source(self) -> Source:
        """Data."""
        return "data"

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """‖F_{a,b}(z) − sg[c + (b−a)(∂_a + c·∇)F_{a,b}]‖², c = data, (B,)."""
        return eulerian(flow, jumps.a, jumps.b, jumps.z, velocity(jumps.a, jumps.z), jumps.h)


@dataclass(frozen=True)
class Lagrangian(Consistency):
    """:func:`lagrangian`: by a JVP with a gradient through it, or by differences where that cannot be."""

    name = "lagrangian"
    differentiates = "through"
    moves = True

    velocity: Literal["teacher", "self"] = "teacher"
    derivative: Derivative = "auto"
    h: DifferenceStep | None = None

    @property
    def source(self) -> Source:
        """Its option ``velocity``."""
        return self.velocity

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """‖∂_b Z_{a,b}(z) − sg c_b(sg Z_{a,b}(z))‖², (B,)."""
        if jumps.h is None:
            return lagrangian(flow, jumps.a, jumps.b, jumps.z, velocity)
        return lagrangian_difference(flow, jumps.a, jumps.b, jumps.z, velocity, jumps.h)


@dataclass(frozen=True)
class LagrangianDifference(Consistency):
    """:func:`lagrangian_difference`: two ordinary calls, no forward-mode AD."""

    name = "lagrangian-difference"
    differentiates = "differences"
    moves = True
    holds_diagonal = True

    velocity: Literal["teacher", "self"] = "teacher"
    h: DifferenceStep | None = None

    @property
    def source(self) -> Source:
        """Its option ``velocity``."""
        return self.velocity

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """‖(Z_{a,b+h} − Z_{a,b−h})/2h − sg c_b(sg Z_{a,b}(z))‖², (B,)."""
        assert jumps.h is not None, "its derivative is a difference by definition"
        return lagrangian_difference(flow, jumps.a, jumps.b, jumps.z, velocity, jumps.h)


@dataclass(frozen=True)
class Semigroup(Consistency):
    """:func:`semigroup`: one jump is two; no velocity, no derivative."""

    name = "semigroup"

    def __call__(self, flow: Flow, jumps: Jumps, velocity: Velocity) -> Tensor:
        """‖F_{a,b}(z) − sg[γ F_{a,w}(z) + (1−γ) F_{w,b}(Z_{a,w}(z))]‖², (B,)."""
        return semigroup(flow, jumps.a, jumps.b, jumps.z, jumps.gamma)
