"""TDS, the twisted diffusion sampler: SMC with ψ = e^{r(D_t(x))} and DPS-guided proposals."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaflowmaps._shapes import event_sum, positive
from metaflowmaps.steering.dps import at_posterior_mean
from metaflowmaps.steering.problem import FIRST, SteeringProblem
from metaflowmaps.steering.twisted import Twisted, TwistedSMC


@dataclass(frozen=True)
class TDS(TwistedSMC):
    """r at the posterior mean; the last move goes there, so the last twist is e^r itself.

    Args:
        scale: of the proposals' shift, as in DPS; the weights make up for whatever it is.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.TDS(particles=16)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "tds"
    title = "TDS"
    in_words = "Many samples at once, guided as by DPS; those of high reward are copied, the others dropped."
    look = ("#0d5226", "^")
    gradients = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.scale, "scale", or_zero=True)

    @property
    def calls_per_step(self) -> float:
        """A call of the network and one of the reward a particle, both differentiated."""
        return 4 * self.copies

    def twist(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Twisted:
        """r(D_t(x)) and its shift."""
        at = at_posterior_mean(problem, t, x)
        norm = event_sum(at.gradient.square()).sqrt()
        return Twisted(at.drift, at.reward, self.scale * at.shift, {"value": at.reward, "gradient_norm": norm})

    def last(
        self, problem: SteeringProblem, memory: Any, t: float, x: Tensor, twisted: Twisted
    ) -> tuple[Tensor, Tensor]:
        """The posterior mean, and its reward."""
        point = problem.denoise(t, x, twisted.drift)
        # a twist this early was looked at a little later: the reward of where the particle goes is another one
        return point, problem.score_of(point) if t < FIRST else twisted.log_twist
