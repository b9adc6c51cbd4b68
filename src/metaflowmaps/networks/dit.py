r"""A diffusion transformer for flow maps with a context: (z, context, a, b, context time) -> F.

Images are cut into patches, tokens of ``width`` numbers with fixed positions. The context enters as tokens of its own,
gated by its time, and is added:

    x = P(z) + pos + P'(context)(1 + scale) + shift,      (shift, scale) = Linear(SiLU(E_t(context_time)))

Each block is attention and a perceptron, both modulated by a vector c through ``shift, scale, gate`` (adaLN-Zero: the
gates start at 0, so a block starts as the identity). The first ``encoder_depth`` blocks read c_1, the remaining ones
and the final layer c_2:

    c_1 = E_s(a) + E_u(b) + E_t(context_time) + E_y(label) + E_w(guidance)
    c_2 = E'_s(a) + E'_u(b) + E_t(context_time) + E_y(label)

At initialisation E_u, E_t, E'_s, E_w and P' are 0: of the times the first part sees a only and the second b only, the
context nothing. It is then the decoupled flow map whose first part encodes the state at a and whose second part reads
off where it is at b; what b and the context mean to the first part is learned from there.

For large networks, :meth:`DiT.configure` has blocks computed again in the backward pass instead of remembered, or
their attention fused under forward-mode AD; :mod:`metaflowmaps.networks.compiling` has them compiled, once for all.
None of these changes what is computed or how weights are named.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaflowmaps.errors import InputError
from metaflowmaps.networks.attention import SelfAttention
from metaflowmaps.networks.checks import check_divides, image_shape
from metaflowmaps.networks.compiling import Compilable
from metaflowmaps.networks.embed import TimeEmbedding, embed_guidance, make_guidance, make_labels, positions, silenced
from metaflowmaps.networks.family import MAX_DEPTH, MAX_WIDTH, NetworkConfig
from metaflowmaps.networks.forward_mode import forward_mode, layer_norm
from metaflowmaps.networks.precision import unrounded

SIZES: dict[str, dict[str, int]] = {
    "nano": {"width": 64, "depth": 3, "heads": 4, "encoder_depth": 2},
    "tiny": {"width": 192, "depth": 6, "heads": 3, "encoder_depth": 4},
    "S": {"width": 384, "depth": 12, "heads": 6, "encoder_depth": 8},
    "B": {"width": 768, "depth": 12, "heads": 12, "encoder_depth": 8},
    "L": {"width": 1024, "depth": 24, "heads": 16, "encoder_depth": 17},
    "XL": {"width": 1152, "depth": 28, "heads": 16, "encoder_depth": 20},
}


class DiTConfig(NetworkConfig):
    """The transformer of the ImageNet family, for images and latents; :data:`SIZES` has the usual ones."""

    name: ClassVar[str] = "dit"

    patch: int = Field(2, ge=1, le=MAX_WIDTH)
    width: int = Field(384, ge=1, le=MAX_WIDTH)
    depth: int = Field(12, ge=1, le=MAX_DEPTH)
    heads: int = Field(6, ge=1, le=MAX_WIDTH)
    encoder_depth: int | None = Field(None, ge=1, le=MAX_DEPTH)  # None: two thirds of the depth
    mlp_ratio: float = Field(4.0, gt=0, le=64)  # hidden width of the perceptrons over the width
    head_norms: bool = False  # queries and keys normalised, each head by itself (RMS)

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """A :class:`DiT` on square images or latents of this shape."""
        return DiT(self, event_shape)

    def reader(self, event_shape: tuple[int, ...], summary: int, frames: int) -> nn.Module:
        """A :class:`DiT` with observations as tokens of patches, their summary beside the times."""
        return DiT(self, event_shape, summary, frames)

    def shallow(self) -> "DiTConfig":
        """Two blocks compile what all of them do."""
        return self.model_copy(update={"depth": 2, "encoder_depth": 1})


class DiT(nn.Module):
    """Zero output at initialisation; ``DiT(DiTConfig(**SIZES["B"]), (4, 32, 32))`` for the usual widths and depths.

    Label ``num_classes`` is the null class, and no label means the null class; no guidance scale means 1.
    """

    rows_cost = True  # more than calls do
    own_parts = ("context_", "early_b.", "late_a.", "late_b.", "guidance.")  # what no flow model without context has
    positions: Tensor

    def __init__(self, config: DiTConfig, event_shape: tuple[int, ...], summary: int = 0, frames: int = 0) -> None:
        super().__init__()
        channels, size = image_shape(event_shape, config.name)
        if config.encoder_depth is None:
            config = config.model_copy(update={"encoder_depth": max(2 * config.depth // 3, 1)})
        _check(config, size)
        self.config = config
        self.event_shape = (channels, size, size)
        self.num_classes = config.num_classes
        width, patch = config.width, config.patch
        self.recompute = False
        self.state_patches = silenced(nn.Conv2d(channels, width, patch, patch))
        self.context_patches = silenced(nn.Conv2d(channels, width, patch, patch))
        self.context_gate = nn.Sequential(nn.SiLU(), silenced(nn.Linear(width, 2 * width)))
        self.register_buffer("positions", positions(width, size // patch)[None])
        self.early_a, self.early_b = TimeEmbedding(width), TimeEmbedding(width, silent=True)
        self.late_a, self.late_b = TimeEmbedding(width, silent=True), TimeEmbedding(width)
        self.context_time = TimeEmbedding(width, silent=True)
        self.labels = make_labels(config.num_classes, width)
        self.guidance = make_guidance(config.guidance, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.summary = silenced(nn.Linear(summary, width)) if summary else None
        self.frames = silenced(nn.Conv2d(frames, width, patch, patch)) if frames else None
        self.final = FinalLayer(width, patch * patch * channels)
        nn.init.xavier_uniform_(self.state_patches.weight.flatten(1))

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
        with unrounded(z, a, b, context, context_time) as (z, a, b, context, context_time):
            shared = self.context_time(context_time)
            shift, scale = self.context_gate(shared).chunk(2, 1)
            x = _tokens(self.state_patches(z)) + self.positions
            x = x + modulate(_tokens(self.context_patches(context)), shift, scale)
            if self.frames is not None and frames is not None:
                x = x + _tokens(self.frames(frames.to(x)))
            if self.summary is not None and summary is not None:
                shared = shared + self.summary(summary.to(shared))
            if self.labels is not None:
                shared = shared + self.labels(label)
            early = self.early_a(a) + self.early_b(b) + shared + embed_guidance(self.guidance, guidance)
            late = self.late_a(a) + self.late_b(b) + shared
        # a checkpoint cannot be recomputed under a dual level that is closed by then: blocks are remembered there
        recompute = self.recompute and torch.is_grad_enabled() and not forward_mode()
        encoder_depth: Any = self.config.encoder_depth
        for i, block in enumerate(self.blocks):
            c = early if i < encoder_depth else late
            # nothing in a block is random
            x = checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False) if recompute else block(x, c)
        with unrounded(x, late) as (x, late):
            return self._image(self.final(x, late))

    @property
    def map_entries(self) -> int:
        """Numbers in a block's attention maps for one sample, heads · N²."""
        return self.config.heads * self.positions.shape[1] ** 2

    def configure(self, recompute: bool = False, fused_tangents: bool = False) -> "DiT":
        """How blocks are computed: see the module. ``fused_tangents`` has needs of its own."""
        self.recompute = recompute
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.fused_tangents = fused_tangents
        return self

    def parameters_of_parent(self) -> int:
        """Parameters of the flow map without context, one embedder of times for both: what DMF and SiT have."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(self.own_parts))

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, N, patch·patch·C), a token's numbers by row, column, channel -> (B, C, H, W)."""
        (c, height, width), patch = self.event_shape, self.config.patch
        grid = tokens.unflatten(2, (patch, patch, c)).unflatten(1, (height // patch, -1))
        out: Tensor = grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, height, width)
        return out


class Block(Compilable):
    """x + gate · attention(modulated norm), then the same with a perceptron."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, round(config.mlp_ratio * config.width)
        self.attention = SelfAttention(width, config.heads, config.head_norms)
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(first, nn.GELU(approximate="tanh"), last)
        self.modulation = _modulation(width, 6)
        for layer in (self.attention.qkv, self.attention.out, first, last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, width), (B, width) -> (B, N, width)."""
        with unrounded(c) as (c,):
            modulation = self.modulation(c)
        return self.run(x, modulation)

    def core(self, *inputs: Tensor) -> Tensor:
        """(B, N, width), (B, 6·width) -> (B, N, width)."""
        x, modulation = inputs
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.chunk(6, 1)
        x = x + gate_1[:, None] * self.attention(modulate(layer_norm(x), shift_1, scale_1))
        out: Tensor = x + gate_2[:, None] * self.mlp(modulate(layer_norm(x), shift_2, scale_2))
        return out


class FinalLayer(nn.Module):
    """Tokens to the numbers of their patch; 0 at initialisation."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = silenced(nn.Linear(width, outputs))
        self.modulation = _modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, width), (B, width) -> (B, N, outputs)."""
        shift, scale = self.modulation(c).chunk(2, 1)
        out: Tensor = self.linear(modulate(layer_norm(x), shift, scale))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, the same for every token."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _modulation(width: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), silenced(nn.Linear(width, parts * width)))


def _tokens(patches: Tensor) -> Tensor:
    """(B, width, h, w) -> (B, h·w, width)."""
    return patches.flatten(2).mT


def _check(config: DiTConfig, size: int) -> None:
    check_divides(config.patch, size, ("patch", "size"))
    if config.width % 4:
        raise InputError(f"width must be a multiple of 4 (for the positions), got {config.width}")
    if config.encoder_depth is not None and config.encoder_depth > config.depth:
        raise InputError(f"encoder_depth must be at most the depth, {config.depth}, got {config.encoder_depth}")
