"""Limits in which steering must do nothing: no reward, one draw, one particle, one candidate. Bit for bit."""

import functools

import pytest
import torch
from closed_forms import base_chain, random_map

import metaflowmaps as mfm
from calls import steer
from conftest import CASES, F64, PATHS, ks_bound, ks_distance
from metaflowmaps.random import copy_seeds, stream

# every process, the paths taking turns
PROCESSES = [
    ("ode", "euler", "linear"), ("ode", "midpoint", "trigonometric"), ("ode", "heun", "linear"),
    ("ode", "rk4", "trigonometric"), ("sde", "euler", "trigonometric"), ("sde", "heun", "linear"),
]  # fmt: skip
RENORMALIZATIONS = ("none", "clip", "rescale")
LAWS = {name: CASES[name].law for name in ("per-component-full", "isotropic")}


def nothing(x):
    return 0 * x.sum(1)


def sharp(x):
    return -50 * (x[:, 0] - 1).square()


def steered(model, reward, method, seed=0, n=12, steps=3, **options):
    return steer(model, reward, n, method, steps=steps, generator=stream(seed), **options).samples


def model_of(kind, path):
    """A random map, or the exact model of a law."""
    return random_map(PATHS[path]) if kind == "map" else mfm.ExactModel(PATHS[path], LAWS[kind])


@functools.cache
def base_of(kind, process, integrator, path):
    """What is drawn without steering."""
    base = steered(model_of(kind, path), nothing, "none", process=process, integrator=integrator)
    assert bool(base.isfinite().all())
    return base


def same_as_base(kind, reward, method, process, integrator, path, **options):
    for renormalize in RENORMALIZATIONS:
        got = steer(
            model_of(kind, path), reward, 12, method, steps=3, process=process, integrator=integrator,
            renormalize=renormalize, generator=stream(0), **options,
        )  # fmt: skip
        base = base_of(kind, process, integrator, path)
        off = float((got.samples - base).abs().max())
        assert torch.equal(got.samples, base), f"{renormalize}: off by {off:.1e}"
        # a zero is not stretched to the length of the drift, not even by a factor that happens not to overflow
        assert torch.equal(got.info["scale"], torch.ones(3, dtype=F64))


# -- no reward -------------------------------------------------------------------------------------------------------

DRAWS = {
    "gf": ("mfm-gf", {"num_draws": 3}),
    "gf, 1 draw": ("mfm-gf", {"num_draws": 1}),
    "gf, not recycled": ("mfm-gf", {"num_draws": 4, "recycle": 1}),
    "gf, 1 draw, not recycled": ("mfm-gf", {"num_draws": 1, "recycle": 1}),
    "gf, jackknife": ("mfm-gf", {"num_draws": 3, "correction": "jackknife"}),
    "gf, antithetic": ("mfm-gf", {"num_draws": 4, "noise": "antithetic", "chunk": 3}),
    "gf, filled": ("mfm-gf", {"num_draws": 2, "recycle": 4, "fill": True}),
    "g": ("mfm-g", {"num_draws": 3}),
    "g, 1 draw": ("mfm-g", {"num_draws": 1}),
    "g, not recycled": ("mfm-g", {"num_draws": 4, "recycle": 1}),
    "g, jackknife": ("mfm-g", {"num_draws": 3, "correction": "jackknife"}),
    "g, plain": ("mfm-g", {"num_draws": 4, "blend": False}),
    "g, plain, 1 draw, capped": ("mfm-g", {"num_draws": 1, "blend": False, "sigma_cap": 5.0}),
    "g, plain, jackknife": ("mfm-g", {"num_draws": 3, "blend": False, "correction": "jackknife"}),
    "g, two passes": ("mfm-g", {"num_draws": 3, "passes": 2, "chunk": 2}),
    "g, quasi": ("mfm-g", {"num_draws": 3, "noise": "quasi", "chunk": 1}),
    "glass": ("glass", {"num_draws": 3, "glass_steps": 2}),
    "glass, g": ("glass", {"num_draws": 2, "glass_steps": 2, "estimator": "mfm-g"}),
    "dps": ("dps", {}),
}


# an ODE and an SDE take turns, and so do the integrators; the other half of the pairs in `make attack`
TURNS = [
    pytest.param(name, process, marks=[] if (i + j) % 2 == 0 else [pytest.mark.attack])
    for i, name in enumerate(DRAWS)
    for j, process in enumerate((PROCESSES[i // 2 % 4], PROCESSES[4 + i // 2 % 2]))
]


@pytest.mark.parametrize(("name", "process"), TURNS, ids=lambda part: part if isinstance(part, str) else "-".join(part))
def test_zero_reward_is_the_base_sampler(name, process):
    """x + dt (b + 0) and the same random numbers: equal in every bit, whatever the renormalisation."""
    method, options = DRAWS[name]
    same_as_base("map", nothing, method, *process, **options)


@pytest.mark.parametrize(
    ("recycle", "num_draws", "process"),
    [(1, 1, 0), (8, 3, 1), (1, 3, 2), (8, 1, 3), (1, 3, 4), (8, 3, 5)],
)
def test_zero_reward_on_an_exact_mixture(recycle, num_draws, process):
    same_as_base(
        "per-component-full", nothing, "mfm-gf", *PROCESSES[process], recycle=recycle, num_draws=num_draws
    )  # fmt: skip


@pytest.mark.parametrize(("process", "integrator", "path"), PROCESSES)
def test_zero_reward_is_the_base_sampler_exact(process, integrator, path):
    for kind in LAWS if integrator == "euler" else ("isotropic",):
        reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6]), 0.8, 1.0, strength=0.0)
        same_as_base(kind, reward, "exact", process, integrator, path)


