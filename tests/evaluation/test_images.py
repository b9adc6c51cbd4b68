"""The image experiments against an oracle: a law of a few images, whose posterior at every t is known.

Of K images x_k, equally likely, p(k | x_t) ∝ exp(−‖x_t − β x_k‖²/(2α²)): drift, draws and values are exact.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import metaflowmaps as mfm
from conftest import normal
from metaflowmaps.cost import Meter
from metaflowmaps.data import ImageSet
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.draws import posteriors
from metaflowmaps.lab.evaluate.images import class_mixture as mixture
from metaflowmaps.lab.evaluate.images import inverse_problems as inverse
from metaflowmaps.lab.evaluate.images import race, race_cells, recovery, steered
from metaflowmaps.lab.evaluate.images import rollout_value as value
from metaflowmaps.lab.evaluate.images.generation import Generation, GenerationConfig, nearest
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scored, weights
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, Judge, diversity_of, per_sample
from metaflowmaps.posterior import RolloutPosterior
from metaflowmaps.random import RowNoise, randn, stream
from metaflowmaps.rewards import InverseProblem
from metaflowmaps.steering import SteerResult
from metaflowmaps.work.config import override

SHAPE = (1, 8, 8)


class Oracle(nn.Module):
    """A law of K images (K, *event), equally likely, in the form of a map: what it draws is exact in one call."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.path, self.event_shape = images, mfm.LinearPath(), tuple(images.shape[1:])
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.network = nn.Identity()  # what a meter watches: one call a drift or draw
        self.dropped = 0.0  # how far draws are pulled to the posterior mean: 0 exact, 1 a point

    def posterior(self, t, x: Tensor) -> Tensor:
        """p(k | x_t): (B, K)."""
        t, flat = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1), self.images.flatten(1)
        # ‖x − t x_k‖² but for ‖x‖², which all share
        squares = t**2 * flat.square().sum(1) - 2 * t * (x.flatten(1) @ flat.T)
        return (-0.5 * squares / (1 - t).clamp_min(1e-6) ** 2).softmax(1)

    def denoise(self, t, x: Tensor, cond=None) -> Tensor:
        return torch.einsum("bk,kchw->bchw", self.posterior(t, x), self.images)

    def drift(self, t, x: Tensor, cond=None) -> Tensor:
        left = 1 - torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return (self.denoise(t, self.network(x)) - x) / left

    def push(self, noise: Tensor, t, x: Tensor, steps: int = 1, cond=None) -> Tensor:
        """The image at which the cumulated posterior passes Φ(first number of the noise)."""
        p = self.posterior(t, self.network(x))
        u = torch.special.ndtr(noise.flatten(1)[:, :1].double())
        index = torch.searchsorted(p.double().cumsum(1), u).clamp_max(len(self.images) - 1)[:, 0]
        drawn = self.images[index]
        return drawn + self.dropped * (torch.einsum("bk,kchw->bchw", p, self.images) - drawn)

    def draw(self, t, x: Tensor, num_draws: int, steps: int = 1, generator=None, cond=None) -> Tensor:
        noise = randn((num_draws, *x.shape), generator)
        wide = x.expand(num_draws, *x.shape).flatten(0, 1)
        times = torch.as_tensor(t).expand(len(x)).repeat(num_draws)
        return self.push(noise.flatten(0, 1), times, wide, steps).reshape(noise.shape)

    def generate(self, n: int, steps: int = 1, generator=None, cond=None, seeds=None) -> Tensor:
        source = generator if seeds is None else RowNoise(seeds, "generate")
        noise = randn((n, *self.event_shape), source)
        return self.push(randn((n, *self.event_shape), source), 0.0, noise, steps)


