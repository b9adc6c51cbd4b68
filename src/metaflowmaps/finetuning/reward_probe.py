"""A reward is tried on samples of the base before anything is written; what cannot be tuned to is refused."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import select_cond
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.state_laws import Samples, base_pool
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.finetuning.tuning_problem import TuningProblem

PROBED = 1024  # samples of the base that a reward is first tried on
POOL_STEPS = 4  # network calls each
OVERFLOW = 30.0  # of r without a baseline: its e^r is squared in a gradient's norm, and other samples have more
LARGEST = 1e7  # of λr: beyond, float32 does not resolve differences of one nat
FEW = 4.0  # effective samples of the probe, below which the base hardly makes what is asked for
WANTED = 0.02  # share of them that a recommended λ leaves


class Probe(NamedTuple):
    """What λr is on samples of the base, and what it leaves of them."""

    mean: float
    std: float
    largest: float
    ess: float  # of so many samples, under e^{λr}
    fitting: float  # the λ that leaves a share WANTED of them
    log_evidence: float  # log E[e^{λr}], what ``bound`` of the meters can reach


def probe(config: FinetuneConfig, problem: TuningProblem) -> Probe:
    """Try a reward on a few samples of the base.

    Args:
        config: of the run, with λ as its strength.
        problem: the base and the reward at strength 1.
    """
    samples = base_pool(problem, PROBED, getattr(config.states, "pool_steps", POOL_STEPS), config.seed)
    r, said = problem.rewards(*samples).double().cpu(), f"--reward {config.reward}"
    if not bool(r.isfinite().any()):
        raise InputError(f"{said} is finite on none of {PROBED} base samples: check its scale")
    _check_gradient(config, problem, samples)
    if bool(r.isfinite().all()) and float(r.std()) <= 1e-6 * float(r.abs().max()):
        raise InputError(
            f"{said} is {float(r[0]):g} on all of {PROBED} base samples, and a constant tilts nothing: check the reward"
        )
    fitting = fitting_strength(r, config.strength)
    scaled = config.strength * r
    evidence = float(scaled.logsumexp(0)) - math.log(len(scaled))
    _check_strength(config, scaled, fitting, evidence)
    shown, ess = scaled[scaled.isfinite()], float(1 / scaled.softmax(0).square().sum())
    if ess < FEW:
        warnings.warn(
            f"λ = {config.strength:g} asks for what {ess:.1f} of {PROBED} base samples have; --strength {fitting:.2g} "
            f"leaves {WANTED:.0%} of them",
            stacklevel=2,
        )
    spread = float(shown.std()) if len(shown) > 1 else 0.0
    return Probe(float(shown.mean()), spread, float(shown.max()), ess, fitting, evidence)


def fitting_strength(r: Tensor, strength: float) -> float:
    """The largest λ up to ``strength`` whose weights leave a share WANTED of the samples r (n,), by bisection."""
    low, high = 0.0, strength
    for _ in range(200):  # a strength may be too large by any number of digits
        middle = (low + high) / 2
        share = float(1 / (middle * r).softmax(0).square().sum()) / len(r)
        low, high = (middle, high) if share >= WANTED else (low, middle)
    return low


def _check_strength(config: FinetuneConfig, scaled: Tensor, fitting: float, evidence: float) -> None:
    """Refuse a λ whose weights overflow, or vanish."""
    finite = scaled[scaled.isfinite()]
    highest, size = float(finite.max()), float(finite.abs().max())
    bare = config.method.unbounded and highest > OVERFLOW
    if bare or size > LARGEST:
        limit = 0.9 * config.strength * (OVERFLOW / highest if bare else LARGEST / size)
        remedy = ", or keep a baseline (--set method.baseline=running)" if bare else ""
        raise InputError(
            f"--strength {config.strength:g} overflows: λr reaches {highest if bare else size:.3g} "
            f"on {PROBED} base samples; --strength {min(limit, fitting):.2g} fits{remedy}"
        )
    if config.method.unbounded and evidence < -2 * OVERFLOW:
        raise InputError(
            f"without a baseline e^{{λr}} vanishes: λr is at most {highest:.3g} on {PROBED} base samples; keep one "
            "(--set method.baseline=running)"
        )


def _check_gradient(config: FinetuneConfig, problem: TuningProblem, samples: Samples) -> None:
    """Refuse a reward without the gradient that its method takes."""
    declared, said, fix = problem.reward.differentiable, f"--reward {config.reward}", config.method.without_gradient
    if not config.method.differentiates(declared):
        return
    config.method.check_reward(declared, said)
    try:
        with torch.enable_grad():
            x = samples.x_1[:2].detach().clone().requires_grad_(True)
            r = problem.reward(x, select_cond(samples.cond, slice(2)))
    except InputError as error:
        raise InputError(
            f"{said} takes no x with a gradient ({str(error)[:160]}): {fix}, or wrap it as mfm.rewards.BlackBox"
        ) from error
    if not r.requires_grad:
        raise InputError(f"{said} has no gradient in x (detach(), steps or numpy inside): {fix}")
