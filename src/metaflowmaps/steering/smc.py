"""MFM-SMC: twisted SMC (:mod:`metaflowmaps.steering.twisted`) with ψ = e^{γ V̂} from posterior draws."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.draws import tilted_weights
from metaflowmaps.errors import check_one_of
from metaflowmaps.random import rand
from metaflowmaps.steering.from_draws import FromDraws, draw_info
from metaflowmaps.steering.mfm_g import blended
from metaflowmaps.steering.problem import FIRST, SteeringProblem
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.steering.twisted import Twisted, TwistedSMC
from metaflowmaps.value import free_shift, log_mean


@dataclass(frozen=True)
class SMC(TwistedSMC, FromDraws):
    """ψ = e^{γ V̂} from draws; proposals guided by their shift, by the blend with gradients, or not at all.

    Args:
        recycle: steps whose draws are used together.
        guide: the proposals': mfm-gf, mfm-g (needs a gradient of the reward) or none.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.SMC(num_draws=4)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "mfm-smc"
    title = "MFM-SMC"
    in_words = "Many samples at once; those whose draws promise a high reward are copied, the others dropped."
    look = ("#46107f", "D")
    published: ClassVar[dict[str, Any]] = {"recycle": 1, "temper": 0.0}
    weighs: ClassVar[bool] = True

    recycle: int = 8
    guide: str = "mfm-gf"
    temper: float = 0.3

    def __post_init__(self) -> None:
        TwistedSMC.__post_init__(self)
        FromDraws.__post_init__(self)
        check_count(self.recycle, "recycle")
        check_one_of("guide", self.guide, ("mfm-gf", "mfm-g", "none"))

    @property
    def calls_per_step(self) -> float:
        """The drift; a call and a reward a draw."""
        return 1 + 2 * self.num_draws

    def remember(self, problem: SteeringProblem) -> DrawPool:
        """The draws of the last steps."""
        self.open_posterior(problem)
        return DrawPool(problem.path, self.recycle)

    def twist(self, problem: SteeringProblem, memory: DrawPool, t: float, x: Tensor) -> Twisted:
        """V̂ of the pool, and the shift of its draws."""
        gradients = self.guide == "mfm-g"
        looked_at = max(t, FIRST) if gradients else t
        made = problem.draws(looked_at, x, self.options(gradients))
        log_base = memory.add(looked_at, x, made)
        pool = memory.pooled()
        drift = problem.drift(t, x)
        if self.guide == "none":
            shift = torch.zeros_like(x)
        elif gradients:
            shift, _ = blended(made, pool, log_base, problem.denoise(t, x, drift))
        else:
            shift = free_shift(pool, log_base)
        info = draw_info(problem, looked_at, shift, pool.rewards, log_base, self.noise)
        return Twisted(drift, log_mean(pool.rewards, log_base), shift, info)

    def select(self, memory: DrawPool, rows: Tensor) -> None:
        """Histories go with their particles."""
        memory.select(rows)

    def last(
        self, problem: SteeringProblem, memory: DrawPool, t: float, x: Tensor, twisted: Twisted
    ) -> tuple[Tensor, Tensor]:
        """One of the last draws, chosen by its reward."""
        made = memory.draws[-1]
        log_base = made.log_base
        edges = tilted_weights(made.rewards, log_base).double().cumsum(0)[:-1]
        uniform = rand((len(x),), problem.stream("pick", rows=len(x)), torch.float64, x.device)
        chosen = (edges <= uniform).sum(0)
        picked = made.x_1[chosen, torch.arange(len(x), device=x.device)]
        return picked, log_mean(made.rewards, log_base)
