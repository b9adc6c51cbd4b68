r"""A U-net for small images with a context: (z, context, a, b, context time) -> F.

Residual blocks at falling, then rising resolutions; the last state of each level on the way down is read again on the
way up. Magnitudes are kept, so that depth needs no normalisation over batch or position:

    conv(x) = w/‖w‖ * x            each filter has norm 1: independent unit inputs give unit outputs
    act(x) = silu(x)/0.596         E[silu(n)²] = 0.596² for n ~ N(0, 1); the constant is part of the next filter
    pixel_norm(x) = x/rms(x)       over channels, at the head of every block

A block is ``x ← pixel_norm(x);  x + (3/7) conv(act((1 + g) conv(act(x))))``: the residual at EDM2's 0.7 to 0.3, its
common factor left to the next norm. The gain g per channel is a linear function, 0 at initialisation, of the embedding
of the three times, the label and the guidance scale. State and context enter as channels, with a channel of ones in
place of biases; times enter through smooth low-frequency features. With ``patch`` p a square of p × p pixels enters and
leaves as one position of p² as many channels: the finest level, the dearest, is then p² times cheaper.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps.errors import InputError
from metaflowmaps.networks.attention import SelfAttention
from metaflowmaps.networks.checks import check_divides, image_shape
from metaflowmaps.networks.compiling import Compilable
from metaflowmaps.networks.embed import TimeFeatures, embed_guidance, make_guidance, make_labels, silenced
from metaflowmaps.networks.family import MAX_DEPTH, MAX_WIDTH, NetworkConfig

SIZES: Mapping[str, Mapping[str, Any]] = {
    "digits": {"width": 32, "multipliers": [1, 2, 2], "blocks": 1, "attention": []},
    "mnist": {"width": 64, "multipliers": [1, 3, 4], "blocks": 2, "attention": [7]},
}


class UNetConfig(NetworkConfig):
    """The U-Net, for images."""

    name: ClassVar[str] = "unet"

    width: int = Field(64, ge=1, le=MAX_WIDTH)
    # of the width, one a level
    multipliers: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field((1, 2, 2), min_length=1, max_length=16)
    blocks: int = Field(2, ge=1, le=MAX_DEPTH)
    attention: tuple[int, ...] | None = None  # sides of the feature maps that attend; None: the smallest
    dropout: float = Field(0.0, ge=0, lt=1)
    patch: int = Field(1, ge=1, le=64)  # side of the squares of pixels that the finest level has as one

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """A :class:`UNet` on square images of this shape."""
        return UNet(self, event_shape)

    def reader(self, event_shape: tuple[int, ...], summary: int, frames: int) -> nn.Module:
        """A :class:`UNet` with observations as channels, their summary beside the times."""
        return UNet(self, event_shape, summary, frames)


class UNet(Compilable):
    """``blocks`` residual blocks each way at each level, of ``width · multipliers[i]`` channels; levels halve the size.

    Self-attention at the sizes in ``attention``, the smallest if not said. Zero output at initialisation. Label
    ``num_classes`` is the null class, and no label means the null class; no guidance scale means 1. Dropout draws from
    torch's global generator.
    """

    def __init__(self, config: UNetConfig, event_shape: tuple[int, ...], summary: int = 0, frames: int = 0) -> None:
        super().__init__()
        channels, size = image_shape(event_shape, config.name)
        check_divides(config.patch, size, ("patch", "size"))
        sizes = _levels(config.multipliers, size // config.patch)
        attention = (sizes[-1],) if config.attention is None else config.attention
        if any(s not in sizes for s in attention):
            raise InputError(f"attention must list sizes of levels, which are {sizes}; got {list(attention)}")
        self.config = config.model_copy(update={"attention": attention})
        self.event_shape = (channels, size, size)
        self.num_classes = config.num_classes
        width, embedding = config.width, 4 * config.width
        self.times = TimeFeatures()
        self.embed_times = nn.Linear(self.times.features, embedding)
        self.labels = make_labels(config.num_classes, embedding)
        self.guidance = make_guidance(config.guidance, embedding)
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())

        def level(i: int, first: int) -> "ResolutionLevel":
            n, attends = width * config.multipliers[i], sizes[i] in attention
            inputs = [first] + [n] * (config.blocks - 1)
            return ResolutionLevel(ResidualBlock(c, n, embedding, attends, config.dropout) for c in inputs)

        widths = [width * m for m in config.multipliers]
        pixels = config.patch**2
        self.enter = Conv((2 * channels + frames) * pixels + 1, widths[0], 3)
        self.down = nn.ModuleList(level(i, widths[max(i - 1, 0)]) for i in range(len(widths)))
        # what comes from below is joined by the level's own state; at the bottom there is nothing below
        joined = [c + n for c, n in zip(widths[1:], widths, strict=False)] + [widths[-1]]
        self.up = nn.ModuleList(level(i, first) for i, first in enumerate(joined))
        self.leave = silenced(nn.Conv2d(widths[0], channels * pixels, 3, padding=1))
        self.summary = silenced(nn.Linear(summary, embedding)) if summary else None

    def forward(
        self,
        z: Tensor,
        a: Tensor,
        b: Tensor,
        context: Tensor,
        context_time: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        summary: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), times (B,) in [0, 1]; summary and frames where it was made to read them."""
        e = self.embed_times(self.times(torch.stack([a, b, context_time], 1)))
        e = e + embed_guidance(self.guidance, guidance)
        if self.labels is not None:
            e = e + self.labels(label)
        if self.summary is not None:
            e = e + self.summary(summary)
        e, observed = self.embed(e), [] if frames is None else [frames]
        x = functional.pixel_unshuffle(torch.cat([z, context, *observed], 1), self.config.patch)
        out = self.run(torch.cat([x, torch.ones_like(x[:, :1])], 1), e)
        return functional.pixel_shuffle(out, self.config.patch)

    def core(self, *inputs: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) -> (B, C · patch², H, W), of patches."""
        x, e = inputs
        x = self.enter(x)
        states = []
        for i, level in enumerate(self.down):
            x = functional.avg_pool2d(x, 2) if i else x
            x = level(x, e)
            states.append(x)
        states.pop()
        for i, level in reversed(list(enumerate(self.up))):
            if i < len(states):
                x = torch.cat([functional.interpolate(x, scale_factor=2.0), states[i]], 1)
            x = level(x, e)
        out: Tensor = self.leave(functional.silu(pixel_norm(x)))
        return out


class ResolutionLevel(nn.ModuleList):
    """Blocks one after the other, at one size."""

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) -> (B, outputs, H, W)."""
        for block in self:
            x = block(x, e)
        return x


