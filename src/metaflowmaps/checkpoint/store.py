"""The checkpoints of one training run: the newest few and the best."""

import math
import re
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from metaflowmaps.checkpoint.manifest import POSITION, CheckpointError, parse_json, read_manifest, reading, verified
from metaflowmaps.checkpoint.reading import Checkpoint, read_checkpoint
from metaflowmaps.checkpoint.writing import discard, recover, write_checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.work import ranks


class CheckpointStore:
    """The checkpoints of one run, ``root/step-00001000``: the newest ``keep_last`` and the best."""

    def __init__(self, root: str | FilePath, keep_last: int = 3, keep_best: bool = True) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last must be at least 1, got {keep_last}")
        self.root, self.keep_last, self.keep_best = FilePath(root), keep_last, keep_best

    def path(self, step: int) -> FilePath:
        """Where the checkpoint of a step is."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a directory, valid or not, oldest first."""
        if not self.root.is_dir():
            return []
        # .old-: its replacement was cut short; read_checkpoint finds it under either name
        names = (re.fullmatch(r"(?:\.old-)?step-(\d{8,})", entry.name) for entry in self.root.iterdir())
        return sorted({int(name[1]) for name in names if name})

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
        score: float | None = None,
    ) -> FilePath:
        """Write the checkpoint of a step, then prune. Lower scores are better; None and NaN never win."""
        if step < 0:
            raise InputError(f"step must be at least 0, got {step}")
        kept = None if score is None or math.isnan(score) else float(score)
        documents = {**documents, POSITION: {**documents.get(POSITION, {}), "score": kept}}
        write_checkpoint(self.path(step), tensors, documents)
        self.prune(step)
        return self.path(step)

    def latest_for_all(self) -> tuple[Checkpoint | None, list[str]]:
        """latest_valid, chosen by the first rank for all; all ranks must enter."""
        if ranks.size() == 1:
            return self.latest_valid()

        def look() -> tuple[FilePath | None, list[str]]:
            newest, skipped = self.latest_valid()
            return (None if newest is None else newest.path), skipped

        path, skipped = ranks.first(look)
        return (None if path is None else ranks.together(lambda: read_checkpoint(path))), skipped

    def latest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that passes every check, and a line for each newer one that does not."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path(step)), skipped
            except CheckpointError as error:
                skipped.append(str(error))
        return None, skipped

    def clean(self) -> None:
        """Finish what a crash interrupted; for the process that writes here."""
        with reading(self.root):
            recover(self.root)

    def prune(self, newest: int) -> None:
        """What save does last; a resumed run repeats it, for the save that was cut short just before."""
        # later steps are what a resume skipped as invalid: they must not displace valid ones
        steps = [step for step in self.steps() if step <= newest]
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            scores = [(score, step) for step in steps if (score := self._score(step)) is not None]
            keep |= {step for _, step in sorted(scores)[:1]}
        for step in steps:
            if step not in keep:
                discard(self.path(step))

    def _score(self, step: int) -> float | None:
        file = self.path(step) / POSITION
        try:
            with reading(file):
                position = parse_json(file, verified(file, read_manifest(file.parent)[POSITION]))
        except (CheckpointError, KeyError):
            return None  # damaged, or not written by save
        score = position.get("score") if isinstance(position, dict) else None
        return score if isinstance(score, float) else None
