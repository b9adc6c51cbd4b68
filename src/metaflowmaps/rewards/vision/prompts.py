"""Which prompt goes with which row.

One for all rows; a list, one a row (an x of k·P rows is k copies of the batch, as draws for a batch of states are); a
template with ``{label}``, filled with the name of each row's class; or token ids, for which no tokenizer is needed.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.errors import InputError

SLOT = "{label}"
Names = Sequence[str] | Mapping[int, str]


class Prompts:
    """The prompts of a reward, as token ids and masks (P, length), and which of them a row has.

    Args:
        prompt: one text, one a row, one with ``{label}``, or token ids.
        tokenizer: of transformers; None for token ids.
        length: tokens that are read.
        classes: the names that ``{label}`` stands for.
    """

    def __init__(self, prompt: Any, tokenizer: Any, length: int, classes: Names | None = None) -> None:
        self.by_label = isinstance(prompt, str) and SLOT in prompt
        if isinstance(prompt, Tensor):
            self.shown = f"{tuple(prompt.shape)} token ids"
            self.rows = len(prompt) if prompt.ndim == 2 else None
            self.input_ids = _given_ids(prompt, length)
            self.attention_mask = torch.ones_like(self.input_ids)
            return
        texts = texts_of(prompt, classes)
        self.rows = None if isinstance(prompt, str) else len(texts)
        self.shown = repr(prompt if self.by_label else texts[0])[:60]
        if not callable(tokenizer):
            raise InputError(
                f"a prompt in words needs tokenizer=…, got {type(tokenizer).__name__}; or give its token ids as a "
                "tensor (length,)"
            )
        longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
        if longest > length:
            warnings.warn(
                f"a prompt of {longest} tokens is cut to the {length} that this reward reads", UserWarning, stacklevel=4
            )
        made = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        self.input_ids, self.attention_mask = made["input_ids"], made["attention_mask"]

    def which(self, x: Tensor, cond: Cond) -> Tensor:
        """The number of each row's prompt: (B,) int64."""
        if self.by_label:
            return labels_of(x, cond, len(self.input_ids))
        if self.rows is None:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if len(x) % self.rows:
            raise InputError(f"there are {self.rows} prompts, one a row, for {len(x)} rows: give one, or {len(x)}")
        return torch.arange(self.rows, device=x.device).repeat(len(x) // self.rows)


def labels_of(x: Tensor, cond: Cond, classes: int) -> Tensor:
    """The class of each row, from the condition: (B,) int64; ``classes`` is 0 where nobody knows how many there are."""
    label = (cond or {}).get("label")
    if label is None or label.shape != x.shape[:1]:
        raise InputError(f'without a label of its own this reward needs cond["label"], shape ({len(x)},), int64')
    if classes and bool(((label < 0) | (label >= classes)).any()):
        raise InputError(
            f'cond["label"] must lie in 0 … {classes - 1}, the classes that this reward knows; got '
            f"{int(label.min())} … {int(label.max())} (the null class is none of them)"
        )
    return label.long()


def texts_of(prompt: Any, classes: Names | None) -> list[str]:
    """The texts of a prompt in words: one, one a row, or one a class."""
    if isinstance(prompt, str) and SLOT in prompt:
        named = dict(classes) if isinstance(classes, Mapping) else dict(enumerate(classes or ()))
        if not named or sorted(named) != list(range(len(named))):
            raise InputError(
                f"a prompt with {SLOT} needs the names of the classes, every class from 0 to "
                f"{max(0, len(named) - 1)}: classes=[…] or {{0: …, 1: …}}"
            )
        return [prompt.replace(SLOT, named[i]) for i in range(len(named))]
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"prompt must be a text, a list of texts (one a row) or token ids, got {prompt!r}: "
            'prompt="a photo of a cat"'
        )
    return texts


def _given_ids(ids: Tensor, length: int) -> Tensor:
    if ids.is_floating_point() or ids.ndim not in (1, 2) or 0 in ids.shape or ids.shape[-1] > length:
        raise InputError(
            f"token ids must be whole numbers of shape (length,) or (rows, length), length <= {length}; got "
            f"{ids.dtype} {tuple(ids.shape)}"
        )
    return ids.long().reshape(-1, ids.shape[-1])
