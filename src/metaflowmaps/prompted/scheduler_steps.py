"""The process of a pipeline's own scheduler: its times, its steps, whatever their order."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.interop.diffusers.schedule import FollowedSchedule
from metaflowmaps.steering import ODE
from metaflowmaps.steering.method import SteeringProblem
from metaflowmaps.steering.process import SteeredDrift


@dataclass(frozen=True)
class SchedulerSteps(ODE):
    """dx = (b + c_t (D* − D)) dt, each step made by the scheduler itself.

    The steered drift is handed to the scheduler as what the network would have predicted for it. A scheduler that looks
    back at earlier predictions (DPM-Solver, UniPC, PNDM) has its memory here: it begins anew with a batch's first step.

    Args:
        schedule: of the pipeline's scheduler, set to ``steps``.
        memory: the scheduler of the batch that is being made.
    """

    schedule: FollowedSchedule | None = None
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def step(self, problem: SteeringProblem, drift: SteeredDrift, t: float, u: float, x: Tensor) -> Tensor:
        """The scheduler's calls between t and u."""
        schedule = self.schedule
        assert schedule is not None, "made by a pipeline"
        grid = schedule.grid
        number = grid.times.index(t)
        if number == 0:
            self.memory["scheduler"] = copy.deepcopy(schedule.scheduler)
            if hasattr(schedule.scheduler, "set_begin_index"):
                self.memory["scheduler"].set_begin_index(0)
        scheduler = self.memory["scheduler"]
        for call in grid.calls[number]:
            at, timestep = grid.call_times[call], scheduler.timesteps[call]
            base, steering = drift(at, x)
            predicted = schedule.prediction(at, x, base + steering)
            predicted, y = predicted.to(x.dtype), x * schedule.scale(at)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(y, timestep)
            y = scheduler.step(predicted, timestep, y, return_dict=False)[0]
            x = y / schedule.scale((*grid.call_times, 1.0)[call + 1])
        return x.to(torch.float32)
