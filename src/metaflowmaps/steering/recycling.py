r"""Draws made at earlier contexts, used again at the present one: no network call, no reward call.

A posterior is ``p_1(x_1) K_l(x_1)/Z_l`` with the kernel ``K_l(x_1) = N(x_l; β_l x_1, α_l²)`` of its context and
``Z_l = p_{t_l}(x_l)``. The data law is common to all of them, so the last L contexts' draws, N from each, are one
sample from a mixture of L known kernels with unknown constants, and a draw has for the present context the weight

    ω_n ∝ K(x_n) / Σ_l e^{f_l} K_l(x_n),        f_l = −log Z_l + constant        (the balance heuristic)

The constants follow from the draws themselves, since each context must be credited with the N draws that it made:

    e^{−f_l} = 1/N Σ_n K_l(x_n) / Σ_k e^{f_k} K_k(x_n)

the maximum-likelihood equations of a biased-sampling model (Vardi's; multistate Bennett acceptance ratio in physics).
No marginal density is needed, a context whose draws do not overlap with the present one loses its weight by itself, and
with L = 1 the weights are equal. A new context's constant is first read off the draws that are there already; the
equations are then solved from the last step's solution. Log-kernels are kept, so a step costs one new row and N new
columns of an L × LN table.

Draws of a weighted posterior (:mod:`metaflowmaps.draws`) count for N ω each in place of one: a count κ_n before every
term of these sums over n, and in ω_n.

The weights are consistent as N grows. At fixed N they are self-normalised, with a bias that shrinks with the effective
number of draws; and draws steered the trajectory they are used on again, which a long memory would feel: keep L ≲ 16.
"""

import math

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum
from metaflowmaps.draws import Draws
from metaflowmaps.path import Path

TOLERANCE = 1e-3  # of a context's share of the draws
MAX_ROUNDS = 40
RIDGE = 1e-4


def solve_constants(log_kernels: Tensor, constants: Tensor, num_draws: int, counts: Tensor | None = None) -> Tensor:
    """f of the balance heuristic from log-kernels (l, M, B), num_draws of the M from each context: (l, B).

    ``counts`` (M, B) is what each draw counts for, 1 where it is None.

    With P_{ln} = e^{f_l} K_l(n) / Σ_k e^{f_k} K_k(n), the equations are Σ_n P_{ln} = N, the stationarity of a
    concave likelihood N Σ_l f_l − Σ_n log Σ_l e^{f_l} K_l(n). One round of the fixed point, which always
    climbs; on the rows that are not there yet Newton steps, or where one would fall the fixed point again.
    """
    counts = torch.ones_like(log_kernels[0]) if counts is None else counts
    constants = _fixed_point(log_kernels, constants, counts)
    eye = torch.eye(len(constants), dtype=constants.dtype, device=constants.device)
    rows = torch.arange(constants.shape[1], device=constants.device)
    for _ in range(MAX_ROUNDS):
        kernels, f, count = log_kernels[..., rows], constants[:, rows], counts[:, rows]
        shares = (kernels + f[:, None]).softmax(0)  # (l, M, b)
        missing = num_draws - (count * shares).sum(1)
        far = (missing.abs().amax(0) > TOLERANCE * num_draws) & missing.isfinite().all(0)
        if not bool(far.any()):
            break
        rows, kernels, f, shares, missing = rows[far], kernels[..., far], f[:, far], shares[..., far], missing[:, far]
        count = count[:, far]
        p, counted = shares.permute(2, 0, 1), (count * shares).permute(2, 0, 1)
        hessian = torch.diag_embed(counted.sum(2)) - counted @ p.mT + RIDGE * num_draws * eye
        newton = f + torch.linalg.solve(hessian, missing.T).T
        climbs = _likelihood(kernels, newton, num_draws, count) >= _likelihood(kernels, f, num_draws, count)
        constants[:, rows] = torch.where(climbs, newton, _fixed_point(kernels, f, count))
    return constants - constants[:1]


def _fixed_point(log_kernels: Tensor, constants: Tensor, counts: Tensor) -> Tensor:
    """f_l ← −log Σ_n K_l(n) / Σ_k e^{f_k} K_k(n), relative to the first (where the factor 1/N cancels)."""
    new = -torch.logsumexp(counts.log() + log_kernels - torch.logsumexp(log_kernels + constants[:, None], 0), 1)
    return new - new[:1]


