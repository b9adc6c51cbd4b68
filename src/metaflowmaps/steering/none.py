"""The base model, unsteered."""

from typing import Any

import torch
from torch import Tensor

from metaflowmaps.steering.problem import Info, Problem


class NoGuide:
    """D* = D."""

    def start(self, problem: Problem) -> None:
        return None

    def guide(self, problem: Problem, memory: Any, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        return problem.drift(t, x), torch.zeros_like(x), {}
