"""``steer``: the loop, written once, for every method, on one time grid and one meter.

Samples are made in batches: as many rows of state at a time as ``batch_size`` says, and half as many where memory runs
out. Each sample is a function of its own seed, whatever n and ``batch_size``: ``seed=result.seeds[i : i + 1]`` makes
sample i again alone, up to rounding. Particles that are returned together are made again as a whole system: one seed a
system, num_samples=particles (unset: as many as were one system, at most ``batch_size``). A model without ``push`` that
draws by its own ``draw(…, generator=)`` is the exception: its draws depend on the batch.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, check_count, select_cond
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import CONDITIONS
from metaflowmaps.random import Seed, as_seeds
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.steering.diagnostics import SteeredBatch, bias_of, checked
from metaflowmaps.steering.method import Method
from metaflowmaps.steering.presets import settled
from metaflowmaps.steering.problem import Info, SteeringProblem, device_of
from metaflowmaps.steering.process import Process
from metaflowmaps.steering.result import SteerResult
from metaflowmaps.work.choices import options_of, spelled
from metaflowmaps.work.memory import frozen, halving
from metaflowmaps.work.progress import Bar

ROWS = 4096  # of state at a time, where nobody says
LATEST_START = 0.05  # the release starts at .01


class Step(NamedTuple):
    """What a callback sees after each step; returning True from it stops as Ctrl-C does."""

    batch: int
    batches: int
    step: int
    steps: int
    time: float  # where the step ended
    state: Any  # the method's own; state.x are the rows
    info: Info


class SteeringFailed(InputError):
    """Bad input that showed itself on the way; ``result`` holds what was finished before."""

    def __init__(self, message: str, result: SteerResult) -> None:
        super().__init__(message)
        self.result = result


def steer(
    model: Any,
    reward: Callable[..., Tensor],
    num_samples: int,
    method: Method | str | None = None,
    process: Process | str | None = None,
    *,
    cond: Cond = None,
    seed: Seed = None,
    batch_size: int | None = None,
    callback: Callable[[Step], Any] | None = None,
    progress: bool = False,
    **misplaced: Any,
) -> SteerResult:
    """Samples of ``model`` steered towards p_reward ∝ p_1 e^r. Ctrl-C returns what is finished.

    Args:
        model: a MetaFlowMap, an ExactModel, or anything with path, event_shape, drift(t, x, cond=None) and, for methods
            that draw, draw(t, x_t, num_draws, generator=, cond=).
        reward: a function x (B, *event) -> (B,), or of x and cond.
        num_samples: n.
        method: an object such as ``mfm.MFMGF(num_draws=4)``, or a name with its defaults; None: the usual preset's.
        process: ``mfm.ODE(steps=250, …)``, ``mfm.SDE(…)`` or a name; None: what a method prefers, or the preset's.
        cond: None or a mapping of tensors, one row a sample.
        seed: a number, a generator, or (n,) int64 seeds (the module says what a seed stands for).
        batch_size: rows of state at a time (draws multiply it, by at most the method's ``chunk``).
        callback: is told of every :class:`Step`.
        progress: show a bar on stderr.
        misplaced: options of the method or the process, which are refused with the place where they belong.

    Returns:
        Samples (n, *event), rewards and seeds (n,), cost and what was seen on the way.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward = lambda x: 2 * x[:, 0]  # any function (B, *event) -> (B,)
        >>> result = mfm.steer(model, reward, 64, mfm.MFMGF(num_draws=4), mfm.ODE(steps=10), seed=0)
        >>> result.samples.shape, result.rewards.shape
        (torch.Size([64, 2]), torch.Size([64]))
        >>> bool(result.samples[:, 0].mean() > 1)  # the model's own mean is 0
        True
    """
    check_count(num_samples, "num_samples")
    made, moves = settled(method, process)
    _refuse(misplaced, made, moves)
    made.check(moves)
    meter = Meter(device=device_of(model))
    problem = SteeringProblem(model, reward, meter)
    _check_cond(cond, num_samples)
    times = made.times(problem, moves)
    if not hasattr(model, "start"):
        _check_start(times[0])
    batches = _batches(problem, made, num_samples, ROWS if batch_size is None else batch_size)
    count = batches[-1].seeds.stop
    seeds = as_seeds(seed, count, "steer", "a sample" if count == num_samples else "a system of particles")
    run = _SteeringRun(problem, made, moves, times, callback)
    with Bar(len(batches) * (len(times) - 1) if progress else 0, made.name) as bar, meter, frozen(model, reward):
        run.bar = bar
        run.all(batches, seeds, cond or None)
    result = run.result(cond)
    run.check(result)
    if not result.interrupted:
        result.notes = checked(
            SteeredBatch(problem, made, moves, result.samples, result.rewards, result.info, cond or None)
        )
    for note in result.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return result


class SampleRange(NamedTuple):
    """A batch: samples that are made together, and the seeds they are made from."""

    samples: slice
    seeds: slice


def _batches(problem: SteeringProblem, method: Method, num_samples: int, rows: int) -> list[SampleRange]:
    """As even as possible; whole systems of particles, rows of a row-by-row reward together."""
    check_count(rows, "batch_size")
    like = torch.zeros(1, *problem.event_shape, dtype=problem.dtype, device=problem.device)
    observed = rows_of(problem.given_reward, like)
    if observed is not None:
        if observed != num_samples:
            raise InputError(f"the reward holds {observed} observations, one a sample: ask for num_samples={observed}")
        if not method.row_by_row:
            raise InputError(
                "the reward holds one observation a sample: particles cannot replace each other (use mfm.MFMGF or "
                "mfm.MFMG, with passes=1)"
            )
        return _cut([num_samples], method.system)
    size = max(1, rows // method.copies)
    system = method.system or 1
    if system > 1:
        if num_samples % system:
            raise InputError(
                f"num_samples must be a multiple of particles ({system}), got {num_samples}: whole systems are returned"
            )
        size = max(system, size // system * system)
        return _cut([min(size, num_samples - begin) for begin in range(0, num_samples, size)], method.system)
    count = -(-num_samples // size)
    return _cut([num_samples // count + (i < num_samples % count) for i in range(count)], method.system)


def _cut(sizes: list[int], system: int | None) -> list[SampleRange]:
    batches, sample, seed = [], 0, 0
    for size in sizes:
        seeds = size // (system or size)
        batches.append(SampleRange(slice(sample, sample + size), slice(seed, seed + seeds)))
        sample, seed = sample + size, seed + seeds
    return batches


class _Made(NamedTuple):
    """A finished batch."""

    samples: Tensor
    seeds: Tensor  # of each sample
    steps: dict[str, Tensor]  # (K,), summed over the batch's samples
    ending: dict[str, Tensor]


@dataclass
class _SteeringRun:
    """One call of :func:`steer`."""

    problem: SteeringProblem
    method: Method
    process: Process
    times: list[float]
    callback: Callable[[Step], Any] | None
    bar: Bar | None = None
    interrupted: bool = False
    failure: Exception | None = None
    made: list[_Made] = field(default_factory=list)

    def all(self, batches: list[SampleRange], seeds: Tensor, cond: Cond) -> None:
        """SampleRange after batch, until the end, an interruption or an error: what is finished stays finished."""
        unit = self.method.system or max(batch.samples.stop - batch.samples.start for batch in batches)
        for number, batch in enumerate(batches):
            first, of_seeds = batch.samples.start, seeds[batch.seeds]

            def make(begin: int, end: int, n: int = number, first: int = first, own: Tensor = of_seeds) -> _Made:
                of_system = self.method.system
                part = own if of_system is None else own[(begin - first) // of_system : (end - first) // of_system]
                self.problem.begin(part, select_cond(cond, slice(begin, end)))
                return self.batch(Progress(n, len(batches)), end - begin)

            try:
                self.made += halving(make, batch.samples.start, batch.samples.stop, unit)
            except (KeyboardInterrupt, _Stopped):
                self.interrupted = True
            except Exception as error:
                self.failure, self.interrupted = error, True
            if self.interrupted:
                return

    def batch(self, place: "Progress", rows: int) -> _Made:
        """One batch from noise to samples."""
        problem, method = self.problem, self.method
        sums: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            state = method.start(problem, problem.start(self.times[0], rows * method.copies))
            for i, (t, u) in enumerate(pairwise(self.times)):
                state, info = method.step(problem, self.process, state, t, u)
                for name, value in info.items():
                    sums.setdefault(name, []).append(value.detach().double().mean().cpu() * rows)
                if self.bar is not None:
                    self.bar.advance()
                step = Step(place.batch, place.batches, i, len(self.times) - 1, u, state, info)
                if self.callback is not None and _is_true(self.callback(step)):
                    raise _Stopped
            samples, ending = method.finish(problem, state)
        if unsaid := ending.keys() - {*method.of_systems, "moves"}:
            raise InputError(f"finish of {spelled(type(method))} reports {min(unsaid)!r}: name it in of_systems")
        # particle m of system s is row m·S + s: each row with the seed of its system
        seeds = problem.seeds.repeat(len(samples) // len(problem.seeds))
        steps = {name: torch.stack(values) for name, values in sums.items()}
        return _Made(samples, seeds, steps, {name: value.detach() for name, value in ending.items()})

    def scores(self, cond: Cond) -> Tensor:
        """r of the finished samples, batch by batch; NaN where the reward fails, which is then the failure."""
        checked, begin, out = checked_reward(self.problem.given_reward), 0, []
        for samples in (made.samples for made in self.made):
            part = select_cond(cond, slice(begin, begin + len(samples)))
            begin += len(samples)
            scores = torch.full_like(samples.flatten(1)[:, 0], torch.nan)
            try:
                with torch.no_grad():
                    scores = checked(samples.clone(), part).detach()
            except KeyboardInterrupt:
                self.interrupted = True
            except InputError as error:
                self.failure = self.failure or error
            out.append(scores)
        return torch.cat(out)

    def check(self, result: SteerResult) -> None:
        """Raise what failed, with what was finished before it."""
        if self.failure is None:
            return
        if not len(result.samples):
            raise self.failure
        text = " ".join(str(self.failure).split()) or type(self.failure).__name__
        kept = f"{text} ({len(result.samples)} finished samples are kept)"
        raise SteeringFailed(kept, result) from self.failure

    def result(self, cond: Cond) -> SteerResult:
        """What is finished, scored: the scoring is not part of the cost."""
        problem = self.problem
        empty = torch.empty(0, *problem.event_shape, dtype=problem.dtype, device=problem.device)
        samples = torch.cat([made.samples for made in self.made]) if self.made else empty
        rewards = self.scores(cond) if len(samples) else empty.new_empty(0)
        seeds = torch.cat([made.seeds for made in self.made]) if self.made else problem.seeds[:0]
        first = self.made[0] if self.made else _Made(samples, seeds, {}, {})
        info = {
            name: torch.stack([made.steps[name] for made in self.made]).sum(0) / len(samples) for name in first.steps
        }
        info["time"] = torch.tensor(self.times[:-1], dtype=torch.float64)
        info["nonfinite"] = (~samples.flatten(1).isfinite().all(1)).sum()
        info |= {name: torch.cat([made.ending[name] for made in self.made]) for name in first.ending}
        if "moves" in info:
            info["bias"] = bias_of(info.pop("moves"), samples)
        cost = problem.meter.cost()
        cost["nfe"] = problem.meter.evaluations / max(1, len(samples))
        return SteerResult(samples, rewards.detach(), seeds, cost, info, self.interrupted)


class Progress(NamedTuple):
    """Which batch of how many."""

    batch: int
    batches: int


def _is_true(answer: Any) -> bool:
    """True, also as a tensor or a number of NumPy's; what a callback happens to return is not."""
    return answer is True or (getattr(answer, "shape", None) == () and "bool" in str(answer.dtype) and bool(answer))


class _Stopped(Exception):
    """The callback asked to stop."""


def _refuse(misplaced: Mapping[str, Any], method: Method, process: Process) -> None:
    """Options are those of objects: say of which."""
    for option, value in misplaced.items():
        for what, chosen in (("process", process), ("method", method)):
            if option in options_of(type(chosen)):
                made = f"{type(chosen).__name__}({option}={value!r})"
                raise InputError(f"{option} is an option of the {what}: steer(…, {what}=mfm.{made})")
        raise unknown("argument of steer", option, signature(steer).parameters.keys() - {"misplaced"})


def _check_start(t: float) -> None:
    if t > LATEST_START:
        warnings.warn(
            f"the grid starts at t = {t:g} with pure noise, which is the law at t = 0: start it there",
            UserWarning,
            stacklevel=3,
        )


def _check_cond(cond: Cond, num_samples: int) -> None:
    if cond is not None and not isinstance(cond, Mapping):
        raise InputError('cond is None or a mapping such as {"label": a tensor of one label a sample}')
    for key, value in (cond or {}).items():
        # a label and a scale are numbers; what else a network reads may be of any shape, one row a sample
        shape = value.shape[: None if key in CONDITIONS else 1] if isinstance(value, Tensor) else None
        if shape != (num_samples,):
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"cond[{key!r}] must be a tensor of shape ({num_samples},), got {given}")
