"""What rewards on pictures share: a frozen network in evaluation mode, its preprocessing, parts that fit in memory."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import no_reward
from metaflowmaps.rewards.micro import Parts, PerRow
from metaflowmaps.rewards.vision.pixels import Pixels


class PictureReward(ABC):
    """r(x) = strength · score(pixels(x)), pictures (B, 3, H, W) in [−1, 1] to (B,).

    The network that is given is put in evaluation mode, frozen, and cast where ``dtype`` says so; it follows x from
    device to device. Its last numbers are float32 (or more) whatever its own dtype is.

    Args:
        model: the network, of transformers.
        processor: how it sees pictures: a :class:`Pixels`, or what transformers has.
        strength: λ, which the reward is multiplied by.
        micro_batch: rows that go through it together; None: all, and fewer where memory runs out.
        dtype: of its weights; None: as they are.
    """

    differentiable = True

    def __init__(
        self, model: nn.Module, processor: Any, strength: float, micro_batch: int | None, dtype: torch.dtype | None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a torch module, got {type(model).__name__}; or use from_pretrained(…)")
        self.pixels = Pixels.of(processor)
        self.strength = positive(strength, "strength", or_zero=True)
        self.parts = Parts(micro_batch)
        self.model = model.eval().requires_grad_(False)
        if dtype is not None:
            self.model.to(dtype)

    @abstractmethod
    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score of a part of the rows, float32 or float64: (b,)."""

    def per_row(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """What else goes with each row."""
        return {}

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        if self.strength == 0 or len(x) == 0:
            return no_reward(x)
        if x.device != self.device and not x.is_meta:  # weights would not come back from there
            self.to(x.device)
        score = self.parts(self.score, x, self.per_row(x, cond))
        return self.strength * score.to(x.dtype)

    def seen(self, x: Tensor) -> Tensor:
        """The pictures as the network reads them, in its dtype."""
        return self.pixels(x).to(self.dtype)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; calls do so by themselves where x is elsewhere."""
        self.model.to(device)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown()}strength={self.strength:g})"

    def _shown(self) -> str:
        return ""


def exact(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(values: Tensor) -> Tensor:
    """Rows of length 1, at least float32: (B, D)."""
    return nn.functional.normalize(exact(values), dim=-1, eps=1e-12)