class ResidualBlock(nn.Module):
    """A residual block with gains from the embedding, and self-attention if ``attends``."""

    def __init__(self, inputs: int, outputs: int, embedding: int, attends: bool, dropout: float) -> None:
        super().__init__()
        self.reduce = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.first, self.second = (Conv(outputs, outputs, 3, norm=1 / 0.596) for _ in range(2))
        self.gain = silenced(nn.Linear(embedding, outputs))
        self.dropout = nn.Dropout(dropout)
        self.attention = SelfAttention(outputs, max(outputs // 32, 1)) if attends else None
        if self.attention is not None:
            silenced(self.attention.out)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) -> (B, outputs, H, W)."""
        x = pixel_norm(self.reduce(x))
        y = self.first(functional.silu(x)) * (1 + self.gain(e))[:, :, None, None]
        x = torch.add(x, self.second(self.dropout(functional.silu(y))), alpha=3 / 7)
        if self.attention is not None:
            tokens = pixel_norm(x).flatten(2).mT
            x = x + self.attention(tokens).mT.unflatten(2, x.shape[2:])
        return x


class Conv(nn.Module):
    """A convolution whose filters have the norm ``norm``; no bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: float = 1.0) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        square = self.weight.square().sum((1, 2, 3), keepdim=True)
        return functional.conv2d(x, self.weight * (self.norm * (square + 1e-12).rsqrt()), padding="same")


def pixel_norm(x: Tensor) -> Tensor:
    """x over its root mean square over channels."""
    return x * (x.square().mean(1, keepdim=True) + 1e-4).rsqrt()


def _levels(multipliers: Sequence[int], size: int) -> list[int]:
    """The sizes of the levels."""
    halvings = len(multipliers) - 1
    if size % 2**halvings:
        most = (size & -size).bit_length()
        raise InputError(
            f"size {size} can be halved {most - 1} times: give at most {most} multipliers, got {halvings + 1}"
        )
    return [size >> i for i in range(len(multipliers))]
