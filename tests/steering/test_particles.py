"""Twisted SMC, MFM-SMC and TDS: unbiased evidence, and samples of the law they claim, against closed forms.

A Gaussian law has an affine D_t, so the discrete base chain has a Gaussian x_1, known exactly
(closed_forms.base_chain), and E[e^r] under it is elementary. Whatever the twist, the proposals, the tempering and the
resampling,

    E[Ẑ] = E_base[e^r]          E[Ẑ · (1/M) Σ_m f(x_m)] = E_base[e^r f(x_1)]

over independent systems; the second tells that the right particles come back with the right weights.
"""

import itertools
import math

import pytest
import torch
from closed_forms import base_chain, gaussian_map, gaussian_moment

import metaflowmaps as mfm
from calls import steer
from conftest import CASES, F64, PATHS
from metaflowmaps.random import stream
from metaflowmaps.steering import SteerResult, log_normaliser

MEAN, COV = torch.tensor([0.4], dtype=F64), torch.tensor([[0.5]], dtype=F64)
A, Y, NOISE_STD = torch.ones(1, 1, dtype=F64), torch.tensor([1.3], dtype=F64), 0.7
REWARD = mfm.rewards.LinearGaussian(A, Y, NOISE_STD)
LAW = mfm.GaussianMixture(MEAN[None], COV[None])
PAIR = torch.tensor([0.4, -0.3], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
PAIR_LAW = mfm.GaussianMixture(PAIR[0][None], PAIR[1][None])
PAIR_A, PAIR_Y = torch.tensor([[0.8, -0.5]], dtype=F64), torch.tensor([1.0], dtype=F64)


def check(got, log_truth, tilted_mean, particles, returns="all", worst=0.03):
    """Means over systems within 4 standard errors (6e-5 each), which must be small enough to tell.

    Evidences have a long tail: of 8,000 systems their standard error is .008 for half of the seeds and above .012 for
    one in seven; of 4,000 it is √2 times that, which suffices but for the worst of the settings below.
    """
    z = torch.exp(got.info["log_evidence"] - log_truth)
    systems = len(z)
    error = float(z.std()) / math.sqrt(systems)
    assert error < worst, f"the test tells nothing: standard error {error:.3f}"
    assert abs(float(z.mean()) - 1) < 4 * error, f"evidence {float(z.mean()):.4f} ± {error:.4f} of the truth"
    # row m·S + s is particle m of system s
    x = got.samples if returns == "one" else got.samples.reshape(particles, systems, -1).mean(0)
    moved = z[:, None] * (x - tilted_mean)
    error = moved.std(0) / math.sqrt(systems)
    assert bool((moved.mean(0).abs() < 4 * error).all()), f"mean off by {moved.mean(0)} ± {error}"


def smc(law, reward, path, method, systems, particles, steps=5, **options):
    model = law if hasattr(law, "drift") and hasattr(law, "path") else mfm.ExactModel(path, law)
    rows = systems if options.get("returns") == "one" else systems * particles
    return steer(
        model, reward, rows, method, steps=steps, particles=particles, generator=stream(0, method,
        str(sorted(options.items()))), batch_size=systems * particles, **options,
    )  # fmt: skip


def truth(path, steps, last, mean=MEAN, cov=COV, A=A, y=Y, noise_std=NOISE_STD):
    times = [i / steps for i in range(steps + 1)]
    return gaussian_moment(*base_chain(path, mean, cov, times, last), A, y, noise_std)


# -- MFM-SMC ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recycle", "guide", "temper", "threshold"),
    [  # every pair of settings occurs
        (1, "none", 0.0, 0.0), (8, "mfm-gf", 0.4, 0.0), (8, "none", 0.0, 0.5), (1, "mfm-gf", 0.4, 0.5),
        (1, "none", 0.4, 1.0), (8, "mfm-gf", 0.0, 1.0), (1, "mfm-gf", 0.0, 0.5),
    ],
)  # fmt: skip
def test_evidence_of_mfm_smc(recycle, guide, temper, threshold):
    path = PATHS["linear" if threshold < 1 else "trigonometric"]
    got = smc(
        LAW, REWARD, path, "mfm-smc", 8000, 4, num_draws=2, recycle=recycle, guide=guide, temper=temper,
        threshold=threshold,
    )  # fmt: skip
    check(got, *truth(path, 5, "draw"), 4, worst=0.02)


