r"""The times of a diffusers scheduler as times of ours, and the states it steps as states of ours.

Our path is linear, ``x = (1−t) ε + t x_1``. A scheduler tells its noise by σ, and its own state Y is

    flow        Y = x                               t = 1 − σ          the network gives dY/dσ = E − D = −b_t(x)
    exploding   Y = x_1 + σ ε      = x/t            t = 1/(1+σ)        (Euler, Heun, LMS)
    preserving  Y = a ε + b x_1    = x/√(α_t²+β_t²)  t = 1/(1+σ)       a² + b² = 1, σ = a/b  (DDIM, PNDM, DPM-Solver)

Networks that go with the last two are shown y = a ε + b x_1 and predict ε, x_1 or v. On the linear path an Euler step
is exact where E and D stay as they are, which is how DDIM and Euler's scheduler step: the three agree.

**Clocks.** What the network is told (the timestep) follows from σ up to rounding: near t = 1 a float32 time holds σ to
6e-8 alone. Times that are the scheduler's own are therefore told by the scheduler's own number; others, GLASS's, by σ.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.errors import InputError
from metaflowmaps.interop.foreign import PREDICTIONS, SMALLEST_WEIGHT
from metaflowmaps.interop.schedules import TableSchedule, View
from metaflowmaps.path import LinearPath

DIFFUSION_PREDICTIONS = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}


class Grid(NamedTuple):
    """The times of a run, and the scheduler's calls that make each step."""

    times: tuple[float, ...]  # K + 1, the last is 1
    calls: tuple[tuple[int, ...], ...]  # K: which of the scheduler's calls make the step
    call_times: tuple[float, ...]  # of each call
    clocks: Tensor  # of each call: what the network is told


class Seen(NamedTuple):
    """What a network is shown of a state."""

    y: Tensor
    clock: Tensor  # (B,)
    view: View | None  # weights of noise and data in y; None where y is our own state


