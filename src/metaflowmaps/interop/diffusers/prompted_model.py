"""One call of a diffusers pipeline as a model to steer: path, event shape, drift and draws.

A condition is ``{"prompt": which prompt each row has}``: numbers travel with the rows, tensors of prompts stay here and
are looked up. So particles, candidates and draws cost a number a row, and particles of one system are seen to share
their prompt. A value goes ``drift(t, x, cond)`` → what the network is shown (:mod:`.schedule`) → the family's call, for
the prompts and the negative ones, in ``micro_batch`` rows → guidance → the drift b_t(x).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaflowmaps._shapes import Cond, Time, batch_time, check_state, check_time
from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers.family import Family, Request, Rows
from metaflowmaps.interop.diffusers.schedule import FollowedSchedule
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import GlassPosterior

GLASS_STEPS = 30


class FamilyNetwork(nn.Module):
    """The network as a family calls it: a module, for the meter; fed in its own dtype, answered in that of states.

    Args:
        family: of the pipeline.
        request: of the call.
    """

    def __init__(self, family: Family, request: Request) -> None:
        super().__init__()
        self.family, self.request = family, request
        self.parts = nn.ModuleList(family.networks)

    def forward(self, y: Tensor, clock: Tensor, rows: Rows) -> Tensor:
        """What the scheduler would be stepped with, (B, *event), before guidance."""
        out = self.family.evaluate(y.to(self.family.dtype), clock, rows, self.request)
        if out.shape[1:] != y.shape[1:] and out.shape[1] == 2 * y.shape[1]:  # a learned variance comes second
            out = out[:, : y.shape[1]]
        return out.to(y.dtype)


class PromptedModel(nn.Module):
    """A pipeline asked for something.

    Args:
        family: of the pipeline.
        request: what is asked for, encoded.
        schedule: the scheduler's, set to the call's steps.
        event_shape: of a state.
        micro_batch: rows that the network is given at a time; None: all.
        glass_steps: of its draws.
    """

    def __init__(
        self,
        family: Family,
        request: Request,
        schedule: FollowedSchedule,
        event_shape: tuple[int, ...],
        micro_batch: int | None = None,
        glass_steps: int = GLASS_STEPS,
    ) -> None:
        super().__init__()
        self.path = LinearPath()
        self.family, self.request, self.schedule = family, request, schedule
        self.event_shape, self.micro_batch, self.glass_steps = event_shape, micro_batch, glass_steps
        self.network = FamilyNetwork(family, request)
        self.dtype, self.device = torch.float32, family.device
        self.given: tuple[Tensor, Tensor] | None = None  # seeds (n,) of samples whose noise (n, *event) is given

    @property
    def metered(self) -> nn.Module:
        """What is evaluated: twice a row where guidance acts."""
        return self.network

    def start(self, t: float, noise: Tensor, seeds: Tensor) -> Tensor:
        """The states of a run that starts at t: rows of noise, one a seed; noise that was given goes by its seed."""
        if self.given is not None:
            own_seeds, own = self.given
            same = seeds.cpu()[:, None] == own_seeds
            rows = same.any(1).nonzero().flatten()
            noise = noise.index_copy(0, rows.to(noise.device), own[same.to(torch.uint8).argmax(1)[rows]].to(noise))
        return self.schedule.start(t, noise)

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x), guided as the call asks.

        Args:
            t: a number, or (B,).
            x: (B, *event).
            cond: "prompt" (B,), the number of each row's prompt; may be left out where there is one prompt.

        Returns:
            (B, *event).
        """
        check_state(x, "x", self.event_shape)
        check_time(t)
        times, which = batch_time(t, x), self._which(x, cond)
        if self.micro_batch is None or len(x) <= self.micro_batch:
            return self._part(times, x, which)
        remember = x.requires_grad and torch.is_grad_enabled()
        made = []
        for begin in range(0, len(x), self.micro_batch):
            part = slice(begin, begin + self.micro_batch)
            here = (times[part], x[part], which[part])
            made.append(checkpoint(self._part, *here, use_reentrant=False) if remember else self._part(*here))
        return torch.cat(made)

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """Draws from p_{1|t}(· | x_t) by the drift's GLASS ODE: (num_draws, B, *event)."""
        return GlassPosterior(self.path, self.drift, steps or self.glass_steps).draw(t, x_t, num_draws, generator, cond)

    def push(self, noise: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> Tensor:
        """Noise to draws by GLASS, one a row: (B, *event)."""
        return GlassPosterior(self.path, self.drift, self.glass_steps).push(noise, t, x_t, cond)

    def _which(self, x: Tensor, cond: Cond) -> Tensor:
        which = (cond or {}).get("prompt")
        if which is None:
            if self.request.prompts > 1:
                raise InputError(
                    f'this model holds {self.request.prompts} prompts: say which each row has by cond={{"prompt": …}}'
                )
            return torch.zeros(len(x), dtype=torch.long, device=x.device)
        if which.shape != x.shape[:1] or bool(((which < 0) | (which >= self.request.prompts)).any()):
            raise InputError(
                f'cond["prompt"] must hold a number in 0 … {self.request.prompts - 1} for each of {len(x)} rows, got '
                f"shape {tuple(which.shape)}"
            )
        return which

    def _part(self, t: Tensor, x: Tensor, which: Tensor) -> Tensor:
        seen = self.schedule.see(t, x)
        return self.schedule.drift(seen, self._guided(t, seen.y.to(x.dtype), seen.clock, which)).to(x.dtype)

    def _guided(self, t: Tensor, y: Tensor, clock: Tensor, which: Tensor) -> Tensor:
        family, request = self.family, self.request
        positive = self._rows(request.positive, which)
        acts = None if request.negative is None else family.acts(request, t, clock)
        if request.negative is None or acts is None or not bool(acts.any()):
            plain: Tensor = self.network(y, clock, positive)
            return plain
        negative = self._rows(request.negative, which)
        given, other = self._both(y, clock, positive, negative)
        guided = family.guide(given, other, family.scale(request, t, clock), request)
        return torch.where(acts.reshape(-1, *([1] * (y.ndim - 1))), guided, given)

    def _both(self, y: Tensor, clock: Tensor, positive: Rows, negative: Rows) -> tuple[Tensor, Tensor]:
        """In one call where the two have rows of one shape."""
        shapes = {name: value.shape for name, value in positive.items()}
        if shapes == {name: value.shape for name, value in negative.items()}:
            rows = {name: torch.cat([positive[name], negative[name]]) for name in positive}
            given, other = self.network(torch.cat([y, y]), torch.cat([clock, clock]), rows).chunk(2)
            return given, other
        return self.network(y, clock, positive), self.network(y, clock, negative)

    def _rows(self, rows: Rows, which: Tensor) -> Rows:
        """The rows' own prompts, floating ones in the network's dtype."""
        return dict(self._looked_up(rows, which))

    def _looked_up(self, rows: Rows, which: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, value in rows.items():
            here = value.to(self.device)[which]
            yield name, here.to(self.family.dtype) if here.is_floating_point() else here