@pytest.mark.parametrize(
    ("recycle", "temper", "path_name"), [(1, 0.0, "linear"), (8, 0.4, "linear"), (8, 0.0, "trigonometric")]
)
def test_evidence_of_mfm_smc_guided_by_gradients(recycle, temper, path_name):
    """Draws of a map that is exact for this law, differentiated; the twist looks at t = .01 where t = 0."""
    path = PATHS[path_name]
    model = gaussian_map(path, MEAN, math.sqrt(0.5))
    got = smc(model, REWARD, path, "mfm-smc", 4000, 4, num_draws=2, guide="mfm-g", recycle=recycle, temper=temper)
    check(got, *truth(path, 5, "draw"), 4)


@pytest.mark.parametrize(
    ("resampler", "returns"),
    [("systematic", "all"), ("stratified", "one"), ("multinomial", "all"), ("residual", "one")],
)
def test_evidence_with_every_resampler(resampler, returns):
    path = PATHS["linear"]
    got = smc(LAW, REWARD, path, "mfm-smc", 4000, 5, num_draws=1, threshold=0.9, resampler=resampler, returns=returns)
    check(got, *truth(path, 5, "draw"), 5, returns, worst=0.035)


@pytest.mark.parametrize("particles", [3, 5])
def test_the_one_that_returns_is_chosen_by_weight(particles):
    """Never resampled, unguided: the weights are uneven, and the particle that returns must follow them."""
    path = PATHS["linear"]
    got = smc(
        LAW, REWARD, path, "mfm-smc", 6000, particles, num_draws=2, threshold=0.0, guide="none", returns="one"
    )  # fmt: skip
    check(got, *truth(path, 5, "draw"), particles, "one")


def test_evidence_in_two_dimensions(path):
    reward = mfm.rewards.LinearGaussian(PAIR_A, PAIR_Y, NOISE_STD)
    got = smc(PAIR_LAW, reward, path, "mfm-smc", 4000, 4, num_draws=3)
    check(got, *truth(path, 5, "draw", *PAIR, PAIR_A, PAIR_Y), 4)


@pytest.mark.parametrize(("guide", "threshold"), [("none", 0.0), ("mfm-gf", 0.0), ("none", 0.5), ("mfm-gf", 1.0)])
def test_evidence_of_a_hard_constraint(guide, threshold):
    """r = 0 on x > 0 and −inf elsewhere: E[e^r] = P(x > 0). With one draw V̂ is often −inf where V is not."""
    path = PATHS["linear"]
    mean, cov = base_chain(path, MEAN - 0.6, COV, [i / 5 for i in range(6)], "draw")
    law = mfm.GaussianMixture((MEAN - 0.6)[None], COV[None])
    got = smc(
        law, lambda x: torch.where(x[:, 0] > 0, 0 * x[:, 0], -torch.inf), path, "mfm-smc", 4000, 4, num_draws=1,
        recycle=1, guide=guide, threshold=threshold,
    )  # fmt: skip
    evidence = got.info["log_evidence"]
    assert not bool(evidence.isnan().any())
    z = evidence.exp() / float(torch.special.ndtr(mean / cov[0].sqrt()))
    assert int((z == 0).sum()) > 0  # systems all of whose particles end where they must not: they do happen
    error = float(z.std()) / math.sqrt(len(z))
    assert abs(float(z.mean()) - 1) < 4 * error, f"{float(z.mean()):.4f} ± {error:.4f}"
    alive = (z > 0).repeat(4)
    assert bool((got.samples[alive, 0] > 0).all())


# -- TDS -------------------------------------------------------------------------------------------------------------

WIDE = 1.2  # DPS overstates ∇V by 1 + τ²/σ²: at σ = .7 its proposals give weights of infinite variance, and no bound


