r"""The processes that carry noise to samples under a steered drift.

A method estimates the **shift** ``D*_t(x) − D_t(x)`` (:mod:`metaflowmaps.value`); a process turns it into a step.

    ODE (Eq. 39)   dx = (b + c_t (D* − D)) dt,  c_t = β̇ − β α̇/α         the same as b + (σ²/2)∇V, and regular at t = 0
    SDE (Eq. 38)   x_u ~ N(keep · x + data · D*, std²)                     the memoryless bridge with x_1 held at D*

The bridge integrates the linear part of the SDE exactly over a step and starts at t = 0, where σ² is infinite. Its
second-order form averages D* over both ends of the step, with one and the same noise; towards t = 1 it loses a
logarithm, h² log(1/h).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum, positive
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.path import Path
from metaflowmaps.sampling import GRIDS, INTEGRATORS, time_grid
from metaflowmaps.work.choices import Choice

if TYPE_CHECKING:
    from metaflowmaps.steering.problem import SteeringProblem

STEPS = 250  # where nobody says: the paper's
SteeredDrift = Callable[[float, Tensor], tuple[Tensor, Tensor]]  # (t, x) -> b_t(x), what steering adds to it


@dataclass(frozen=True)
class Process(Choice, ABC):
    """How a steered drift moves the state, and on which times.

    Args:
        steps: K, intervals of the time grid.
        grid: uniform, power, log-snr, or K + 1 times that end at 1; None is what the method prefers.
        integrator: of one step.
        renormalize: none; clip or rescale the steering term to ``renormalize_to`` times ‖b‖ (leaves the theory).
        renormalize_to: how far clip and rescale go.
        sigma_cap: σ² at most this for methods that follow gradients, as the release has it for MFM-G (50).
    """

    kind: ClassVar[str] = "process"
    integrators: ClassVar[tuple[str, ...]]

    steps: int = STEPS
    grid: str | Sequence[float] | None = None
    integrator: str = "euler"
    renormalize: str = "none"
    renormalize_to: float = 1.0
    sigma_cap: float | None = None

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        if self.integrator not in self.integrators:
            raise unknown("integrator", self.integrator, self.integrators)
        if self.renormalize not in ("none", "clip", "rescale"):
            raise unknown("renormalize", self.renormalize, ("none", "clip", "rescale"))
        if isinstance(self.grid, str) and self.grid not in GRIDS:
            raise unknown("grid", self.grid, GRIDS)
        if self.sigma_cap is not None:
            positive(self.sigma_cap, "sigma_cap")
        positive(self.renormalize_to, "renormalize_to")
        if self.renormalize_to != 1 and self.renormalize == "none":
            raise InputError("renormalize_to says how far clip and rescale go: set renormalize to one of them")

    def times(self, path: Path, preferred: str) -> list[float]:
        """The K + 1 times, on the grid that was asked for or else the preferred one."""
        grid = preferred if self.grid is None else self.grid
        asked = grid if isinstance(grid, str) else torch.as_tensor(grid, dtype=torch.float64)
        times: list[float] = time_grid(path, asked, self.steps).tolist()
        return times

    @abstractmethod
    def step(self, problem: "SteeringProblem", drift: SteeredDrift, t: float, u: float, x: Tensor) -> Tensor:
        """x at time u from x at time t: (B, *event)."""

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of these options that are not left at their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def steering_term(self, path: Path, t: float, drift: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """c_t (D* − D) after σ²-cap and renormalisation, and the factor that these applied, (B,)."""
        gain = float(path.tilt_gain(t))
        if self.sigma_cap is not None:
            gain *= min(1.0, self.sigma_cap / float(path.sigma_squared(t))) if t > 0 else 0.0
        steering = gain * shift
        if self.renormalize == "none":
            return steering, torch.ones_like(shift.flatten(1)[:, 0])
        size, base = event_norm(steering), self.renormalize_to * event_norm(drift)
        scale = base / size.clamp_min(torch.finfo(size.dtype).tiny)
        if self.renormalize == "clip":
            scale = scale.clamp_max(1)
        scale = torch.where(size > 0, scale, torch.ones_like(scale))  # a zero stays a zero
        return steering * scale.reshape(-1, *([1] * (shift.ndim - 1))), scale


@dataclass(frozen=True)
class ODE(Process):
    """dx = (b + c_t (D* − D)) dt (Eq. 39); integrators euler, midpoint, heun, rk4.

    Examples:
        >>> process = mfm.ODE(steps=50, grid="power", integrator="heun")
        >>> process.steps
        50
    """

    name = "ode"
    integrators = tuple(INTEGRATORS)

    def step(self, problem: "SteeringProblem", drift: SteeredDrift, t: float, u: float, x: Tensor) -> Tensor:
        """One step of the integrator."""

        def field(t: Any, x: Tensor) -> Tensor:
            base, steering = drift(float(t), x)
            return base + steering

        # methods that look at the end of the step would meet c_1 = ∞: their last step is a midpoint step
        late = u == 1 and self.integrator in ("heun", "rk4")
        integrator = INTEGRATORS["midpoint" if late else self.integrator]
        t_, dt = torch.tensor(t, dtype=torch.float64), torch.tensor(u - t, dtype=torch.float64)
        return integrator.step(field, t_, dt, x)


@dataclass(frozen=True)
class SDE(Process):
    """The memoryless SDE (Eq. 38) by its bridge; integrators euler, heun.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.MFMGF(num_draws=4)
        >>> result = mfm.steer(model, reward, 64, method, mfm.SDE(steps=20), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "sde"
    integrators = ("euler", "heun")

    def step(self, problem: "SteeringProblem", drift: SteeredDrift, t: float, u: float, x: Tensor) -> Tensor:
        """keep · x + data · D* + std ξ."""
        path, bridge = problem.path, problem.path.bridge(t, u)

        def target(t: float, x: Tensor) -> Tensor:
            base, steering = drift(t, x)
            return problem.denoise(t, x, base + steering)

        noise = bridge.std.to(x) * problem.noise("sde", len(x))
        ahead = target(t, x)
        x_u = bridge.keep.to(x) * x + bridge.data.to(x) * ahead + noise
        if self.integrator == "heun" and float(path.alpha(u)) > 0:
            ahead = (ahead + target(u, x_u)) / 2
            x_u = bridge.keep.to(x) * x + bridge.data.to(x) * ahead + noise
        return x_u


def event_norm(x: Tensor) -> Tensor:
    """‖x‖ of each sample: (B, *event) -> (B,)."""
    return event_sum(x.square()).sqrt()
