"""A multilayer perceptron for vector data: (z, context, a, b, context time) -> F."""

from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.networks.embed import TimeFeatures

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """``depth`` hidden layers of ``width``, output layer zero at initialisation.

    With ``num_classes`` the optional condition ``{"label": (B,)}`` enters as a learned vector on the first hidden
    layer; label ``num_classes`` is the null class, and no label means the null class.
    """

    name = "mlp"

    def __init__(
        self, dim: int, width: int = 128, depth: int = 4, activation: str = "silu", num_classes: int = 0
    ) -> None:
        super().__init__()
        if activation not in list(ACTIVATIONS):
            raise unknown("activation", activation, ACTIVATIONS)
        sizes = (dim, width, depth, num_classes)
        if not all(isinstance(n, int) for n in sizes) or min(dim, width, depth) < 1 or num_classes < 0:
            raise InputError(
                f"mlp needs dim, width and depth >= 1 and num_classes >= 0, got {dim}, {width}, {depth}, {num_classes}"
            )
        self.event_shape = (dim,)
        self.num_classes = num_classes
        self.config: dict[str, Any] = {
            "dim": dim,
            "width": width,
            "depth": depth,
            "activation": activation,
            "num_classes": num_classes,
        }
        self.time_features = TimeFeatures()
        self.input = nn.Linear(2 * dim + self.time_features.features, width)
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes else None
        layers: list[nn.Module] = [ACTIVATIONS[activation]()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), ACTIVATIONS[activation]()]
        self.hidden = nn.Sequential(*layers)
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
    ) -> Tensor:
        """(B, d) -> (B, d), times (B,) in [0, 1]."""
        times = self.time_features(torch.stack([a, b, context_time], 1))
        h = self.input(torch.cat([z, context, times], 1))
        if self.labels is not None:
            h = h + (self.labels(label) if label is not None else self.labels.weight[-1])
        out: Tensor = self.output(self.hidden(h))
        return out
