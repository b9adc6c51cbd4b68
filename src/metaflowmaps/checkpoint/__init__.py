"""Checkpoints: directories that are either complete and verified, or refused.

A checkpoint is a directory of safetensors and JSON files, and a ``manifest.json`` with the size and sha256 of
each of them:

    config.json  model.safetensors  manifest.json                 every checkpoint
    ema.safetensors  optimizer.safetensors  position.json  …      a training run's, besides

However many ranks train, the first one writes whole tensors: a checkpoint does not know how many there were.

**Writing.** Everything goes into a ``.tmp-`` sibling, each file flushed to the disk, the manifest last, and
one rename puts it in place. A checkpoint that is replaced first steps aside to ``.old-<name>``: whatever
happens between the two renames, one of the two names holds a complete directory, readers look at both, and
:func:`recover` tidies up. What is deleted is first renamed to ``.del-…``, so no half-deleted directory ever
carries a checkpoint's name.

**Reading.** Each file is read once, hashed, and parsed from those same bytes: a file that changes between the
check and the use cannot slip through. (One flipped bit in a safetensors file loads without an error: only the
hash knows.) Nothing is returned until every file has passed, and nothing is ever unpickled. Of what several ranks of
version 0.1 wrote in parts, the averaged weights are read, which were written whole.

**Training.** :class:`CheckpointStore` keeps the newest few and the best. The score is in the checkpoint
itself, so what is pruned depends on the directories alone, not on what a process remembers: a resumed run
prunes like one never stopped.
"""

from metaflowmaps.checkpoint.flatten import flatten_state, unflatten_state
from metaflowmaps.checkpoint.manifest import CheckpointError
from metaflowmaps.checkpoint.models import (
    Pretrained,
    export_run,
    load_classifier,
    model_config,
    resolve_checkpoint,
    save_model,
)
from metaflowmaps.checkpoint.reading import Checkpoint, read_checkpoint
from metaflowmaps.checkpoint.store import CheckpointStore
from metaflowmaps.checkpoint.writing import recover, write_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "Pretrained",
    "export_run",
    "flatten_state",
    "load_classifier",
    "model_config",
    "read_checkpoint",
    "recover",
    "resolve_checkpoint",
    "save_model",
    "unflatten_state",
    "write_checkpoint",
]
