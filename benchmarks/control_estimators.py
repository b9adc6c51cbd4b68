r"""Bias and variance of a tuned drift, on a task in the plane whose optimal drift is known.

Samples of a Gaussian mixture are to reach a goal and to keep clear of obstacles, with corridors between them: the
reward is neither linear nor Gaussian, the tilted law has two lobes around an obstacle, and yet everything about it can
be computed. Given (t, x), the base's posterior p(x_1 | x_t) is a mixture of Gaussians N(m_k, C_k) with weights π_k, so
that ratios of integrals over it,

    V_t(x) = log E[e^r]        D*_t(x) = E[x_1 e^r]/E[e^r]        b* = b + c_t (D* − D),    c_t = β̇ − β α̇/α

follow by quadrature: the trapezoidal rule on a grid that is whitened by each component, so that it shrinks with the
posterior and is as accurate late, where the posterior is narrower than any fixed grid, as it is early. For smooth
rewards its error falls faster than any power of the spacing: with 64 nodes a side drifts here are off by at most 2e-5
(Gauss–Hermite nodes, which reach far into tails that carry nothing: 2e-3), with 96 by 2e-8.

Drifts b̂_1 … b̂_S of independent runs are judged at **probes**: states of the tilted law's own marginals, at inner
times that are uniform as in training, in the chart coordinates F in which drifts are learned:

    variance = mean over states of Σ_s ‖b̂_s − b̄‖²/(S − 1)      b̄ = mean over seeds
    bias²    = mean over states of ‖b̄ − b*‖² − variance/S       (without the last term the mean's own noise counts)
    total    = bias² + variance = mean over states and seeds of ‖b̂_s − b*‖²

**Of a target** v with weight w, the drift that a regression without limits would find is E[w v]/E[w]: its distance to
b* is the target's bias, whatever network learns from it. Its noise, as that regression feels it, is
E[w² ‖v − E[w v]/E[w]‖²]/E[w]².
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metaflowmaps._shapes import Time, batch_time, positive
from metaflowmaps.data import Mixture
from metaflowmaps.draws import Draws
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_problem import BaseStates, TuningProblem, in_parts, student_flow
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.parameterization import Chart
from metaflowmaps.path import Path
from metaflowmaps.random import noise, randn, stream
from metaflowmaps.rewards.base import Cond

# -- the task ----------------------------------------------------------------------------------------------------------

# three wide components that meet in the arena
LAW = Mixture(means=[[-1.8, -0.6], [0.4, 1.7], [1.2, -1.6]], covariances=[1.0, 0.8, 0.9], weights=[0.4, 0.3, 0.3])
DATA_STD = 1.64  # of a coordinate
GOAL, REACH = (1.9, 0.2), 1.2
OBSTACLES = ((1.8, 0.2, 0.4), (2.8, 0.9, 0.35), (0.8, -0.5, 0.35))  # x, y, radius; the first stands before the goal
DEPTH = 0.75  # of an obstacle, in units of the goal's height
STRENGTH = 10.0  # leaves an effective share of 7.6 % of the law's samples


class Navigation:
    """r(x) = −λ (1 − e^{−‖x − goal‖²/2s²} + depth Σ_j e^{−‖x − c_j‖²/2ρ_j²}): at most 0, and flat far away."""

    differentiable = True

    def __init__(self, strength: float = STRENGTH) -> None:
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        bumps = torch.tensor([(*GOAL, REACH), *OBSTACLES], dtype=x.dtype, device=x.device)
        apart = (x[:, None] - bumps[:, :2]).square().sum(2)
        height = torch.exp(-0.5 * apart / bumps[:, 2].square())
        return -self.strength * (1 - height[:, 0] + DEPTH * height[:, 1:].sum(1))

    def __repr__(self) -> str:
        return f"Navigation(strength={self.strength:g})"


class PlaneReward(Protocol):
    """Any reward on the plane: (n, 2) -> (n,)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Exact:
    """A mixture in the plane under any smooth reward: values, drifts and samples, in float64.

    ``nodes`` a side for each component, over REACHED of its standard deviations either way.
    """

    ROWS = 2**21  # reward calls at a time
    ROUNDS = 1000  # of 131,072 proposals each, before sampling gives up
    REACHED = 8.0  # beyond it a normal has 1e-15, and no reward here multiplies that by more than e^17

    def __init__(self, law: GaussianMixture, path: Path, reward: PlaneReward, nodes: int = 96) -> None:
        if law.dim != 2:
            raise InputError(f"the quadrature is for the plane, got a law in {law.dim} dimensions")
        self.law, self.path, self.reward = law, path, reward
        line = torch.linspace(-self.REACHED, self.REACHED, nodes, dtype=torch.float64)
        self.nodes = torch.cartesian_prod(line, line)
        self.log_weights = (-0.5 * self.nodes.square().sum(1)).log_softmax(0)

    def value(self, t: Time, x: Tensor) -> Tensor:
        """V_t(x): (B,), differentiable in x."""
        return torch.cat([value for value, _ in self._tilted(t, x, lambda x_1: x_1)])

    def denoise(self, t: Time, x: Tensor) -> Tensor:
        """D*_t(x), the mean of the tilted posterior: (B, 2)."""
        return torch.cat([mean for _, mean in self._tilted(t, x, lambda x_1: x_1)])

    def drift(self, t: Time, x: Tensor) -> Tensor:
        """b*_t(x): (B, 2). (The base's own is ``law.drift``.)"""
        x = x.double()
        return self.path.from_denoise(t, x, self.denoise(t, x), "drift")

    def mean_reward(self) -> float:
        """E[r] under the tilted law."""
        origin = torch.zeros(1, 2, dtype=torch.float64)
        ((_, mean),) = self._tilted(0.0, origin, lambda x_1: self.reward(x_1)[:, None])
        return float(mean)

    def log_evidence(self) -> float:
        """log E[e^r] under the law."""
        return float(self.value(0.0, torch.zeros(1, 2, dtype=torch.float64)))

    def ess_share(self) -> float:
        """E[e^r]²/E[e^{2r}]: the effective share of the law's samples under the tilt."""
        twice = Exact(self.law, self.path, lambda x: 2 * self.reward(x), math.isqrt(len(self.nodes)))
        return math.exp(2 * self.log_evidence() - twice.log_evidence())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact samples of the tilted law, by rejection from the law: (n, 2) float64."""
        ceiling, kept, have = self._ceiling(), [], 0
        for _ in range(self.ROUNDS):
            x = self.law.sample(2**17, generator).double()
            accept = self.reward(x) - ceiling
            if bool((accept > 0).any()):
                raise InputError("the reward is higher somewhere than on its grid: it is not smooth enough")
            uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
            kept.append(x[uniform.log() < accept])
            have += len(kept[-1])
            if have >= n:
                return torch.cat(kept)[:n]
        raise InputError(f"only {have} of {n} samples were accepted: the reward asks for what the law hardly has")

    def _ceiling(self) -> float:
        """An upper bound of r where the law has samples, from a fine grid; samples above it would be refused."""
        spread = 7 * self.law.covariances.diagonal(dim1=-2, dim2=-1).sqrt()
        low, high = (self.law.means - spread).amin(0), (self.law.means + spread).amax(0)
        unit = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 601, dtype=torch.float64)])
        r = self.reward(low + (high - low) * unit)
        return float(r.max()) + 0.01 * float(r.max() - r.min())

    def _tilted(self, t: Time, x: Tensor, f: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """log E[e^r] and E[f e^r]/E[e^r] under the posteriors of (t, x), some rows at a time."""
        x = x.double()
        times = batch_time(t, x)
        for part in in_parts(len(x), max(1, self.ROWS // (len(self.nodes) * len(self.law.means)))):
            posterior = self.law.posterior(self.path, times[part], x[part])
            factor = torch.linalg.cholesky(posterior.covariances)  # (B, K, 2, 2)
            x_1 = posterior.means[:, :, None] + torch.einsum("bkde,qe->bkqd", factor, self.nodes)
            flat = x_1.flatten(0, 2)
            prior = self.log_weights + posterior.weights.clamp_min(1e-300).log()[..., None]
            logits = prior + self.reward(flat).reshape(prior.shape)
            logits = logits.flatten(1)
            yield logits.logsumexp(1), torch.einsum("bq,bqd->bd", logits.softmax(1), f(flat).reshape(*logits.shape, -1))


# -- where drifts are judged -------------------------------------------------------------------------------------------


class Probes(NamedTuple):
    """States (t, x), (a, z) in the chart, with exact answers as F; everything float64."""

    t: Tensor
    x: Tensor
    a: Tensor
    z: Tensor
    chart: Chart
    base: Tensor  # F of the law's drift b
    tilted: Tensor  # F of b*
    gain: Tensor  # (n, 1): by how much D moves when F moves by 1

    def carried(self, velocity: Tensor) -> Tensor:
        """A drift at the probes as F."""
        return self.chart.velocity_in(self.t, self.x, velocity.double())


def make_probes(exact: Exact, model: MetaFlowMap, n: int, last: float, seed: int = 0) -> Probes:
    """n states of the tilted law's marginals, inner times uniform below ``last``, in the chart of a model."""
    g, path = stream(seed, "probes", n), exact.path
    x_1 = exact.sample(n, g)
    a = last * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chart = model.anchor(torch.zeros_like(a), torch.zeros_like(x_1)).chart
    t = chart.time_out(a)
    x = path.interpolate(randn((n, 2), g, torch.float64), x_1, t)

    def carried(velocity: Tensor) -> Tensor:
        return chart.velocity_in(t, x, velocity)

    # a drift is affine in F and D in the drift, both by one number a state
    step = chart.velocity_out(t, t, x, torch.ones_like(x)) - chart.velocity_out(t, t, x, torch.zeros_like(x))
    gain = step[:, :1] / path.tilt_gain(t)[:, None]
    base, tilted = exact.law.drift(path, t, x), exact.drift(t, x)
    return Probes(t, x, a, chart.state_in(t, x), chart, carried(base), carried(tilted), gain)


