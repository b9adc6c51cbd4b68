"""A consistency loss of one's own that learns from a teacher: the Lagrangian identity by a one-sided difference."""

from dataclasses import dataclass

import torch

from metaflowmaps.losses import Consistency


@dataclass(frozen=True)
class Pulled(Consistency):
    """The end of the jump moves by the velocity of the teacher."""

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
