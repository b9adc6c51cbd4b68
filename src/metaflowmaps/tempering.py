"""How far λ may rise on the way from p_1 to p_1 e^r, seen from weighted samples of p_1 e^{λr}."""

import torch
from torch import Tensor

SMALLEST_LOSS = 0.02  # of a reweighting: less is not worth a resampling


def stretch(rewards: Tensor, log_weights: Tensor, strength: Tensor) -> Tensor:
    """Λ from λ to 1, by the variance of weighted rewards (S, M) at λ: (S,)."""
    kept = rewards.isfinite()
    weights = log_weights.masked_fill(~kept, -torch.inf).softmax(1).nan_to_num()
    finite = rewards.masked_fill(~kept, 0.0)
    mean = (weights * finite).sum(1, keepdim=True)
    variance = (weights * (finite - mean).square()).sum(1)
    return -variance.sqrt() * strength * strength.log()


def next_strength(rewards: Tensor, log_weights: Tensor, strength: Tensor, share: Tensor | float) -> Tensor:
    """The largest λ ≤ 1 at which e^{(λ − now) r} leaves this share, as an ESS, of the weights that may live: (S,)."""
    living = log_weights.masked_fill(rewards == -torch.inf, -torch.inf)
    least = torch.as_tensor(share).log() + torch.logsumexp(living, 1)
    low, high = strength.clone(), torch.ones_like(strength)

    def leaves(at: Tensor) -> Tensor:
        raised = (at - strength)[:, None].clamp_min(1e-300) * rewards
        log_ess = 2 * torch.logsumexp(log_weights + raised, 1) - torch.logsumexp(log_weights + 2 * raised, 1)
        return log_ess.nan_to_num(nan=torch.inf) >= least

    done = leaves(high)
    for _ in range(60):  # halvings: to a double's precision
        middle = (low + high) / 2
        enough = leaves(middle)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(done, torch.ones_like(low), low)
