r"""Rewards from a classifier: any callable that returns logits (B, classes).

``ClassifierMixture``   r(x) = λ log Σ_i w_i p(y_i | x)              one class, or a wish for several
``LogitMargin``         r(x) = λ (ℓ_y − log Σ_{j≠y} e^{ℓ_j})         the log-odds log p/(1 − p): no ceiling at 0
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, as_numbers, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import describe

Classifier = Callable[[Tensor], Tensor]


class ClassifierMixture:
    """r(x) = strength · log Σ_i w_i p(y_i | x), w >= 0 and normalised: only the ratios of weights matter.

    Args:
        classifier: (B, *event) -> logits (B, classes).
        weights: w, one a class.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> classifier = lambda x: x[:, 0, 0, :3]  # logits (B, classes)
        >>> reward = mfm.rewards.ClassifierMixture(classifier, [0.5, 0.5, 0.0])
        >>> reward(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4])
    """

    differentiable = True

    def __init__(self, classifier: Classifier, weights: Any, strength: float = 1.0) -> None:
        self.classifier = _usable(classifier)
        given = as_numbers(weights, "weights")
        if given.ndim != 1:
            raise InputError(f"weights must have one number a class, shape (classes,), got {tuple(given.shape)}")
        if not bool((torch.isfinite(given) & (given >= 0)).all()) or not bool(given.any()):
            raise InputError(f"weights must be finite and >= 0 and not all 0, got {given.tolist()}")
        scaled = given / given.amax()  # so that the sum cannot overflow
        self.weights = scaled / scaled.sum()
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        log_p = _logits(self.classifier, x, len(self.weights), "weights").log_softmax(1)
        log_w = self.weights.log().to(log_p)  # −inf for a weight of 0: no part in the value, a gradient of 0
        return (self.strength * (log_p + log_w).logsumexp(1)).to(x.dtype)

    def __repr__(self) -> str:
        weights = {int(i): round(float(self.weights[i]), 4) for i in self.weights.nonzero()[:, 0]}
        return (
            f"ClassifierMixture({describe(self.classifier)}, weights={weights} of {len(self.weights)} classes, "
            f"strength={self.strength:g})"
        )


class LogitMargin:
    """r(x) = strength · (ℓ_label − log Σ_{j≠label} e^{ℓ_j}), the log-odds of a class.

    Args:
        classifier: (B, *event) -> logits (B, classes).
        label: the class.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> classifier = lambda x: x  # logits (B, classes)
        >>> reward = mfm.rewards.LogitMargin(classifier, label=1)
        >>> reward(torch.tensor([[0.0, 2.0, -50.0]]))  # log-odds of the class
        tensor([2.])
    """

    differentiable = True

    def __init__(self, classifier: Classifier, label: int, strength: float = 1.0) -> None:
        self.classifier = _usable(classifier)
        try:
            self.label = operator.index(label)
        except TypeError:
            self.label = -1
        if self.label < 0:
            raise InputError(f"label must be the number of a class, 0, 1, …; got {label!r}")
        known = getattr(classifier, "num_classes", None)  # of the package's own; of others the logits tell
        if isinstance(known, int):
            self._check(known)
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        logits = _logits(self.classifier, x)
        self._check(logits.shape[1])
        others = torch.tensor([j for j in range(logits.shape[1]) if j != self.label], device=logits.device)
        margin = logits[:, self.label] - logits.index_select(1, others).logsumexp(1)
        return (self.strength * margin).to(x.dtype)

    def _check(self, classes: int) -> None:
        if self.label >= classes:
            raise InputError(f"label {self.label} is not among 0 … {classes - 1}, the classes of the classifier")
        if classes < 2:
            raise InputError("LogitMargin needs a classifier of two classes or more: add a column of zeros for 'no'")

    def __repr__(self) -> str:
        return f"LogitMargin({describe(self.classifier)}, label={self.label}, strength={self.strength:g})"


def _usable(classifier: Classifier) -> Classifier:
    if not callable(classifier):
        raise InputError(f"classifier must be a function of x that returns logits, got {describe(classifier)}")
    if isinstance(classifier, nn.Module) and classifier.training:
        raise InputError(
            f"the classifier {type(classifier).__name__} is in training mode, where dropout and batch norm make its "
            "logits random or depend on the batch: call .eval() on it first"
        )
    return classifier


def _logits(classifier: Classifier, x: Tensor, classes: int | None = None, counted: str = "") -> Tensor:
    """Logits (B, classes), refused in any other form."""
    logits = _usable(classifier)(x)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the classifier must return a tensor of logits, got {type(logits).__name__}; "
            "unwrap it, as in lambda x: net(x).logits"
        )
    if logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        raise InputError(
            f"the classifier must return floating-point logits of shape ({len(x)}, classes), "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    if classes is not None and logits.shape[1] != classes:
        raise InputError(
            f"the classifier knows {logits.shape[1]} classes and there are {classes} {counted}: "
            "give one weight a class, 0 for the classes that do not matter"
        )
    return logits
