"""Best-of-N against order statistics, and search against what it says it does."""

import math

import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from calls import steer
from conftest import F64, PATHS
from metaflowmaps.random import stream
from metaflowmaps.steering.problem import SteeringProblem

LAW = mfm.GaussianMixture(torch.tensor([[0.4]], dtype=F64), 0.6)


def max_of_normals(n):
    """E[max] and Var[max] of n standard normals: ∫ z^k n φ(z) Φ(z)^{n−1} dz, trapezoidal (error < 1e-12)."""
    z = torch.linspace(-12, 12, 24_001, dtype=F64)
    density = n * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * torch.special.ndtr(z) ** (n - 1)
    first, second = (float((z**k * density).sum() * (z[1] - z[0])) for k in (1, 2))
    return first, second - first**2


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_mean_reward_is_that_of_the_best(n, path):
    """r = −3x on x ~ N(.4, .6): −1.2 + 3 √.6 E[max of n normals], within 4 standard errors."""
    samples = 3000
    got = steer(
        mfm.ExactModel(path, LAW), lambda x: -3 * x[:, 0], samples, "best-of-n", num_draws=n, steps=12,
        integrator="rk4", generator=stream(0, n), batch_size=20_000,
    )  # fmt: skip
    mean, variance = max_of_normals(n)
    scale = 3 * math.sqrt(0.6)
    error = scale * math.sqrt(variance / samples)
    # rk4's base law: its deviation is off by less than 1e-3 of itself in 12 steps (measured)
    assert abs(float(got.rewards.mean()) - (-1.2 + scale * mean)) < 4 * error + 3e-3
    # and the spread of the best; a variance of m samples has a relative error √(2/m) (normal) to 2 √(2/m) (a maximum)
    assert float(got.rewards.var()) == pytest.approx(scale**2 * variance, rel=8 * math.sqrt(2 / samples))


def overheard(reward, method, **options):
    """A run on one row of states at a time that can be replayed: its x_0."""
    start = []
    original = SteeringProblem.noise

    def spy(self, name, rows):
        out = original(self, name, rows)
        start.append(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteeringProblem, "noise", spy)
        got = steer(mfm.ExactModel(PATHS["linear"], LAW), reward, 5, method, generator=stream(0), **options)
    return got, start[0]


def test_it_is_the_best_of_its_own_candidates():
    """Row m · samples + i is candidate m of sample i: replayed one by one by the base sampler's ODE."""
    n, steps = 4, 6
    got, start = overheard(lambda x: -(x[:, 0] - 1).square(), "best-of-n", num_draws=n, steps=steps)
    x = start
    for k in range(steps):
        x = x + LAW.drift(PATHS["linear"], k / steps, x) / steps
    x = x.reshape(n, 5)
    best = (-(x - 1).square()).argmax(0)
    torch.testing.assert_close(got.samples[:, 0], x[best, torch.arange(5)], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the grid starts")  # late on purpose: few steps, each by hand
@pytest.mark.parametrize("selection", ["particle", "global"])
@pytest.mark.parametrize("transition", ["stochastic", "deterministic"])
def test_search_by_hand(selection, transition, path):
    """Alg. 4 written out for a model whose draws are known numbers: keep the best, noise it again."""
    m, n, samples = 3, 2, 4

    class Known:
        """Draw j of the row at x is x + (j + 1)/10 (and the generator is left alone)."""

        path, event_shape, dtype = None, (1,), F64

        def drift(self, t, x, cond=None):
            raise AssertionError("a search needs no drift")

        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            rows = len(x_t) // (m * samples)
            j = torch.arange(rows, dtype=F64).repeat_interleave(m * samples)[:, None]
            return (x_t + (j + 1) / 10)[None]

    Known.path = path
    noises = []
    original = SteeringProblem.noise

    def spy(self, name, rows):
        noises.append(original(self, name, rows))
        return noises[-1]

    def reward(x):
        return -(x[:, 0] - 0.3).square()

    grid = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=F64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteeringProblem, "noise", spy)
        got = steer(
            Known(), reward, samples, "mfm-search", num_draws=n, particles=m, selection=selection,
            transition=transition, grid=grid, generator=stream(0),
        )  # fmt: skip
    x = noises[0]
    for k, (t, u) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
        made = torch.stack([x + 0.1, x + 0.2])
        r = -(made[..., 0] - 0.3).square()
        chosen, best = made[r.argmax(0), torch.arange(m * samples)], r.amax(0)
        if selection == "global":
            of = best.reshape(m, samples).argmax(0)
            # the winner is copied as a pair: what its draw implies of the noise, it implies at its own state
            x, chosen = (v.reshape(m, samples, 1)[of, torch.arange(samples)].repeat(m, 1) for v in (x, chosen))
            best = best.reshape(m, samples).amax(0).repeat(m)
        a_t, b_t, a_u, b_u = (float(f(v)) for v in (t, u) for f in (path.alpha, path.beta))
        xi = noises[k + 1] if transition == "stochastic" else (x - b_t * chosen) / a_t
        x = a_u * xi + b_u * chosen
    last = x.reshape(m, samples, 1)[best.reshape(m, samples).argmax(0), torch.arange(samples)]
    torch.testing.assert_close(got.samples, last, rtol=1e-12, atol=1e-12)
    assert len(noises) == (1 + 3 if transition == "stochastic" else 1)


def test_a_global_search_tells_the_reward_of_the_one_that_all_go_on_from():
    """At the last step that is the sample; a mean over each particle's own best would be lower."""
    got = mfm.steer(random_map(PATHS["linear"]), lambda x: x[:, 0], 1, mfm.Search(2, particles=4), seed=0)
    torch.testing.assert_close(got.info["best_reward"][-1], got.rewards[0].double(), rtol=1e-6, atol=0)  # float32


def test_search_raises_the_reward():
    """More particles find more; all above the base."""
    model = mfm.ExactModel(PATHS["linear"], LAW)
    rewards = [
        float(steer(
            model, lambda x: x[:, 0], 400, method, num_draws=2, steps=20, generator=stream(0), **options
        ).rewards.mean()) for method, options in (
            ("none", {}), ("mfm-search", {"particles": 1}), ("mfm-search", {"particles": 6})
        )
    ]  # fmt: skip
    # a mean of 400 is known to ±.05
    assert rewards[0] + 0.5 < rewards[1] < rewards[2] - 0.5, rewards
