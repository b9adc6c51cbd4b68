"""A sample is a function of its own seed: made again alone, in other batches, with other neighbours."""

import pytest
import torch
from closed_forms import random_map
from test_own_model import Drawing, Labelled, of_label

import metaflowmaps as mfm
from calls import steer
from conftest import CASES, F64, PATHS
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.steering import Method
from metaflowmaps.work.choices import choices

PATH = PATHS["linear"]
MODELS = {dtype: random_map(PATH, dtype) for dtype in (torch.float32, F64)}
EXACT = mfm.ExactModel(PATH, CASES["per-component-full"].law)
LINEAR = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6]), 0.8, 1.0)
# matrix products of another batch size round otherwise, and 4 steps of a map with random weights stretch that a little
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, F64: {"rtol": 1e-9, "atol": 1e-11}}

CALLS = {
    "none": ("none", {}),
    "none, sde": ("none", {"process": "sde"}),
    "mfm-g": ("mfm-g", {}),
    "mfm-g, two passes": ("mfm-g", {"passes": 2, "blend": False, "chunk": 2}),
    "mfm-g, quasi": ("mfm-g", {"noise": "quasi"}),
    "mfm-gf": ("mfm-gf", {}),
    "mfm-gf, sde": ("mfm-gf", {"process": "sde", "integrator": "heun"}),
    "mfm-gf, antithetic": ("mfm-gf", {"noise": "antithetic", "chunk": 1}),
    "mfm-gf, filled": ("mfm-gf", {"fill": True, "recycle": 3}),
    "mfm-search": ("mfm-search", {"particles": 3}),
    "mfm-search, each": ("mfm-search", {"particles": 3, "selection": "particle"}),
    "mfm-smc": ("mfm-smc", {"particles": 4, "returns": "one", "threshold": 0.9}),
    "mfm-smc, residual": ("mfm-smc", {"particles": 4, "returns": "one", "threshold": 0.95, "resampler": "residual"}),
    "dps": ("dps", {}),
    "tds": ("tds", {"particles": 4, "returns": "one", "threshold": 0.95}),
    "best-of-n": ("best-of-n", {}),
    "glass": ("glass", {"glass_steps": 2}),
    "glass, g": ("glass", {"glass_steps": 2, "estimator": "mfm-g"}),
    "rejection": ("rejection", {"pilot": 64}),
    "resampling": ("resampling", {"particles": 1}),
    "mfm-anneal": ("mfm-anneal", {"particles": 1, "pool": 3}),
    "exact": ("exact", {}),
    "exact, sde": ("exact", {"process": "sde"}),
}


def mild(x):
    return -1.5 * (x - torch.tensor([0.8, -0.4]).to(x)).square().sum(1)


def steered(method, n, dtype=F64, **options):
    model, reward = (EXACT, LINEAR) if method == "exact" else (MODELS[dtype], mild)
    if "seeds" not in options:
        options["generator"] = stream(0)
    return steer(model, reward, n, method, **{"num_draws": 3, "steps": 4, **options})


def test_every_method_is_covered():
    assert {method for method, _ in CALLS.values()} == set(choices(Method))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, F64) for name in CALLS), *((name, torch.float32) for name in list(CALLS)[::4])]
)
def test_one_sample_of_a_batch_is_made_again_alone(name, dtype):
    method, options = CALLS[name]
    batch = steered(method, 12, dtype, **options)
    assert batch.seeds.shape == (12,)
    assert batch.seeds.dtype == torch.int64
    assert len(batch.seeds.unique()) == 12
    for i in (4, 11):
        alone = steered(method, 1, dtype, **options, seeds=batch.seeds[i : i + 1])
        torch.testing.assert_close(alone.samples[0], batch.samples[i], **CLOSE[batch.samples.dtype])
        torch.testing.assert_close(alone.rewards[0], batch.rewards[i], **CLOSE[batch.samples.dtype])
        assert alone.seeds.tolist() == [int(batch.seeds[i])]


@pytest.mark.parametrize("name", CALLS)
def test_neither_batch_size_nor_number_nor_order_matter(name):
    method, options = CALLS[name]
    batch = steered(method, 9, **options)
    for other in (
        steered(method, 9, **options, batch_size=5),
        steered(method, 9, **options, seeds=batch.seeds),
    ):
        torch.testing.assert_close(other.samples, batch.samples, **CLOSE[F64])
        assert torch.equal(other.seeds, batch.seeds)
    fewer = steered(method, 4, **options)
    assert torch.equal(fewer.seeds, batch.seeds[:4])
    torch.testing.assert_close(fewer.samples, batch.samples[:4], **CLOSE[F64])
    order = torch.tensor([5, 2, 2, 8])
    chosen = steered(method, 4, **options, seeds=batch.seeds[order])
    torch.testing.assert_close(chosen.samples, batch.samples[order], **CLOSE[F64])
    # and rows differ: a sample for each seed
    assert len({round(float(x), 6) for x in batch.samples[:, 0]}) == 9


def test_resampling_happened_and_not_everywhere():
    """Else the tests above would not see that a system resamples when others do not."""
    for name in ("mfm-smc", "mfm-smc, residual", "tds"):
        method, options = CALLS[name]
        share = steered(method, 12, **options).info["resampled"]
        assert bool(((share > 0) & (share < 1)).any()), name


