"""Best-of-N: N samples of the base model, keep the one of highest reward."""

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.steering.guided import Control, Guided
from metaflowmaps.steering.none import NoGuide
from metaflowmaps.steering.problem import Info, Problem


class BestOfN:
    """The base sampler on N rows a sample; num_draws is N."""

    default_grid = "uniform"

    def __init__(self, num_draws: int, control: Control) -> None:
        check_count(num_draws, "num_draws")
        self.copies = num_draws
        self.base = Guided(NoGuide(), control)
        self.init, self.step = self.base.init, self.base.step

    def finish(self, problem: Problem, state: object) -> tuple[Tensor, Info]:
        x, _ = self.base.finish(problem, state)  # type: ignore[arg-type]
        reward = problem.score_of(x).reshape(self.copies, -1)
        samples = reward.shape[1]
        return x[reward.argmax(0) * samples + torch.arange(samples, device=x.device)], {}
