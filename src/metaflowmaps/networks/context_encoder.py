r"""Networks that read observations: an encoder of the set, and a body that reads what the encoder says.

Observations (t_i, x_i) are tokens: their value, whitened by the process's own mean and spread at t_i
(:mod:`metaflowmaps.networks.process_prior`), and features of t_i, of r and of the lag t_i − r. A token of r alone
stands beside them; all attend to each other, masked ones to nobody, and the token of r is the **summary**. Nothing says
which token came first, so the order of observations means nothing. The body reads the summary beside state and times.
For images the whitened observations, in the order of their times and the latest last, and the Gaussian answer are
channels beside it.

A context is encoded once for a batch and not once a call: what the body is called with are summary and channels.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps._shapes import expand_time
from metaflowmaps.context import OBSERVED, QUERY, Context, Observations, beside, ordered
from metaflowmaps.errors import InputError, warn_caller
from metaflowmaps.networks.attention import attend
from metaflowmaps.networks.checks import check_divides
from metaflowmaps.networks.family import MAX_DEPTH, MAX_WIDTH, NetworkConfig
from metaflowmaps.networks.forward_mode import layer_norm
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.networks.process_prior import ProcessPrior
from metaflowmaps.work.choices import Pick

SUMMARY, FRAMES, MEAN, STD = ENCODED = ("summary", "frames", "prior_mean", "prior_std")
FREQUENCIES = tuple(math.pi * f for f in (0.5, 1.0, 2.0, 4.0, 8.0))  # of times over the whole span
POOLED = 4  # side to which an image is averaged for its token


class ObservedConfig(NetworkConfig):
    """A network of observations: an encoder and the network that it feeds."""

    name: ClassVar[str] = "observed"

    body: Annotated[NetworkConfig, Pick(NetworkConfig)] = MLPConfig()
    max_observations: int = Field(4, ge=1, le=4096)  # as many as are trained with
    observed_shape: tuple[Annotated[int, Field(ge=1)], ...] | None = None  # of an observation; None: that of a sample
    nodes: int = Field(33, ge=1, le=1025)  # times at which the data's mean and covariance are kept; 1: one for all
    stationary: bool = False  # times count from r alone
    width: int = Field(64, ge=4, le=MAX_WIDTH)
    depth: int = Field(1, ge=1, le=MAX_DEPTH)
    heads: int = Field(4, ge=1, le=MAX_WIDTH)

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """An :class:`Observed` on samples of this shape."""
        return Observed(self, event_shape)

    def shallow(self) -> "ObservedConfig":
        """With a shallow body, which is what is compiled."""
        return self.model_copy(update={"body": self.body.shallow()})


class Observed(nn.Module):
    """An encoder of observations and the network that reads its summary.

    ``span`` holds the first and the last time that were trained with, ``least`` the fewest observations.
    """

    reads = (*OBSERVED, *ENCODED)
    span: Tensor
    least: Tensor
    seen_mean: Tensor
    seen_std: Tensor

    def __init__(self, config: ObservedConfig, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.config, self.event_shape = config, event_shape
        self.observed_shape = config.observed_shape or event_shape
        if config.nodes > 1 and self.observed_shape != event_shape:
            raise InputError(f"observations of shape {self.observed_shape} are none of X_r: set model.network.nodes=1")
        self.num_classes = config.body.num_classes
        self.prior = ProcessPrior(config.nodes, event_shape)
        self.encoder = ContextEncoder(config, self.observed_shape, event_shape)
        frames = 0
        if len(event_shape) == 3 and self.observed_shape == event_shape:
            frames = (config.max_observations + 1) * event_shape[0]
        self.frames = frames
        self.body = config.body.reader(event_shape, config.width, frames)
        self.register_buffer("span", torch.tensor([0.0, 1.0]))
        self.register_buffer("least", torch.zeros(()))
        own = self.observed_shape if config.nodes == 1 else ()  # observations of another kind than X_r
        self.register_buffer("seen_mean", torch.zeros(own))
        self.register_buffer("seen_std", torch.ones(own))

    @torch.no_grad()
    def fit(self, nodes: Tensor, paths: Tensor, least: int, seen: Tensor | None = None) -> None:
        """Take from the data what is not trained.

        Args:
            nodes: times (K,).
            paths: (n, K, *event), paths at the nodes.
            least: the fewest observations that are trained with.
            seen: (k, *observed) some observations, where there is one node.
        """
        self.prior.fit(nodes, paths)
        self.span.copy_(torch.stack([nodes[0], nodes[-1]]))
        self.least.fill_(least)
        if seen is not None:
            self.seen_mean.copy_(seen.mean(0))
            spread = seen.std(0)
            self.seen_std.copy_(torch.where(spread > 0, spread, 1.0))

    @property
    def rows_cost(self) -> bool:
        """As the body has it."""
        return bool(getattr(self.body, "rows_cost", False))

    def forward(self, z: Tensor, a: Tensor, b: Tensor, context: Tensor, context_time: Tensor, **cond: Any) -> Tensor:
        """(B, *event) -> (B, *event), times (B,) in [0, 1]; ``cond`` as :meth:`encode` gives it; without, it is 0."""
        if SUMMARY not in cond:
            cond[SUMMARY] = z.new_zeros(len(z), self.config.width)
        if self.frames and FRAMES not in cond:
            cond[FRAMES] = z.new_zeros(len(z), self.frames, *self.event_shape[1:])
        out: Tensor = self.body(z, a, b, context, context_time, **cond)
        return out

    def encode(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions with the observations read: a summary, the Gaussian answer, and for images channels."""
        given = [name for name in OBSERVED if name in cond]
        if SUMMARY in cond and not given:
            return dict(cond)
        if SUMMARY in cond or len(given) < len(OBSERVED):
            raise InputError("this map reads observations: draw(mfm.Context(values, times, query=r), num_draws)")
        seen, query = ordered(cond, self.config.max_observations), cond[QUERY]
        if seen.values.shape[2:] != self.observed_shape:
            raise InputError(f"observations must have shape {self.observed_shape}, got {tuple(seen.values.shape[2:])}")
        most, places = self.config.max_observations, seen.mask.shape[1]
        if self.frames and places > most:
            raise InputError(f"this map has channels for {most} observations, got {places}: leave the earliest out")
        if self.config.stationary:
            seen, query = seen._replace(times=(seen.times - query[:, None]) * seen.mask), torch.zeros_like(query)
        mean, std = self.prior.given(seen, query)
        white = self._whitened(seen)
        spread = self.prior.spread_at(query[:, None])[:, 0].clamp_min(1e-8)
        answer = (mean - self.prior.mean_at(query[:, None])[:, 0]) / expand_time(spread, mean)
        known = {name: value for name, value in cond.items() if name not in OBSERVED}
        known[SUMMARY] = self.encoder(seen._replace(values=white), query, answer, std / spread, self.span)
        if self.frames:
            known[FRAMES] = torch.cat([_latest_last(white, seen.mask).flatten(1, 2), answer], 1)
        return {**known, MEAN: mean, STD: std}

    def _whitened(self, seen: Observations) -> Tensor:
        """Values by the mean and the spread of their times, or where X_r is of another kind by their own."""
        if self.config.nodes == 1:
            white = (seen.values - self.seen_mean) / self.seen_std
        else:
            spread = self.prior.spread_at(seen.times).clamp_min(1e-8)
            white = (seen.values - self.prior.mean_at(seen.times)) / beside(spread, seen.values)
        return torch.where(beside(seen.mask, white), white, 0.0)

    def check(self, context: Context) -> None:
        """Say where a context is none of those that were trained with."""
        counts = context.mask.sum(1)
        fewest, most = (int(counts.min()), int(counts.max())) if len(context) else (0, 0)
        if fewest < int(self.least):
            raise InputError(
                f"this map was trained on at least {int(self.least)} observations, got {fewest}: give more"
            )
        if not self.frames and most > self.config.max_observations:
            warn_caller(f"{most} observations: this map was trained on at most {self.config.max_observations}")
        times, first, last = context.times[context.mask], *self.span.tolist()
        assert context.query is not None, "conditions() refuses a context that asks for nothing"
        if self.config.stationary:
            times = (context.times - context.query[:, None])[context.mask]
        asked = times if self.config.stationary else torch.cat([times, context.query])
        room = 1e-6 * (last - first)
        if asked.numel() and not bool(((asked >= first - room) & (asked <= last + room)).all()):
            what = "lags" if self.config.stationary else "times"
            warn_caller(
                f"{what} in [{float(asked.min()):g}, {float(asked.max()):g}] reach beyond those trained with, "
                f"[{first:g}, {last:g}]"
            )


