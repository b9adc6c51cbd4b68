r"""A deterministic flow map trained elsewhere, as a model of ours.

Among Gaussian paths the lines of the flow of one law are the same but for a scale: where the ratios of data to noise
agree, ``y = c x`` with ``c = √(a² + b²)/√(α² + β²)``, a and b being the convention's weights. So a jump on the
convention's path between the times that have the ratios of s and u, scaled by c_s before and by 1/c_u after, is
``X_{s,u}`` on the linear path. Its diagonal is the drift (:mod:`metaflowmaps.interop.foreign`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond, Time, batch_time, check_count, check_order, check_state, check_time, expand_time
from metaflowmaps.errors import InputError
from metaflowmaps.interop.flow_maps.convention import FlowMapConvention
from metaflowmaps.interop.foreign import LABELS, PREDICTIONS, ForeignModel, _rows, _takes, answer
from metaflowmaps.interop.schedules import PathSchedule
from metaflowmaps.random import randn
from metaflowmaps.weighted_posterior import WeightedPosterior


class _TwoTime(nn.Module):
    """A network with its convention: its velocity at one time, or its jump to another; one evaluation a call.

    It is fed in the dtype of its weights, but for times that are passed by name, which diffusers embeds in float32.
    """

    def __init__(self, network: Callable[..., Any], convention: FlowMapConvention, fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.convention, self.fixed = network, convention, fixed
        self.label = next((name for name in LABELS if _takes(network, name)), LABELS[0])

    def forward(
        self, y: Tensor, clock: Tensor, label: Tensor | None, mask: None = None, *, there: Tensor | None = None
    ) -> Tensor:
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), y.dtype)
        bound = {} if label is None else {self.label: label}
        bound |= {name: _rows(value, len(y)) for name, value in self.fixed.items()}

        def network(state: Tensor, *clocks: Tensor, **named: Tensor) -> Tensor:
            return answer(self.network(state.to(own), *(c.to(own) for c in clocks), **named, **bound), state)

        if there is None:
            return self.convention.velocity(network, y, clock)
        return self.convention.jump(network, y, clock, there)


class FlowMap(ForeignModel):
    """X_{s,u} on the linear path; :func:`metaflowmaps.wrap` with ``flow_map=`` makes it.

    It generates in few jumps, draws from posteriors by :class:`metaflowmaps.WeightedPosterior` (steering methods that
    can weigh, do) and steers by its ``drift``. Guidance is what it was trained with.

    Args:
        network: called as its convention says.
        convention: how.
        event_shape: the shape of one sample; None where it is not known.
        num_classes: how many classes it knows; the number itself is the null class.
        fixed: other arguments of the network, always the same.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        convention: FlowMapConvention,
        event_shape: tuple[int, ...] | None,
        num_classes: int,
        fixed: Mapping[str, Any],
    ) -> None:
        schedule = PathSchedule(convention.path, data_at_1=True)
        super().__init__(
            _TwoTime(network, convention, fixed), PREDICTIONS["velocity"], schedule, event_shape, num_classes
        )
        self.convention = convention

    def jump(self, s: Time, u: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,u}(x), one evaluation.

        Args:
            s: A number, or (B,).
            u: Where it ends, s <= u.
            x: (B, *event).
            cond: "label" (B,), or None.

        Returns:
            (B, *event).
        """
        check_state(x, "x", self._event_shape)
        check_time(s, "s")
        check_time(u, "u")
        check_order(s, u)
        if "mask" in (cond or {}):
            raise InputError("a flow map jumps whole samples: leave cond['mask'] out")
        given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
        label, scale = self._conditions(cond, x)
        if scale is not None and not bool((scale == 1).all()):
            raise InputError("a flow map has the guidance that it was trained with: leave cond['guidance'] out")
        if "mask" in (cond or {}):
            raise InputError("a flow map knows no padding: leave cond['mask'] out")
        s, u = batch_time(s, x), batch_time(u, x)
        if self.convention.to_data and bool((u != 1).any()):
            raise InputError("this network jumps to the data alone: u must be 1")
        (here, before), (there, after) = self._placed(s), self._placed(u)
        y = self.network(expand_time(before, x) * x, here, label, there=there)
        out: Tensor = y / expand_time(after, x)
        return out.to(given)

    def _placed(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The convention's time with the ratio of ours, and c: (B,) each."""
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        length = (alpha**2 + beta**2).sqrt()
        view = self.schedule.at(alpha / length, beta / length)
        return view.clock, (view.a**2 + view.b**2).sqrt() / length

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        steps: int = 1,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """Draws from p_{1|t}(· | x_t), picked by weight, of ``steps`` jumps each: (num_draws, B, *event)."""
        ratio = 0.0 if self.convention.to_data else 1.0
        return WeightedPosterior(self, ratio, steps=steps).draw(t, x_t, num_draws, generator, cond)

    @torch.no_grad()
    def generate(self, n: int, steps: int = 1, generator: torch.Generator | None = None, cond: Cond = None) -> Tensor:
        """Samples by ``steps`` jumps; where these end at the data alone, noised anew between them: (n, *event)."""
        check_count(n, "n")
        check_count(steps, "steps")
        shape = (n, *self.event_shape)
        x = randn(shape, generator, self.dtype, self.device)
        for i in range(steps):
            s, u = i / steps, (i + 1) / steps
            if not self.convention.to_data:
                x = self.jump(s, u, x, cond)
                continue
            x = self.jump(s, 1.0, x, cond)
            if u < 1:
                x = self.path.interpolate(randn(shape, generator, self.dtype, self.device), x, u)
        return x
