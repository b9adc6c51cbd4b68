"""A reward behind a check: what comes back is (B,) finite numbers on the device of x, and x is as it was."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, check_plain
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import is_differentiable, with_cond

BLACK_BOX = "mfm.rewards.BlackBox"
MOODY = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # other in training than in use


class CheckedReward:
    """``reward(x, cond) -> (B,)`` in the dtype of x, or one line that says what is wrong with it.

    −inf is allowed (a hard constraint); NaN and +inf at a finite x are not.

    Args:
        reward: any callable of x, or of x and cond.
    """

    def __init__(self, reward: Callable[..., Any]) -> None:
        if not callable(reward) or inspect.isclass(reward):
            given = f"the class {reward.__name__}" if inspect.isclass(reward) else type(reward).__name__
            raise InputError(f"a reward is a function of x (and optionally cond), got {given}")
        if isinstance(reward, nn.Module) and any(m.training and isinstance(m, MOODY) for m in reward.modules()):
            raise InputError(
                "the reward is a module in training mode, where dropout draws at random: call .eval() on it"
            )
        self.reward, self._call = reward, with_cond(reward)
        self.differentiable = is_differentiable(reward)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        given = x.clone()  # whatever the reward does to it, the samples stay as they are
        version = _version(given)
        try:
            out = self._call(given, cond)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # the user's own code: in one line, with its traceback behind it
            text = " ".join(str(error).split())[:200]
            if "to numpy" in text or "to NumPy" in text:  # of a tensor on an accelerator, or that requires a gradient
                text += f" (wrap it as {BLACK_BOX}, which is given tensors on the CPU)"
            raise InputError(f"the reward raised {type(error).__name__}: {text}") from error
        if _version(given) != version or not _same(given, x):
            raise InputError("the reward changed its input in place: begin it with x = x.clone()")
        if not isinstance(out, Tensor):
            fix = "does it end with return?" if out is None else f"wrap what is not written in torch as {BLACK_BOX}"
            raise InputError(f"the reward must return a tensor of shape ({len(x)},), got {type(out).__name__}; {fix}")
        if out.device != x.device:
            raise InputError(f"the reward returned a tensor on {out.device} for samples on {x.device}: move it there")
        check_plain(out, "the reward's answer")
        if tuple(out.shape) != (len(x),):
            raise InputError(
                f"the reward must return one number a sample, shape ({len(x)},), got {tuple(out.shape)}; "
                "sum or mean over all dimensions but the first"
            )
        if out.is_complex():
            raise InputError("the reward must return real numbers, got complex ones")
        out = out.to(x.dtype)
        bad = (out.isnan() | (out == torch.inf)) & x.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            raise InputError(
                f"the reward is {float(out.detach()[bad][0]):g} for {int(bad.sum())} of {len(x)} finite samples: "
                "it must be finite (or −inf, for what is forbidden)"
            )
        return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN for NaN: what was written through ``x.data`` or ``x.numpy()`` shows here alone."""
    with torch.no_grad():
        return bool(((a == b) | (b != b)).all())


def _version(x: Tensor) -> int:
    """How often x was written to; tensors of inference mode do not count."""
    return 0 if x.is_inference() else x._version


def checked_reward(reward: Callable[..., Any]) -> CheckedReward:
    """The reward behind a check, once."""
    return reward if isinstance(reward, CheckedReward) else CheckedReward(reward)
