r"""Independent trajectories under a controlled drift: the part that all guided methods share.

A guide estimates the shift ``D*_t(x) − D_t(x)`` (see :mod:`metaflowmaps.value`); the processes turn it into a step.

    ODE (Eq. 39)   dx = (b + c_t (D* − D)) dt,  c_t = β̇ − β α̇/α         the same as b + (σ²/2)∇V, and regular at t = 0
    SDE (Eq. 38)   x_u ~ N(keep · x + data · D*, std²)                     the memoryless bridge with x_1 held at D*

The bridge integrates the linear part of the SDE exactly over a step and starts at t = 0, where σ² is infinite. Its
second-order form averages D* over both ends of the step, with one and the same noise; towards t = 1 it loses a
logarithm, h² log(1/h).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum, positive
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.path import Path
from metaflowmaps.sampling import INTEGRATORS
from metaflowmaps.steering.problem import Info, Problem

PROCESSES = ("ode", "sde")
RENORMALIZATIONS = ("none", "clip", "rescale")
SDE_INTEGRATORS = ("euler", "heun")


class Guide(Protocol):
    """How one method estimates the shift."""

    def start(self, problem: Problem) -> Any:
        """A memory for one chunk of trajectories, or None."""
        ...

    def guide(self, problem: Problem, memory: Any, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        """b_t(x), the shift D* − D, and what to report, (B,) each."""
        ...


class Control(NamedTuple):
    """How the shift acts."""

    process: str = "ode"
    integrator: str = "euler"
    renormalize: str = "none"
    sigma_cap: float | None = None  # σ² at most this, as the release has it (50)
    renormalize_to: float = 1.0  # clip: at most, rescale: exactly so many times ‖b‖

    def checked(self) -> "Control":
        """Refuse unknown names."""
        for kind, given, allowed in (
            ("process", self.process, PROCESSES),
            ("renormalize", self.renormalize, RENORMALIZATIONS),
            ("integrator", self.integrator, tuple(INTEGRATORS) if self.process == "ode" else SDE_INTEGRATORS),
        ):
            if given not in allowed:
                raise unknown(kind, given, allowed)
        if self.sigma_cap is not None:
            positive(self.sigma_cap, "sigma_cap")
        positive(self.renormalize_to, "renormalize_to")
        if self.renormalize_to != 1 and self.renormalize == "none":
            raise InputError("renormalize_to says how far clip and rescale go: set renormalize to one of them")
        return self


class Guided:
    """init: noise. step: one step of the controlled process. finish: the state itself."""

    copies = 1
    default_grid = "uniform"

    def __init__(self, guide: Guide, control: Control) -> None:
        self.guide, self.control = guide, control.checked()

    def init(self, problem: Problem, x: Tensor) -> "_State":
        return _State(x, self.guide.start(problem))

    def step(self, problem: Problem, state: "_State", t: float, u: float) -> tuple["_State", Info]:
        infos: list[Info] = []

        def controlled(t: float, x: Tensor) -> tuple[Tensor, Tensor]:
            drift, shift, info = self.guide.guide(problem, state.memory, t, x)
            steering, info["scale"] = steering_term(problem.path, self.control, t, drift, shift)
            infos.append({**info, "drift_norm": _norm(drift), "steering_norm": _norm(steering)})
            return drift, steering

        if self.control.process == "ode":
            x = _ode_step(problem.path, self.control.integrator, controlled, t, u, state.x)
        else:
            x = _sde_step(problem, self.control.integrator, controlled, t, u, state.x)
        return _State(x, state.memory), infos[0]

    def finish(self, problem: Problem, state: "_State") -> tuple[Tensor, Info]:
        return state.x, {}


class _State(NamedTuple):
    x: Tensor
    memory: Any


Controlled = Callable[[float, Tensor], tuple[Tensor, Tensor]]


def _ode_step(path: Path, integrator: str, controlled: Controlled, t: float, u: float, x: Tensor) -> Tensor:
    def field(t: Any, x: Tensor) -> Tensor:
        drift, steering = controlled(float(t), x)
        return drift + steering

    # methods that look at the end of the step would meet c_1 = ∞: their last step is a midpoint step
    if u == 1 and integrator in ("heun", "rk4"):
        integrator = "midpoint"
    t_, dt = torch.tensor(t, dtype=torch.float64), torch.tensor(u - t, dtype=torch.float64)
    return INTEGRATORS[integrator].step(field, t_, dt, x)


def _sde_step(problem: Problem, integrator: str, controlled: Controlled, t: float, u: float, x: Tensor) -> Tensor:
    path, bridge = problem.path, problem.path.bridge(t, u)

    def target(t: float, x: Tensor) -> Tensor:
        drift, steering = controlled(t, x)
        return problem.denoise(t, x, drift + steering)

    noise = bridge.std.to(x) * problem.noise("sde", len(x))
    ahead = target(t, x)
    x_u = bridge.keep.to(x) * x + bridge.data.to(x) * ahead + noise
    if integrator == "heun" and float(path.alpha(u)) > 0:
        ahead = (ahead + target(u, x_u)) / 2
        x_u = bridge.keep.to(x) * x + bridge.data.to(x) * ahead + noise
    return x_u


def steering_term(path: Path, control: Control, t: float, drift: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """c_t (D* − D) after σ²-cap and renormalisation, and the factor that these applied, (B,)."""
    gain = float(path.tilt_gain(t))
    if control.sigma_cap is not None:
        gain *= min(1.0, control.sigma_cap / float(path.sigma_squared(t))) if t > 0 else 0.0
    steering = gain * shift
    if control.renormalize == "none":
        return steering, torch.ones_like(shift.flatten(1)[:, 0])
    size, base = _norm(steering), control.renormalize_to * _norm(drift)
    scale = base / size.clamp_min(torch.finfo(size.dtype).tiny)
    if control.renormalize == "clip":
        scale = scale.clamp_max(1)
    scale = torch.where(size > 0, scale, torch.ones_like(scale))  # a zero stays a zero
    return steering * scale.reshape(-1, *([1] * (shift.ndim - 1))), scale


def _norm(x: Tensor) -> Tensor:
    return event_sum(x.square()).sqrt()
