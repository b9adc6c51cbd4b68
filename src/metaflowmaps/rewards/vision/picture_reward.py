"""What rewards on pictures share: a frozen network in evaluation mode, its preprocessing, parts that fit in memory."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import no_reward
from metaflowmaps.rewards.micro import Parts, PerRow
from metaflowmaps.rewards.vision.pixels import Pixels


class PictureReward(ABC):
    """r(x) = strength · score(pixels(x)), pictures (B, 3, H, W) in [−1, 1] to (B,). Members are dataclasses.

    The network that is given is put in evaluation mode, frozen, and cast where ``dtype`` says so; it follows x from
    device to device. Its last numbers are float32 (or more) whatever its own dtype is.

    Args:
        model: the network, of transformers.
        processor: how it sees pictures: a :class:`Pixels`, or what transformers has; None: as its release does.
        strength: λ, which the reward is multiplied by.
        micro_batch: rows that go through it together; None: all, and fewer where memory runs out.
        dtype: of its weights; None: as they are.
    """

    differentiable: ClassVar[bool] = True
    own_pixels: ClassVar[Pixels | None] = Pixels()  # where no processor is given
    needs: ClassVar[tuple[str, ...]] = ()  # parts that the network must have
    needed_kind: ClassVar[str] = "a torch module"  # what has them

    model: nn.Module
    processor: Any
    strength: float
    micro_batch: int | None
    dtype: torch.dtype | None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            given = type(self.model).__name__
            raise InputError(f"model must be a torch module, got {given}; or use from_pretrained(…)")
        if not all(hasattr(self.model, part) for part in self.needs):
            raise InputError(f"model must be {self.needed_kind}, got {type(self.model).__name__}")
        self.pixels = Pixels.of(self.own_pixels if self.processor is None else self.processor)
        self.strength = positive(self.strength, "strength", or_zero=True)
        self.parts = Parts(self.micro_batch)
        self.model.eval().requires_grad_(False)
        if self.dtype is not None:
            self.model.to(self.dtype)

    @abstractmethod
    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score of a part of the rows, float32 or float64: (b,)."""

    def per_row(self, x: Tensor, cond: Cond) -> PerRow:
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
        return self.pixels(x).to(next(self.model.parameters()).dtype)

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the weights; calls do so by themselves where x is elsewhere."""
        self.model.to(device)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._shown()}strength={self.strength:g})"

    def _shown(self) -> str:
        return ""


def embedded(network: Any, pixels: Tensor) -> Tensor:
    """CLIP's embeddings of pictures, of length 1: (B, D)."""
    return unit(network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))


def exact(values: Tensor) -> Tensor:
    """At least float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(values: Tensor) -> Tensor:
    """Rows of length 1, at least float32: (B, D)."""
    return nn.functional.normalize(exact(values), dim=-1, eps=1e-12)
