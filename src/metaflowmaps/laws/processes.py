r"""Processes whose posteriors given any observations are known: Gaussian ones, and mixtures of them.

A Gaussian process with mean m and covariance k, seen at times t_1 … t_M, has at r

    X_r | C ~ N(m(r) + gᵀ (x − m(t)), k(r, r) − gᵀ k(t, r)),    g = k(t, t)⁻¹ k(t, r)

for each coordinate (coordinates are independent and of one covariance). A mixture of processes has a mixture of these,
each weighted by the density of what was seen. Both come back as a :class:`GaussianMixture` with a row a context: its
drift on a path is the auxiliary drift of that context, exactly, whatever network there is to teach or to judge.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, positive
from metaflowmaps.context import Context, ordered
from metaflowmaps.errors import InputError
from metaflowmaps.laws.mixture import GaussianMixture

Kernel = Callable[[Tensor, Tensor], Tensor]  # covariance of X_t and X_u, elementwise
JITTER = 1e-10  # of the variance, on the diagonal of what is inverted in float64


class Conditioned(NamedTuple):
    """What Gaussian conditioning says of X_r."""

    shift: Tensor  # (B, D), of the mean
    variance: Tensor  # (B,)
    log_evidence: Tensor  # (B,), of what was seen; what is the same for every covariance is left out


def conditioned(among: Tensor, across: Tensor, variance: Tensor, residual: Tensor, mask: Tensor) -> Conditioned:
    """A Gaussian given others; those that are masked have no part in it.

    Args:
        among: (B, M, M) covariance of what was seen.
        across: (B, M) its covariance with X_r.
        variance: (B,) of X_r.
        residual: (B, M, D) what was seen less its mean, for D independent coordinates.
        mask: (B, M) bool.
    """
    both = mask[:, :, None] & mask[:, None, :]
    scale = JITTER * torch.where(mask, among.diagonal(dim1=1, dim2=2), 0.0).sum(1, keepdim=True).clamp_min(1e-30)
    among = torch.where(both, among, 0.0) + torch.diag_embed(torch.where(mask, scale, 1.0))
    across, residual = torch.where(mask, across, 0.0), torch.where(mask[:, :, None], residual, 0.0)
    factor = torch.linalg.cholesky(among)
    gain = torch.cholesky_solve(across[:, :, None], factor)
    white = torch.linalg.solve_triangular(factor, residual, upper=False)
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return Conditioned(
        (gain.mT @ residual)[:, 0],
        (variance - (gain[:, :, 0] * across).sum(1)).clamp_min(0),
        -0.5 * white.square().sum((1, 2)) - 0.5 * residual.shape[2] * log_det,
    )


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process on (d,) vectors of independent coordinates.

    Args:
        kernel: ``kernel(t, u)``, the covariance of a coordinate at two times, elementwise.
        mean: the mean of a coordinate at a time, elementwise; a number for a constant one.
        dim: d.
    """

    kernel: Kernel
    mean: Callable[[Tensor], Tensor] | float = 0.0
    dim: int = 1

    def mean_at(self, t: Tensor) -> Tensor:
        """m(t), elementwise, float64."""
        t = t.double()
        return self.mean(t) if callable(self.mean) else torch.full_like(t, self.mean)

    def covariance(self, t: Tensor, u: Tensor) -> Tensor:
        """k between times (…, M) and (…, N): (…, M, N), float64."""
        return self.kernel(t.double()[..., :, None], u.double()[..., None, :])

    def sample(self, times: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n paths at times (T,): (n, T, d)."""
        check_count(n, "n")
        among = self.covariance(times, times)
        eigenvalues, basis = torch.linalg.eigh(among)
        root = basis * eigenvalues.clamp_min(0).sqrt()
        noise = torch.randn(n, len(times), self.dim, generator=generator, dtype=torch.float64)
        paths: Tensor = self.mean_at(times)[:, None] + root @ noise
        return paths.to(torch.get_default_dtype())

    def given(self, context: Context | Mapping[str, Tensor]) -> GaussianMixture:
        """p(X_r | C), one mixture a row, differentiable in the values."""
        return ProcessMixture((self,)).given(context)

    def _conditioned(self, values: Tensor, times: Tensor, mask: Tensor, query: Tensor) -> Conditioned:
        among, across = self.covariance(times, times), self.covariance(times, query[:, None])[..., 0]
        variance = self.covariance(query[:, None], query[:, None])[:, 0, 0]
        return conditioned(among, across, variance, values - self.mean_at(times)[:, :, None], mask)


class ProcessMixture:
    """One of several processes, chosen once a path.

    Args:
        processes: the Gaussian processes.
        weights: of each, summing to one; None for equal ones.
    """

    def __init__(self, processes: Sequence[GaussianProcess], weights: Sequence[float] | None = None) -> None:
        self.processes = tuple(processes)
        weights = weights or [1 / len(self.processes)] * len(self.processes)
        if len(weights) != len(self.processes) or abs(sum(weights) - 1) > 1e-6 or min(weights) <= 0:
            raise InputError(f"weights must be {len(self.processes)} positive numbers that sum to 1, got {weights}")
        if len({process.dim for process in self.processes}) != 1:
            raise InputError("the processes of a mixture must have one dim")
        self.weights, self.dim = tuple(weights), self.processes[0].dim

    def sample(self, times: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n paths at times (T,): (n, T, d)."""
        edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)[:-1].contiguous()
        chosen = torch.searchsorted(edges, torch.rand(n, generator=generator, dtype=torch.float64), right=True)
        paths = torch.stack([process.sample(times, n, generator) for process in self.processes])
        return paths[chosen, torch.arange(n)]

    def given(self, context: Context | Mapping[str, Tensor]) -> GaussianMixture:
        """p(X_r | C), one mixture a row, differentiable in the values."""
        cond = context.conditions() if isinstance(context, Context) else context
        seen, query, dtype = ordered(cond), cond["query"].double(), cond["values"].dtype
        parts = [p._conditioned(seen.values.double(), seen.times, seen.mask, query) for p in self.processes]
        shifted = zip(parts, self.processes, strict=True)
        means = torch.stack([part.shift + process.mean_at(query)[:, None] for part, process in shifted], 1)
        smallest = 1e-12 * max(float(part.variance.max()) for part in parts) + 1e-24
        variances = torch.stack([part.variance.clamp_min(smallest) for part in parts], 1)
        evidence = torch.stack([part.log_evidence for part in parts], 1)
        log_weights = (torch.tensor(self.weights, dtype=torch.float64).log() + evidence).log_softmax(1)
        return GaussianMixture._of(means, variances[:, :, None].expand_as(means), None, log_weights, dtype)


