r"""Attention with its forward derivative, nothing of size N² stored: a Triton kernel for CUDA.

With S = q kᵀ/√d, P = softmax(S) over keys, O = P v, and tangents marked by a dot,

    Ṡ = (q̇ kᵀ + q k̇ᵀ)/√d        Ȯ = (P∘Ṡ) v + P v̇ − μ O        μ = rowsum(P∘Ṡ)

Every sum runs over keys, so they are accumulated block by block with weights relative to the largest S seen so far, as
in the usual fused kernel: l = Σ p, m = Σ pṠ, A = Σ p v, B = Σ (pṠ v + p v̇); in the end Ȯ = B/l − (m/l)(A/l). The kernel
has no gradient: it serves the losses that take their JVP under no_grad. ``TRITON_INTERPRET=1`` runs it on a processor.
"""
# ruff: noqa: ANN001, ANN202 -- a kernel's pointers have no types

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


# as many parameters as pointers and sizes: they are the compiled kernel's own arguments
@triton.jit  # type: ignore[untyped-decorator]
def _tangent_kernel(  # type: ignore[no-untyped-def]
    q, k, v, dq, dk, dv, out, scale, n, d, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    start = tl.program_id(1).to(tl.int64) * n * d  # of this sample's and head's (n, d) arrays
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    here = start + rows[:, None] * d + columns[None, :]
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    q_i, dq_i = tl.load(q + here, mask=inside, other=0.0), tl.load(dq + here, mask=inside, other=0.0)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    mass, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    value, slope = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, n, KEYS):
        keys = first + tl.arange(0, KEYS)
        there, exists = start + keys[:, None] * d + columns[None, :], (keys[:, None] < n) & (columns[None, :] < d)
        k_j, dk_j = tl.load(k + there, mask=exists, other=0.0), tl.load(dk + there, mask=exists, other=0.0)
        v_j, dv_j = tl.load(v + there, mask=exists, other=0.0), tl.load(dv + there, mask=exists, other=0.0)
        s = scale * tl.dot(q_i, tl.trans(k_j), input_precision="ieee")
        ds = tl.dot(dq_i, tl.trans(k_j), input_precision="ieee") + tl.dot(q_i, tl.trans(dk_j), input_precision="ieee")
        s = tl.where(keys[None, :] < n, s, -float("inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p, fade = tl.exp(s - higher[:, None]), tl.exp(top - higher)
        pds, top = p * (scale * ds), higher
        mass, moment = mass * fade + tl.sum(p, 1), moment * fade + tl.sum(pds, 1)
        p, pds = p.to(v_j.dtype), pds.to(v_j.dtype)
        value = value * fade[:, None] + tl.dot(p, v_j, input_precision="ieee")
        slope = slope * fade[:, None] + tl.dot(pds, v_j, input_precision="ieee")
        slope += tl.dot(p, dv_j, input_precision="ieee")
    tangent = slope / mass[:, None] - (moment / mass)[:, None] * (value / mass[:, None])
    tl.store(out + here, tangent.to(out.dtype.element_ty), mask=inside)


# an operator of its own: torch unwraps the tensors of its transforms before they reach the kernel
@torch.library.custom_op("metaflowmaps::attention_tangent", mutates_args=())
def attention_tangent(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Ȯ from (q, k, v) and their tangents, (B, heads, N, d) each."""
    q, k, v, dq, dk, dv = (x.contiguous() for x in (q, k, v, dq, dk, dv))
    batch, heads, n, d = q.shape
    out, width = torch.empty_like(v), max(16, triton.next_power_of_2(d))
    size = 32 if q.dtype == torch.float32 or width > 128 else 64
    grid, warps = (triton.cdiv(n, size), batch * heads), 4 if width < 128 else 8  # with 4, wide rows spill registers
    _tangent_kernel[grid](q, k, v, dq, dk, dv, out, d**-0.5, n, d, ROWS=size, KEYS=32, WIDTH=width, num_warps=warps)
    return out


class _Attention(torch.autograd.Function):
    """The usual fused kernel, with the derivative above."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        primals = ctx.saved_tensors
        filled = (torch.zeros_like(x) if dx is None else dx for x, dx in zip(primals, tangents, strict=True))
        out: Tensor = attention_tangent(*primals, *filled)
        return out


def attend_with_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v under forward-mode AD: (B, heads, N, d), three times -> (B, heads, N, d)."""
    out: Tensor = _Attention.apply(q, k, v)
    return out
