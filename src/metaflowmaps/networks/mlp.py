"""A multilayer perceptron, for vectors and for small images laid flat: (z, context, a, b, context time) -> F."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.networks.embed import TimeFeatures
from metaflowmaps.networks.embed import _refuse as refuse_scales
from metaflowmaps.networks.family import NetworkConfig
from metaflowmaps.work.choices import with_options

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLPConfig(NetworkConfig):
    """The multilayer perceptron; images go in flat."""

    name: ClassVar[str] = "mlp"

    width: int = Field(128, ge=1)
    depth: int = Field(4, ge=1)
    activation: Literal["silu", "gelu", "tanh"] = "silu"
    guidance: bool = False
    modulation: bool = False

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """An :class:`MLP` on samples of this shape."""
        return MLP(math.prod(event_shape), **dict(self), shape=event_shape)


class MLP(nn.Module):
    """``depth`` hidden layers of ``width``, output layer zero at initialisation.

    With ``num_classes`` the optional condition ``{"label": (B,)}`` enters as a learned vector on the first hidden
    layer; label ``num_classes`` is the null class, and no label means the null class. With ``guidance`` the scale
    ``{"guidance": (B,)}``, w >= 0, enters there too, as (w − 1)/(w + 1) times a learned vector: w = 1, the default,
    adds nothing. ``modulation`` makes the hidden layers residual, each scaled and shifted by the times: better where
    one network must serve every time, as for images. ``shape`` is that of one sample, where it is not (dim,).
    """

    def __init__(
        self,
        dim: int,
        width: int = 128,
        depth: int = 4,
        activation: str = "silu",
        num_classes: int = 0,
        guidance: bool = False,
        modulation: bool = False,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        options = {"width": width, "depth": depth, "activation": activation, "num_classes": num_classes}
        self.config = with_options(MLPConfig, {**options, "guidance": guidance, "modulation": modulation})
        check_count(dim, "dim")
        self.event_shape = (dim,) if shape is None else tuple(shape)
        if math.prod(self.event_shape) != dim or min(self.event_shape) < 1:
            raise InputError(
                f"mlp with shape {list(self.event_shape)} needs dim={math.prod(self.event_shape)}, got {dim}"
            )
        self.num_classes = num_classes
        self.time_features = TimeFeatures()
        self.input = nn.Linear(2 * dim + self.time_features.features, width)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.guidance = nn.Parameter(torch.zeros(width)) if guidance else None
        layers: list[nn.Module] = [ACTIVATIONS[activation]()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), ACTIVATIONS[activation]()]
        self.hidden = nn.Sequential(*layers)
        self.modulation: nn.ModuleList | None = None
        if modulation:
            features = self.time_features.features
            self.modulation = nn.ModuleList(nn.Linear(features, 2 * width) for _ in range(depth - 1))
            for layer in self.modulation:
                nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.labels is not None:
            nn.init.zeros_(self.labels.weight)

    def forward(
        self,
        z: Tensor,
        a: Tensor,
        b: Tensor,
        context: Tensor,
        context_time: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """(B, *event) -> (B, *event), times (B,) in [0, 1]."""
        times = self.time_features(torch.stack([a, b, context_time], 1))
        h = self.input(torch.cat([z.flatten(1), context.flatten(1), times], 1))
        if self.labels is not None:
            h = h + (self.labels(label) if label is not None else self.labels.weight[-1])
        if guidance is not None:
            if self.guidance is None:
                raise InputError("this network takes no guidance scale: it was made with guidance=False")
            refuse_scales(~(guidance >= 0), guidance, "be numbers >= 0")
            h = h + ((guidance - 1) / (guidance + 1)).to(h)[:, None] * self.guidance
        out: Tensor = self.output(self.hidden(h) if self.modulation is None else self._modulated(h, times))
        return out.reshape(z.shape)

    def _modulated(self, h: Tensor, times: Tensor) -> Tensor:
        """h ← h + act((W h + c)(1 + scale) + shift), scale and shift linear in the features of the times."""
        assert self.modulation is not None
        first, *layers = self.hidden
        h = first(h)
        for linear, activation, modulate in zip(layers[::2], layers[1::2], self.modulation, strict=True):
            scale, shift = modulate(times).chunk(2, 1)
            h = h + activation(linear(h) * (1 + scale) + shift)
        return h