class ContextEncoder(nn.Module):
    """(observations, r, the Gaussian answer) -> summary (B, width)."""

    def __init__(self, config: ObservedConfig, observed_shape: tuple[int, ...], event_shape: tuple[int, ...]) -> None:
        super().__init__()
        check_divides(config.heads, config.width, ("heads", "width"))
        times = 3 + 4 * len(FREQUENCIES)
        width = config.width
        self.token = _perceptron(_size(observed_shape) + times, width, width)
        self.asked = _perceptron(_size(event_shape) + 2 + 2 * len(FREQUENCIES), width, width)
        self.blocks = nn.ModuleList(_Block(width, config.heads) for _ in range(config.depth))

    def forward(self, seen: Observations, query: Tensor, answer: Tensor, spread: Tensor, span: Tensor) -> Tensor:
        """(B, width)."""
        first, length = span[0], (span[1] - span[0]).clamp_min(1e-30)
        at, asked = (seen.times - first) / length, (query - first) / length
        lag = at - asked[:, None]
        times = torch.cat([at[..., None], lag[..., None], torch.log1p(64 * lag.abs())[..., None] / 4], 2)
        tokens = self.token(torch.cat([_pooled(seen.values, 2), times, _waves(at), _waves(lag)], 2))
        log_spread = spread.clamp_min(1e-4).log()[:, None]
        head = self.asked(torch.cat([_pooled(answer, 1), log_spread, asked[:, None], _waves(asked)], 1))
        x = torch.cat([head[:, None], tokens], 1)
        mask = torch.cat([seen.mask.new_ones(len(head), 1), seen.mask], 1)
        for left, block in reversed(list(enumerate(reversed(self.blocks)))):
            x = block(x, mask, None if left else 1)  # of the last block the summary alone is read
        return layer_norm(x[:, 0])