class Nearest(nn.Module):
    """A sure classifier of the oracle's images: logits −‖x − x_k‖²; features are the pixels."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.event_shape, self.num_classes = images, tuple(images.shape[1:]), len(images)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.images).square().flatten(2).sum(2)

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def images(k: int) -> Tensor:
    """K pictures of ±.9, far from each other."""
    return 0.9 * normal(k, *SHAPE, seed=f"images {k}", dtype=torch.float32).sign()


def repeated(x: Tensor, times: int, classes: bool = True) -> ImageSet:
    """Each image so many times."""
    labels = torch.arange(len(x)).repeat(times)
    names = tuple(map(str, range(len(x))))
    return ImageSet("made", x.repeat(times, 1, 1, 1), labels if classes else None, names if classes else ())


def made(k: int = 4, held: int = 40, **parts) -> ImageSetup:
    """A setup on the oracle; the judge is of principal components unless one is given."""
    x = images(k)
    train, held_out = repeated(x, 50), repeated(x, held // k)
    judge = Judge(parts.pop("judge", None), train)
    return ImageSetup(Oracle(x), train, held_out, judge, **parts)


# -- the setup ---------------------------------------------------------------------------------------------------------


def test_the_judge_of_principal_components():
    """They keep all distances between images of a law that has no more dimensions than there are components."""
    setup = made(5)
    assert setup.judge.space == "4 principal components"  # five points span four dimensions
    features = setup.judge.features(images(5))
    assert features.shape == (5, 4)
    torch.testing.assert_close(torch.cdist(features, features), torch.cdist(*2 * [images(5).flatten(1)]))
    with pytest.raises(InputError, match="--set judge=RUN"):
        setup.judge.classes(images(5))
    smooth = ImageSet("made", normal(200, *SHAPE, dtype=torch.float32))
    judge = Judge(None, smooth)
    assert judge.space == "32 principal components"
    x = smooth.tensor().flatten(1)
    # the leading ones: no 32 axes keep more of the variance
    best = torch.linalg.svdvals(x - x.mean(0))[:32].square().sum()
    kept = judge.features(smooth.tensor())
    assert float((kept - kept.mean(0)).square().sum()) == pytest.approx(float(best), rel=1e-4)


def test_the_judge_with_a_classifier_names_classes_and_measures_in_its_features():
    setup = made(4, judge=Nearest(images(4)))
    assert setup.judge.space == "features of the judging classifier"
    assert setup.judge.classes(images(4)[[2, 0, 3]]).tolist() == [2, 0, 3]
    assert torch.equal(setup.judge.features(images(4)), images(4).flatten(1))


def test_distances_to_the_held_out_images():
    x = normal(300, *SHAPE, dtype=torch.float32)
    setup = ImageSetup(
        Oracle(images(2)), ImageSet("a", x[:200]), ImageSet("a", x[200:]), Judge(None, ImageSet("a", x[:200]))
    )
    assert setup.frechet(x[200:]) == pytest.approx(0, abs=1e-6)  # rounding of roots
    assert setup.floor() > 0.1  # other images of the same law: 32 dimensions fitted from 100 images are never equal
    assert setup.floor() < setup.frechet(1.5 * x[:200])
    assert setup.everything().shape == (300, *SHAPE)
    alike = diversity_of(setup.judge.features(x[:1].repeat(10, 1, 1, 1) + 1e-4 * x[:10]))
    assert alike.distance < 1e-2 * diversity_of(setup.judge.features(x[:10])).distance
    assert alike.vendi == pytest.approx(1, abs=1e-3)


def test_held_out_images_come_equally_often_and_in_a_seeded_order():
    x = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, *SHAPE) / 10
    setup = ImageSetup(
        Oracle(images(2)), repeated(images(2), 9), ImageSet("b", x, torch.arange(10), tuple("abcdefghij")), None
    )
    picked, labels = setup.images(25, "some", 3)
    counts = torch.bincount(labels, minlength=10)
    assert sorted(counts.tolist()) == [2] * 5 + [3] * 5
    torch.testing.assert_close(picked[:, 0, 0, 0] * 10, labels.float())
    assert torch.equal(labels[:10], labels[10:20])  # round after round
    assert torch.equal(setup.images(10, "some", 3)[1], labels[:10])
    assert not torch.equal(setup.images(10, "some", 4)[1], labels[:10])
    assert not torch.equal(setup.images(10, "other", 3)[1], labels[:10])


def test_cost_of_one_sample():
    counts = {"forwards": 40.0, "backwards": 20.0, "reward_calls": 10.0, "reward_backwards": 5.0, "seconds": 2.0}
    shared = per_sample({**counts, "decodes": 7.0}, 10)
    assert shared == {
        "forwards": 4,
        "backwards": 2,
        "reward_calls": 1,
        "reward_backwards": 0.5,
        "seconds": 0.2,
        "nfe": 7.5,
    }
    model = Oracle(images(2))
    with Meter(model.network) as meter:
        model.generate(6)
        model.drift(0.5, images(2))
    assert per_sample(meter.cost(), 2)["forwards"] == 4


# -- recovery ----------------------------------------------------------------------------------------------------------

FEW = recovery.RecoveryConfig(samples=400, times=(0.0, 0.2, 0.5), glass_steps=(30,), map_steps=(1, 4), images=100)


@pytest.fixture(scope="module")
def recovered() -> recovery.Recovered:
    return recovery.Recovery(made(), FEW).run()


def test_exact_draws_are_at_the_floor_and_calibrated(recovered):
    setup = made()
    # what 400 independent exact samples are from the held-out images, at worst of 40 sets: at t = 0 that is what draws
    # are, and at later times they are tied to the held-out images and nearer
    g = stream(0, "resampled")
    sets = [setup.frechet(images(4)[torch.randint(4, (400,), generator=g)]) for _ in range(40)]
    for t, by_sampler in recovered.metrics["frechet"].items():
        for name in ("map-1", "map-4"):
            assert by_sampler[name] <= 1.5 * max(sets), (t, name)
        # the oracle's drift carries GLASS there too; 30 Euler steps leave a little
        assert by_sampler["glass-30"] <= 5 * max(sets), t
    ratios = recovered.metrics["spread_ratio"]
    assert ratios.keys() == {"0.0", "0.2", "0.5"}
    for t in ("0.0", "0.2"):
        assert ratios[t].keys() == {"map-1", "map-4", "glass-30"}
        # of 100 images × 64 pixels, all of one image moving together: 5 standard deviations of √(χ²₁₀₀/100) are .35
        assert ratios[t]["map-1"] == pytest.approx(1, abs=0.35), t
    assert recovered.metrics["floor"] < max(sets)  # the same four images, as often
    assert len(recovered.noisy) == len(recovered.draws) == len(recovered.spread) == 3
    assert "30 calls of GLASS at" in recovered.metrics["summary"]


def test_draws_of_the_wrong_spread_are_seen(recovered):
    """The mean of the posterior, always: d² = tr C exactly. Half-way to it: a spread ratio of 2, nearly."""
    setup = made()
    t0 = FEW.model_copy(update={"times": (0.0,), "glass_steps": ()})
    setup.model.dropped = 1.0
    broken = recovery.Recovery(setup, t0).run().metrics
    features = setup.judge.features(setup.held_out.tensor()).double()
    trace = float(features.var(0).sum())
    # the images are as often in either set: means agree, and a point has no spread
    assert broken["frechet"]["0.0"]["map-1"] == pytest.approx(trace, rel=1e-3)
    assert broken["frechet"]["0.0"]["map-1"] > 50 * recovered.metrics["frechet"]["0.0"]["map-1"]
    assert broken["spread_ratio"]["0.0"]["map-1"] > 100  # infinite, but for rounding
    setup.model.dropped = 0.5
    half = recovery.Recovery(setup, t0).run().metrics["spread_ratio"]["0.0"]["map-1"]
    n = FEW.draws
    expected = math.sqrt((1 + 0.25 / n) / ((1 + 1 / n) * 0.25))
    assert half == pytest.approx(expected, rel=0.1)  # of 100 images: the error's own deviation is 5 %


def test_several_draws_belong_to_the_image_that_was_noised(monkeypatch):
    """At t = .9 an image is known from its noisy version: all its draws are that image."""
    compared: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(recovery, "spread_ratio", lambda drawn, truth: compared.append((drawn, truth)) or 1.0)
    config = recovery.RecoveryConfig(samples=20, times=(0.9,), glass_steps=(), map_steps=(1,), images=12, draws=5)
    recovery.Recovery(made(), config).run()
    ((drawn, truth),) = compared
    assert drawn.shape == (5, 12, *SHAPE)
    torch.testing.assert_close(drawn, truth.expand_as(drawn))


def test_recovery_says_nothing_of_what_it_did_not_measure():
    config = recovery.RecoveryConfig(samples=20, times=(0.5,), glass_steps=(2,), map_steps=(1,), images=4, draws=2)
    metrics = recovery.Recovery(made(), config).run().metrics
    assert "30 calls" not in metrics["summary"]
    for bad in ({"times": (1.0,)}, {"map_steps": (2,)}, {"glass_steps": (0,)}):
        with pytest.raises(ValueError, match=r"times|steps"):
            recovery.RecoveryConfig(**bad)


def test_a_drift_trained_alone_is_judged_beside():
    setup = made()
    setup.drift = setup.model.drift
    config = FEW.model_copy(update={"map_steps": (1,), "glass_steps": (2, 4)})
    names = posteriors(setup.model, config, drift_alone=setup.drift)
    assert list(names) == ["map-1", "glass-2", "glass-4", "drift-glass-2", "drift-glass-4"]
    x_t, noise = normal(5, *SHAPE, dtype=torch.float32), normal(5, *SHAPE, seed="noise", dtype=torch.float32)
    torch.testing.assert_close(names["glass-4"].push(noise, 0.3, x_t), names["drift-glass-4"].push(noise, 0.3, x_t))


# -- value -------------------------------------------------------------------------------------------------------------


def test_rollouts_agree_with_the_value_in_closed_form():
    setup, reward = made(), image_reward(made(), "slant", 20.0)
    model, n = setup.model, 200
    r = reward(model.images).double()
    for t in (0.0, 0.3):
        x_1, _ = setup.images(6, "value", 0)
        x_t = model.path.interpolate(normal(6, *SHAPE, dtype=torch.float32), x_1, t)
        p = model.posterior(t, x_t).double()
        moments = [(p * (i * r).exp()).sum(1) for i in (1, 2)]
        deviation = ((moments[1] / moments[0] ** 2 - 1) / n).sqrt()  # of log mean e^r, by the delta method
        states = value.NoisyStates(t, x_t)
        found = value.estimate(RolloutPosterior(model.path, model.drift, 50), reward, states, n, stream(0, "roll", t))
        # 24 comparisons: P(|normal| > 4.5) is 7e-6 each; 1e-3 for steps and for states that are decided
        assert bool(((found - moments[0].log()).abs() <= 4.5 * deviation + 1e-3).all()), t
        drawn = value.estimate(model, reward, states, n, stream(0, "draw", t))
        assert bool(((drawn - moments[0].log()).abs() <= 4.5 * deviation + 1e-3).all()), t


def test_value_of_exact_draws_and_of_broken_ones():
    config = value.ImageValueConfig(
        states=32, times=(0.1,), num_draws=(1, 200), map_steps=(1,), glass_steps=(), rollout_steps=20, reward="slant",
        strength=20.0,
    )  # fmt: skip
    metrics = value.ImageValue(made(), config).run().metrics
    cells = metrics["by_sampler"]
    assert cells.keys() == {"map-1", "rollout"}
    exact = cells["map-1"]["200"]["0.1"]
    assert exact["pearson"] > 0.95
    assert exact["pearson"] > cells["map-1"]["1"]["0.1"]["pearson"] + 0.1  # one draw says less
    # map and rollouts both have 200 draws: their difference is that of two sets of rollouts, within 4 × √(1/(2·32))
    assert exact["rmse"] == pytest.approx(cells["rollout"]["200"]["0.1"]["rmse"], rel=0.5)
    assert metrics["value_std"]["0.1"] > 3 * exact["rmse"]
    setup = made()
    setup.model.dropped = 1.0  # the posterior mean in place of draws: Jensen's gap
    point = value.ImageValue(setup, config).run().metrics["by_sampler"]["map-1"]["200"]["0.1"]
    assert point["rmse"] > 2 * exact["rmse"]
    for bad in ({"times": (1.0,)}, {"num_draws": (0,)}, {"map_steps": (), "glass_steps": ()}):
        with pytest.raises(ValueError, match=r"times|num_draws|nothing to judge"):
            value.ImageValueConfig(**bad)


# -- the class mixture -------------------------------------------------------------------------------------------------


def test_the_targets_of_the_class_mixture():
    """The wanted is w itself; a sure classifier tilts the data to p_1(y) w_y."""
    x = images(10)
    labels = torch.tensor([0] * 10 + [1] * 30 + [3] * 10 + [5] * 20 + [7] * 10 + [9] * 20)
    train = ImageSet("made", x[labels], labels, tuple(map(str, range(10))))
    wanted, tilted = mixture.targets(ImageSetup(Oracle(x), train, train, Judge(Nearest(x), train)))
    expected = torch.tensor([0, 30, 0, 10, 0, 40, 0, 20, 0, 80], dtype=torch.float64) / 180
    torch.testing.assert_close(tilted, expected)
    torch.testing.assert_close(wanted, torch.tensor([0, 1, 0, 1, 0, 2, 0, 2, 0, 4], dtype=torch.float64) / 10)
    assert weights(10) == [0, 1, 0, 1, 0, 2, 0, 2, 0, 4]
    assert weights(12)[-2:] == [0, 1]


def test_what_the_budget_pays_for():
    config = mixture.MixtureConfig(samples=4096, steps=100, budget=1e6)
    a_step = {"none": 2, "dps": 2, "mfm-g-1": 2, "mfm-gf-16": 17, "mfm-search-4": 40, "tds-64": 2, "tds-one-64": 128}
    for name, calls in a_step.items():
        n = mixture.affordable(name, config)
        assert n == min(4096, max(64, 1e6 // (100 * calls))), name
        assert n == 64 or n * 100 * calls <= 1e6
    assert mixture.affordable("tds-one-64", config) == 78
    assert mixture.affordable("tds-one-64", config.model_copy(update={"budget": 1.0})) == 64
    assert mixture.affordable("none", config.model_copy(update={"samples": 7})) == 7
    assert mixture.affordable("resampling-16", config.model_copy(update={"budget": 1.0})) == config.samples, "no steps"


def test_steering_to_a_mixture_of_classes_meets_its_target():
    """Exact draws under MFM-GF bring the frequencies to the target; unsteered they stay those of the data."""
    x = images(10)
    setup = made(10, judge=Nearest(x), guide=Nearest(x))
    config = mixture.MixtureConfig(methods=("none", "mfm-gf-16", "tds-64"), samples=250, steps=12)
    lines: list[str] = []
    found = mixture.ClassMixture(setup, config, lines.append).run()
    cells = found.metrics["methods"]
    target = torch.tensor(found.metrics["target"], dtype=torch.float64)
    torch.testing.assert_close(target, torch.tensor([0, 1, 0, 1, 0, 2, 0, 2, 0, 4], dtype=torch.float64) / 10)
    uniform = math.sqrt(float((target - 0.1).square().sum()))
    # four standard deviations of 250 samples at most
    assert cells["none"]["l2"] == pytest.approx(uniform, abs=4 * cells["none"]["chance"])
    assert cells["mfm-gf-16"]["l2"] < 3 * cells["mfm-gf-16"]["chance"] < 0.5 * uniform
    assert cells["none"]["chance"] == pytest.approx(math.sqrt(float(1 - target.square().sum()) / 250))
    assert cells["mfm-gf-16"]["reward"] > cells["none"]["reward"] + 1
    assert [len(c["frequencies"]) for c in cells.values()] == [10, 10, 10]
    assert {c["samples"] for c in cells.values()} == {250}  # whole systems of 64, cut
    assert {c["lost"] for c in cells.values()} == {0}
    assert [x.shape for x in found.samples.values()] == [(20, *SHAPE)] * 3
    assert "MFM-GF" in found.metrics["summary"] or "TDS" in found.metrics["summary"]
    # weights e^r on unsteered samples are the exact tilt: at the target up to chance, which the weights make larger
    exact = found.metrics["weighted_base"]
    assert exact["l2"] < 4 * exact["chance"]
    assert exact["chance"] > math.sqrt(float(1 - target.square().sum()) / exact["samples"])


def test_both_distances_of_the_class_mixture():
    """Weighted frequencies by hand, with a wanted and a tilted target that differ."""
    x = images(10)
    setup = made(10, judge=Nearest(x), guide=Nearest(x))
    wanted, tilted = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    wanted[1] = 1.0
    tilted[1], tilted[3] = 0.5, 0.5
    experiment = mixture.ClassMixture(setup, mixture.MixtureConfig())
    experiment.wanted, experiment.tilted = wanted, tilted
    got = experiment.frequencies(x[[1, 1, 3]], torch.tensor([1.0, 2.0, 1.0]))
    assert got.frequencies == [0, 0.75, 0, 0.25, 0, 0, 0, 0, 0, 0]
    assert got.l2 == pytest.approx(math.sqrt(2) / 4)
    assert got.l2_tilted == pytest.approx(math.sqrt(2) / 4)
    assert got.chance == 0  # one class alone: nothing is left to chance
    experiment.wanted, experiment.tilted = tilted, wanted
    got = experiment.frequencies(x[[1, 1, 3]], torch.tensor([1.0, 2.0, 1.0]))
    assert got.chance == pytest.approx(math.sqrt(0.5 * (1 + 4 + 1) / 16))


def test_the_class_mixture_refuses_what_it_cannot_count():
    x = images(4)
    config = mixture.MixtureConfig(methods=("none",), samples=10, steps=2)
    for parts, says in (
        ({"judge": Nearest(x)}, "mfm train made-guide"),
        ({"guide": Nearest(x)}, "--set judge=RUN"),
    ):
        with pytest.raises(InputError, match=says):
            mixture.ClassMixture(made(**parts), config).run()
    setup = made(guide=Nearest(x), judge=Nearest(x))
    unlabelled = ImageSetup(setup.model, repeated(x, 5, classes=False), setup.held_out, setup.judge, setup.guide)
    with pytest.raises(InputError, match="one subfolder a class"):
        mixture.ClassMixture(unlabelled, config).run()
    with pytest.raises(InputError, match="unknown method"):
        mixture.ClassMixture(setup, config.model_copy(update={"methods": ("none", "mfm-h-4")})).run()


def test_samples_that_are_not_finite_are_counted_and_not_judged(monkeypatch):
    x = images(4)
    setup = made(guide=Nearest(x), judge=Nearest(x))

    def broken(setup, v, reward, n, process, generator):
        samples = x[torch.arange(n) % 4].clone()
        samples[: n if v.name == "dps" else 3] = torch.nan
        cost = dict.fromkeys(("forwards", "backwards", "reward_calls", "reward_backwards", "seconds"), 1.0)
        return samples, SteerResult(samples, samples[:, 0, 0, 0], torch.arange(n), cost, {})

    monkeypatch.setattr(mixture, "run", broken)
    lines: list[str] = []
    config = mixture.MixtureConfig(methods=("mfm-g-1", "dps"), samples=43, steps=2)
    cells = mixture.ClassMixture(setup, config, lines.append).run().metrics["methods"]
    assert list(cells) == ["mfm-g-1"]
    assert (cells["mfm-g-1"]["lost"], cells["mfm-g-1"]["samples"]) == (3, 40)
    assert any("43 samples are not finite" in line for line in lines)
    with pytest.raises(InputError, match="no method gave finite samples"):
        mixture.ClassMixture(setup, config.model_copy(update={"methods": ("dps",)})).run()


# -- the race ----------------------------------------------------------------------------------------------------------

COST = {"forwards": 250.0, "backwards": 0.0, "reward_calls": 0.0, "reward_backwards": 0.0, "seconds": 0.5, "nfe": 250.0}


def pool(size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Images that carry their score 1 … size at every pixel, in no order."""
    scores = 1 + torch.randperm(size, generator=stream(0, "pool")).float()
    return scores[:, None, None, None].expand(size, *SHAPE) / size, {"slant": scores, "ink": -scores}


