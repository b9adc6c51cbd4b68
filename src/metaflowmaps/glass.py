r"""GLASS: from the drift to the auxiliary drift, in closed form (Eq. 32).

For a context (t, x), the auxiliary process ``Ī_s = α_s Ī_0 + β_s I_1`` has ``I_1 ~ p_{1|t}(·|x)`` and fresh noise.
Its drift needs ``E[I_1 | Ī_s = x̄, I_t = x]``: a posterior mean given two independent Gaussian observations of one x_1,
which is the posterior mean given a single, sharper one. So any drift ``b`` yields ``b̄``; the coefficients and their
derivation are in :mod:`metaflowmaps.path`. Limits, on every path:

    t = 0: b_s(x̄)         s → 1: b_1(x̄)         t → 1: (α̇_s/α_s) x̄ + (β̇_s − β_s α̇_s/α_s) x
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.path import Path
from metaflowmaps.shapes import Time, batch_time, check_same, check_state, check_time, expand_time

Drift = Callable[..., Tensor]


def call_drift(drift: Drift, t: Time, x: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
    """drift(t, x), or drift(t, x, cond) where there is a condition: plain two-argument drifts stay welcome."""
    return drift(t, x) if cond is None else drift(t, x, cond)


def glass_drift(path: Path, drift: Drift, s: Time, x_s: Tensor, t: Time, x_t: Tensor) -> Tensor:
    """b̄_s(x̄_s; t, x_t) from any ``drift(t, x)``, Eq. 32: x_s, x_t (B, *event) -> (B, *event)."""
    check_time(s, "s")
    check_time(t, "t")
    check_state(x_s, "x_s")
    check_same(x_s, x_t, "x_s and x_t")
    s, t = batch_time(s, x_s), batch_time(t, x_t)
    if bool(((s == 1) & (t == 1)).any()):
        raise InputError("the auxiliary drift has no limit at s = t = 1; stop the inner flow below 1 at t = 1")
    k = path.glass_coefficients(s, t)
    c_context, c_inner, k_context, k_inner, k_drift = (expand_time(c, x_s) for c in k[1:])
    x_star = c_context * x_t + c_inner * x_s
    # rounding may carry t* past 1 by an ulp
    drift_star = drift(torch.clamp(k.t_star, 0, 1), x_star)
    return k_context * x_t + k_inner * x_s + k_drift * drift_star


def glass_drift_general(path: Path, drift: Drift, s: Time, x_s: Tensor, t: Time, x_t: Tensor) -> Tensor:
    """The same by the hub alone, on any path: Λ, m, t*, D, then b̄. Singular at the ends; it checks the regular form."""
    alpha_s, beta_s = (f(expand_time(s, x_s)) for f in (path.alpha, path.beta))
    alpha_t, beta_t = (f(expand_time(t, x_t)) for f in (path.alpha, path.beta))
    precision = beta_t**2 / alpha_t**2 + beta_s**2 / alpha_s**2
    m = (beta_t * x_t / alpha_t**2 + beta_s * x_s / alpha_s**2) / precision
    t_star = path.time_of_ratio(precision.sqrt(), torch.ones_like(precision))
    x_star = path.beta(t_star) * m
    t_star = t_star.flatten() if t_star.ndim else t_star
    denoise = path.to_denoise(t_star, x_star, drift(t_star, x_star), "drift")
    return path.from_denoise(s, x_s, denoise, "drift")
