r"""MFM-Search (Alg. 4): draw, keep the best, noise it again to the next time; no drift, no gradients.

M particles a sample, N draws each. Selection "particle": each particle goes on from its own best draw; "global": all
go on from the best of the M N. Transition "stochastic": x_u = α_u ξ + β_u x_1* with fresh ξ; "deterministic": with the
noise that x implies, ξ = (x − β_t x_1*)/α_t. A search maximises the reward: it does not target p_reward.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, repeat_rows
from metaflowmaps.errors import check_one_of
from metaflowmaps.steering.from_draws import FromDraws, best_of_copies, best_rows
from metaflowmaps.steering.method import Info, Process
from metaflowmaps.steering.problem import SteeringProblem


class Searched(NamedTuple):
    """The particles of a search."""

    x: Tensor
    best: Tensor  # reward of the draw each particle came from


@dataclass(frozen=True)
class Search(FromDraws):
    """The best draw, again and again.

    Args:
        particles: M, of which the best is returned.
        selection: global (all go on from the best of all) or particle (each from its own best draw).
        transition: stochastic (fresh noise) or deterministic (the noise that x implies).

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.Search(num_draws=2, particles=4)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "mfm-search"
    title = "MFM-Search"
    in_words = "Draws what a sample may become, keeps the best draw, adds noise to it, and again; maximises the reward."
    targets_law = False
    look = ("#c27df5", "v")
    grid = "power"
    moved_by = "search"
    own_moves = "renoises its draws"

    particles: int = 8
    selection: str = "global"
    transition: str = "stochastic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.particles, "particles")
        check_one_of("selection", self.selection, ("particle", "global"))
        check_one_of("transition", self.transition, ("stochastic", "deterministic"))

    @property
    def copies(self) -> int:
        """M particles a sample."""
        return self.particles

    @property
    def calls_per_step(self) -> float:
        """A call and a reward a draw of each particle."""
        return 2 * self.num_draws * self.particles

    def start(self, problem: SteeringProblem, x: Tensor) -> Searched:
        """Noise."""
        self.open_posterior(problem)
        return Searched(x, x.new_full((len(x),), -torch.inf))

    def step(
        self, problem: SteeringProblem, process: Process, state: Searched, t: float, u: float
    ) -> tuple[Searched, Info]:
        """Draw, choose, and noise again to time u."""
        x, rows = state.x, torch.arange(len(state.x), device=state.x.device)
        made = problem.draws(t, x, self.options())
        reward, index = made.rewards.max(0)
        chosen = made.x_1[index, rows]
        if self.selection == "global":
            best = best_rows(reward, self.copies)
            # the winner as a whole: the noise that it implies is that of its own state
            chosen, x = repeat_rows(chosen[best], self.copies), repeat_rows(x[best], self.copies)
            reward = reward[best].repeat(self.copies)
        alpha_u, beta_u = float(problem.path.alpha(u)), float(problem.path.beta(u))
        if self.transition == "stochastic":
            noise = problem.noise("sde", len(x))
        else:
            noise = (x - float(problem.path.beta(t)) * chosen) / float(problem.path.alpha(t))
        return Searched(alpha_u * noise + beta_u * chosen, reward), {"best_reward": reward}

    def finish(self, problem: SteeringProblem, state: Searched) -> tuple[Tensor, Info]:
        """The best particle of each sample."""
        return best_of_copies(state.x, state.best, self.copies), {}