def _likelihood(log_kernels: Tensor, constants: Tensor, num_draws: int, counts: Tensor) -> Tensor:
    return num_draws * constants.sum(0) - (counts * torch.logsumexp(log_kernels + constants[:, None], 0)).sum(0)


class DrawPool:
    """The last ``length`` contexts of a batch of trajectories, with their draws; all of one size."""

    def __init__(self, path: Path, length: int) -> None:
        check_count(length, "recycle")
        self.path, self.length = path, length
        self.draws: list[Draws] = []
        self._contexts: list[tuple[float, Tensor]] = []
        self._log_kernels = torch.empty(0)  # (l, l·N, B)
        self._constants = torch.empty(0)  # (l, B)
        self._log_counts = torch.empty(0)  # (l·N, B), of what each draw counts for

    def add(self, t: float, x: Tensor, draws: Draws) -> Tensor:
        """Take in the present context's draws; returns log ω for all draws of the pool: (l·N, B), normalised."""
        n = len(draws.x_1)
        old = min(len(self.draws), self.length - 1)
        drop = len(self.draws) - old
        kernels, constants, counts = self._log_kernels, self._constants, self._log_counts
        log_counts = torch.zeros_like(draws.rewards) if draws.log_weights is None else draws.log_base + math.log(n)
        if drop:
            del self.draws[:drop], self._contexts[:drop]
            kernels, constants, counts = kernels[drop:, drop * n :], constants[drop:], counts[drop * n :]
        column = torch.stack(
            [self._log_kernel(*context, draws.x_1) for context in [*self._contexts, (t, x)]]
        )  # (l, N, B)
        if old:
            row = torch.cat([self._log_kernel(t, x, made.x_1) for made in self.draws])  # (old·N, B)
            mixture = torch.logsumexp(kernels + constants[:, None], 0)
            newest = math.log(n) - torch.logsumexp(counts + row - mixture, 0)
            kernels = torch.cat([torch.cat([kernels, row[None]]), column], 1)
            # where no old draw reaches the present context nothing is known yet: start level with the last one
            newest = torch.where(newest.isfinite(), newest, constants[-1])
            constants = torch.cat([constants, newest[None]])
            counts = torch.cat([counts, log_counts.to(counts)])
            constants = solve_constants(kernels, constants, n, counts.exp())
            log_weights = counts + kernels[-1] - torch.logsumexp(kernels + constants[:, None], 0)
        else:
            kernels, constants = column, torch.zeros_like(column[:, 0])
            log_weights = counts = log_counts.to(column)
        self.draws.append(draws)
        self._contexts.append((t, x))
        self._log_kernels, self._constants, self._log_counts = kernels, constants, counts
        return log_weights.log_softmax(0)

    def pooled(self) -> Draws:
        """All draws, oldest first: (l·N, B, *event)."""
        gradients = [made.gradients for made in self.draws if made.gradients is not None]
        return Draws(
            torch.cat([made.x_1 for made in self.draws]),
            torch.cat([made.rewards for made in self.draws]),
            torch.cat(gradients) if len(gradients) == len(self.draws) else None,
        )

    def select(self, rows: Tensor) -> None:
        """Trajectories replaced by others of the batch, histories and all: what resampling does."""
        self.draws = [
            Draws(*(None if part is None else part[:, rows] for part in made))  # type: ignore[arg-type]
            for made in self.draws
        ]
        self._contexts = [(t, x[rows]) for t, x in self._contexts]
        if self.draws:
            self._log_kernels = self._log_kernels[..., rows]
            self._constants, self._log_counts = self._constants[..., rows], self._log_counts[..., rows]

    def _log_kernel(self, t: float, x: Tensor, x_1: Tensor) -> Tensor:
        """log N(x; β_t x_1, α_t²) up to a constant of the context, which f absorbs: (n, B)."""
        alpha, beta = float(self.path.alpha(t)), float(self.path.beta(t))
        # half precision has no linear solver, and no digits to spare
        wide = torch.promote_types(x.dtype, torch.float32)
        residual = (x.to(wide) - beta * x_1.to(wide)).flatten(0, 1)
        return (event_sum(residual.square()) / (-2 * alpha**2)).reshape(x_1.shape[:2])
