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


def attend(q: Tensor, k: Tensor, v: Tensor, fused_tangents: bool = False) -> Tensor:
    """softmax(q kᵀ/√d) v over tokens: (B, heads, N, d), three times -> (B, heads, N, d)."""
    if fused_tangents and forward_mode() and not torch.is_grad_enabled():
        from metaflowmaps.networks.tangents import attend_with_tangents

        out: Tensor = attend_with_tangents(q, k, v)
    elif forward_mode():
        out = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    else:
        out = functional.scaled_dot_product_attention(q, k, v)
    return out


class SelfAttention(nn.Module):
    """Self-attention with one projection to queries, keys and values, in this order, and one out."""

    fused_tangents = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_count(heads, "heads")
        check_divides(heads, width, ("heads", "width"))
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, width) -> (B, N, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.out(attend(q, k, v, self.fused_tangents).transpose(1, 2).flatten(2))
        return out
