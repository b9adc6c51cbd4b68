r"""Multi-head self-attention that is fused where it can be and differentiable in forward mode where it must be.

    attend(q, k, v) = softmax(q kᵀ / √d) v

The fused kernel computes this without storing the softmax, but has no forward-mode derivative; two matrix products and
a softmax have one, and a gradient through it. Where no gradient is wanted, on CUDA, the derivative too can be had
without storing anything of size N² (:mod:`metaflowmaps.networks.tangents`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps._shapes import check_count
from metaflowmaps.networks.checks import check_divides
from metaflowmaps.networks.forward_mode import forward_mode


def attend(q: Tensor, k: Tensor, v: Tensor, fused_tangents: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v over tokens: (B, heads, N, d), three times -> (B, heads, N, d).

    Tokens where ``mask`` (B, N) is False are seen by nobody.
    """
    if mask is not None:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, None, None], -torch.inf)
        out: Tensor = scores.softmax(-1) @ v
    elif fused_tangents and forward_mode() and not torch.is_grad_enabled():
        from metaflowmaps.networks.tangents import attend_with_tangents

        out = attend_with_tangents(q, k, v)
    elif forward_mode():
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v)
    return out


class HeadNorm(nn.Module):
    """x / √(mean x² + 1e-6) over the numbers of a head, each then scaled; exact under forward-mode AD."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) -> (…, size)."""
        out = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.scale
        return out.to(x.dtype)  # autocast has queries in fewer bits than parameters


class SelfAttention(nn.Module):
    """Self-attention with one projection to queries, keys and values, in this order, and one out.

    ``head_norms``: queries and keys are normalised, each head by itself.
    """

    fused_tangents = False

    def __init__(self, width: int, heads: int, head_norms: bool = False) -> None:
        super().__init__()
        check_count(heads, "heads")
        check_divides(heads, width, ("heads", "width"))
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm, self.k_norm = (HeadNorm(width // heads) if head_norms else nn.Identity() for _ in "qk")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(self.q_norm(q), self.k_norm(k), v, self.fused_tangents)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