class _Block(nn.Module):
    """x + attention(norm x), then the same with a perceptron; masked tokens are seen by nobody."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = _perceptron(width, 2 * width, width)

    def forward(self, x: Tensor, mask: Tensor, first: int | None) -> Tensor:
        """(B, N, width), (B, N) -> (B, N, width), or of the first few tokens alone."""
        q, k, v = (
            layer(layer_norm(part)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q, x[:, :first]), (self.k, x), (self.v, x))
        )
        x = x[:, :first] + self.out(attend(q, k, v, mask=mask).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(layer_norm(x))
        return out


def _latest_last(values: Tensor, mask: Tensor) -> Tensor:
    """Observations in their order at the last places, zeros before them: the latest is always at one place."""
    source = torch.arange(mask.shape[1], device=mask.device) - (~mask).sum(1, keepdim=True)
    moved = values.gather(1, beside(source.clamp_min(0), values).expand_as(values))
    return torch.where(beside(source >= 0, values), moved, 0.0)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _size(shape: tuple[int, ...]) -> int:
    """Numbers in the token of a value."""
    return shape[0] * POOLED**2 if len(shape) == 3 else math.prod(shape)


def _pooled(values: Tensor, batch_dims: int) -> Tensor:
    """Values as tokens have them: images averaged to 4×4, all else flat."""
    if values.ndim == batch_dims + 3:
        flat = functional.adaptive_avg_pool2d(values.flatten(0, batch_dims - 1), POOLED)
        return flat.reshape(*values.shape[:batch_dims], -1)
    return values.flatten(batch_dims)


def _waves(times: Tensor) -> Tensor:
    """Sines and cosines of times: (…) -> (…, features)."""
    phases = torch.stack([times * f for f in FREQUENCIES], -1)
    return torch.cat([phases.sin(), phases.cos()], -1)
