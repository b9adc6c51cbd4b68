r"""Two small image classifiers, different enough that what fools one need not fool the other.

Each is ``forward(x) -> logits`` and ``features(x)``, the (B, d) numbers that the last linear layer reads: a classifier
serves as a reward through its logits and as a metric's feature space through its features. Neither mixes the rows of
a batch.

- **conv-classifier** looks locally: residual convolutions with group norm, the size halving and the width doubling
  until at most 7 pixels are left, averaged over positions.
- **patch-classifier** looks globally: patches as tokens, mixed by perceptrons, over tokens and over channels in turn.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps._shapes import check_count, check_state
from metaflowmaps.errors import InputError
from metaflowmaps.networks.checks import check_divides, image_shape
from metaflowmaps.networks.family import MAX_DEPTH, MAX_WIDTH, ClassifierNetworkConfig


class Classifier(nn.Module, ABC):
    """Logits as a linear function of features."""

    head: nn.Linear

    def __init__(self, config: ClassifierNetworkConfig, event_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        image_shape(event_shape, config.name)
        check_count(num_classes, "num_classes")
        if num_classes < 2:
            raise InputError(f"a classifier needs at least 2 classes, got num_classes {num_classes}")
        self.config, self.event_shape, self.num_classes = config, event_shape, num_classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes)."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d)."""


class ConvClassifierConfig(ClassifierNetworkConfig):
    """The convolutional classifier."""

    name: ClassVar[str] = "conv-classifier"

    width: int = Field(32, ge=1, le=MAX_WIDTH)
    features: int = Field(96, ge=1, le=MAX_WIDTH)
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self, event_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A :class:`ConvClassifier` of square images."""
        return ConvClassifier(self, event_shape, num_classes)


class PatchClassifierConfig(ClassifierNetworkConfig):
    """The mixer on patches."""

    name: ClassVar[str] = "patch-classifier"

    patch: int | None = Field(None, ge=1, le=MAX_WIDTH)  # None: the least that leaves at most 7 a side
    width: int = Field(80, ge=1, le=MAX_WIDTH)
    depth: int = Field(5, ge=1, le=MAX_DEPTH)
    dropout: float = Field(0.0, ge=0, lt=1)

    def build(self, event_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """A :class:`PatchClassifier` of square images."""
        return PatchClassifier(self, event_shape, num_classes)


class ConvClassifier(Classifier):
    """Residual convolutions; dropout acts on the features, in training only."""

    def __init__(self, config: ConvClassifierConfig, event_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(config, event_shape, num_classes)
        channels, size = self.event_shape[:2]
        width = config.width
        if width % 8:
            raise InputError(f"width must be a multiple of 8 (the groups of a group norm), got {width}")
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), ConvBlock(width, width)]
        while size > 7:
            layers += [nn.AvgPool2d(2), ConvBlock(width, 2 * width)]
            size, width = size // 2, 2 * width
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(width, config.features)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d)."""
        check_state(x, "x", self.event_shape)
        pooled = functional.silu(self.layers(x)).mean((2, 3))
        out: Tensor = self.dropout(functional.silu(self.last(pooled)))
        return out


class ConvBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1×1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.first, self.second = (nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        y = self.first(functional.silu(self.norm_1(x)))
        out: Tensor = self.skip(x) + self.second(functional.silu(self.norm_2(y)))
        return out


class PatchClassifier(Classifier):
    """A perceptron mixer on patches of ``patch`` pixels (by default the least that leaves at most 7 a side)."""

    def __init__(self, config: PatchClassifierConfig, event_shape: tuple[int, ...], num_classes: int) -> None:
        channels, size = image_shape(event_shape, config.name)
        patch = config.patch or next((p for p in range(1, size) if size % p == 0 and size // p <= 7), size)
        super().__init__(config.model_copy(update={"patch": patch}), event_shape, num_classes)
        check_divides(patch, size, ("patch", "size"))
        width = config.width
        tokens = (size // patch) ** 2
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.mixers = nn.Sequential(*(MixerBlock(tokens, width, config.dropout) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d)."""
        check_state(x, "x", self.event_shape)
        tokens = self.mixers(self.patches(x).flatten(2).mT)
        out: Tensor = self.norm(tokens).mean(1)
        return out


class MixerBlock(nn.Module):
    """A residual perceptron over tokens, the same for every channel, then one over channels."""

    def __init__(self, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = _perceptron(tokens, 4 * tokens, dropout)
        self.over_channels = _perceptron(width, 2 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, tokens, width)."""
        x = x + self.over_tokens(self.norm_1(x).mT).mT
        out: Tensor = x + self.over_channels(self.norm_2(x))
        return out


def _perceptron(n: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, n))
