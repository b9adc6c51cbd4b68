r"""A reward from examples: more like these pictures than like those, in a network's features f.

Both sets are taken for Gaussians of means μ₁, μ₀ and one covariance Σ, which gives the log-odds (Fisher's discriminant)

    r(x) = λ ⟨w, f(x) − (μ₁ + μ₀)/2⟩,      w = (Σ + ε (tr Σ/d) I)⁻¹ (μ₁ − μ₀)

ε is for few examples, of which Σ is poorly known.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, check_state, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import describe

PART = 512  # examples that the network sees at a time


class Likeness:
    """r(x) = strength · log-odds of being one of ``like`` rather than of ``unlike``.

    Args:
        features: (B, *event) -> (B, d), such as ``load_classifier("emoji-guide").features``.
        like: (n, *event) examples of what is wanted.
        unlike: (m, *event) examples of all else.
        strength: λ, which the reward is multiplied by.
        ridge: ε.

    Examples:
        >>> features = lambda x: x.flatten(1)
        >>> reward = mfm.rewards.Likeness(features, like=1 + torch.randn(20, 2), unlike=torch.randn(40, 2) - 1)
        >>> bool(reward(torch.ones(1, 2)) > reward(-torch.ones(1, 2)))
        True
    """

    differentiable = True

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        like: Tensor,
        unlike: Tensor,
        strength: float = 1.0,
        ridge: float = 0.1,
    ) -> None:
        if not len(like) or not len(unlike):
            raise InputError(f"Likeness needs examples of both kinds, got {len(like)} and {len(unlike)}")
        self.features, self.counts = features, (len(like), len(unlike))
        self.strength, ridge = positive(strength, "strength", or_zero=True), positive(ridge, "ridge")
        parts = [_features(features, like), _features(features, unlike)]
        means = [part.mean(0) for part in parts]
        spread = torch.cat([part - mean for part, mean in zip(parts, means, strict=True)])
        covariance = spread.T @ spread / max(len(spread) - 2, 1)
        size = covariance.diagonal().mean().clamp_min(1e-12)
        damped = covariance + ridge * size * torch.eye(len(covariance), dtype=covariance.dtype)
        self.weight = torch.linalg.solve(damped, means[0] - means[1])
        self.middle = (means[0] + means[1]) / 2

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        check_state(x)
        found = self.features(x)
        odds: Tensor = (found - self.middle.to(found)) @ self.weight.to(found)
        return self.strength * odds.to(x.dtype)

    def __repr__(self) -> str:
        like, unlike = self.counts
        return f"Likeness({describe(self.features)}, {like} like, {unlike} unlike, strength={self.strength:g})"


@torch.no_grad()
def _features(features: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([features(part).double().cpu() for part in x.split(PART)])
