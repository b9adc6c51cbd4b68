r"""The Gaussian answer to a context: what a Gaussian process with the data's mean and covariance says of X_r.

A process is described at K nodes in time, linearly between them and constantly beyond: X̃_t = Σ_k h_k(t) X_{τ_k}. Its
mean and covariance are those of the data, one covariance for all coordinates, so with ``Σ = R Rᵀ`` at the nodes

    k(t, u) = (h(t)ᵀ R)(h(u)ᵀ R)ᵀ        m(C), τ(C)²: the mean and the variance of X̃_r given what was seen

is positive whatever the data were. A map in the gaussian parameterisation whitens by m(C), τ(C): it is then the exact
answer for Gaussian data plus a residual, of several observations as it is of one noisy state. Where r is among the
observed times τ = 0 and the map returns the observation, whatever its network says.
"""

import torch
from torch import Tensor, nn

from metaflowmaps.context import Observations, beside
from metaflowmaps.laws.processes import conditioned

LEAST_SPREAD = 3e-3  # τ over the spread of X_r: below, the data's covariance is not known so well


class ProcessPrior(nn.Module):
    """Mean and covariance of a process at ``nodes`` times; one node is a constant law, which observations do not move.

    Args:
        nodes: K.
        event_shape: of X_r.
    """

    nodes: Tensor
    mean: Tensor
    root: Tensor

    def __init__(self, nodes: int, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("nodes", torch.linspace(0, 1, nodes) if nodes > 1 else torch.zeros(1))
        self.register_buffer("mean", torch.zeros(nodes, *event_shape))
        self.register_buffer("root", torch.eye(nodes))

    @torch.no_grad()
    def fit(self, nodes: Tensor, paths: Tensor) -> None:
        """Take mean and covariance from paths (n, K, *event) at the nodes (K,).

        The covariance is shrunk towards its diagonal by K/(K + n): fewer paths than nodes know no inverse.
        """
        count, size = paths.shape[:2]
        around = (paths - paths.mean(0)).double().flatten(2).transpose(0, 1).flatten(1)
        covariance = around @ around.T / around.shape[1]
        share, diagonal = size / (size + count), covariance.diagonal().diag_embed()
        eigenvalues, basis = torch.linalg.eigh((1 - share) * covariance + share * diagonal)
        root = basis * eigenvalues.clamp_min(1e-12 * float(eigenvalues.max())).sqrt()
        for buffer, value in ((self.nodes, nodes), (self.mean, paths.mean(0)), (self.root, root)):
            buffer.copy_(value)

    def given(self, seen: Observations, query: Tensor) -> tuple[Tensor, Tensor]:
        """m(C) (B, *event) and τ(C) (B,), differentiable in what was seen."""
        at_query, root = self.mean_at(query[:, None])[:, 0], self._rows(query[:, None])[:, 0]
        variance = root.square().sum(1)
        if len(self.nodes) == 1:
            return at_query, variance.sqrt().to(at_query.dtype).expand(len(query))
        rows = self._rows(seen.times)
        residual = (seen.values - self.mean_at(seen.times)).double().flatten(2)
        answer = conditioned(rows @ rows.mT, (rows @ root[:, :, None])[:, :, 0], variance, residual, seen.mask)
        mean = at_query + answer.shift.to(at_query.dtype).reshape(at_query.shape)
        std = torch.maximum(answer.variance, LEAST_SPREAD**2 * variance).sqrt().to(mean.dtype)
        return _returned(seen, query, mean, std)

    def mean_at(self, times: Tensor) -> Tensor:
        """m(t): (B, M) -> (B, M, *event)."""
        left, right, part = self._between(times)
        before, after = self.mean[left], self.mean[right]
        return torch.lerp(before, after, beside(part.to(before), before))

    def spread_at(self, times: Tensor) -> Tensor:
        """The standard deviation of X_t: (B, M) -> (B, M)."""
        return self._rows(times).square().sum(-1).sqrt().to(self.mean.dtype)

    def _rows(self, times: Tensor) -> Tensor:
        """h(t)ᵀ R, float64: (B, M) -> (B, M, K)."""
        left, right, part = self._between(times)
        root = self.root.double()
        return (1 - part)[..., None] * root[left] + part[..., None] * root[right]

    def _between(self, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes on either side of a time, and how far it is from the left one to the right one."""
        nodes, times = self.nodes.double(), times.double().contiguous()
        right = torch.searchsorted(nodes, times, right=True).clamp(min(1, len(nodes) - 1), len(nodes) - 1)
        left = (right - 1).clamp_min(0)
        part = ((times - nodes[left]) / (nodes[right] - nodes[left]).clamp_min(1e-30)).clamp(0, 1)
        return left, right, part


def _returned(seen: Observations, query: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Where r is an observed time, the observation and 0."""
    hit = seen.mask & (seen.times == query[:, None])  # one place at most: of equal times one was kept
    there = hit.any(1)
    values, wide = (seen.values * beside(hit, seen.values)).sum(1), there.reshape(-1, *([1] * (mean.ndim - 1)))
    return torch.where(wide, values, mean), torch.where(there, torch.zeros_like(std), std)
