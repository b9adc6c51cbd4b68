"""Training a classifier: cross-entropy on images that are shifted by whole pixels and blurred by a little noise.

It goes through the same loop as a map: a batch is a function of (seed, step), so runs resume and repeat exactly.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaflowmaps.data import Examples
from metaflowmaps.random import randn, stream
from metaflowmaps.training.train_config import ClassifierConfig


@dataclass(frozen=True)
class LabelledBatch:
    """Images with their classes."""

    x: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, start: int, end: int) -> "LabelledBatch":
        return LabelledBatch(self.x[start:end], self.label[start:end])

    def share(self, rank: int, size: int) -> "LabelledBatch":
        return LabelledBatch(self.x[rank::size], self.label[rank::size])

    def to(self, device: torch.device) -> "LabelledBatch":
        return replace(self, x=self.x.to(device), label=self.label.to(device))

    def about(self, rows: Tensor) -> str:
        return f"classes {sorted(set(self.label[rows].tolist()))}"


class ClassifierObjective:
    """Batches of a step, and the cross-entropy of each row."""

    def __init__(self, data: Examples, config: ClassifierConfig) -> None:
        self.data, self.config = data, config

    def batch(self, model: nn.Module, step: int) -> LabelledBatch:
        """The inputs of a step, the same whoever asks and whenever."""
        g, c = stream(self.config.seed, "classifier", step), self.config
        x, label = self.data.sample_labelled(c.batch_size, g)
        x = shifted(x, torch.randint(-c.shift, c.shift + 1, (2, len(x)), generator=g))
        return LabelledBatch(x + c.noise * randn(tuple(x.shape), g), label)

    def __call__(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        """Per-row losses, (B,)."""
        return F.cross_entropy(model(batch.x), batch.label, reduction="none", label_smoothing=self.config.smoothing)


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """Each image (B, C, H, W) moved by its own (rows, columns) of ``by`` (2, B); what comes in is the border's copy."""
    n, channels, height, width = x.shape
    rows = (torch.arange(height) - by[0, :, None]).clamp(0, height - 1)
    columns = (torch.arange(width) - by[1, :, None]).clamp(0, width - 1)
    each = torch.arange(n)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return x[each[0], each[1], rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, data: Examples) -> float:
    """Share of a set that the classifier names right."""
    assert data.labels is not None
    right = [
        (model(data.tensor(part)).argmax(1) == data.labels[part]).float().sum()
        for part in torch.arange(len(data)).split(1024)
    ]
    return float(torch.stack(right).sum()) / len(data)