# -- named ones --------------------------------------------------------------------------------------------------------


def ornstein_uhlenbeck(rate: float = 1.0, std: float = 1.0, mean: float = 0.0, dim: int = 1) -> GaussianProcess:
    """The stationary solution of dX = −rate (X − mean) dt + noise: covariance std² e^{−rate |t − u|}."""
    rate, variance = positive(rate, "rate"), positive(std, "std") ** 2
    return GaussianProcess(lambda t, u: variance * torch.exp(-rate * (t - u).abs()), mean, dim)


def brownian(std: float = 1.0, dim: int = 1) -> GaussianProcess:
    """Brownian motion from 0 at t = 0: covariance std² min(t, u)."""
    variance = positive(std, "std") ** 2
    return GaussianProcess(lambda t, u: variance * torch.minimum(t, u), 0.0, dim)


def integrated_brownian(std: float = 1.0, dim: int = 1) -> GaussianProcess:
    """The integral of Brownian motion from 0: covariance std² a² (3b − a)/6 with a <= b the two times."""
    variance = positive(std, "std") ** 2

    def kernel(t: Tensor, u: Tensor) -> Tensor:
        a, b = torch.minimum(t, u), torch.maximum(t, u)
        return variance * a**2 * (3 * b - a) / 6

    return GaussianProcess(kernel, 0.0, dim)


def autoregressive(first: float, second: float, std: float = 1.0, dim: int = 1) -> GaussianProcess:
    """The stationary X_t = first X_{t−1} + second X_{t−2} + N(0, 1)-noise, scaled to ``std``; times are whole numbers.

    Its correlations follow ρ_h = first ρ_{h−1} + second ρ_{h−2} from ρ_0 = 1, ρ_1 = first/(1 − second).
    """
    if not (abs(second) < 1 and abs(first) < 1 - second):
        raise InputError(f"first={first:g}, second={second:g} have no stationary law: |second| < 1 and |first| < 1 − s")
    matrix = torch.tensor([[first, second], [1.0, 0.0]], dtype=torch.float64)
    start, variance = torch.tensor([1.0, first / (1 - second)], dtype=torch.float64), positive(std, "std") ** 2

    def kernel(t: Tensor, u: Tensor) -> Tensor:
        lag = (t - u).abs().round().long()
        state, table = start, []  # ρ_h and ρ_{h−1}, where ρ_{−1} = ρ_1
        for _ in range(int(lag.max()) + 1 if lag.numel() else 0):
            table.append(state[0])
            state = matrix @ state
        return variance * torch.stack(table)[lag] if table else variance * t.new_zeros(lag.shape)

    return GaussianProcess(kernel, 0.0, dim)


def two_ornstein_uhlenbecks(rate: float = 1.0, apart: float = 3.0) -> ProcessMixture:
    """Paths about +apart/2 or −apart/2, of spread 1/2: bimodal until enough is seen."""
    levels = (-apart / 2, apart / 2)
    return ProcessMixture([ornstein_uhlenbeck(rate, 0.5, level) for level in levels])


PROCESSES: dict[str, Callable[..., GaussianProcess | ProcessMixture]] = {
    "ou": ornstein_uhlenbeck,
    "brownian": brownian,
    "integrated-brownian": integrated_brownian,
    "ar2": autoregressive,
    "ou-mixture": two_ornstein_uhlenbecks,
}