@torch.no_grad()
def drift_flow(model: MetaFlowMap, probes: Probes) -> Tensor:
    """F of a model's drift at the probes, float64."""
    a, z = (part.to(model.dtype) for part in (probes.a, probes.z))
    return student_flow(model, a, z, {}).double()


@torch.no_grad()
def implied_flow(model: MetaFlowMap, probes: Probes, draws: int = 128) -> Tensor:
    """F of the drift that a map's one-step draws imply, through their mean; quasi-random noise, the same every time."""
    t, x = probes.t.to(model.dtype), probes.x.to(model.dtype)
    eps = noise("quasi", draws, x, stream(0, "implied"))
    mean = torch.stack([model.push(e, t, x).double() for e in eps]).mean(0)
    return probes.carried(model.path.from_denoise(probes.t, probes.x, mean, "drift"))


# -- bias and variance -------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Mean over states of each; total = bias² + variance."""

    bias_squared: float
    variance: float
    total: float


def decomposed(estimates: Tensor, exact: Tensor, gain: Tensor | float = 1.0) -> Parts:
    """Bias² and variance of S independent estimates (S, n, d) of exact answers (n, d), each scaled by ``gain``."""
    runs = len(estimates)
    if runs < 2:
        raise InputError("a variance needs at least two independent estimates")
    error = (estimates - exact) * gain
    variance = float(error.var(0).sum(-1).mean())
    bias_squared = float(error.mean(0).square().sum(-1).mean()) - variance / runs
    return Parts(bias_squared, variance, bias_squared + variance)


