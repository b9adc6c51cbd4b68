"""A reward is any callable ``(x, cond=None) -> (B,)``: a log-density tilt, already multiplied by its strength λ.

A plain function works. A class in this package also declares ``differentiable`` (may ∇r be taken?) and ``strength``.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from metaflowmaps._shapes import Cond, event_sum
from metaflowmaps.errors import InputError


@runtime_checkable
class Reward(Protocol):
    """What the package's own rewards offer beyond being callable.

    Examples:
        >>> isinstance(mfm.rewards.Ink(), mfm.rewards.Reward)
        True
    """

    differentiable: bool
    strength: float

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        ...


def is_differentiable(reward: Callable[..., Any]) -> bool:
    """What the reward declares.

    Args:
        reward: any callable.

    Returns:
        Its ``differentiable``; True where it declares nothing.

    Examples:
        >>> mfm.rewards.is_differentiable(mfm.rewards.Ink())
        True
        >>> mfm.rewards.is_differentiable(mfm.rewards.BlackBox(lambda x: x[:, 0]))
        False
    """
    return bool(getattr(reward, "differentiable", True))


def check_differentiable(reward: Callable[..., Any]) -> None:
    """Refuse a reward that declares itself not differentiable, where its gradient is taken."""
    if not is_differentiable(reward):
        raise InputError(
            "this reward declares itself not differentiable: use mfm.MFMGF (--method mfm-gf, or GradientFree())"
        )


def rows_of(reward: Any, x: Tensor) -> int | None:
    """How many samples the reward is about, row by row; None (nearly always) if it treats all alike."""
    if hasattr(reward, "rows_for"):
        rows: int | None = reward.rows_for(x)
        return rows
    return next((n for part in _inside(reward) if (n := rows_of(part, x)) is not None), None)


def codecs_of(reward: Any) -> list[nn.Module]:
    """The modules that decode a state before the reward sees it: what its parts hold as ``codec``."""
    own = getattr(reward, "codec", None)
    found = [own] if isinstance(own, nn.Module) else []
    return [*found, *(codec for part in _inside(reward) for codec in codecs_of(part))]


def _inside(reward: Any) -> tuple[Any, ...]:
    """Compositions hold their parts as ``rewards``, wrappers theirs as ``reward``."""
    return (*getattr(reward, "rewards", ()), *([reward.reward] if hasattr(reward, "reward") else []))


def call_reward(reward: Callable[..., Any], x: Tensor, cond: Cond = None) -> Any:
    """reward(x, cond) where the callable has a place for cond, reward(x) where it has none.

    The place is a parameter named ``cond``, or else a second positional one. A default stays as it is when there is no
    condition, and always when it is not None: ``scale=2.0`` is an option of the function, not a place for cond.

    Args:
        reward: any callable.
        x: (B, *event).
        cond: None, or tensors by name, one row a sample; no names are as good as None.

    Returns:
        What the callable does: (B,) where it is a reward.

    Examples:
        >>> mfm.rewards.call_reward(lambda x: x.sum(1), torch.ones(2, 3))
        tensor([3., 3.])
    """
    return with_cond(reward)(x, cond)


def with_cond(reward: Callable[..., Any]) -> Callable[[Tensor, Cond], Any]:
    """The reward as a function of x and cond, whatever it takes: its signature is read once, as call_reward says."""
    try:
        signature = inspect.signature(reward.forward if isinstance(reward, nn.Module) else reward)
    except (TypeError, ValueError):  # builtins written in C
        return lambda x, cond: reward(x)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    after_x = parameters if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL else parameters[1:]
    by_position = [p for p in after_x if p.kind is not p.KEYWORD_ONLY]
    place = next(iter([p for p in after_x if p.name == "cond"] or by_position), None)
    if place is None or not (place.default is None or place.default is place.empty):
        return lambda x, cond: reward(x)
    required = place.default is place.empty and place.kind is not place.VAR_POSITIONAL
    by_name = place.name == "cond" and place.kind in (place.POSITIONAL_OR_KEYWORD, place.KEYWORD_ONLY)

    def call(x: Tensor, cond: Cond) -> Any:
        if not cond and not required:
            return reward(x)
        return reward(x, cond=cond or None) if by_name else reward(x, cond or None)

    return call


def no_reward(x: Tensor) -> Tensor:
    """r(x) = 0: (B,) zeros on the graph of x, so that a gradient exists and is 0."""
    return event_sum(0 * x)


def describe(thing: object) -> str:
    """A function's name, a module's class or a short repr: what a reward's own repr says of its parts."""
    name = getattr(thing, "__name__", None)
    if isinstance(name, str):
        return name
    if isinstance(thing, nn.Module) or type(thing).__repr__ is object.__repr__:
        return type(thing).__name__
    text = " ".join(repr(thing).split())
    return text if len(text) <= 120 else text[:117] + "..."
