"""``steer``: the loop, written once, for every method, on one time grid and one meter."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.random import check_seeds, fresh_seeds
from metaflowmaps.rewards.base import Cond, rows_of
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.sampling import time_grid
from metaflowmaps.steering.best_of_n import BestOfN
from metaflowmaps.steering.dps import DpsGuide
from metaflowmaps.steering.exact import ExactGuide
from metaflowmaps.steering.glass import GlassGuide
from metaflowmaps.steering.guided import Control, Guided
from metaflowmaps.steering.mfm_g import GradientGuide
from metaflowmaps.steering.mfm_gf import GradientFreeGuide
from metaflowmaps.steering.none import NoGuide
from metaflowmaps.steering.problem import Info, Problem, device_of
from metaflowmaps.steering.search import Search
from metaflowmaps.steering.smc import TwistedSmc, ValueTwist
from metaflowmaps.steering.tds import PointTwist
from metaflowmaps.work.progress import Bar


class Method(Protocol):
    """init → step, step, … → finish. ``copies`` rows of state make one returned sample."""

    copies: int
    default_grid: str

    def init(self, problem: Problem, x: Tensor) -> Any: ...

    def step(self, problem: Problem, state: Any, t: float, u: float) -> tuple[Any, Info]: ...

    def finish(self, problem: Problem, state: Any) -> tuple[Tensor, Info]: ...


class Step(NamedTuple):
    """What a callback sees after each step; returning True from it stops as Ctrl-C does."""

    chunk: int
    chunks: int
    step: int
    steps: int
    time: float  # where the step ended
    state: Any  # the method's own; state.x are the rows
    info: Info


@dataclass
class SteerResult:
    """Samples, their rewards, what they cost, and what was seen on the way."""

    samples: Tensor  # (n, *event)
    rewards: Tensor  # (n,)
    seeds: Tensor  # (n,) int64; of a particle system that is returned whole, the system's, for each of its particles
    cost: dict[str, float]
    info: dict[str, Tensor]  # per step (K,), averaged over samples; "time" is where each step began
    interrupted: bool = False


class SteeringFailed(InputError):
    """Bad input that showed itself on the way; ``result`` holds what was finished before."""

    def __init__(self, message: str, result: SteerResult) -> None:
        super().__init__(message)
        self.result = result


# -- methods -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Common:
    """What every factory is given."""

    num_draws: int
    control: Control
    reward: Any


def _guided(make: Callable[..., Any]) -> Callable[..., Method]:
    return lambda common, **options: Guided(make(common, **options), common.control)


METHODS: dict[str, tuple[Callable[..., Method], Any]] = {
    # name: (factory, where its own options are declared)
    "none": (_guided(lambda common: NoGuide()), None),
    "mfm-g": (_guided(lambda common, **o: GradientGuide(common.num_draws, **o)), GradientGuide),
    "mfm-gf": (_guided(lambda common, **o: GradientFreeGuide(common.num_draws, **o)), GradientFreeGuide),
    "mfm-search": (lambda common, **o: Search(common.num_draws, **o), Search),
    "mfm-smc": (lambda common, **o: _smc(lambda **own: ValueTwist(common.num_draws, **own), ValueTwist, o), ValueTwist),
    "dps": (_guided(lambda common: DpsGuide()), None),
    "tds": (lambda common, **o: _smc(PointTwist, None, o), None),
    "best-of-n": (lambda common: BestOfN(common.num_draws, common.control), None),
    "glass": (_guided(lambda common, **o: GlassGuide(common.num_draws, **o)), GlassGuide),
    "exact": (_guided(lambda common: ExactGuide(common.reward)), None),
}
DRAWLESS = ("none", "dps", "tds", "exact")  # num_draws means nothing to them
PARTICLE = ("mfm-smc", "tds")
GUIDED = ("none", "mfm-g", "mfm-gf", "dps", "best-of-n", "glass", "exact")  # those with a choice of process


def _parameters(owner: Any) -> set[str]:
    if owner is None:
        return set()
    taken = inspect.signature(owner.__init__).parameters
    return {name for name, p in taken.items() if p.kind is not p.VAR_KEYWORD} - {"self", "num_draws", "twist"}


def _smc(make: Callable[..., Any], owner: Any, options: dict[str, Any]) -> Method:
    own = _parameters(owner)
    return TwistedSmc(
        make(**{k: v for k, v in options.items() if k in own}), **{k: v for k, v in options.items() if k not in own}
    )


def method_options(method: str) -> set[str]:
    """The names of a method's own options."""
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    names = _parameters(METHODS[method][1])
    if method == "glass":
        names = names | _parameters(GradientGuide) | _parameters(GradientFreeGuide)
    if method in PARTICLE:
        names |= _parameters(TwistedSmc)
    return names


