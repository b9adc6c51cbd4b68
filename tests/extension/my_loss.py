"""A consistency loss of one's own: the semigroup identity with a stop at a share of the jump that is an option."""

from dataclasses import dataclass

import torch

from metaflowmaps.losses import Consistency, semigroup


@dataclass(frozen=True)
class Halfway(Consistency):
    """One jump is two, with the stop always at the same share of it."""

    name = "halfway"

    share: float = 0.5

    def __call__(self, flow, jumps, velocity):
        return semigroup(flow, jumps.a, jumps.b, jumps.z, torch.full_like(jumps.gamma, self.share))
