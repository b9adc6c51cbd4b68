r"""Forecasts with a map of general contexts: members that go on from what they drew, and what an observation is worth.

A **rolling forecast** draws X_{r_1} given the context, appends the draw as an observation, draws X_{r_2}, and so on: a
member is one joint sample of (X_{r_1}, …, X_{r_T}), exact as far as the map is and as the latest observations that it
reads say all. Members have a seed each: one depends on its own seed and not on how many there are.

The **value** of a context is ``V(C) = log E[e^{r(X_r)} | C]``, its gradient in the observed values that of draws,

    ∇V̂ = Σ w_i ∇ r(X(ε_i; C)),   w = softmax of rewards
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, repeat_cond
from metaflowmaps.context import Context, ordered
from metaflowmaps.draws import equal_log_weights, pull_back, tilted_weights, weighted
from metaflowmaps.errors import InputError, check_one_of, known_keywords
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import RowNoise, Seed, as_seeds, randn
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.value import ValueEstimate, ess, log_mean, value_std_err


@known_keywords
@torch.no_grad()
def roll(
    model: MetaFlowMap, context: Context, times: Sequence[float], num_draws: int, steps: int = 1, seed: Seed = 0
) -> Tensor:
    """Members of a forecast at several times, each drawn given what it drew before.

    Args:
        model: a map of general contexts.
        context: what was observed; its query is not used.
        times: T times, in the order in which they are drawn.
        num_draws: members N.
        steps: network calls a draw.
        seed: int, an int64 tensor with one seed a member (N,), or a generator.

    Returns:
        (N, B, T, *event).

    Examples:
        >>> from metaflowmaps.networks import MLPConfig, ObservedConfig
        >>> network = ObservedConfig(body=MLPConfig(width=8, depth=1), nodes=4, width=8, heads=2).network((1,))
        >>> model = mfm.MetaFlowMap(network, mfm.LinearPath())  # untrained; `mfm train sequences` trains one
        >>> context = mfm.Context(torch.tensor([[[0.4], [1.1]]]), torch.tensor([0.0, 1.0]), query=0.5)
        >>> mfm.roll(model, context, [0.25, 0.5, 0.75], num_draws=6).shape
        torch.Size([6, 1, 3, 1])
    """
    check_count(num_draws, "num_draws")
    try:
        asked = [float(time) for time in times]
    except (TypeError, ValueError):
        raise InputError(f"times must be a sequence of numbers, as [1.0, 2.0], got {times!r}") from None
    if not asked:
        raise InputError("times must name at least one time to draw")
    model.conditions_of(context.at(asked[0]) if isinstance(context, Context) else context)
    batch, most = len(context), int(model.network.config.max_observations)  # type: ignore[union-attr, arg-type]
    seeds = as_seeds(seed, num_draws, "roll", "a member").to(model.device)
    source = RowNoise(seeds, "roll")
    members, drawn = context.repeated(num_draws), []
    for time in asked:
        noise = source.normal((batch, *model.event_shape), dtype=model.dtype).flatten(0, 1)
        cond = model.conditions_of(members.at(time))
        drawn.append(model.push(noise, 0.0, torch.zeros_like(noise), steps, cond))
        members = _latest(members.seen(drawn[-1], time), most)
    path = torch.stack(drawn, 1)
    return path.reshape(num_draws, batch, *path.shape[1:])


def _latest(context: Context, most: int) -> Context:
    """With no more than the latest ``most`` observations of each row."""
    if context.mask.shape[1] <= most:
        return context
    seen = ordered({"values": context.values, "times": context.times, "mask": context.mask})
    later = seen.mask.flip(1).cumsum(1).flip(1)  # how many are left from here on
    return Context(seen.values, seen.times, seen.mask & (later <= most), None, context.cond)


@known_keywords
@torch.no_grad()
def observation_gradient(
    model: MetaFlowMap,
    reward: Callable[..., Tensor],
    context: Context,
    num_draws: int,
    method: str = "gradient",
    generator: torch.Generator | None = None,
) -> ValueEstimate:
    """V̂(C) = log E[e^r | C] and its gradient in the observed values, from draws of the map.

    Args:
        model: a map of general contexts.
        reward: a differentiable function of x (B, *event) -> (B,).
        context: what was observed, and the time that is asked for.
        num_draws: N.
        method: "gradient". Tweedie's formula, which is what needs no gradient, is of a state seen through noise.
        generator: of the draws' noise.

    Returns:
        The value (B,), its gradient in the values (B, M, *event), 0 where masked, the ESS (B,), standard errors, and
        the draws with their rewards; the gradient's standard error is NaN.

    Examples:
        >>> from metaflowmaps.networks import MLPConfig, ObservedConfig
        >>> network = ObservedConfig(body=MLPConfig(width=8, depth=1), nodes=4, width=8, heads=2).network((1,))
        >>> model = mfm.MetaFlowMap(network, mfm.LinearPath())  # untrained; `mfm train sequences` trains one
        >>> context = mfm.Context(torch.tensor([[[0.4], [1.1]]]), torch.tensor([0.0, 1.0]), query=0.5)
        >>> estimate = mfm.observation_gradient(model, lambda x: x[:, 0], context, num_draws=8)
        >>> estimate.gradient.shape
        torch.Size([1, 2, 1])
    """
    if method == "gradient-free":
        raise InputError(
            "method='gradient-free' is for a noisy state (t, x_t): an observation without noise has no Tweedie "
            "formula; use method='gradient'"
        )
    check_one_of("method", method, ("gradient",))
    check_count(num_draws, "num_draws")
    conditions, looked, batch = model.conditions_of(context), checked_reward(reward), len(context)
    values = context.repeated(num_draws).values.detach().requires_grad_()
    with torch.enable_grad():
        known = repeat_cond(conditions, num_draws) or {}
        noise = randn((num_draws * batch, *model.event_shape), generator, model.dtype, model.device)
        x_1 = model.push(noise, 0.0, torch.zeros_like(noise), 1, {**known, "values": values})
        rewards = looked(x_1, None)
        gradients = pull_back(rewards, values, x_1).unflatten(0, (num_draws, batch))
    rewards = rewards.detach().unflatten(0, (num_draws, batch))
    log_base = equal_log_weights(rewards)
    tilted = tilted_weights(rewards, log_base)
    return ValueEstimate(
        log_mean(rewards, log_base),
        weighted(tilted, gradients),
        ess(tilted),
        value_std_err(tilted, log_base.exp()),
        torch.full((batch,), torch.nan),
        x_1.detach().unflatten(0, (num_draws, batch)),
        rewards,
    )
