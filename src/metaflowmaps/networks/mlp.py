"""A multilayer perceptron, for vectors and for small images laid flat: (z, context, a, b, context time) -> F."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.networks.embed import TimeFeatures
from metaflowmaps.networks.embed import _refuse as refuse_scales

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """``depth`` hidden layers of ``width``, output layer zero at initialisation.

    With ``num_classes`` the optional condition ``{"label": (B,)}`` enters as a learned vector on the first hidden
    layer; label ``num_classes`` is the null class, and no label means the null class. With ``guidance`` the scale
    ``{"guidance": (B,)}``, w >= 0, enters there too, as (w − 1)/(w + 1) times a learned vector: w = 1, the default,
    adds nothing. ``modulation`` makes the hidden layers residual, each scaled and shifted by the times: better where
    one network must serve every time, as for images. ``shape`` is that of one sample, where it is not (dim,).
    """

    name = "mlp"

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
        if activation not in list(ACTIVATIONS):
            raise unknown("activation", activation, ACTIVATIONS)
        sizes = (dim, width, depth, num_classes)
        if not all(isinstance(n, int) for n in sizes) or min(dim, width, depth) < 1 or num_classes < 0:
            raise InputError(
                f"mlp needs dim, width and depth >= 1 and num_classes >= 0, got {dim}, {width}, {depth}, {num_classes}"
            )
        self.event_shape = (dim,) if shape is None else tuple(shape)
        if math.prod(self.event_shape) != dim or min(self.event_shape) < 1:
            raise InputError(
                f"mlp with shape {list(self.event_shape)} needs dim={math.prod(self.event_shape)}, got {dim}"
            )
        self.num_classes = num_classes
        self.config: dict[str, Any] = {
            "dim": dim,
            "width": width,
            "depth": depth,
            "activation": activation,
            "num_classes": num_classes,
        }
        for name, given in (("guidance", guidance), ("modulation", modulation)):
            if given:
                self.config[name] = True
        if shape is not None:
            self.config["shape"] = list(shape)
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
