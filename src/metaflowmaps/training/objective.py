r"""The objective of a run: ``L = L_diag + L_cons`` on batches that are functions of (seed, step).

A batch is drawn whole from ``stream(seed, "train", step)``: data x_1, a context (t, x_t) made with one noise, an inner
state z_a made with another, inner times. On an accelerator only x_1 comes from there (its rows are where the data are);
noise, times and conditions are made on the device by a stream a row, ``RowNoise(rows, "train", seed, step)``, whose
integers are the same on every device. The first rows train the diagonal, the others the consistency loss; each row's
loss depends on its own row alone, so the sum does not depend on how the batch is split into micro-batches.

With classes, each row has its label, replaced by the null class with a probability, and a guidance scale w. A data
target is then guided by the model itself (Eqs. 69–70): ``+ ω sg(v(·, y, w) − v(·, ∅))``, ω = 1 − 1/w, whose fixed point
is ``v_∅ + w (v_y − v_∅)``; a teacher guides its own drift.

What a step costs, in forwards of the network a row (a backward is two): a flow-matching step 3; a diagonal row with a
teacher 4, with a guided one 5; a consistency row 5 (semigroup) to 8. So the split decides: with three quarters of the
rows on the diagonal every form stays near twice a flow-matching step (docs/scale.md). Which rows are which does not
depend on the data, so each sample is trained by both terms in turn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from metaflowmaps import losses
from metaflowmaps._shapes import expand_time
from metaflowmaps.data import SampleSource
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import Anchored, MetaFlowMap
from metaflowmaps.networks.compiling import Precision
from metaflowmaps.networks.precision import autocasting
from metaflowmaps.random import RowNoise, Source, rand, randn, stream
from metaflowmaps.training.derivative import Differentiation, choose
from metaflowmaps.training.teachers import Teacher
from metaflowmaps.training.times import context_times, diagonal_times, inner_times, late_rows
from metaflowmaps.training.train_config import ConditionConfig, LossConfig, TimesConfig


@dataclass(frozen=True)
class Batch:
    """One step's random inputs; the first ``diagonal_rows`` rows train the diagonal."""

    x_1: Tensor
    t: Tensor
    x_t: Tensor
    eps: Tensor
    a: Tensor
    b: Tensor
    gamma: Tensor
    diagonal_rows: int
    cond: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None  # of the rows' losses; None is 1
    figures: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.t.shape[0]

    def rows(self, start: int, end: int) -> "Batch":
        """Rows [start, end), each with the role it had."""
        return self._each(lambda v: v[start:end], min(max(self.diagonal_rows - start, 0), end - start))

    def share(self, rank: int, size: int) -> "Batch":
        """Rows rank, rank + size, …: equally many of each role, where ``size`` divides both numbers."""
        return self._each(lambda v: v[rank::size], len(range(rank, self.diagonal_rows, size)))

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        # not blocking: of memory that is not pinned, CUDA has a copy of its own before it returns
        return self._each(lambda v: v.to(device, non_blocking=device.type == "cuda"), self.diagonal_rows)

    def _each(self, change: Callable[[Tensor], Tensor], diagonal_rows: int) -> "Batch":
        """The batch with every tensor changed."""
        tensors: Any = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        cond = {name: change(v) for name, v in self.cond.items()}
        return replace(self, **tensors, cond=cond, diagonal_rows=diagonal_rows)

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        low, high = float(self.t[rows].min()), float(self.t[rows].max())
        return f"context times in [{low:.3f}, {high:.3f}]"


class Given(NamedTuple):
    """A context (t, x_t) and an x_1 of its posterior, with its label and with what else was observed."""

    x_1: Tensor
    t: Tensor
    x_t: Tensor
    label: Tensor | None = None
    observed: Mapping[str, Tensor] | None = None  # the conditions of a general context