def make_method(method: str, common: _Common, options: dict[str, Any]) -> Method:
    """The method of that name; options it does not have are refused."""
    allowed = method_options(method)
    if method not in GUIDED:
        own = {"mfm-search": "renoises its draws", "mfm-smc": "moves by the SDE", "tds": "moves by the SDE"}[method]
        defaults = Control(common.control.checked().process)
        for name in ("integrator", "renormalize", "sigma_cap", "renormalize_to"):
            if getattr(common.control, name) != getattr(defaults, name):
                raise InputError(f"{method} {own}: it has no {name}; leave it at {getattr(defaults, name)!r}")
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {method}", name, {*allowed, *LOOP_OPTIONS})
    try:
        return METHODS[method][0](common, **options)
    except TypeError as error:
        raise InputError(f"{method}: {error}") from None


def check_steering(method: str, num_draws: int, control: Control, options: dict[str, Any]) -> Method:
    """The method; refused is what ``steer`` would refuse of it and its options, before anything is begun."""
    return make_method(
        method,
        _Common(num_draws, control.checked(), None),
        {k: v for k, v in options.items() if k not in LOOP_OPTIONS},
    )


# -- the loop ------------------------------------------------------------------------------------------

LOOP_OPTIONS = ("grid", "integrator", "sigma_cap", "renormalize_to", "batch_size", "map_steps", "progress")
LATEST_START = 0.05  # the release starts at .01
FEW = 1.2  # an ESS below this is one draw that has it all


