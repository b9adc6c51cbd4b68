"""Where a run's samples come from: the family of data sources.

A source of your own is a subclass of :class:`DataSource` in a file of yours: its fields are its options, and ``load``
returns two sets of examples, or ``law`` the mixture that its samples are drawn from.
"""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps.data.image_set import Examples
from metaflowmaps.errors import InputError
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.work.choices import Choice, built, spelled
from metaflowmaps.work.config import Config
from metaflowmaps.work.own_code import named_by_a_file

Parts = tuple[Examples, Examples]


class SampleSource(Protocol):
    """What training draws x_1 from. With classes there is ``sample_labelled`` as well, which returns (x_1, y)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...


class DataSource(Config, Choice):
    """A law, or examples to train on and examples held out."""

    kind: ClassVar[str] = "data source"
    latent: ClassVar[bool] = False  # examples are of an autoencoder's latent space
    observed: ClassVar[bool] = False  # samples come with a general context

    def law(self) -> GaussianMixture | None:
        """The law itself, where it is known; of means in float32, as samples are."""
        return None

    def load(self) -> Parts:
        """Examples to train on, and examples held out: such as two :class:`ImageSet` of any event shape."""
        raise InputError(f"{spelled(type(self))} has no examples: let its load() return two sets")

    def samples(self) -> SampleSource:
        """What training draws from: the law, or the examples to train on."""
        law = self.law()
        return self.load()[0] if law is None else law

    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        law = self.law()
        return tuple(self.load()[0].event_shape) if law is None else (law.dim,)

    @property
    def classes(self) -> int | None:
        """How many classes a map is conditioned on: 0 none, None as many as the examples turn out to have."""
        return 0

    @property
    def open(self) -> bool:
        """Whether something is left to be read off the examples."""
        return False

    def settled(self, examples: Examples) -> Self:
        """The source with what it left open."""
        return self

    def moved(self, path: str) -> Self:
        """The source with its files at ``path``."""
        if "path" not in type(self).model_fields:
            raise InputError(
                f"data={spelled(type(self))} takes no files: leave --data out, or train images --data {path}"
            )
        return self.model_copy(update={"path": path})

    def given(self, data: Any, folder: Path) -> Self:
        """The source of what a caller has in Python: here the path of its files.

        Args:
            data: what was given.
            folder: of the run, where a source keeps what lies in memory.
        """
        if isinstance(data, str | PathLike):
            return self.moved(str(data))
        raise InputError(f"data of {spelled(type(self))} is the path of its files, got {type(data).__name__}")

    def describe(self) -> str | None:
        """A line for the user, where there are examples: how many, their shape, mean and spread, and their classes."""
        if self.law() is not None:
            return None
        train, held_out = self.load()
        path, names = getattr(self, "path", None), train.class_names
        shown = ", ".join(names) if len(names) <= 10 else ", ".join((*names[:3], "…", names[-1]))
        use = "not conditioned on" if self.classes == 0 else "conditioned on"
        return (
            f"{train.name}{f' from {path}' if path is not None else ''}: {len(train):,} images to train on and "
            f"{len(held_out):,} held out, {'×'.join(map(str, train.event_shape))}, mean {train.mean:.3f}, spread "
            f"{train.std:.3f}, {f'{len(names)} classes ({shown}), {use}' if names else 'no classes'}"
        )


def keep(content: bytes, file: Path) -> str:
    """Data that were given in memory, written beside their run; other data that lie there are refused.

    Args:
        content: of the file.
        file: in the folder of the run.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    elif file.read_bytes() != content:
        raise InputError(f"{file.parent} holds a run on other data: choose another out")
    return str(file.resolve())


@named_by_a_file()
def read_source(training: Mapping[str, Any]) -> DataSource | None:
    """The data source of a checkpoint's training configuration, None where it says none.

    Version 0.1 kept mixtures apart, as ``law``, and wrote options that a source does not have as null. A fine-tuned
    map's ``law`` is the tilted one.
    """
    law, data = training.get("law"), training.get("data")
    if law is not None:
        return built(DataSource, {**law, "name": "mixture"})
    if data is None:
        return None
    return built(DataSource, {key: value for key, value in data.items() if value is not None})


def read_examples(training: Mapping[str, Any]) -> DataSource | None:
    """The same, where the source has examples; None for a law."""
    source = read_source(training)
    return None if source is None or source.law() is not None else source
