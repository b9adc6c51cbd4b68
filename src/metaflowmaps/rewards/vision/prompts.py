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
    """The prompts of a reward, as token ids and masks (P, length), and which of them a row has."""

    def __init__(self, prompt: Any, tokenizer: Any, length: int, classes: Names | None = None) -> None:
        self.by_label = isinstance(prompt, str) and SLOT in prompt
        self.rows: int | None = None
        if isinstance(prompt, Tensor):
            self.shown = f"{tuple(prompt.shape)} token ids"
            self.rows = len(prompt) if prompt.ndim == 2 else None
            self.input_ids, self.attention_mask = _given_ids(prompt, length)
            return
        texts = _texts(prompt, classes)
        self.rows = None if isinstance(prompt, str) else len(texts)
        self.shown = repr(texts[0] if not self.by_label else prompt)[:60]
        if tokenizer is None:
            raise InputError("a prompt in words needs tokenizer=…; or give its token ids as a tensor (length,)")
        if not callable(tokenizer):
            raise InputError(f"tokenizer must be one of transformers, got {type(tokenizer).__name__}")
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
            label = None if cond is None else cond.get("label")
            if label is None or label.shape != x.shape[:1]:
                raise InputError(f'a prompt with {SLOT} needs cond["label"], shape ({len(x)},), int64')
            if bool(((label < 0) | (label >= len(self.input_ids))).any()):
                raise InputError(
                    f'cond["label"] must lie in 0 … {len(self.input_ids) - 1}, the classes that have names; '
                    f"got {int(label.min())} … {int(label.max())} (the null class has none)"
                )
            return label.long()
        if self.rows is None:
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if len(x) % self.rows:
            raise InputError(f"there are {self.rows} prompts, one a row, for {len(x)} rows: give one, or {len(x)}")
        return torch.arange(self.rows, device=x.device).repeat(len(x) // self.rows)


def check_prompt(prompt: Any, classes: Names | None) -> None:
    """Refuse what is no prompt, before gigabytes are loaded for it."""
    if not isinstance(prompt, Tensor):
        _texts(prompt, classes)


def _texts(prompt: Any, classes: Names | None) -> list[str]:
    if isinstance(prompt, str) and SLOT in prompt:
        if not classes:
            raise InputError(f"a prompt with {SLOT} needs the names of the classes: classes=[…] or {{0: …, 1: …}}")
        names = [classes[i] for i in range(len(classes)) if not isinstance(classes, Mapping) or i in classes]
        if len(names) < len(classes):
            raise InputError(f"classes must name every class from 0 to {len(classes) - 1}, got {list(classes)[:5]} …")
        return [prompt.replace(SLOT, name) for name in names]
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(
            f"prompt must be a text, a list of texts (one a row) or token ids, got {prompt!r}: "
            'prompt="a photo of a cat"'
        )
    return texts


def _given_ids(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    if ids.is_floating_point() or ids.ndim not in (1, 2) or 0 in ids.shape or ids.shape[-1] > length:
        raise InputError(
            f"token ids must be whole numbers of shape (length,) or (rows, length), length <= {length}; got "
            f"{ids.dtype} {tuple(ids.shape)}"
        )
    ids = ids.long().reshape(-1, ids.shape[-1])
    return ids, torch.ones_like(ids)
