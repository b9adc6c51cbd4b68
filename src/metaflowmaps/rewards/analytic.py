r"""Rewards whose tilt of a Gaussian mixture is known in closed form.

``r(x) = −λ ‖y − A x‖² / (2 σ²)``: the log-likelihood of a linear observation ``y = A x + σ n``, without normaliser.
"""

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, as_numbers, positive
from metaflowmaps.errors import InputError


class LinearGaussian:
    """r(x) = −strength · ‖y − A x‖² / (2 noise_std²); A is (p, d) or (d,), y is (p,) or a number.

    Args:
        A: (p, d), or (d,) for one number.
        y: (p,), or a number.
        noise_std: σ of the observation.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0.0]), y=2.0, noise_std=1.0)
        >>> reward(torch.tensor([[1.0, 5.0], [0.0, 0.0]]))
        tensor([-0.5000, -2.0000])
    """

    differentiable = True

    def __init__(self, A: Tensor, y: Tensor | float, noise_std: float, strength: float = 1.0) -> None:
        matrix = as_numbers(A, "A")
        matrix = matrix.reshape(1, -1) if matrix.ndim < 2 else matrix
        target = as_numbers(y, "y").reshape(-1)
        if matrix.ndim != 2 or 0 in matrix.shape or target.shape[0] != matrix.shape[0]:
            raise InputError(
                f"LinearGaussian needs A of shape (p, d) and y of shape (p,); got {tuple(matrix.shape)} "
                f"and {tuple(target.shape)}"
            )
        if not (torch.isfinite(matrix).all() and torch.isfinite(target).all()):
            raise InputError("LinearGaussian needs finite A and y")
        self.A = matrix
        self.y = target
        self.noise_std = positive(noise_std, "noise_std")
        self.strength = positive(strength, "strength", or_zero=True)

    @property
    def precision(self) -> float:
        """λ/σ², the precision of one coordinate of the observation."""
        return self.strength / self.noise_std**2

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        residual = self.y.to(x) - x.flatten(1) @ self.A.to(x).T
        return -0.5 * self.precision * residual.square().sum(1)

    def __repr__(self) -> str:
        return (
            f"LinearGaussian(A={self.A.tolist()}, y={self.y.tolist()}, noise_std={self.noise_std}, "
            f"strength={self.strength})"
        )