def steer(
    model: Any,
    reward: Callable[..., Tensor],
    num_samples: int,
    method: str = "mfm-g",
    num_draws: int = 4,
    steps: int = 250,
    process: str = "ode",
    renormalize: str = "none",
    cond: Cond = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Step], Any] | None = None,
    *,
    grid: str | Tensor | None = None,
    integrator: str = "euler",
    sigma_cap: float | None = None,
    renormalize_to: float = 1.0,
    batch_size: int = 4096,
    map_steps: int = 1,
    progress: bool = False,
    seeds: Tensor | None = None,
    **options: Any,
) -> SteerResult:
    """num_samples samples of ``model`` steered towards p_reward ∝ p_1 e^r.

    ``model``: a MetaFlowMap, an ExactModel, or anything with path, event_shape, drift(t, x, cond=None) and, for methods
    that draw, draw(t, x_t, num_draws, generator=, cond=). ``reward``: any function x (B, *event) -> (B,).
    ``grid``: uniform, power, log-snr, or times; ``integrator``: euler, midpoint, heun, rk4 (sde: euler, heun);
    ``batch_size``: rows of state at a time (draws multiply it, by at most the method's ``chunk``); ``options``: the
    method's own, see its file. Ctrl-C returns what is finished.

    ``seeds`` (num_samples,) int64 takes the place of ``generator``, which otherwise chooses them: each sample is a
    function of its own seed, whatever num_samples and batch_size, and ``seeds=result.seeds[i : i + 1]`` makes sample i
    again alone, up to rounding. Particles of tds and mfm-smc with returns="all" are made again as a whole system: one
    seed a system, num_samples=particles (unset: as many as were one system, at most batch_size). A model without
    ``push`` that draws by its own ``draw(…, generator=)`` is the exception: its draws depend on the batch.
    """
    check_count(num_samples, "num_samples")
    check_count(batch_size, "batch_size")
    check_count(num_draws, "num_draws")
    common = _Common(num_draws, Control(process, integrator, renormalize, sigma_cap, renormalize_to), reward)
    made = make_method(method, common, options)
    meter = Meter(device=device_of(model))
    problem = Problem(model, reward, meter, map_steps)
    _check_cond(cond, num_samples)
    cond = cond or None
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    times = time_grid(problem.path, grid if grid is not None else made.default_grid, steps).tolist()
    if times[0] > LATEST_START:
        warnings.warn(
            f"the grid starts at t = {times[0]:g} with pure noise, which is the law at t = 0: start it there",
            UserWarning,
            stacklevel=2,
        )
    sizes = _chunk_sizes(problem, made, reward, num_samples, batch_size, options)
    shares = [size // _particles_of_a_seed(made, size) for size in sizes]
    if seeds is None:
        seeds = fresh_seeds(sum(shares), generator)
    each = "a sample" if sum(shares) == num_samples else "a system of particles"
    chunk_seeds = check_seeds(seeds, sum(shares), each).to(problem.device).split(shares)
    run = _Run(problem, made, times, callback, list(chunk_seeds))
    with Bar(len(sizes) * (len(times) - 1) if progress else 0, method) as bar, meter:
        run.all(sizes, cond, bar)
    result = run.result(reward, cond)
    if run.failure is not None:
        if not len(result.samples):
            raise run.failure
        text = " ".join(str(run.failure).split()) or type(run.failure).__name__
        kept = f"{text} ({len(result.samples)} finished samples are kept)"
        raise SteeringFailed(kept, result) from run.failure
    _warn(method, num_draws, result)
    return result


def _chunk_sizes(
    problem: Problem, made: Method, reward: Any, num_samples: int, batch_size: int, options: dict[str, Any]
) -> list[int]:
    """Samples a chunk: as even as possible, whole systems of particles, rows of a row-by-row reward together."""
    systems = made.particles if isinstance(made, TwistedSmc) else 1
    rows = rows_of(reward, torch.zeros(1, *problem.event_shape, dtype=problem.dtype, device=problem.device))
    if rows is not None:
        if rows != num_samples:
            raise InputError(f"the reward holds {rows} observations, one a sample: ask for num_samples={rows}")
        if systems != 1 or options.get("passes", 1) != 1:
            raise InputError(
                "the reward holds one observation a sample: particles cannot replace each other (use mfm-gf or mfm-g, "
                "with passes=1)"
            )
        return [num_samples]
    size = max(1, batch_size // made.copies)
    if isinstance(made, TwistedSmc) and made.particles is not None and made.returns == "all":
        if num_samples % made.particles:
            raise InputError(
                f"num_samples must be a multiple of particles ({made.particles}), got {num_samples}: whole systems "
                "are returned"
            )
        size = max(made.particles, size // made.particles * made.particles)
        return [min(size, num_samples - begin) for begin in range(0, num_samples, size)]
    chunks = -(-num_samples // size)
    return [num_samples // chunks + (i < num_samples % chunks) for i in range(chunks)]


def _particles_of_a_seed(made: Method, size: int) -> int:
    """Samples of a chunk that share a seed: the particles of a system that is returned whole."""
    return made.particles or size if isinstance(made, TwistedSmc) and made.returns == "all" else 1


@dataclass
class _Run:
    """The chunks of one call."""

    problem: Problem
    method: Method
    times: list[float]
    callback: Callable[[Step], Any] | None
    seeds: list[Tensor]  # of each chunk
    interrupted: bool = False
    failure: Exception | None = None
    samples: list[Tensor] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    endings: dict[str, list[Tensor]] = field(default_factory=dict)
    rows: int = 0

    def all(self, sizes: list[int], cond: Cond, bar: Bar) -> None:
        """Chunk after chunk, until the end, an interruption or an error: what is finished stays finished."""
        begin = 0
        for chunk, rows in enumerate(sizes):
            part = None if cond is None else {k: v[begin : begin + rows] for k, v in cond.items()}
            self.problem.begin(self.seeds[chunk], part)
            begin += rows
            try:
                self.interrupted = not self.chunk(chunk, rows, bar)
            except KeyboardInterrupt:
                self.interrupted = True
            except Exception as error:
                self.failure, self.interrupted = error, True
            if self.interrupted:
                return

    def chunk(self, chunk: int, rows: int, bar: Bar) -> bool:
        """One chunk from noise to samples; False if the callback stopped it."""
        problem, copies = self.problem, self.method.copies
        sums: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            state = self.method.init(problem, problem.noise("start", rows * copies))
            for i, (t, u) in enumerate(pairwise(self.times)):
                state, info = self.method.step(problem, state, t, u)
                for name, value in info.items():
                    sums.setdefault(name, []).append(value.detach().double().mean().cpu() * rows)
                bar.advance()
                told = Step(chunk, len(self.seeds), i, len(self.times) - 1, u, state, info)
                if self.callback is not None and self.callback(told) is True:
                    return False
            samples, ending = self.method.finish(problem, state)
        self.samples.append(samples)
        for name, values in sums.items():
            stacked = torch.stack(values)
            self.sums[name] = self.sums[name] + stacked if name in self.sums else stacked
        for name, value in ending.items():
            self.endings.setdefault(name, []).append(value.detach())
        self.rows += rows
        return True

    def scores(self, reward: Any, cond: Cond) -> Tensor:
        """r of the finished samples, a chunk at a time; NaN where the reward fails, which is then the failure."""
        checked, begin, out = checked_reward(reward), 0, []
        for samples in self.samples:
            part = None if cond is None else {k: v[begin : begin + len(samples)] for k, v in cond.items()}
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

    def result(self, reward: Any, cond: Cond) -> SteerResult:
        """What is finished, scored: the scoring is not part of the cost."""
        problem = self.problem
        empty = torch.empty(0, *problem.event_shape, dtype=problem.dtype, device=problem.device)
        samples = torch.cat(self.samples) if self.samples else empty
        rewards = self.scores(reward, cond) if len(samples) else empty.new_empty(0)
        info = {name: total / max(1, self.rows) for name, total in self.sums.items()}
        info["time"] = torch.tensor(self.times[:-1], dtype=torch.float64)
        info["nonfinite"] = (~samples.flatten(1).isfinite().all(1)).sum()
        for name, values in self.endings.items():
            info[name] = torch.cat(values)
        cost = problem.meter.cost()
        cost["nfe"] = problem.meter.evaluations / max(1, len(samples))
        # particle m of system s is row m·S + s: each row with the seed of its system
        seeds = [s.repeat(len(x) // len(s)) for s, x in zip(self.seeds, self.samples, strict=False)]
        of_samples = torch.cat(seeds) if seeds else torch.empty(0, dtype=torch.int64, device=problem.device)
        return SteerResult(samples, rewards.detach(), of_samples, cost, info, self.interrupted)


def _check_cond(cond: Cond, num_samples: int) -> None:
    if cond is not None and not isinstance(cond, Mapping):
        raise InputError('cond is None or a mapping such as {"label": a tensor of one label a sample}')
    for key, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.shape != (num_samples,):
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"cond[{key!r}] must be a tensor of shape ({num_samples},), got {given}")


def _warn(method: str, num_draws: int, result: SteerResult) -> None:
    """Say what a user should know before trusting the samples."""
    bad = int(result.info["nonfinite"])
    if bad:
        warnings.warn(
            f"{bad} of {len(result.samples)} samples are not finite: the steering is too stiff for these steps; "
            "use more steps, renormalize='clip', or mfm-gf",
            UserWarning,
            stacklevel=3,
        )
    seen = result.info.get("ess")
    if seen is not None and num_draws > 1 and float((seen < FEW).double().mean()) > 0.5:
        warnings.warn(
            f"one draw carries all the weight (ESS < {FEW}) at {int((seen < FEW).sum())} of {len(seen)} steps: the "
            "reward is too sharp for these draws; use more draws, recycle=8 or more, or a smaller strength",
            UserWarning,
            stacklevel=3,
        )


def log_normaliser(result: SteerResult) -> float:
    """log of the mean evidence over the systems of an SMC run."""
    evidence = result.info["log_evidence"]
    return float(torch.logsumexp(evidence, 0)) - math.log(len(evidence))