@pytest.mark.parametrize("method", ["tds", "mfm-smc"])
def test_a_particle_system_is_made_again_as_a_whole(method):
    """Row m·S + s is particle m of system s and carries the system's seed."""
    options = {"particles": 4, "threshold": 0.95}
    whole = steered(method, 20, **options)
    seeds = whole.seeds.reshape(4, 5)
    assert bool((seeds == seeds[:1]).all())
    assert len(seeds[0].unique()) == 5
    for s in (0, 3):
        again = steered(method, 4, **options, seeds=whole.seeds[s : s + 1])
        torch.testing.assert_close(again.samples, whole.samples[s::5], **CLOSE[F64])
        torch.testing.assert_close(again.info["log_evidence"][0], whole.info["log_evidence"][s], **CLOSE[F64])
        assert again.seeds.tolist() == [int(seeds[0, s])] * 4
    # chunks of 8 rows hold 2, 2 and 1 systems: the same ones, in another order
    chunked = steered(method, 20, **options, batch_size=8)
    torch.testing.assert_close(chunked.info["log_evidence"], whole.info["log_evidence"], **CLOSE[F64])
    for seed in seeds[0]:
        torch.testing.assert_close(
            chunked.samples[chunked.seeds == seed], whole.samples[whole.seeds == seed], **CLOSE[F64]
        )
    # one system of all
    one = steered(method, 6)
    assert len(one.seeds.unique()) == 1
    torch.testing.assert_close(steered(method, 6, seeds=one.seeds[:1]).samples, one.samples, **CLOSE[F64])
    torch.testing.assert_close(steered(method, 6, particles=6, seeds=one.seeds[:1]).samples, one.samples, **CLOSE[F64])


def test_candidates_are_the_same_for_any_number_of_them():
    """The best of 8 is at least the best of 3, sample by sample: three of the eight are those."""
    one, three, eight = (steered("best-of-n", 20, num_draws=n).rewards for n in (1, 3, 8))
    assert bool((three >= one - 1e-9).all())
    assert bool((eight >= three - 1e-9).all())
    assert bool((eight > three).any())


def test_conditions_stay_with_their_seeds():
    labels = torch.tensor([2, 0, -1, 1, 1])
    batch = steer(
        Labelled(PATH), of_label, 5, "mfm-gf", steps=6, cond={"label": labels}, generator=stream(0), batch_size=2
    )
    alone = steer(Labelled(PATH), of_label, 1, "mfm-gf", steps=6, cond={"label": labels[3:4]}, seeds=batch.seeds[3:4])
    torch.testing.assert_close(alone.samples[0], batch.samples[3], **CLOSE[F64])


def test_draws_of_a_models_own_depend_on_the_batch_and_on_nothing_else():
    """The exception that the docstring names: draw(…, generator=) without push."""
    cond, seeds = {"label": torch.zeros(4, dtype=torch.int64)}, fresh_seeds(4, stream(0))

    def run(seeds):
        part = {"label": cond["label"][: len(seeds)]}
        return steer(Drawing(PATH), of_label, len(seeds), "mfm-gf", steps=6, cond=part, seeds=seeds).samples

    assert torch.equal(run(seeds), run(seeds))
    assert not torch.isclose(run(seeds[1:2])[0], run(seeds)[1]).any()


def test_the_generator_only_chooses_the_seeds():
    """It is asked once, and what it says next does not depend on how many samples were made."""
    left = []
    for n in (1, 7):
        g = stream(0)
        steered_samples = steer(MODELS[F64], mild, n, "mfm-gf", steps=2, generator=g)
        left.append(torch.rand(1, generator=g).item())
    assert left[0] == left[1]
    g = stream(0)
    assert torch.equal(fresh_seeds(7, g), steered_samples.seeds)
    state = torch.random.get_rng_state()
    steered("mfm-gf", 3, seeds=torch.tensor([1, 2, -3]))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_finished_samples_keep_their_seeds():
    """Interrupted in the second chunk: the seeds of the first."""
    whole = steered("mfm-gf", 6, batch_size=2)
    got = steered("mfm-gf", 6, batch_size=2, callback=lambda step: step.batch == 1)
    assert got.interrupted
    assert torch.equal(got.seeds, whole.seeds[:2])
    got = steered("mfm-gf", 6, callback=lambda step: True)
    assert got.seeds.shape == (0,)


@pytest.mark.parametrize(
    ("seeds", "says"),
    [
        (torch.arange(3), r"shape \(4,\), one a sample, got torch.int64, shape \(3,\)"),
        (torch.arange(4.0), r"got torch.float32"),
        (torch.arange(4)[:, None], r"shape \(4, 1\)"),
        ([1, 2, 3, 4], r"got list"),
        ("seven", r"got str"),
    ],
)
def test_wrong_seeds_are_refused(seeds, says):
    with pytest.raises(mfm.InputError, match=says) as caught:
        steered("mfm-gf", 4, seeds=seeds)
    assert "\n" not in str(caught.value)
    with pytest.raises(mfm.InputError, match="seeds must be an int64 tensor"):
        MODELS[F64].generate(4, seeds=seeds)


def test_particle_systems_take_a_seed_each():
    with pytest.raises(mfm.InputError, match=r"shape \(2,\), one a system of particles"):
        steered("tds", 8, particles=4, seeds=torch.arange(8))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("steps", [1, 3])
def test_generated_samples_too(steps, dtype):
    """MetaFlowMap.generate by seeds."""
    model, seeds = MODELS[dtype], fresh_seeds(20, stream(0))
    batch = model.generate(20, steps, seeds=seeds)
    assert batch.dtype == dtype
    for i in (0, 7, 19):
        torch.testing.assert_close(model.generate(1, steps, seeds=seeds[i : i + 1])[0], batch[i], **CLOSE[dtype])
    torch.testing.assert_close(
        model.generate(5, steps, seeds=seeds[[3, 1, 4, 1, 5]]), batch[[3, 1, 4, 1, 5]], **CLOSE[dtype]
    )
    assert len(batch[:, 0].unique()) == 20
