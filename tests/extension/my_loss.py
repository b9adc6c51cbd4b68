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


@dataclass(frozen=True)
class Pulled(Consistency):
    """The Lagrangian identity by a one-sided difference, on the teacher's velocity."""

    name = "pulled"
    moves = True

    @property
    def source(self):
        return "teacher"

    def __call__(self, flow, jumps, velocity):
        b = torch.minimum(jumps.b + 1e-3, torch.ones_like(jumps.b))
        step, jump, longer = (v[:, None] for v in (b - jumps.b, jumps.b - jumps.a, b - jumps.a))
        here = jumps.z + jump * flow(jumps.a, jumps.b, jumps.z)
        there = jumps.z + longer * flow(jumps.a, b, jumps.z)
        with torch.no_grad():
            target = velocity(jumps.b, here)
        return ((there - here) / step - target).square().sum(1)