@pytest.mark.parametrize(("threshold", "path_name"), [(0.0, "linear"), (0.5, "trigonometric"), (1.0, "linear")])
def test_evidence_of_tds(threshold, path_name):
    path = PATHS[path_name]
    reward = mfm.rewards.LinearGaussian(A, Y, WIDE)
    got = smc(LAW, reward, path, "tds", 4000, 4, threshold=threshold)
    check(got, *truth(path, 5, "mean", noise_std=WIDE), 4)


@pytest.mark.parametrize(("returns", "path_name"), [("all", "trigonometric"), ("one", "linear")])
def test_evidence_of_tds_in_two_dimensions(returns, path_name):
    path = PATHS[path_name]
    reward = mfm.rewards.LinearGaussian(PAIR_A, PAIR_Y, WIDE)
    got = smc(PAIR_LAW, reward, path, "tds", 4000, 4, returns=returns, threshold=0.8)
    check(got, *truth(path, 5, "mean", *PAIR, PAIR_A, PAIR_Y, WIDE), 4, returns)


@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
def test_a_single_step(method, path):
    """One move, from noise to the end: TDS goes to E[x_1], where e^r is a number; MFM-SMC to a draw of p_1."""
    got = smc(LAW, REWARD, path, method, 4000, 4, steps=1)
    if method == "tds":
        exact = torch.full((4000,), -0.5 * (0.9 / 0.7) ** 2, dtype=F64)
        torch.testing.assert_close(got.info["log_evidence"], exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(got.samples, MEAN.expand(16_000, 1))
    else:
        check(got, *gaussian_moment(MEAN, COV, A, Y, NOISE_STD), 4)


# -- twists and thresholds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temper", [0.0, 0.5, 1.0])
def test_the_twist_is_tempered_until_its_time(temper, path):
    """log ψ_t = min(1, t/temper) V̂_t: never resampled, so that particles and what was reported of them stay put."""
    seen = []
    steer(
        mfm.ExactModel(path, LAW), REWARD, 24, "mfm-smc", num_draws=2, steps=8, particles=4, temper=temper,
        threshold=0.0, generator=stream(0), callback=seen.append,
    )  # fmt: skip
    for k, step in enumerate(seen):
        gamma = 1.0 if temper == 0 else min(1.0, k / 8 / temper)
        torch.testing.assert_close(step.state.log_twist, gamma * step.info["value"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_systems_are_resampled_below_the_threshold(method, threshold, path):
    """Where the ESS is below threshold · M, there and then, and nowhere else."""
    seen = []
    steer(
        mfm.ExactModel(path, LAW), REWARD, 200, method, num_draws=2, steps=8, particles=4, threshold=threshold,
        generator=stream(0), callback=seen.append,
    )  # fmt: skip
    resampled = torch.stack([step.info["resampled"] for step in seen])
    ess = torch.stack([step.info["particle_ess"] for step in seen])
    assert torch.equal(resampled, (ess < threshold * 4).to(resampled))
    share = float(resampled.mean())
    assert share == 0 if threshold == 0 else share > 0
    assert bool(((ess > 1 - 1e-9) & (ess < 4 + 1e-9)).all())
    for before, after in itertools.pairwise(seen):
        # what a system has gained goes to its evidence when it is resampled, and only then
        changed = after.state.log_evidence != before.state.log_evidence
        assert torch.equal(changed, after.info["resampled"][:50] == 1)


# -- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
def test_systems_do_not_mix(method):
    """Two systems, one far from where the reward is: its particles are not replaced by the other's."""
    path = PATHS["linear"]

    class Far(mfm.ExactModel):
        """Row i of the batch belongs to system i mod 2, whose data lie at ±10."""

        def side(self, x):
            return torch.where(torch.arange(len(x)) % 2 == 0, 10.0, -10.0)[:, None].to(x)

        def drift(self, t, x, cond=None):  # of N(±10, .5)
            t = t[:, None]
            side = self.side(x)
            denoise = side + 0.5 * t / ((1 - t) ** 2 + 0.5 * t**2) * (x - t * side)
            return (denoise - x) / (1 - t)

        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            t = t[:, None]
            side = self.side(x_t)
            variance = (1 - t) ** 2 + 0.5 * t**2
            mean = side + 0.5 * t / variance * (x_t - t * side)
            eps = torch.randn(num_draws, *x_t.shape, generator=generator, dtype=F64)
            return mean + (0.5 * (1 - t) ** 2 / variance).sqrt() * eps

    reward = mfm.rewards.LinearGaussian(A, 10.0, 1.0)
    got = steer(
        Far(path, LAW), reward, 8, method, steps=20, particles=4, num_draws=2, threshold=1.0, generator=stream(0)
    )
    assert bool((got.samples[::2] > 5).all())
    assert bool((got.samples[1::2] < 0).all())
    assert float(got.info["log_evidence"][0]) > float(got.info["log_evidence"][1]) + 50


@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
def test_a_particle_that_is_lost_takes_no_other_with_it(method):
    """The first of four diverges half-way and is never resampled: the others return, and the evidence is theirs."""

    class Losing(mfm.ExactModel):
        def drift(self, t, x, cond=None):
            lost = torch.zeros_like(x)
            lost[0] = math.nan
            return super().drift(t, x, cond) + (lost if float(t[0]) > 0.5 else 0)

        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            made = super().draw(t, x_t.nan_to_num(), num_draws, generator, cond)
            return torch.where(x_t.isnan(), x_t, made)

    path = PATHS["linear"]
    got = steer(
        Losing(path, LAW), REWARD, 4, method, steps=4, particles=4, num_draws=2, threshold=0.0, generator=stream(0)
    )
    assert bool(got.samples.isfinite().all())
    assert bool(got.info["log_evidence"].isfinite().all())


def test_more_particles_reach_the_tilted_law():
    """M → ∞: one system of many particles on a mixture, both by many small steps (the evidence tests are about few)."""
    path, case = PATHS["linear"], CASES["isotropic"]
    reward = mfm.rewards.LinearGaussian(torch.tensor([[1.0, -0.6]]), 0.8, 0.7)
    target = case.law.tilt(reward)
    n = 2000
    got = steer(mfm.ExactModel(path, case.law), reward, n, "mfm-smc", num_draws=2, steps=24, generator=stream(0))
    assert got.info["log_evidence"].shape == (1,)
    # weights of ESS n_e between n/2 and n: as good as n/2 samples; 4.5 of their standard errors, and .04 for 24 steps
    error = (target.variance / (n / 2)).sqrt()
    assert bool(((got.samples.mean(0) - target.mean).abs() < 4.5 * error + 0.04).all())
    assert abs(float(got.info["log_evidence"]) - float(case.law.log_evidence(reward))) < 0.08


def test_particles_and_samples_must_fit():
    model = mfm.ExactModel(PATHS["linear"], LAW)
    with pytest.raises(mfm.InputError, match="multiple of particles"):
        steer(model, REWARD, 10, "mfm-smc", particles=4, steps=2)
    with pytest.raises(mfm.InputError, match="needs particles="):
        steer(model, REWARD, 10, "mfm-smc", returns="one", steps=2)
    with pytest.raises(mfm.InputError, match="threshold"):
        steer(model, REWARD, 8, "mfm-smc", threshold=1.5, steps=2)
    with pytest.raises(mfm.InputError, match="temper"):
        steer(model, REWARD, 8, "mfm-smc", temper=-0.5, steps=2)
    # several chunks of whole systems, whatever the batch size
    for batch_size in (1, 5, 8, 100):
        got = steer(model, REWARD, 12, "mfm-smc", particles=4, steps=2, batch_size=batch_size, generator=stream(0))
        assert got.samples.shape == (12, 1)
        assert got.info["log_evidence"].shape == (3,)


def test_the_evidence_of_a_run_is_the_mean_of_its_systems():
    """Of e^−1000, 3 e^−1000 and none at all: 4/3 e^−1000, with no overflow on the way; a mean of logarithms is −inf."""
    log_evidence = torch.tensor([-1000.0, -1000 + math.log(3), -math.inf], dtype=F64)
    result = SteerResult(torch.zeros(3, 1), torch.zeros(3), torch.arange(3), {}, {"log_evidence": log_evidence})
    assert log_normaliser(result) == pytest.approx(-1000 + math.log(4 / 3), abs=1e-12)
