r"""SANA-Sprint, as diffusers has it: one time, and jumps to the data alone.

Its pipeline thinks in angles, ``x = cos τ x_1 + sin τ ε`` with a consistency jump ``cos τ x − sin τ F``, but calls its
transformer on the linear path, at ``t = sin τ/(sin τ + cos τ)`` and ``y = x √(t² + (1 − t)²) = (1 − t) x_1 + t ε``, and
makes of the answer v

    F = ((1 − 2t) y + (1 − 2t + 2t²) v)/√(t² + (1 − t)²)

Put in, with n² = t² + (1 − t)² = 1 − 2t + 2t², ``cos τ = (1 − t)/n`` and ``sin τ = t/n``, the y cancel but one:

    cos τ x − sin τ F = ((1 − t) y − t ((1 − 2t) y + n² v))/n² = y − t v

So v is an average velocity from t to the data. States are in units of the pipeline's ``sigma_data``, which drops out.
"""

from dataclasses import dataclass

from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.interop.flow_maps.convention import Network
from metaflowmaps.interop.flow_maps.mean_flow import AverageVelocity


@dataclass(frozen=True)
class SanaSprint(AverageVelocity):
    """``network(y, timestep=t)``: the average velocity from t to the data."""

    name = "sana-sprint"
    to_data = True

    def average(self, network: Network, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(y, timestep=t)

    def velocity(self, network: Network, y: Tensor, s: Tensor) -> Tensor:
        """There is none."""
        raise InputError(
            "this network jumps to the data alone and has no drift: generate with it, or draw with "
            "mfm.WeightedPosterior(model, ratio=0)"
        )
