"""Where a run begins: what its directory holds, what ``--resume`` names, or nothing."""

import warnings
from pathlib import Path
from typing import Any

from metaflowmaps.checkpoint import Checkpoint, CheckpointStore, resolve_checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.training.train_config import (
    RunConfig,
)
from metaflowmaps.work import ranks
from metaflowmaps.work.config import differences, validated
from metaflowmaps.work.own_code import named_by_a_file


def starting_point(config: RunConfig, out: Path, resume: str) -> Checkpoint | None:
    """auto: the newest valid checkpoint of ``out``. none: nothing, and there must be nothing. Else: that checkpoint."""
    store = CheckpointStore(out / "checkpoints", config.keep_last, config.keep_best)
    ranks.first(store.clean)
    if resume == "none":
        ranks.first(lambda: _check_empty(store, out))
        return None
    checkpoint, skipped = store.latest_for_all()
    for line in skipped:
        warnings.warn(f"skipped {line}", stacklevel=2)
    if checkpoint is not None:
        step = checkpoint.document("position.json")["step"]
        ranks.first(lambda: store.prune(step))  # a kill may have come between a save and its pruning
    if checkpoint is None and skipped:
        warnings.warn("no valid checkpoint is left: starting from step 0", stacklevel=2)
    if checkpoint is None and resume != "auto":
        checkpoint = ranks.together(lambda: _source(config, resume))
    return checkpoint


def _source(config: RunConfig, resume: str) -> Checkpoint:
    """The checkpoint that --resume names; refused where it cannot be gone on with."""
    checkpoint = resolve_checkpoint(resume)
    if not checkpoint.has("optimizer.safetensors"):
        raise InputError(f"--resume {resume}: this checkpoint holds a model without a training state")
    theirs, ours = checkpoint.config.get("training", {}), config.model_dump(mode="json")
    for part in ("model", "network", "optimizer"):
        if part not in ours:
            continue
        lines = differences(_as_read(config, part, theirs.get(part)), ours[part])
        if lines:
            raise InputError(f"--resume {resume} has another {part} ({'; '.join(lines[:3])}): repeat its settings")
    step = checkpoint.document("position.json")["step"]
    if step >= config.steps:
        raise InputError(f"--resume {resume} stands at step {step}, this run ends at {config.steps}: raise steps")
    return checkpoint


@named_by_a_file()
def _as_read(config: RunConfig, part: str, stored: Any) -> Any:
    """A part of a checkpoint's configuration with what versions before this one did not write."""
    try:
        return validated(type(config), {**config.model_dump(), part: stored}).model_dump(mode="json")[part]
    except InputError:  # it differs, and the two do not go together
        return stored


def _check_empty(store: CheckpointStore, out: Path) -> None:
    if store.steps():
        raise InputError(f"--resume none, but {out} already holds checkpoints: move it away or choose another --out")


def tidy(config: RunConfig, out: Path) -> None:
    """Remove from a finished run what its disk refused to remove while it lasted."""
    for folder in (out, out / "drift"):
        store = CheckpointStore(folder / "checkpoints", config.keep_last, config.keep_best)
        store.clean()
        store.prune(max(store.steps(), default=0))
