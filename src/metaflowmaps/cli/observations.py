"""Observations as they are typed, ``0.5=1.2`` or a file, as a context."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from metaflowmaps.cli.drawing import DrawingOptions
from metaflowmaps.context import FINITE, Context
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap


class ObservingOptions(DrawingOptions):
    """What was observed, of maps of general contexts."""

    observe: tuple[str, ...] = Field(
        (), description="What was seen: time=value (vectors: time=1:2:3), or an .npz of values and times (repeatable)."
    )
    query: float | None = Field(None, description="The time asked for, of a map of general contexts.")

    def observed(self, model: Any) -> Context | None:
        """The context (one row) that is typed; None for a map that reads no observations."""
        if hasattr(getattr(model, "network", None), "encode"):
            return read_observations(self.observe, self.query, model)
        if self.observe or self.query is not None:
            raise InputError(
                f"{self.checkpoint} reads no observations: leave --observe and --query out, or train "
                "mfm train sequences"
            )
        return None


def read_observations(typed: Sequence[str], query: float | None, model: MetaFlowMap) -> Context:
    """The context (one row) that is typed, for a map.

    Args:
        typed: ``time=value``, of vectors ``time=1:2:3``, or the name of an .npz with values (M, *event) and times (M,);
            NaN in a file is no observation.
        query: the time that is asked for.
        model: reads it.
    """
    if query is None:
        raise InputError("this map draws X at a time given what was observed: --query TIME --observe TIME=VALUE …")
    shape = tuple(model.network.observed_shape)  # type: ignore[arg-type]
    times, values = [], []
    for text in typed:
        part_times, part_values = _of_file(Path(text), shape) if text.endswith(".npz") else _of_text(text, shape)
        times.append(part_times)
        values.append(part_values)
    empty = [torch.zeros(0)], [torch.zeros(0, *shape)]
    at, seen = torch.cat(times or empty[0]), torch.cat(values or empty[1])
    return Context(seen[None].to(model.device, model.dtype), at.to(model.device, model.dtype), FINITE, query)


def span_of(context: Context, model: MetaFlowMap) -> tuple[float, float]:
    """The times to show: those trained with, about r where only lags were."""
    first, last = model.network.span.tolist()  # type: ignore[union-attr, operator]
    assert context.query is not None, "read_observations asks for one"
    if not model.network.config.stationary:  # type: ignore[union-attr]
        return first, last
    asked = float(context.query[0])
    seen = context.times[context.mask]
    start = float(seen.max()) if len(seen) and float(seen.max()) < asked else asked + first
    return start, max(asked, start + 1e-6)


def _of_text(text: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    time, equals, rest = text.partition("=")
    try:
        numbers = [float(time), *map(float, rest.split(":"))]
    except ValueError:
        numbers = []
    size = math.prod(shape)
    if not equals or len(numbers) != 1 + size or not all(map(math.isfinite, numbers)):
        form = "TIME=VALUE" if size == 1 else f"TIME={':'.join(['VALUE'] * min(size, 3))}, {size} values"
        raise InputError(f"--observe takes {form} or an .npz with values and times, got {text!r}")
    return torch.tensor(numbers[:1]), torch.tensor(numbers[1:]).reshape(1, *shape)


def _of_file(path: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with np.load(path) as file:
            values, times = (torch.from_numpy(np.asarray(file[name], dtype=np.float32)) for name in ("values", "times"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--observe {path} cannot be read ({error}): give an .npz with values and times") from None
    if shape == (1,) and values.ndim == 1:
        values = values[:, None]
    if times.ndim != 1 or tuple(values.shape) != (len(times), *shape):
        raise InputError(
            f"--observe {path}: values must be (M, {', '.join(map(str, shape))}) and times (M,), "
            f"got {tuple(values.shape)} and {tuple(times.shape)}"
        )
    return times, values
