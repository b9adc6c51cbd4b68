"""A multilayer perceptron, for vectors and for small images laid flat: (z, context, a, b, context time) -> F."""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.networks.compiling import Compilable
from metaflowmaps.networks.embed import TimeFeatures, refuse_scales, silenced
from metaflowmaps.networks.family import MAX_DEPTH, MAX_WIDTH, NetworkConfig

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "tanh": nn.Tanh}


class MLPConfig(NetworkConfig):
    """The multilayer perceptron; images go in flat."""

    name: ClassVar[str] = "mlp"

    width: int = Field(128, ge=1, le=MAX_WIDTH)
    depth: int = Field(4, ge=1, le=MAX_DEPTH)
    activation: Literal["silu", "gelu", "tanh"] = "silu"
    guidance: bool = False
    modulation: bool = False

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """An :class:`MLP` on samples of this shape."""
        return MLP(self, event_shape)

    def reader(self, event_shape: tuple[int, ...], summary: int, frames: int) -> nn.Module:
        """An :class:`MLP` that reads a summary too, and frames laid flat."""
        return MLP(self, event_shape, summary + frames * math.prod(event_shape[1:]))


class MLP(Compilable):
    """``depth`` hidden layers of ``width``, output layer zero at initialisation.

    With ``num_classes`` the optional condition ``{"label": (B,)}`` enters as a learned vector on the first hidden
    layer; label ``num_classes`` is the null class, and no label means the null class. With ``guidance`` the scale
    ``{"guidance": (B,)}``, w >= 0, enters there too, as (w − 1)/(w + 1) times a learned vector: w = 1, the default,
    adds nothing. ``modulation`` makes the hidden layers residual, each scaled and shifted by the times: better where
    one network must serve every time, as for images.
    """

    def __init__(self, config: MLPConfig, event_shape: tuple[int, ...], observed: int = 0) -> None:
        super().__init__()
        for n in event_shape:
            check_count(n, "event_shape")
        dim, width, layers_after = math.prod(event_shape), config.width, config.depth - 1
        self.config, self.event_shape, self.num_classes = config, event_shape, config.num_classes
        self.time_features = TimeFeatures()
        times = self.time_features.features
        self.input = nn.Linear(2 * dim + times + observed, width)
        self.labels = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.guidance = nn.Parameter(torch.zeros(width)) if config.guidance else None
        activation = ACTIVATIONS[config.activation]
        layers: list[nn.Module] = [activation()]
        for _ in range(layers_after):
            layers += [nn.Linear(width, width), activation()]
        self.hidden = nn.Sequential(*layers)
        self.modulation: nn.ModuleList | None = None
        if config.modulation:
            self.modulation = nn.ModuleList(silenced(Modulation(times, 2 * width)) for _ in range(layers_after))
        self.output = silenced(nn.Linear(width, dim))
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
        summary: Tensor | None = None,
        frames: Tensor | None = None,
    ) -> Tensor:
        """(B, *event) -> (B, *event), times (B,) in [0, 1]; summary and frames where it was made to read them."""
        times = self.time_features(torch.stack([a, b, context_time], 1))
        observed = [part.flatten(1) for part in (summary, frames) if part is not None]
        rows: list[Tensor] = []
        if self.labels is not None:
            rows.append(self.labels(label) if label is not None else self.labels.weight[-1])
        if guidance is not None:
            if self.guidance is None:
                raise InputError("this network takes no guidance scale: it was made with guidance=False")
            refuse_scales(~(guidance >= 0), guidance, "be numbers >= 0")
            rows.append(((guidance - 1) / (guidance + 1)).to(self.guidance)[:, None] * self.guidance)
        given = torch.cat([context.flatten(1), *observed], 1) if observed else context.flatten(1)
        return self.run(z.flatten(1), given, times, *rows).reshape(z.shape)

    def core(self, *inputs: Tensor) -> Tensor:
        """z (B, dim), context and what was observed, features of the times, and what is added at first: (B, dim)."""
        *states, times = inputs[:3]
        h = self.input(torch.cat([*states, times], 1))
        for row in inputs[3:]:
            h = h + row
        out: Tensor = self.output(self.hidden(h) if self.modulation is None else self._modulated(h, times))
        return out

    def _modulated(self, h: Tensor, times: Tensor) -> Tensor:
        """h ← h + act((W h + c)(1 + scale) + shift), scale and shift linear in the features of the times."""
        assert self.modulation is not None
        first, *layers = self.hidden
        h = first(h)
        for linear, activation, modulate in zip(layers[::2], layers[1::2], self.modulation, strict=True):
            factor, shift = modulate(times)
            h = h + activation(torch.addcmul(shift, linear(h), factor))
        return h


class Modulation(nn.Linear):
    """Features of the times -> (1 + scale, shift); of the weight's halves, whose gradients join for little."""

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (scale, shift), (scale_bias, shift_bias) = self.weight.chunk(2), self.bias.chunk(2)
        return functional.linear(times, scale, 1 + scale_bias), functional.linear(times, shift, shift_bias)
