"""Everything a run must remember to go on as if it had never stopped, and its form on disk."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from metaflowmaps.checkpoint import (
    Checkpoint,
    CheckpointStore,
    flatten_state,
    model_config,
    unflatten_state,
)
from metaflowmaps.training.soap import SOAP
from metaflowmaps.training.train_config import OptimizerConfig, RunConfig
from metaflowmaps.work import ranks

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
OBJECTIVE = "objective.safetensors"


class TrainState:
    """Model, EMA, optimizer, position and, where it has one, the objective's own state.

    ``window`` holds the sums of the metrics since the last record.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, objective: Any = None) -> None:
        self.model = model
        self.objective = objective if hasattr(objective, "state_dict") else None
        self.optimizer = make_optimizer(model, config)
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.decay = config.ema
        self.step = 0
        self.window: dict[str, float] = {}
        self.window_steps = 0
        self.last_loss = math.inf
        self.metrics_bytes = 0
        live = dict(model.named_parameters())
        self._averaged = [ranks.local(self.ema[name]) for name in live]
        self._live = list(live.values())

    @torch.no_grad()
    def average(self) -> None:
        """ema ← k ema + (1 − k) weights, k = min(decay, (step + 1)/(step + 10)), on what this rank holds of them."""
        keep = min(self.decay, (self.step + 1) / (self.step + 10))
        get_ema_multi_avg_fn(keep)(self._averaged, [ranks.local(p) for p in self._live], self.step)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights and in evaluation mode, while it lasts."""
        live = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        was_training = self.model.training
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(live)
            self.model.train(was_training)

    def add(self, values: dict[str, float]) -> None:
        """Add one step's figures to the window."""
        for name, value in values.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1

    def flush(self) -> dict[str, float]:
        """The means over the window, which starts anew."""
        means = {name: total / max(1, self.window_steps) for name, total in self.window.items()}
        self.window, self.window_steps = {}, 0
        self.last_loss = means.get("loss", self.last_loss)
        return means

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self, store: CheckpointStore, config: RunConfig, scheduled: bool) -> None:
        """One checkpoint directory, complete or not at all; the first rank writes it, all must enter.

        An unscheduled one has no score: kept as the best, it would make an interrupted run differ from a whole one.
        """
        optimizer, skeleton = flatten_state(self.optimizer.state_dict())
        position = {
            "step": self.step,
            "window": self.window,
            "window_steps": self.window_steps,
            "last_loss": self.last_loss if math.isfinite(self.last_loss) else None,
            "metrics_bytes": self.metrics_bytes,
            "optimizer": skeleton,
        }
        learned = {MODEL: self.model.state_dict(), EMA: self.ema, OPTIMIZER: optimizer}
        tensors = {name: ranks.whole(named) for name, named in learned.items()}
        if self.objective is not None:
            tensors[OBJECTIVE], position["objective"] = flatten_state(self.objective.state_dict())
        score = self.last_loss if scheduled and math.isfinite(self.last_loss) else None
        documents = {
            "config.json": {**model_config(self.model), "training": config.model_dump()},
            "position.json": position,
        }
        ranks.first(lambda: store.save(self.step, tensors, documents, score))

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up where the checkpoint left, however many ranks there were and are."""
        position = checkpoint.document("position.json")
        for held, name in ((self.model.state_dict(), MODEL), (self.ema, EMA)):
            stored = checkpoint.tensors(name)
            for key, value in held.items():
                ranks.copy_into(value, stored[key])
        optimizer = unflatten_state(checkpoint.tensors(OPTIMIZER), position["optimizer"])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, slots in optimizer["state"].items():
            for key, value in slots.items():
                slots[key] = _own(value, parameters[number])
        self.optimizer.load_state_dict(optimizer)
        if self.objective is not None and checkpoint.has(OBJECTIVE):
            memory = {name: value.clone() for name, value in checkpoint.tensors(OBJECTIVE).items()}
            self.objective.load_state_dict(unflatten_state(memory, position["objective"]))
        self.step = position["step"]
        self.window, self.window_steps = position["window"], position["window_steps"]
        self.last_loss = math.inf if position["last_loss"] is None else position["last_loss"]
        self.metrics_bytes = position["metrics_bytes"]


def _own(value: Any, parameter: Tensor) -> Any:
    """A copy of what an optimizer keeps of a weight; of its shape, it is sharded like it.

    A copy in any case: torch aligns what it allocates, a view into a file's bytes it does not, and kernels round by it.
    """
    if not isinstance(value, Tensor):
        return value
    like = parameter.detach() if value.shape == parameter.shape and hasattr(parameter, "placements") else value
    mine = torch.empty_like(like, dtype=value.dtype)
    ranks.copy_into(mine, value)
    return mine


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of a configuration over a model's parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind: Any = {"soap": SOAP, "radam": torch.optim.RAdam, "adam": partial(torch.optim.Adam, fused=True)}[config.name]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    return optimizer


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant or a cosine to 0 at the last step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay


def truncate(path: Path, size: int) -> None:
    """Cut a log back to what a checkpoint vouches for."""
    if path.exists() and path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
