r"""Operations whose fused kernels cannot be trusted under forward-mode AD.

Losses differentiate a network in its times by ``torch.func.jvp`` and take a gradient through the result. Of the fused
kernels that transformers use (torch 2.13),

- scaled dot-product attention has no forward-mode derivative and raises (see :mod:`metaflowmaps.networks.attention`);
- layer norm has one, but the gradient *through* it is wrong, silently: it takes the mean and the deviation of the
  primal as constants.

So while forward-mode AD is on, they are composed of elementary operations, and fused otherwise.
"""

from typing import Any

from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional


def forward_mode() -> bool:
    """Whether forward-mode AD is on: a dual level is open, whoever opened it, whatever vmap or grad lies in between.

    The level is asked for, not the tensors: inside ``jvp(grad(f))`` a tensor does not show the tangent that an outer
    level gave it.
    """
    level: Any = forward_ad._current_level  # torch has no public name for it
    return bool(level >= 0)


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x − mean)/√(variance + eps) over the last dimension."""
    if not forward_mode():
        return functional.layer_norm(x, x.shape[-1:], eps=eps)
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