@pytest.fixture(scope="module")
def lane() -> race.RewardRace:
    config = race.RaceConfig(samples=64, pool=8000, rewards=("slant", "ink"))
    return race.Race(made(), config).races["slant"]


@pytest.mark.parametrize("n", [1, 10, 100])
def test_best_of_n_has_its_exact_expectation(lane, n):
    """Of the ranks 1 … P, the largest of n without replacement is n(P + 1)/(n + 1) on average."""
    size = 8000
    before = len(lane.cells)
    lane.best_of("ode", n, *pool(size), COST)
    (cell,) = lane.cells[before:]
    groups = cell.samples
    assert groups == min(size // n, 64)
    expected = n * (size + 1) / (n + 1)
    variance = n * (size - n) * (size + 1) / ((n + 1) ** 2 * (n + 2))
    # disjoint groups are negatively correlated: the mean's deviation is at most that of independent ones
    assert cell.reward == pytest.approx(expected, abs=4 * math.sqrt(variance / groups))
    assert cell.others == {"ink": -cell.reward}
    assert cell.reward_se == pytest.approx(math.sqrt(variance / groups), rel=0.4)  # 4 × √(1/(2·64)) = .35
    assert cell.cost == {**COST, "forwards": 250 * n, "seconds": 0.5 * n, "reward_calls": n, "nfe": 251 * n}
    assert (cell.method, cell.number, cell.lost) == ("ode", n, 0)


def test_groups_are_disjoint_and_cover_the_pool(lane, monkeypatch):
    """Where the groups are the whole pool, its best image wins once, and no image wins twice."""
    caught: list[Tensor] = []
    monkeypatch.setattr(lane, "_add", lambda method, n, made: caught.append(made.x[:, 0, 0, 0]))
    for size, n in ((640, 10), (6400, 100), (1000, 500)):
        lane.best_of("map-1", n, *pool(size), COST)
        winners = (caught.pop() * size).round().tolist()
        assert len(winners) == size // n
        assert len(set(winners)) == len(winners)
        assert max(winners) == size
        assert min(winners) >= n  # who wins a group of n has beaten n − 1 others


def test_a_race_that_cannot_be_run_is_refused():
    for bad, says in (
        ({"pool": 1999}, "at most half of the pool"),
        ({"best_of": (0,)}, "best_of must be at least 1"),
        ({"strengths": (1.0, 0.0)}, "must be positive"),
        ({"rescales": (-1.0,)}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=says):
            race.RaceConfig(**bad)
    with pytest.raises(InputError, match="at most half of the pool"):
        override(race.RaceConfig(), ["pool=1000"])


def cell(
    method: str, number: float, reward: float, nfe: float = 100.0, seconds: float = 1.0, **more: float | None
) -> race_cells.RaceCell:
    spread = {"distance": 1.0, "vendi": 1.0, "frechet": 2.0, **more}
    cost = {"nfe": nfe, "seconds": seconds}
    known = {"reward": reward, "reward_se": 0.1, "others": {}, "samples": 64, "cost": cost}
    return race_cells.RaceCell(method=method, number=number, **known, **spread)


def test_the_headline_takes_the_most_diverse_that_is_enough():
    cells = [
        cell("ode", 10, 9.9, 2510), cell("ode", 1000, 5.0, 251_000, 40.0, distance=3.0),
        cell("mfm-g-1", 1.0, 4.9, distance=9.0), cell("mfm-g-1", 8.0, 9.0, 500, 0.2, distance=1.5),
        cell("mfm-g-rescale-1", 0.5, 5.0, 400, 0.1, distance=2.0), cell("mfm-g-plain-1", 4.0, 6.0, distance=1.9),
        cell("mfm-g-4", 0.5, 99.0, distance=9.0), cell("dps", 0.5, 99.0, distance=9.0),
    ]  # fmt: skip
    found = race_cells.headline(cells)
    assert found.keys() == {"ode"}  # pools that were not run are not there
    ode = found["ode"]
    assert (ode.n, ode.reached, ode.method, ode.strength) == (1000, True, "mfm-g-rescale-1", 0.5)
    assert (ode.reward, ode.rival_reward) == (5.0, 5.0)  # as much is enough
    assert ode.nfe_ratio == pytest.approx(251_000 / 400)
    assert ode.seconds_ratio == pytest.approx(40 / 0.1)
    assert (ode.distance, ode.rival_distance) == (2.0, 3.0)
    none = race_cells.headline([cell("ode", 1000, 50.0), *cells[2:]])["ode"]
    assert (none.reached, none.method, none.strength, none.reward) == (False, "mfm-g-1", 8.0, 9.0)
    assert race_cells.headline(cells[:2]) == {}  # nobody to compare
    assert race_cells.headline(cells[2:]) == {}  # no rival
    assert race_cells.headline([]) == {}


def test_the_frontier_is_what_none_beats_in_both():
    cells = [
        cell("dps", 1.0, 5.0, distance=1.0, frechet=9.0), cell("mfm-g-1", 1.0, 4.0, distance=2.0, frechet=8.0),
        cell("mfm-g-1", 2.0, 4.0, distance=1.9, frechet=7.0), cell("ode", 1, 1.0, distance=3.0, frechet=7.0),
        cell("tds-64", 1.0, 0.9, distance=2.9, frechet=None), cell("mfm-gf-4", 1.0, 4.0, distance=2.0, frechet=8.0),
    ]  # fmt: skip
    assert [cells.index(c) for c in race_cells.frontier(cells, "distance")] == [0, 1, 3, 5]  # equal ones stay, both
    assert [cells.index(c) for c in race_cells.frontier(cells, "frechet")] == [0, 2]
    assert race_cells.frontier([], "distance") == []


def test_a_whole_race(monkeypatch):
    """On exact draws: steering raises its own reward, cells are complete, and a method that breaks is said so."""
    x = images(4)
    setup = made(guide=Nearest(x))
    broken = race.run

    def run(setup, v, reward, *rest):
        samples, result = broken(setup, v, reward, *rest)
        return (samples * torch.nan if v.name == "dps" else samples), result

    monkeypatch.setattr(race, "run", run)
    config = race.RaceConfig(
        rewards=("margin", "slant"), methods=("mfm-gf-8", "dps", "none", "mfm-gf-rescale-8"), strengths=(4.0,),
        rescales=(0.01, 1.0), samples=64, steps=10, base_steps=10, pool=1000, best_of=(1, 10, 500),
    )  # fmt: skip
    found = race.Race(setup, config).run()
    for name, one in found.metrics["rewards"].items():
        cells = {(c["method"], c.get("n", c.get("strength"))): c for c in one["cells"]}
        assert len(cells) == 9 + 5
        assert cells["dps", 4.0] == {"method": "dps", "strength": 4.0, "lost": 64}
        scores = scored(image_reward(setup, name), x)
        steered, free = cells["mfm-gf-8", 4.0], cells["none", 0.0]
        assert steered["reward"] > free["reward"] + 0.5 * one["data"]["reward_std"]
        # γ is the length of the steering: a hundredth of the drift's moves next to nothing
        gentle, firm = cells["mfm-gf-rescale-8", 0.01], cells["mfm-gf-rescale-8", 1.0]
        assert gentle["reward"] < free["reward"] + 0.3 * one["data"]["reward_std"]
        assert firm["reward"] > gentle["reward"] + 0.5 * one["data"]["reward_std"]
        assert one["frontier"].keys() == {"distance", "frechet"}
        # best of many of a law of four images is the best of the four
        assert cells["map-1", 500]["reward"] == pytest.approx(float(scores.max()), rel=1e-4)
        assert cells["map-1", 500]["vendi"] is None  # two samples are not compared with 64
        # 64 of the four: their mean has a deviation of σ/8
        assert free["reward"] == pytest.approx(float(scores.mean()), abs=4 * one["data"]["reward_std"] / 8)
        assert free["others"].keys() == {"margin", "slant"} - {name}
        assert cells["map-4", 10]["cost"]["nfe"] == 10 * cells["map-4", 1]["cost"]["forwards"] + 10
        assert cells["ode", 1]["cost"]["forwards"] == 10
        assert one["headline"] == {}  # no MFM-G here
        assert one["data"]["target_images"] == 128
        assert one["data"]["target_reward"] > one["data"]["reward"]
        assert f"Reward {name}" in found.metrics["tables"]
        assert len(found.metrics["tables"][f"Reward {name}"]["rows"]) == 9 + 4 + 1
    assert found.samples["slant"].keys() >= {"target data", "ode 1", "ode 500", "mfm-gf-8 4", "none 0"}


def test_few_images_still_race():
    """A folder of sixty images has no 128 that are best."""
    x = images(6)
    setup = ImageSetup(Oracle(x), repeated(x, 9), repeated(x, 1), Judge(None, repeated(x, 9)))
    one = race.Race(setup, race.RaceConfig(rewards=("ink",))).races["ink"].result().data
    assert (one.target_images, one.frechet) == (60, None)


# -- inverse problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", inverse.PROBLEMS)
def test_the_truth_leaves_the_noise_alone(problem):
    """‖y − A x‖²/(p σ²) of the truth is χ²_p/p."""
    setup = made(10, 200)
    truth, _ = setup.images(200, "inverse", 0)
    seen = InverseProblem.observe(inverse.operator(problem, SHAPE), truth, 0.3, stream(0, "noise"))
    cell = inverse.fit(setup, truth[None].repeat(3, 1, 1, 1, 1), truth, None, seen)
    count = seen.y.numel()
    assert cell.residual == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert cell.psnr == cell.psnr_mean == 100  # the cap
    off = inverse.fit(setup, truth[None] + 0.3, truth, None, seen)
    assert off.residual == pytest.approx(2, abs=0.2)  # every A keeps a constant: one σ² more
    assert off.psnr == pytest.approx(20 * math.log10(2 / 0.3), abs=1e-3)
    assert off.accuracy is None


def test_operators_and_their_pictures():
    x = normal(3, *SHAPE, dtype=torch.float32)
    half = inverse.operator("inpaint", SHAPE)(x)
    assert half.shape == (3, 32)
    shown = inverse.shown("inpaint", half, x)
    torch.testing.assert_close(shown[..., :4], x[..., :4])
    assert not shown[..., 4:].any()
    for factor in (2, 4):
        shown = inverse.shown(f"sr{factor}", inverse.operator(f"sr{factor}", SHAPE)(x), x)
        assert shown.shape == x.shape
        torch.testing.assert_close(shown[:, :, 0, 0], x[:, :, :factor, :factor].mean((2, 3)))
    blurred = inverse.operator("deblur", SHAPE)(x)
    torch.testing.assert_close(inverse.shown("deblur", blurred, x), blurred)
    colour = normal(2, 3, 6, 6, dtype=torch.float32)
    shown = inverse.shown("inpaint", inverse.operator("inpaint", (3, 6, 6))(colour), colour)
    torch.testing.assert_close(shown[..., :3], colour[..., :3])
    with pytest.raises(InputError, match="did you mean 'sr4'"):
        inverse.operator("sr44", SHAPE)


def test_systems_hold_the_samples_of_an_image():
    """A pool makes no more than are asked for, which would be on its bill; particles are at least those of the name."""
    sizes = {"resampling-16": 31, "tds-64": 64, "tds-16": 31}
    assert {name: inverse.for_draws(name, 31).method.system for name in sizes} == sizes


@pytest.mark.parametrize(
    "name",
    ["mfm-gf-4", "mfm-search-4", "best-of-n-16", "resampling-16", "dps", "tds-64"]
    + [pytest.param(name, marks=pytest.mark.attack) for name in ("tds-one-64", "mfm-smc-4")],
)
def test_samples_come_in_the_order_of_their_observations(name):
    """Half of an image decides which of four it was: sample (d, b) must be image b."""
    setup = made()
    truth, _ = setup.images(12, "inverse", 0)
    assert len({tuple(row) for row in truth.flatten(1).sign().tolist()}) == 4
    seen = InverseProblem.observe(inverse.operator("inpaint", SHAPE), truth, 0.5, stream(0, "noise"))
    config = inverse.InverseConfig(images=12, draws=5, steps=30)
    x, cost = inverse.solve(setup, name, seen, config)
    assert x.shape == (5, 12, *SHAPE)
    found = Nearest(setup.model.images)(x.flatten(0, 1)).argmax(1).reshape(5, 12)
    right = (found == Nearest(setup.model.images)(truth).argmax(1)).double().mean()
    assert right == 1, name
    assert cost["nfe"] > config.steps
    if name == "tds-64":  # all 64 particles are paid for by the 5 samples that are kept
        assert cost["forwards"] == pytest.approx(64 / 5 * config.steps, rel=0.1)


def test_calibration_of_the_whole_experiment(monkeypatch):
    """Gaussian images, whose posteriors are known: exact samples pass, samples of half the spread do not."""
    spread, noise = 0.25, 0.2
    x = spread * normal(240, *SHAPE, dtype=torch.float32)
    train = ImageSet("made", x[:120])
    setup = ImageSetup(Oracle(images(2)), train, ImageSet("made", x[120:]), Judge(None, train))
    scale = 1.0

    def solve(setup, name, seen, config):
        gain = spread**2 / (spread**2 + noise**2)
        mean = torch.zeros(config.images, *SHAPE)
        mean[..., :4] = gain * seen.y.reshape(config.images, 1, 8, 4)
        std = torch.full(SHAPE, spread)
        std[..., :4] = spread * math.sqrt(1 - gain)
        drawn = randn((config.draws, config.images, *SHAPE), stream(0, "exact"))
        return mean + scale * std * drawn, {"nfe": 0.0, "seconds": 0.0}

    monkeypatch.setattr(inverse, "solve", solve)
    config = inverse.InverseConfig(problems=("inpaint",), methods=("mfm-gf-4",), images=100, draws=15)
    exact = inverse.Inverse(setup, config).run()
    one = exact.metrics["problems"]["inpaint"]["mfm-gf-4"]
    assert one["rank_p"] > 0.01
    assert one["spread_ratio"] == pytest.approx(1, abs=0.05)  # 6,400 pixels: 4 × √(1/(2·6400)) = .035
    assert exact.histograms["inpaint"]["mfm-gf-4"].sum() == 6400
    scale = 0.5
    narrow = inverse.Inverse(setup, config).run().metrics["problems"]["inpaint"]["mfm-gf-4"]
    assert narrow["rank_p"] <= 0.001
    assert narrow["spread_ratio"] == pytest.approx(2, abs=0.2)
    scale = math.nan
    lost = inverse.Inverse(setup, config).run().metrics["problems"]["inpaint"]["mfm-gf-4"]
    assert lost["lost"] == 1500  # counted, shown as grey, and the experiment goes on
    assert lost["spread_ratio"] == math.inf


# -- generation --------------------------------------------------------------------------------------------------------


def test_generation_and_copying():
    setup = made()
    setup.drift = setup.model.drift
    x = 0.1 * normal(40, *SHAPE, dtype=torch.float32)
    # held-out images lie about the four images, so that nearness to training images has a scale
    setup.held_out = ImageSet("made", images(4).repeat(10, 1, 1, 1) + x)
    config = GenerationConfig(samples=200, refine_steps=(1, 2), compose_steps=(2,), ode_steps=(1, 30))
    found = Generation(setup, config).run()
    cells = found.metrics["by_sampler"]
    assert list(cells) == ["refine-1", "refine-2", "compose-2", "ode-1", "ode-30", "drift-ode-1", "drift-ode-30"]
    assert cells["refine-1"]["copying"] == 0  # the oracle repeats what it has seen
    assert cells["ode-30"]["frechet"] < 0.1 * cells["ode-1"]["frechet"]  # one Euler step gives the mean image
    assert cells["refine-1"]["frechet"] < 0.1 * cells["ode-1"]["frechet"]
    assert cells["ode-30"]["cost"]["forwards"] == 30
    assert {len(x) for x in found.samples.values()} == {16}
    far = nearest(images(4) + 0.5, images(4))
    torch.testing.assert_close(far, torch.full((4,), 4.0))  # 64 pixels off by a half
    for bad in ({"refine_steps": (0,)}, {"refine_steps": (), "compose_steps": (), "ode_steps": ()}):
        with pytest.raises(ValueError, match="each at least 1"):
            GenerationConfig(**bad)


# -- methods and rewards by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", dict.fromkeys([*mixture.METHODS, *race.METHODS, *inverse.METHODS]))
def test_every_listed_method_has_a_meaning(name):
    found = steered.image_variant(name)
    assert name.startswith(found.method.name)
    number = found.method.shown_draws or getattr(found.method, "particles", 0)
    assert str(number) in name or not any(word.isdecimal() for word in name.split("-"))
    assert found.title
    assert ("plain" in name) == ("plain" in found.title)
    assert ("rescale" in name) == ("rescale" in found.title) == found.rescaled


def test_names_of_methods():
    def named(name):
        v = steered.image_variant(name)
        return v.method, v.renormalize

    assert named("mfm-gf-plain-16") == (mfm.MFMGF(16, recycle=1), None)
    assert named("mfm-g-plain-1") == (mfm.MFMG(1, blend=False), None)
    assert named("tds-one-8") == (mfm.TDS(particles=8, returns="one"), None)
    assert named("tds-64") == named("tds-64-all") == (mfm.TDS(particles=64), None)
    assert named("mfm-smc-4") == (mfm.SMC(4, particles=64), None)
    assert named("mfm-g-rescale-1") == (mfm.MFMG(1, blend=False), "rescale")
    assert named("mfm-gf-rescale-4") == (mfm.MFMGF(4), "rescale")
    assert named("dps-rescale") == (mfm.DPS(), "rescale")
    assert named("best-of-n-100") == (mfm.BestOfN(100), None)
    assert named("best-of-n-map-100") == (mfm.BestOfN(100, source="map"), None)
    assert named("dps-scale=.03") == (mfm.DPS(scale=0.03), None)
    assert named("tds-temper=.5-scale=.1-16") == (mfm.TDS(particles=16, temper=0.5, scale=0.1), None)
    assert named("resampling-8") == (mfm.Resampling(8, particles=64), None)
    assert steered.image_variant("dps-scale=.03").title == "DPS scale .03"
    assert steered.image_variant("mfm-g-1").title == "MFM-G, 1 draw"
    assert steered.image_variant("tds-64").title == "TDS, 64 particles"
    for bad in (
        "mfm-h-4",
        "dps-plain",
        "mfm-g-one-4",
        "dps-4",
        "mfm-gf-²",
        "exact",
        "tds-plain-64",
        "tds-rescale-64",
        "dps-scale=low",
        "dps-scales=.1",
        "mfm-gf-map-4",
        "mfm-smc-rescale-4",
        "",
        "-4",
    ):
        with pytest.raises(InputError) as caught:
            steered.image_variant(bad)
        assert "\n" not in str(caught.value)


def test_an_interruption_is_not_a_result(monkeypatch):
    """steer returns what is finished when Ctrl-C comes; an experiment must not go on to its next cell."""
    x = images(4)
    setup = made(guide=Nearest(x), judge=Nearest(x))
    asked = []

    class Stopping:
        def __call__(self, x, cond=None):
            asked.append(len(x))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steered.run(setup, steered.image_variant("mfm-gf-4"), Stopping(), 8, mfm.ODE(steps=5), stream(0))
    assert len(asked) == 1
    monkeypatch.setattr(InverseProblem, "__call__", lambda self, x, cond=None: Stopping()(x))
    truth, _ = setup.images(9, "inverse", 0)
    seen = InverseProblem.observe(inverse.operator("sr2", SHAPE), truth, 0.2, stream(0, "noise"))
    config = inverse.InverseConfig(images=9, draws=5, steps=5)
    for name in ("mfm-gf-4", "tds-64"):
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            inverse.solve(setup, name, seen, config)
        assert len(asked) == 1


def test_rewards_by_name():
    x = images(4)
    setup = made(guide=Nearest(x))
    margin = image_reward(setup, "margin:2")
    assert margin(x).argmax() == 2
    assert image_reward(setup, "margin").label == 3
    torch.testing.assert_close(scored(image_reward(setup, "margin:2", 3.0), x), 3 * margin(x))
    half = image_reward(setup, "half")
    assert half.y.shape == (32,)
    assert torch.equal(image_reward(setup, "half").y, half.y)
    # the guide's own number of classes counts: a map of images may be trained without any
    unlabelled = ImageSetup(setup.model, repeated(x, 5, classes=False), setup.held_out, setup.judge, Nearest(x))
    assert image_reward(unlabelled, "margin").label == 3
    assert len(image_reward(unlabelled, "mixture").weights) == 4
    for name, says in (
        ("margin:4", "one of 0 … 3"), ("margin:²", "one of 0 … 3"), ("margin:-1", "one of 0 … 3"),
        ("slant:3", "did you mean 'slant'"), ("slnt", "did you mean 'slant'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            image_reward(setup, name)
    for name in ("margin", "mixture"):
        with pytest.raises(InputError, match=r"mfm train made-guide .*; slant, ink and half need none"):
            image_reward(made(), name)


def test_rewards_of_looks_names_and_sums_by_name():
    x = images(4)
    setup = made(guide=Nearest(x))
    setup.train.class_names = ("Food & Drink", "Flags", "Animals", "Food")
    assert image_reward(setup, "margin:anim").label == 2
    for name, says in (
        ("margin:f", "names no class: .*Food & Drink, Flags"), ("named:smil", "pictures that have names"),
        ("colour:bleu", "did you mean 'blue'"), ("symmetry:2", "unknown reward"), ("slant+inc", "unknown reward"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            image_reward(setup, name)
    both = image_reward(setup, "slant+margin:2", 3.0)
    parts = [image_reward(setup, name) for name in ("slant", "margin:2")]
    # each over its spread on the held-out images
    expected = sum(part(x) / scored(part, setup.unseen).std() for part in parts)
    torch.testing.assert_close(both(x), 3 * expected)


def test_a_reward_that_is_the_same_for_all_data_has_a_scale():
    setup = made()
    setup.named = lambda name: lambda x, cond=None: x.new_zeros(len(x))
    assert race.Race(setup, race.RaceConfig(rewards=("flat",))).races["flat"].scale == 1
