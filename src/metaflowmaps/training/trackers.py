"""Where a training run is followed besides its own log: TensorBoard, W&B, trackio, or a tracker of your own.

``--set track=wandb``, or ``--set track=my.py:Mine`` of a class that derives from :class:`Tracker`, whose ``begin``
returns what takes the numbers of a step and the pictures that the run draws (``sample_every``). Each package is loaded
where it is asked for.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from metaflowmaps.errors import InputError
from metaflowmaps.work.choices import Choice

PROJECT = "metaflowmaps"  # of runs that nobody named otherwise


class TrackedRun(NamedTuple):
    """What a run that is tracked tells.

    Args:
        scalars: takes a step and its numbers by name.
        picture: takes a step, a name and the PNG file of a figure.
        close: ends it.
    """

    scalars: Callable[[int, Mapping[str, float]], object]
    picture: Callable[[int, str, Path], object]
    close: Callable[[], object]


@dataclass(frozen=True)
class Tracker(Choice, ABC):
    """Where runs are followed."""

    kind: ClassVar[str] = "tracker"
    package: ClassVar[str] = ""  # that it needs
    extra: ClassVar[str] = ""  # which brings it

    @abstractmethod
    def begin(self, out: Path, settings: Mapping[str, Any], step: int) -> TrackedRun:
        """A run that begins, or goes on.

        Args:
            out: the directory of the run, which names it.
            settings: the configuration.
            step: where it goes on; 0 at its beginning.
        """

    def module(self) -> Any:
        """The package that it needs; without it, how to get it."""
        try:
            return import_module(self.package)
        except ImportError:
            raise InputError(f"track={self.name} needs a package: pip install 'metaflowmaps[{self.extra}]'") from None


@dataclass(frozen=True)
class Untracked(Tracker):
    """The run's own log alone."""

    name = "none"

    def begin(self, out: Path, settings: Mapping[str, Any], step: int) -> TrackedRun:
        """Nothing is told to anybody."""
        return TrackedRun(lambda step, values: None, lambda step, name, file: None, lambda: None)


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """Event files in ``out/tensorboard``."""

    name = "tensorboard"
    package = "torch.utils.tensorboard"
    extra = "track"

    def begin(self, out: Path, settings: Mapping[str, Any], step: int) -> TrackedRun:
        """What an earlier process wrote of later steps is left out by the reader."""
        writer = self.module().SummaryWriter(out / "tensorboard", purge_step=step or None)

        def scalars(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        def picture(step: int, name: str, file: Path) -> None:
            import numpy as np
            from PIL import Image

            with Image.open(file) as image:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

        return TrackedRun(scalars, picture, writer.close)


class _Logging(Tracker):
    """W&B, and what has its interface: a run that goes on has the identity of its directory."""

    def begin(self, out: Path, settings: Mapping[str, Any], step: int) -> TrackedRun:
        """A run of the project that WANDB_PROJECT or TRACKIO_PROJECT names, called as its directory."""
        package = self.module()
        project = os.environ.get(f"{self.package.upper()}_PROJECT", PROJECT)
        package.init(project=project, config=dict(settings), **self.identity(out))

        def picture(step: int, name: str, file: Path) -> None:
            package.log({name: package.Image(str(file))}, step=step)

        return TrackedRun(lambda step, values: package.log(dict(values), step=step), picture, package.finish)

    def identity(self, out: Path) -> dict[str, Any]:
        """What tells a run from others."""
        return {"name": out.name, "resume": "allow"}


@dataclass(frozen=True)
class WandB(_Logging):
    """Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    name = "wandb"
    package = "wandb"
    extra = "wandb"

    def identity(self, out: Path) -> dict[str, Any]:
        """W&B asks for an identity of its own letters, and for the folder of its files."""
        known = sha256(str(out.resolve()).encode()).hexdigest()[:16]
        return {**super().identity(out), "id": known, "dir": str(out)}


@dataclass(frozen=True)
class Trackio(_Logging):
    """trackio, W&B's interface on this machine: ``trackio show`` opens it."""

    name = "trackio"
    package = "trackio"
    extra = "trackio"