def test_centred_on_the_drift_it_is_not(path):
    """The exception: draws scatter about D_t, and their mean is not it."""
    base = steered(random_map(path), nothing, "none")
    assert not torch.equal(steered(random_map(path), nothing, "mfm-gf", centre="denoise"), base)


@pytest.mark.parametrize(
    ("resampler", "recycle", "path_name"),
    [("systematic", 1, "linear"), ("stratified", 8, "linear"), ("multinomial", 1, "trigonometric"),
     ("residual", 8, "trigonometric")],
)  # fmt: skip
def test_zero_reward_gives_equal_weights_and_no_evidence(path_name, resampler, recycle):
    """Every weight is 1: the evidence is 0, nobody is resampled, and the samples follow the base chain."""
    n, times, path = 4000, torch.linspace(0, 1, 5).tolist(), PATHS[path_name]
    law = mfm.GaussianMixture(torch.tensor([[0.7]], dtype=F64), 0.6)
    seen = []
    got = steer(
        mfm.ExactModel(path, law), nothing, n, "mfm-smc", num_draws=2, steps=4, particles=8, recycle=recycle,
        resampler=resampler, generator=stream(0), callback=lambda step: seen.append(step.info),
    )  # fmt: skip
    assert got.info["log_evidence"].shape == (n // 8,)
    # log-weights are sums of at most 4 rounding errors of logsumexp
    assert float(got.info["log_evidence"].abs().max()) < 1e-14
    for info in seen:
        torch.testing.assert_close(info["particle_ess"], torch.full((n,), 8.0, dtype=F64))
        assert float(info["resampled"].max()) == 0
    mean, cov = base_chain(path, torch.tensor([0.7], dtype=F64), torch.tensor([[0.6]], dtype=F64), times, "draw")
    distance = ks_distance(got.samples[:, 0], mean, cov[0], torch.ones(1, dtype=F64))
    # level 1e-4 for independent samples; multinomial ancestors repeat in a system of 8: as good as n/2 of them
    assert distance < ks_bound(n if resampler != "multinomial" else n // 2)


@pytest.mark.parametrize("returns", ["all", "one"])
def test_tds_without_a_reward_is_the_base_sde(path, returns):
    """Proposals are the base kernel, the weights equal: bit for bit the euler SDE (returns="one": of one of them)."""
    model = random_map(path)
    seeds = torch.arange(3)
    base = steered(model, nothing, "none", process="sde", n=12, seeds=copy_seeds(seeds, 4))
    if returns == "all":
        assert torch.equal(steered(model, nothing, "tds", n=12, particles=4, seeds=seeds), base)
        whole = steered(model, nothing, "none", process="sde", n=12, seeds=copy_seeds(seeds[:1], 12))
        assert torch.equal(steered(model, nothing, "tds", n=12, seeds=seeds[:1]), whole)
        return
    one = steered(model, nothing, "tds", n=3, particles=4, returns="one", seeds=seeds)
    for i, sample in enumerate(one):
        assert any(torch.equal(sample, row) for row in base[i::3])


def test_search_without_a_reward_is_a_function_of_its_generator(path):
    model = random_map(path)
    one, again, other = (steered(model, nothing, "mfm-search", seed, num_draws=2, particles=3) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).any()


# -- one draw, one particle, one candidate ---------------------------------------------------------------------------


@pytest.mark.parametrize(("process", "integrator", "path"), PROCESSES)
def test_one_draw_without_a_past_says_nothing(process, integrator, path):
    """MFM-GF at N = 1, centred on its draw: identically zero (method.md §6), however sharp the reward."""
    same_as_base("map", sharp, "mfm-gf", process, integrator, path, num_draws=1, recycle=1)
    assert not torch.equal(
        steered(random_map(PATHS[path]), sharp, "mfm-gf", num_draws=1, recycle=2),
        base_of("map", "ode", "euler", path),
    )  # with a past it speaks


@pytest.mark.parametrize(("process", "integrator", "path"), PROCESSES)
def test_best_of_one_is_the_base_sampler(process, integrator, path):
    same_as_base("map", sharp, "best-of-n", process, integrator, path, num_draws=1)


@pytest.mark.filterwarnings("ignore:one draw carries all the weight")
@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
def test_one_particle_is_never_replaced(method, path):
    """A system of one: no threshold and no resampler can matter."""
    model = random_map(path)
    made = [
        steered(model, sharp, method, particles=1, threshold=threshold, resampler=resampler, num_draws=2)
        for threshold, resampler in ((0.0, "systematic"), (0.5, "multinomial"), (1.0, "systematic"))
    ]  # fmt: skip
    for other in made[1:]:
        assert torch.equal(other, made[0])
    assert not torch.equal(steered(model, sharp, method, particles=4, num_draws=2), made[0])


def test_one_particle_with_one_draw_and_no_guide_is_unsteered(path):
    """It moves by the base kernel and goes to its only draw."""
    model = random_map(path)
    options = {"particles": 1, "num_draws": 1, "guide": "none"}
    unsteered = steered(model, nothing, "mfm-smc", **options)
    assert torch.equal(steered(model, sharp, "mfm-smc", **options), unsteered)
    assert not torch.equal(steered(model, sharp, "mfm-smc", particles=1, num_draws=4, guide="none"), unsteered)