class Targets(Protocol):
    """Regression targets from draws, as :class:`metaflowmaps.finetuning.mfm_ft.WeightedRegression` makes them."""

    def targets(self, states: BaseStates, draws: Draws, level: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class TargetParts(NamedTuple):
    """Bias² and variance of a target in F, means over the probes; ``error`` is the standard error of bias²."""

    bias_squared: float
    variance: float
    error: float


class TargetErrors(NamedTuple):
    """Of targets from N draws, alone (weight 1) and weighted."""

    plain: TargetParts
    weighted: TargetParts


@torch.no_grad()
def target_errors(
    problem: TuningProblem, objective: Targets, probes: Probes, made: Draws, num_draws: int, rows: int = 2**15
) -> TargetErrors:
    """Bias and variance of the targets that groups of ``num_draws`` of the draws (M, n, 2) give at the probes."""
    n, groups = len(probes.t), len(made.x_1) // num_draws
    if groups < 2:
        raise InputError(f"{len(made.x_1)} draws make less than two groups of {num_draws}: make more")
    targets, weights = [], []
    for part in in_parts(groups, max(1, rows // n)):
        count = part.stop - part.start

        def together(y: Tensor | None, part: slice = part, count: int = count) -> Any:
            if y is None:
                return None
            y = y[part.start * num_draws : part.stop * num_draws].reshape(count, num_draws, n, *y.shape[2:])
            return y.transpose(0, 1).flatten(1, 2)

        t, x = probes.t.to(made.x_1).repeat(count), probes.x.to(made.x_1).repeat(count, 1)
        states = problem.at(t, x, {})
        drawn = Draws(together(made.x_1), together(made.rewards), together(made.gradients))
        target, weight, _ = objective.targets(states, drawn, torch.zeros_like(t))
        targets.append(target.double().reshape(count, n, 2))
        weights.append(weight.double().reshape(count, n, 1))
    v, w = torch.cat(targets), torch.cat(weights)
    return TargetErrors(_of_ratio(v, torch.ones_like(w), probes.tilted), _of_ratio(v, w, probes.tilted))


def _of_ratio(v: Tensor, w: Tensor, exact: Tensor) -> TargetParts:
    """Of targets v (G, n, d) with weights w (G, n, 1): the bias of E[w v]/E[w], and how noisy one is (see above)."""
    groups, n = len(v), v.shape[1]
    ratio = (w * v).sum(0) / w.sum(0)
    # G/(G − 1): the ratio is that of these very targets
    spread = (
        (w.square() * (v - ratio).square()).sum((0, 2)) / w.sum(0).square()[:, 0] * groups * (groups / (groups - 1))
    )
    # the ratio itself scatters by spread/G, which is no bias
    each = (ratio - exact).square().sum(1) - spread / groups
    return TargetParts(float(each.mean()), float(spread.mean()), float(each.std() / math.sqrt(n)))


# -- samples -----------------------------------------------------------------------------------------------------------


class PlaneJudge:
    """Sliced W2 of samples to exact ones, as a ratio to that between two exact sets of the same size."""

    def __init__(self, exact: Exact, n: int, sets: int = 16, seed: int = 0) -> None:
        self.exact, self.n, self.along, self.curves = exact, n, directions(2), Curves()
        drawn = exact.sample(n * sets, stream(seed, "judge", n, sets))
        for part in drawn.split(n):
            self.curves.add(curves(part, self.along))
        self.floor = math.sqrt(self.curves.floor())

    def __call__(self, sets: Sequence[Tensor]) -> dict[str, Any]:
        """``ratio`` over all sets (of n samples each), mean ``reward``, and how many samples were ``lost``."""
        mine, lost, kept = Curves(), 0, []
        for x in sets:
            finite = x.isfinite().all(1)
            lost += int((~finite).sum())
            # left out, what is not finite would flatter the method: it counts as being at the origin
            whole = torch.where(finite[:, None], x, torch.zeros_like(x)).clamp(-1e6, 1e6)
            mine.add(curves(whole, self.along))
            kept.append(whole)
        sw2 = math.sqrt(max(0.0, mine.squared_distance(self.curves)))
        reward = float(self.exact.reward(torch.cat(kept).double()).mean())
        return {"sw2": sw2, "ratio": sw2 / self.floor, "reward": reward, "lost": lost}