class FollowedSchedule:
    """A scheduler set to some steps.

    Args:
        scheduler: of a diffusers pipeline; it is copied.
        set_timesteps: sets the copy as the pipeline sets its own.
    """

    def __init__(self, scheduler: Any, set_timesteps: Callable[[Any], None]) -> None:
        self.scheduler = copy.deepcopy(scheduler)
        try:
            set_timesteps(self.scheduler)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{type(scheduler).__name__} cannot be set as this pipeline sets it ({' '.join(str(error).split())}): "
                "give the pipeline the scheduler it was published with"
            ) from error
        self.grid = _grid(self._sigmas(), self.scheduler.timesteps, self.time_of_sigma)
        self._own_times = torch.tensor(self.grid.call_times, dtype=torch.float64)

    # -- what the two kinds say --------------------------------------------------------------------------------------

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """Our time."""
        raise NotImplementedError

    def see(self, t: Tensor, x: Tensor) -> Seen:
        """What the network is shown at t (B,), x (B, *event)."""
        raise NotImplementedError

    def drift(self, seen: Seen, prediction: Tensor) -> Tensor:
        """b_t(x) of what the network predicts."""
        raise NotImplementedError

    def prediction(self, t: float, x: Tensor, drift: Tensor) -> Tensor:
        """What a network would predict whose drift is ``drift``."""
        raise NotImplementedError

    def scale(self, t: float) -> float:
        """Y/x: the scheduler's state for ours at t."""
        raise NotImplementedError

    def start(self, t: float, noise: Tensor) -> Tensor:
        """The state at t, where a run starts: noise as the scheduler scales it."""
        raise NotImplementedError

    # -- what they share ---------------------------------------------------------------------------------------------

    def clock_of(self, t: Tensor, otherwise: Tensor) -> Tensor:
        """The scheduler's own clock at its own times, ``otherwise`` at others: (B,)."""
        own = self._own_times.to(t)
        same = t[:, None] == own
        number = self.grid.clocks.to(t)[same.to(torch.uint8).argmax(1)]
        return torch.where(same.any(1), number, otherwise)

    def _sigmas(self) -> Tensor:
        """σ of each call, float64."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        count = len(self.scheduler.timesteps)
        if sigmas is not None and len(sigmas) >= count:
            return torch.as_tensor(sigmas)[:count].detach().cpu().double()
        table: Tensor = self.scheduler.alphas_cumprod[self.scheduler.timesteps.long().cpu()].double()
        return ((1 - table) / table).sqrt()


class FlowSchedule(FollowedSchedule):
    """Flow matching: the network sees our state, and predicts −b."""

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 - sigma

    def see(self, t: Tensor, x: Tensor) -> Seen:
        steps = float(self.scheduler.config.num_train_timesteps)
        return Seen(x, self.clock_of(t, (1 - t) * steps), None)

    def drift(self, seen: Seen, prediction: Tensor) -> Tensor:
        return -prediction

    def prediction(self, t: float, x: Tensor, drift: Tensor) -> Tensor:
        return -drift

    def scale(self, t: float) -> float:
        return 1.0

    def start(self, t: float, noise: Tensor) -> Tensor:
        return noise


class DiffusionSchedule(FollowedSchedule):
    """Diffusion: the network sees a ε + b x_1 and predicts ε, v or x_1."""

    def __init__(self, scheduler: Any, set_timesteps: Callable[[Any], None]) -> None:
        self.table = TableSchedule(scheduler.alphas_cumprod, data_at_1=False)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in DIFFUSION_PREDICTIONS:
            raise InputError(
                f"prediction_type={kind!r} of {type(scheduler).__name__} goes with flow sigmas: give the scheduler "
                f"use_flow_sigmas=True, or one of {', '.join(DIFFUSION_PREDICTIONS)}"
            )
        self.predicts = PREDICTIONS[DIFFUSION_PREDICTIONS[kind]]
        self.path = LinearPath()
        super().__init__(scheduler, set_timesteps)
        self.exploding = float(self.scheduler.init_noise_sigma) > 1.0

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)

    def see(self, t: Tensor, x: Tensor) -> Seen:
        # in float64, the network's answer apart: D = (y − a E)/b multiplies what is rounded by 1/b, 15 at the start
        clock_like, t, x = t, t.double(), x.double()
        length = ((1 - t) ** 2 + t**2).sqrt()
        alpha, beta = (1 - t) / length, t / length
        if "a" in self.predicts.divides_by:
            alpha = alpha.clamp_min(SMALLEST_WEIGHT)
        if "b" in self.predicts.divides_by:
            beta = beta.clamp_min(SMALLEST_WEIGHT)
        view = self.table.at(alpha, beta)
        return Seen(x / expand_time(length, x), self.clock_of(clock_like, view.clock.to(clock_like)), view.over(x))

    def drift(self, seen: Seen, prediction: Tensor) -> Tensor:
        assert seen.view is not None, "a diffusion schedule sees through a view"
        noise, data = self.predicts.means(seen.y, prediction.double(), seen.view)
        return data - noise

    def prediction(self, t: float, x: Tensor, drift: Tensor) -> Tensor:
        t, x, drift = float(torch.tensor(t).to(x)), x.double(), drift.double()  # t as the drift was told it
        noise, data = x - t * drift, x + (1 - t) * drift
        if self.predicts is PREDICTIONS["noise"]:
            return noise
        if self.predicts is PREDICTIONS["data"]:
            return data
        return (t * noise - (1 - t) * data) / math.hypot(t, 1 - t)

    def scale(self, t: float) -> float:
        return 1 / t if self.exploding else 1 / math.hypot(t, 1 - t)

    def start(self, t: float, noise: Tensor) -> Tensor:
        if t == self.grid.times[0]:
            return noise * (float(self.scheduler.init_noise_sigma) / self.scale(t))
        return noise * math.hypot(t, 1 - t)


def follow(scheduler: Any, set_timesteps: Callable[[Any], None]) -> FollowedSchedule:
    """The schedule of a pipeline's scheduler, flow or diffusion."""
    config = getattr(scheduler, "config", None)
    if config is None or not hasattr(scheduler, "set_timesteps"):
        raise InputError(f"{type(scheduler).__name__} is no diffusers scheduler: give the pipeline one, as published")
    if config.get("invert_sigmas"):
        raise InputError("a scheduler with invert_sigmas=True runs the other way: this package has no family for it")
    diffusion = getattr(scheduler, "alphas_cumprod", None) is not None
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if diffusion and not flow:
        return DiffusionSchedule(scheduler, set_timesteps)
    largest = float(torch.as_tensor(getattr(scheduler, "sigmas", [2.0])).max())
    if not flow and largest > 1:
        raise InputError(
            f"{type(scheduler).__name__} has neither a flow schedule (sigmas in [0, 1]) nor alphas_cumprod: give the "
            "pipeline a FlowMatchEulerDiscreteScheduler, DDIMScheduler or EulerDiscreteScheduler with its numbers"
        )
    return FlowSchedule(scheduler, set_timesteps)


def steps_alone(scheduler: Any, set_timesteps: Callable[[Any], None]) -> bool:
    """Does it step without drawing noise of its own? Then its steps can be followed; tried with two seeds."""
    ends = []
    for seed in (0, 1):
        tried = copy.deepcopy(scheduler)
        set_timesteps(tried)
        y = torch.ones(1, 4, 4, 4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for timestep in tried.timesteps[:2]:
                if hasattr(tried, "scale_model_input"):
                    tried.scale_model_input(y, timestep)
                y = tried.step(torch.ones_like(y), timestep, y, return_dict=False)[0]
        ends.append(y)
    return bool((ends[0] == ends[1]).all())


def _grid(sigmas: Tensor, clocks: Tensor, time_of_sigma: Callable[[Tensor], Tensor]) -> Grid:
    """Steps between different times: a time that is called twice ends a step, as its corrector, and begins the next."""
    call_times = time_of_sigma(sigmas).tolist()
    times = sorted(set(call_times))
    step_of, last = [], -1
    for number, time in enumerate(call_times):
        first_of_two = time in call_times[number + 1 :]
        step_of.append(max(0, times.index(time) - (1 if first_of_two else 0)))
        if step_of[-1] < last:
            raise InputError("the scheduler's times go back and forth: give the pipeline one whose noise only falls")
        last = step_of[-1]
    calls = tuple(tuple(i for i, s in enumerate(step_of) if s == k) for k in range(len(times)))
    if times[-1] >= 1 or not all(calls):
        raise InputError("the scheduler calls the network at the data's end: give it timesteps with noise left")
    return Grid((*times, 1.0), calls, tuple(call_times), clocks.detach().cpu().double())