class Objective:
    """Draws the batch of a step and gives each of its rows a loss."""

    def __init__(
        self,
        data: SampleSource,
        loss: LossConfig,
        times: TimesConfig,
        teacher: Teacher | None,
        batch_size: int,
        seed: int,
        condition: ConditionConfig | None = None,
    ) -> None:
        """``condition`` makes it conditional: the data must have labels then."""
        self.data, self.loss, self.times, self.teacher = data, loss, times, teacher
        self.batch_size, self.seed, self.condition = batch_size, seed, condition
        self.differentiation: Differentiation | None = None  # where a run has chosen one; else each call's own
        self.on_device = False  # whether batches are made where the model is

    def batch(self, model: MetaFlowMap, step: int) -> Batch:
        """The inputs of a step, the same whoever asks and whenever."""
        host, n = stream(self.seed, "train", step), self.batch_size
        g: Source = host
        x_1, label, observed = self._data(n, host)
        if self.on_device:
            device = model.device
            g = RowNoise(torch.arange(n, device=device), "train", self.seed, step)
            x_1 = x_1.to(device, non_blocking=True)
            label = None if label is None else label.to(device, non_blocking=True)
            observed = {name: value.to(device) for name, value in (observed or {}).items()}
        t = context_times(self.times, n, g)
        x_t = model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
        return self._inner(model, step, g, Given(x_1, t, x_t, label, observed))

    def _inner(self, model: MetaFlowMap, step: int, g: Source, given: "Given") -> Batch:
        """Inner noise, times and conditions around x_1 and its context."""
        x_1, t, x_t, label, observed = given
        n = len(t)
        eps = randn(tuple(x_1.shape), g)
        a, b = inner_times(self.times, n, g)
        rows = diagonal_rows(self.loss, self.batch_size, step)
        a[:rows] = b[:rows] = diagonal_times(self.times, n, g)[:rows]
        if self.times.late_share:
            at = {name: value.to(model.device) for name, value in (observed or {}).items()}
            chart, flags = model.anchor(t.to(model.device), x_t.to(model.device), at).chart, late_rows(self.times, n, g)
            a, b = (torch.where(flags, chart.time_in((1 - (1 - u) ** 2).to(model.device)).to(u), u) for u in (a, b))
        b = a + torch.clamp_max(b - a, self._longest_jump(step))
        gamma = rand((n,), g)
        return Batch(x_1, t, x_t, eps, a, b, gamma, rows, {**(observed or {}), **self._cond(model, label, n, g)})

    def __call__(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        """Per-row losses, (B,)."""
        losses = self._losses(model, batch)
        return losses if batch.weight is None else batch.weight * losses

    def _losses(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        n = batch.diagonal_rows
        if self._fused(model):
            return self._consistency(model, batch)
        parts = []
        if n > 0:
            parts.append(self._diagonal(model, batch.rows(0, n)))
        if n < len(batch):
            parts.append(self._consistency(model, batch.rows(n, len(batch))))
        return torch.cat(parts)

    # -- conditions --------------------------------------------------------------------------------------------------

    def _data(self, n: int, g: torch.Generator) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor] | None]:
        """x_1, with its label where they are trained with, and its context where the data have one."""
        if hasattr(self.data, "sample_given"):
            x_1, context = self.data.sample_given(n, g)
            return x_1, None, context.conditions()
        if self.condition is None:
            return self.data.sample(n, g), None, None
        x_1, label = self.data.sample_labelled(n, g)  # type: ignore[attr-defined]
        return x_1, label, None

    def _cond(self, model: MetaFlowMap, label: Tensor | None, n: int, g: Source) -> dict[str, Tensor]:
        if self.condition is None or label is None:
            return {}
        null = rand((n,), g) < self.condition.dropout
        label = torch.where(null, torch.full_like(label, _null_class(model)), label)
        if not self.condition.guided:
            return {"label": label}
        scales = torch.tensor(self.condition.guidance)
        if isinstance(g, RowNoise):
            w = scales.to(label.device)[g.integers(len(scales))]
        else:
            w = scales[torch.randint(len(scales), (n,), generator=g)]
        return {"label": label, "guidance": torch.where(null, w.new_ones(()), w)}  # the null class has nothing to guide

    # -- schedules ---------------------------------------------------------------------------------------------------

    def _longest_jump(self, step: int) -> float:
        since = step - self.loss.warmup_steps + 1
        return min(1.0, since / self.loss.anneal_steps) if self.loss.anneal_steps else 1.0

    def _fused(self, model: MetaFlowMap) -> bool:
        # where the diagonal is the consistency identity at b = a, one network call serves both with one teacher. It
        # has two rows for each row of the diagonal: worth it where calls cost more than rows
        c = self.loss
        same = c.diagonal == c.consistency.source and c.adaptive_power_diagonal == c.adaptive_power_consistency
        return c.consistency.holds_diagonal and same and not getattr(model.network, "rows_cost", False)

    # -- the two terms -----------------------------------------------------------------------------------------------

    def _diagonal(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        flow, z, data = _at(model, batch)
        velocity = self._velocity(self.loss.diagonal, model, flow, batch, data)
        with torch.no_grad():
            target = velocity(batch.a, z)
        return self._weighted(losses.diagonal(flow, batch.a, z, target), flow, self.loss.adaptive_power_diagonal)

    def _consistency(self, model: MetaFlowMap, batch: Batch) -> Tensor:
        flow, z, data = _at(model, batch)
        way = self.differentiation or self._differentiation(model, z)
        jumps = losses.Jumps(batch.a, batch.b, z, batch.gamma, way.step if way.form == "difference" else None)
        velocity = self._velocity(self.loss.consistency.source, model, flow, batch, data)
        loss = self.loss.consistency(flow, jumps, velocity)
        return self._weighted(loss, flow, self.loss.adaptive_power_consistency)

    def _differentiation(self, model: MetaFlowMap, z: Tensor) -> Differentiation:
        recompute = getattr(model.network, "recompute", False)
        precision: Precision = "bf16" if autocasting(z.device) else "float32"
        return choose(self.loss.consistency, model.network, z.device, precision, len(z), recompute)

    def _velocity(
        self, source: losses.Source | None, model: MetaFlowMap, flow: Anchored, batch: Batch, data: Tensor
    ) -> losses.Velocity:
        """The velocity of a source at the batch's contexts."""
        if source == "data":
            return lambda a, z: self._guided(model, flow, batch, z, data)
        if source == "self":
            return lambda a, z: flow(a, a, z)
        if source == "teacher":
            assert self.teacher is not None, "TrainConfig refuses a teacher loss without a teacher"
            return self.teacher.at(flow.chart, batch.t, batch.x_t, batch.cond)
        if source is None:
            return _no_velocity
        raise unknown("velocity source", source, get_args(losses.Source))

    @torch.no_grad()
    def _guided(self, model: MetaFlowMap, flow: Anchored, batch: Batch, z: Tensor, target: Tensor) -> Tensor:
        """target + ω (F(·, y, w) − F(·, ∅)) on the diagonal."""
        if "guidance" not in batch.cond:
            return target
        w = batch.cond["guidance"]
        null = {"label": torch.full_like(batch.cond["label"], _null_class(model)), "guidance": torch.ones_like(w)}
        free = model.anchor(batch.t, batch.x_t, null)
        return target + expand_time(1 - 1 / w, z) * (flow(batch.a, batch.a, z) - free(batch.a, batch.a, z))

    def _weighted(self, loss: Tensor, flow: Anchored, power: float) -> Tensor:
        if flow.chart.weight is not None:
            loss = loss * flow.chart.weight
        if power:
            loss = loss * losses.adaptive_weight(loss, self.loss.adaptive_constant, power)
        return loss


def diagonal_rows(loss: LossConfig, batch_size: int, step: int) -> int:
    """How many rows of a step's batch train the diagonal."""
    if not loss.consistency.trains or step < loss.warmup_steps:
        return batch_size
    return round(loss.diagonal_share * batch_size)


def _no_velocity(a: Tensor, z: Tensor) -> Tensor:
    raise InputError("this loss asks for a velocity and names no source: let its property `source` return one")


def _at(model: MetaFlowMap, batch: Batch) -> tuple[Anchored, Tensor, Tensor]:
    """The map at the batch's contexts, the inner state z_a and the data velocity there."""
    flow = model.anchor(batch.t, batch.x_t, batch.cond)
    end, path = flow.chart.endpoint(batch.x_1), flow.chart.inner_path
    return flow, path.interpolate(batch.eps, end, batch.a), path.velocity(batch.eps, end, batch.a)


def _null_class(model: MetaFlowMap) -> int:
    return int(model.network.num_classes)  # type: ignore[arg-type]
