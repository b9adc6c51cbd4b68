r"""The meta flow map: one network for every posterior.

``X_{s,u}(x̄; t, x) = x̄ + (u − s) v_{s,u}(x̄; t, x)`` carries the auxiliary process of the context (t, x) from s
to u; ``v_{s,s} = b̄_s``. One step from noise, ``x_1 = X_{0,1}(ε; t, x)``, is a draw from ``p_{1|t}(·|x)``,
differentiable in x. By construction ``X_{s,s} = id``. Free by-products:

    b_t(x) = v_{t,t}(x; 0, ·)        D_t(x) = (v_{0,0}(x̄; t, x) − α̇_0 x̄)/β̇_0        generator X_{0,1}(ε; 0, ·)

A network that reads observations makes the same map of every law ``p(X_r | C)``, C a general context
(:mod:`metaflowmaps.context`): all of the above holds given C, and the generator draws from the posterior of C itself.

What the network predicts, and in which coordinates, is its parameterisation: see :mod:`metaflowmaps.parameterization`.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import (
    Cond,
    Time,
    as_numbers,
    batch_time,
    check_count,
    check_finite,
    check_order,
    check_plain,
    check_same,
    check_state,
    check_time,
    expand_time,
    positive,
    repeat_cond,
    repeat_rows,
    select_cond,
)
from metaflowmaps.checkpoint import Pretrained
from metaflowmaps.context import Context
from metaflowmaps.errors import InputError, known_keywords, unknown, warn_caller
from metaflowmaps.guidance import GuidanceLaw, read_law
from metaflowmaps.parameterization import Chart, chart_class
from metaflowmaps.path import Path, as_path, make_path
from metaflowmaps.random import RowNoise, Source, check_seeds, randn
from metaflowmaps.work.memory import is_out_of_memory

CONDITIONS = ("guidance", "label")
PRIOR_MEAN, PRIOR_STD = "prior_mean", "prior_std"  # of X_r given what was observed, as a network that reads it says


class Anchored:
    """A map at a batch of contexts, in chart coordinates: ``flow(a, b, z) -> F_{a,b}(z)``.

    z may hold several states a context, stacked as (k·B, *event): the context is repeated to match.
    """

    def __init__(self, network: nn.Module, chart: Chart, cond: Cond) -> None:
        self.network, self.chart = network, chart
        self.cond = dict(cond or {})

    def __call__(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return self.chart.flow(self._bound, a, b, z)

    def _bound(self, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        copies = z.shape[0] // max(1, self.chart.context.shape[0])
        context, context_time, cond = self.chart.context, self.chart.context_time, self.cond
        if copies > 1:
            context = repeat_rows(context, copies)
            context_time = context_time.repeat(copies)
            cond = dict(repeat_cond(cond, copies) or {})
        out: Tensor = self.network(z, a, b, context, context_time, **cond)
        return out

    def jump(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        """Z_{a,b}(z) = z + (b − a) F."""
        return z + expand_time(b - a, z) * self(a, b, z)


class MetaFlowMap(Pretrained):
    """A network on a path, in a parameterisation; see the module for what it computes.

    Args:
        network: ``network(z, a, b, context, context_time, **cond) -> (B, *event)``, with an ``event_shape``.
        path: the interpolant.
        parameterization: gaussian, plain or residual.
        data_mean: of the data, for the gaussian parameterisation: a number or (*event).
        data_std: of a coordinate of the data about that mean.

    ``guidance_law`` is what a published network gives for a label, and how a scale is made of it where the network
    reads none: None for a map whose scales mean what they say. It may be replaced by another one.

    Examples:
        >>> model = mfm.MetaFlowMap.from_pretrained("digits")  # comes with the package
        >>> x_t = torch.zeros(2, 1, 8, 8)
        >>> model.draw(0.5, x_t, num_draws=3).shape
        torch.Size([3, 2, 1, 8, 8])
        >>> model.generate(4, steps=2).shape
        torch.Size([4, 1, 8, 8])
    """

    kind = "meta-flow-map"
    data_mean: Tensor
    guidance_law: GuidanceLaw | None = None
    decoder_id: str | None = None  # the autoencoder of its latents, where a published family names one
    _told = False  # that a label was asked for at a scale that was never trained

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        parameterization: str = "gaussian",
        data_mean: Tensor | float = 0.0,
        data_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.path = as_path(path)
        self.parameterization = parameterization
        self._chart = chart_class(parameterization)
        mean = as_numbers(data_mean, "data_mean")
        if mean.device.type != "meta" and not bool(torch.isfinite(mean).all()):
            raise InputError("data_mean must be finite")
        if not hasattr(network, "event_shape"):
            raise InputError("the network must have an event_shape, the shape of one sample")
        if mean.ndim and tuple(mean.shape) != tuple(network.event_shape):  # type: ignore[arg-type]
            raise InputError(
                f"data_mean must be a number or have the event shape {tuple(network.event_shape)}, "  # type: ignore[arg-type]
                f"got {tuple(mean.shape)}"
            )
        self.network = network
        self.data_std = positive(data_std, "data_std")
        if not 1e-8 <= self.data_std <= 1e8:  # its square must fit float32, with room for precision
            raise InputError(f"data_std must lie between 1e-8 and 1e8, got {data_std:g}: scale the data")
        self.register_buffer("data_mean", mean.to(self.dtype))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.network.event_shape)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; of those that are not rounded, where a pipeline holds some in bfloat16."""
        dtypes = (p.dtype for p in self.network.parameters())
        first = next(dtypes, torch.get_default_dtype())
        return first if first != torch.bfloat16 else next((d for d in dtypes if d != torch.bfloat16), first)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        first = next(self.network.parameters(), None)
        return self.data_mean.device if first is None else first.device

    # -- the map -----------------------------------------------------------------------------------------------------

    def anchor(self, t: Tensor, x_t: Tensor, cond: Cond = None) -> Anchored:
        """The map at contexts (t, x_t), in its chart: what losses train. t is (B,); nothing is checked."""
        known = dict(self.encode(cond) or {})
        mean, std = known.pop(PRIOR_MEAN, self.data_mean), known.pop(PRIOR_STD, self.data_std)
        spread = expand_time(std, x_t) if isinstance(std, Tensor) else std
        chart = self._chart(self.path, t, x_t, mean.to(x_t.dtype), spread)  # type: ignore[call-arg]
        return Anchored(self.network, chart, known)

    def encode(self, cond: Cond) -> Cond:
        """Conditions with their observations read, once for many calls; of a map that reads none as they are."""
        read = getattr(self.network, "encode", None)
        return cond if read is None else read(cond or {})

    def velocity(self, s: Time, u: Time, x_s: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> Tensor:
        """v_{s,u}(x_s; t, x_t): (B, *event)."""
        self._check(s, u, x_s, t, x_t)
        self._check_cond(cond, x_s)
        s, u, t = batch_time(s, x_s), batch_time(u, x_s), batch_time(t, x_t)
        at = (s, u, x_s, t, x_t)
        if self.guidance_law is None or self.guidance_law.asked or "guidance" not in (cond or {}):
            return self._velocity(at, cond)
        return self._guided(self.guidance_law, at, dict(cond or {}))

    def _velocity(self, at: tuple[Tensor, ...], cond: Cond) -> Tensor:
        """What the network itself gives at (s, u, x_s, t, x_t); times are (B,)."""
        s, u, x_s, t, x_t = at
        flow = self.anchor(t, x_t, cond)
        chart = flow.chart
        f = flow(chart.time_in(s), chart.time_in(u), chart.state_in(s, x_s))
        return chart.velocity_out(s, u, x_s, f)

    def _guided(self, law: GuidanceLaw, at: tuple[Tensor, ...], cond: dict[str, Tensor]) -> Tensor:
        """The velocity at a scale that the network does not read; rows that guidance moves are evaluated twice."""
        w, label = cond.pop("guidance"), cond.get("label")
        given = self._velocity(at, cond)
        if label is None:  # no class to guide towards
            return given
        factor, null_class = law.factor(at[0], w), int(self.network.num_classes)  # type: ignore[arg-type]
        rows = ((factor != 1) & (label != null_class)).nonzero().squeeze(1)
        if not len(rows):
            return given
        without = {**(select_cond(cond, rows) or {}), "label": torch.full_like(label[rows], null_class)}
        null = self._velocity(tuple(value[rows] for value in at), without)
        return given.index_copy(0, rows, law.guide(given[rows], null, factor[rows]).to(given))

    def forward(self, s: Time, u: Time, x_s: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> Tensor:
        """X_{s,u}(x_s; t, x_t) = x_s + (u − s) v_{s,u}."""
        velocity = self.velocity(s, u, x_s, t, x_t, cond)
        return x_s + expand_time(batch_time(u, x_s) - batch_time(s, x_s), x_s) * velocity

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x) = v_{t,t}(x; 0, 0)."""
        return self.velocity(t, t, x, 0.0, torch.zeros_like(x), cond)

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x) = (v_{0,0}(x̄; t, x) − α̇_0 x̄)/β̇_0, at x̄ = 0."""
        beta_dot = self.path.beta_dot(expand_time(0.0, x))
        return self.velocity(0.0, 0.0, torch.zeros_like(x), t, x, cond) / beta_dot

    # -- drawing -----------------------------------------------------------------------------------------------------

    def push(self, noise: Tensor, t: Time, x_t: Tensor, steps: int = 1, cond: Cond = None) -> Tensor:
        """X_{0,1}(noise; t, x_t) composed of ``steps`` jumps, equal in the chart's inner time."""
        check_count(steps, "steps")
        check_time(t)
        x = noise
        t, cond = batch_time(t, x_t), self.encode(cond)
        chart = self.anchor(t, x_t, cond).chart
        grid = [chart.time_out(torch.full_like(t, i / steps)) for i in range(steps + 1)]
        grid[0], grid[-1] = torch.zeros_like(t), torch.ones_like(t)
        for s, u in pairwise(grid):
            x = self(s, u, x, t, x_t, cond)
        return x

    @overload
    def draw(self, t: Context, x_t: int, *, steps: int = 1, generator: torch.Generator | None = None) -> Tensor: ...

    @overload
    def draw(
        self, t: Context, *, num_draws: int, steps: int = 1, generator: torch.Generator | None = None
    ) -> Tensor: ...

    @overload
    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        steps: int = 1,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor: ...

    @known_keywords
    def draw(
        self,
        t: Any,
        x_t: Any = None,
        num_draws: Any = None,
        steps: int = 1,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """Independent draws, ``draw(t, x_t, num_draws)`` or ``draw(context, num_draws)``: (num_draws, B, *event).

        From p_{1|t}(· | x_t), differentiable in x_t; or from p(X_r | C), differentiable in the observed values.
        """
        if isinstance(t, Context):
            if cond is not None:
                raise InputError("a context has its own conditions: mfm.Context(…, cond=…)")
            if x_t is not None and num_draws is not None:
                raise InputError("a context has no noisy state: draw(context, num_draws)")
            return self._draw_given(t, num_draws if x_t is None else x_t, steps, generator)
        check_state(x_t, "x_t", self.event_shape)
        check_finite(x_t, "x_t")
        check_count(num_draws, "num_draws")
        self._check_cond(cond, x_t)
        check_time(t)
        noise = randn((num_draws, *x_t.shape), generator, x_t.dtype, x_t.device)
        contexts = repeat_rows(x_t, num_draws)
        times = batch_time(t, x_t).repeat(num_draws)
        return self.push(noise.flatten(0, 1), times, contexts, steps, repeat_cond(cond, num_draws)).reshape(noise.shape)

    def _draw_given(self, context: Context, num_draws: int, steps: int, generator: torch.Generator | None) -> Tensor:
        """Draws from p(X_r | C): the map's draws at t = 0, given C, which is read once for all of them."""
        check_count(num_draws, "num_draws")
        known = self.encode(self.conditions_of(context))
        try:
            noise = randn((num_draws, len(context), *self.event_shape), generator, self.dtype, self.device)
            flat, many = noise.flatten(0, 1), repeat_cond(known, num_draws)
            return self.push(flat, 0.0, torch.zeros_like(flat), steps, many).reshape(noise.shape)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"{num_draws:,} draws do not fit in memory: draw fewer at a time") from None

    def conditions_of(self, context: Context) -> Cond:
        """A context as ``cond``, checked against what was trained."""
        if not isinstance(context, Context):
            raise InputError(f"observations are an mfm.Context(values, times), got {type(context).__name__}")
        check = getattr(self.network, "check", None)
        if check is None:
            raise InputError("this map reads no observations: train one with mfm train sequences")
        cond = context.conditions()
        check(context)
        if context.values.dtype != self.dtype or context.values.device != self.device:
            raise InputError(
                f"values must be {self.dtype} on {self.device}, as the map is, got {context.values.dtype} on "
                f"{context.values.device}: convert one of them"
            )
        return cond

    @known_keywords
    @torch.no_grad()
    def generate(
        self,
        n: int,
        steps: int = 1,
        generator: torch.Generator | None = None,
        cond: Cond = None,
        *,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """K-step refinement (Alg. 1), K network calls a sample: (n, *event).

        At each time τ_j of a uniform grid from 0, draw x_1 from the posterior and renoise it to τ_{j+1}. With
        ``seeds`` (n,) int64 in place of a generator a sample depends on its own seed and not on the others.
        """
        check_count(n, "n")
        check_count(steps, "steps")
        shape = (n, *self.event_shape)
        source: Source | None = generator
        if seeds is not None:
            source = RowNoise(check_seeds(seeds, n).to(self.device), "generate")

        def noise() -> Tensor:
            return randn(shape, source, self.dtype, self.device)

        x = noise()
        for j in range(steps):
            x_1 = self.push(noise(), j / steps, x, 1, cond)
            t = (j + 1) / steps
            x = x_1 if j == steps - 1 else self.path.interpolate(noise(), x_1, t)
        return x

    # -- keeping -----------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Path, parameterization, network and spread of the data, as a checkpoint keeps them."""
        from metaflowmaps.networks import describe_network  # configurations bring pydantic
        from metaflowmaps.networks.low_rank import rank_of

        rank = rank_of(self.network)
        return {
            "path": self.path.name,
            "parameterization": self.parameterization,
            "data_std": self.data_std,
            "network": describe_network(self.network),
            **({} if self.guidance_law is None else {"guidance_law": self.guidance_law.described()}),
            **({"low_rank": rank} if rank else {}),
        }

    @classmethod
    def from_description(cls, described: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> "MetaFlowMap":
        """The map of what ``describe`` says, freshly initialised."""
        from metaflowmaps.networks import make_network
        from metaflowmaps.networks.low_rank import add_low_rank

        network, path = make_network(described["network"]), make_path(described["path"])
        if described.get("low_rank"):
            add_low_rank(network, described["low_rank"])
        model = cls(network, path, described["parameterization"], data_std=described["data_std"])
        model.data_mean = torch.zeros(shapes.get("data_mean", ()))  # a number or a tensor
        model.guidance_law = read_law(described)
        return model

    def _check(self, s: Time, u: Time, x_s: Tensor, t: Time, x_t: Tensor) -> None:
        check_state(x_s, "x_s", self.event_shape)
        check_plain(x_s, "x_s")
        check_same(x_s, x_t, "x_s and x_t")
        if x_s.dtype != self.dtype:
            raise InputError(f"states must have the model's dtype {self.dtype}, got {x_s.dtype}; convert one of them")
        for name, time in (("s", s), ("u", u), ("t", t)):
            check_time(time, name)
            expand_time(time, x_s)  # its shape
        check_order(s, u)

    def _check_cond(self, cond: Cond, x: Tensor) -> None:
        reads = getattr(self.network, "reads", ())  # of any shape, a row a sample
        for key, value in (cond or {}).items():
            if key not in (*CONDITIONS, *reads):
                raise unknown("condition", key, CONDITIONS)
            shape = value.shape[:1] if key in reads and isinstance(value, Tensor) else getattr(value, "shape", None)
            if not isinstance(value, Tensor) or shape != x.shape[:1]:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"condition {key!r} must be a tensor of shape ({x.shape[0]},), got {given}")
        label = None if cond is None else cond.get("label")
        if label is not None:
            if label.dtype != torch.int64:
                raise InputError(f"labels must be int64, got {label.dtype}; convert them with .long()")
            classes = getattr(self.network, "num_classes", None)
            if classes == 0 and bool((label != 0).any()):
                raise InputError("this map knows no classes: leave the label out, or train one with data.labels=true")
            if classes is not None and not bool(((label >= 0) & (label <= classes)).all()):
                raise InputError(f"labels must lie in 0..{classes} ({classes} is the null class)")
            self._warn_of_untrained(label, (cond or {}).get("guidance"))

    def _warn_of_untrained(self, label: Tensor, w: Tensor | None) -> None:
        """Once, where a label is asked for at a scale at which the network has learned none."""
        law = self.guidance_law
        if law is None or not law.asked or self._told:
            return
        named = label != getattr(self.network, "num_classes", -1)
        if bool((named if w is None else named & ((w - law.scale).abs() > 1e-6)).any()):
            self._told = True
            warn_caller(
                f"this map has learned labels at guidance {law.scale:g} alone, the null class at 1: a label without "
                f"guidance={law.scale:g} asks for what was never trained"
            )


Flow = Callable[[Tensor, Tensor, Tensor], Tensor]
