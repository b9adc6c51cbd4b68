"""A user's own model and reward through mfm.steer; conditions reach every call, row by row."""

import math
from types import SimpleNamespace

import pytest
import torch
from closed_forms import random_map
from torch import nn

import metaflowmaps as mfm
from calls import steer
from conftest import F64, PATHS, coefficients
from metaflowmaps.random import stream
from metaflowmaps.steering import Method
from metaflowmaps.steering.problem import device_of
from metaflowmaps.work.choices import choices

STD, PULL = 0.5, 0.4  # data N(4 label, .25), reward −(x − (4 label + 1))²/(2 · .16): posterior mean 4 label + .25/.41
LABELS = torch.tensor([2, 0, -1, 1, 1, -2, 0, 2, -1, 0, 1, -2])
N = len(LABELS)
SHIFT, SPREAD = 0.25 / 0.41, math.sqrt(0.25 * 0.16 / 0.41)


def denoise(path, t, x, centre):
    """D_t(x) and the posterior's variance for N(centre, STD²)."""
    alpha, beta, *_ = (c[:, None] for c in coefficients(path, t))
    v = alpha**2 + beta**2 * STD**2
    return centre + beta * STD**2 / v * (x - beta * centre), STD**2 * alpha**2 / v


def drift_at(path, t, x, centre):
    alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(path, t))
    d, _ = denoise(path, t, x, centre)
    return alpha_dot / alpha * (x - beta * d) + beta_dot * d


def own_model(path):
    """What the README asks of a model, and nothing else."""
    return SimpleNamespace(
        path=path, event_shape=(2,), drift=lambda t, x: drift_at(path, t.double(), x.double(), 1.0).to(x)
    )


def own_reward(x):
    r = -(x - 2).square().sum(1) / 0.32
    return r


# -- two lines each --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("glass", {"num_draws": 8, "glass_steps": 12}),
        ("glass", {"num_draws": 4, "glass_steps": 12, "estimator": "mfm-g"}),
        ("dps", {}),
        ("tds", {"particles": 4}),
        ("tds", {}),
        ("none", {}),
        ("best-of-n", {"num_draws": 4}),
    ],
    ids=str,
)
def test_own_drift_and_own_reward(method, options, path):
    """From base mean 1 (deviation .5) towards 2: the exact tilt has mean 1 + .25/.41 = 1.61."""
    got = steer(own_model(path), own_reward, 64, method, steps=20, generator=stream(0), **options)
    assert got.samples.shape == (64, 2)
    assert got.samples.dtype == torch.float32
    torch.testing.assert_close(got.rewards, own_reward(got.samples))
    mean = float(got.samples.mean())
    # 128 numbers of deviation <= .5: ±.045. DPS and TDS overstate, few draws and a best of 4 understate
    if method == "none":
        assert mean == pytest.approx(1.0, abs=0.2)
    elif method == "glass":
        assert mean == pytest.approx(1 + SHIFT, abs=0.2)
    else:
        assert 1.2 < mean < 2.1, f"{mean:.2f}"
    # what a callable costs is counted by its rows
    assert got.cost["forwards"] >= 64 * 20


def test_what_a_model_lacks_is_named():
    path = PATHS["linear"]
    for name in ("path", "event_shape", "drift"):
        broken = own_model(path)
        delattr(broken, name)
        with pytest.raises(mfm.InputError, match=f"has no {name}"):
            steer(broken, own_reward, 4, "dps", steps=2)
    with pytest.raises(mfm.InputError, match="LinearPath"):
        steer(SimpleNamespace(path="linear", event_shape=(2,), drift=None), own_reward, 4, "dps", steps=2)
    for method in ("mfm-g", "mfm-gf", "mfm-search", "mfm-smc"):
        with pytest.raises(mfm.InputError, match=r"no draw.*mfm\.Glass"):
            steer(own_model(path), own_reward, 4, method, steps=2)
    with pytest.raises(mfm.InputError, match=r"exact.*needs a model with value"):
        steer(own_model(path), own_reward, 4, "exact", steps=2)
    wrong = SimpleNamespace(path=path, event_shape=(2,), drift=lambda t, x: x[:, :1])
    with pytest.raises(mfm.InputError, match=r"drift must return a tensor of shape \(4, 2\), got \(4, 1\)"):
        steer(wrong, own_reward, 4, "dps", steps=2)
    wrong.drift, wrong.draw = (lambda t, x: -x), (lambda t, x, n, generator=None, cond=None: x)
    with pytest.raises(mfm.InputError, match=r"draw must return a tensor of shape \(1, "):
        steer(wrong, own_reward, 4, "mfm-gf", steps=2)


# -- conditions ------------------------------------------------------------------------------------------------------


class Labelled:
    """N(4 label, STD²) in one dimension, with exact differentiable draws: every call must have its row's label."""

    event_shape, dtype = (1,), F64

    def __init__(self, path):
        self.path = path

    def centre(self, x, cond):
        assert cond["label"].shape == x.shape[:1], "a label a row"
        return 4.0 * cond["label"].double()[:, None]

    def drift(self, t, x, cond):
        return drift_at(self.path, t, x, self.centre(x, cond))

    def push(self, noise, t, x_t, cond):
        mean, variance = denoise(self.path, t, x_t, self.centre(x_t, cond))
        return mean + variance.sqrt() * noise

    def draw(self, t, x_t, num_draws, generator=None, cond=None):
        noise = torch.randn(num_draws, *x_t.shape, generator=generator, dtype=F64)
        return torch.stack([self.push(eps, t, x_t, cond) for eps in noise])


class Drawing(Labelled):
    """The same without a push: draws come by draw() alone."""

    push = property()

    def draw(self, t, x_t, num_draws, generator=None, cond=None):
        mean, variance = denoise(self.path, t, x_t, self.centre(x_t, cond))
        return mean + variance.sqrt() * torch.randn(num_draws, *x_t.shape, generator=generator, dtype=F64)


def of_label(x, cond):
    assert cond["label"].shape == x.shape[:1], "a label a row"
    return -(x[:, 0] - 4 * cond["label"] - 1).square() / (2 * PULL**2)


CALLS = {
    "none": ("none", {}),
    "mfm-gf": ("mfm-gf", {"num_draws": 3}),
    "mfm-gf, 1 draw": ("mfm-gf", {"num_draws": 1}),
    "mfm-gf, draws one by one": ("mfm-gf", {"num_draws": 3, "chunk": 1}),
    "mfm-gf, last chunk of 1": ("mfm-gf", {"num_draws": 3, "chunk": 2}),
    "mfm-g": ("mfm-g", {"num_draws": 3, "chunk": 2}),
    "mfm-g, 1 draw": ("mfm-g", {"num_draws": 1}),
    "mfm-g, two passes": ("mfm-g", {"num_draws": 3, "chunk": 2, "passes": 2}),
    "mfm-search": ("mfm-search", {"num_draws": 2, "particles": 3}),
    "mfm-smc": ("mfm-smc", {"num_draws": 2, "particles": 4, "returns": "one"}),
    "mfm-smc, by gradients": ("mfm-smc", {"num_draws": 2, "particles": 4, "returns": "one", "guide": "mfm-g"}),
    "dps": ("dps", {}),
    "tds": ("tds", {"particles": 4, "returns": "one"}),
    "best-of-n": ("best-of-n", {"num_draws": 3}),
    "best-of-n, one step": ("best-of-n", {"num_draws": 3, "source": "map"}),
    "resampling": ("resampling", {"num_draws": 6, "particles": 1}),
    "mfm-anneal": ("mfm-anneal", {"num_draws": 2, "particles": 1}),
    "glass": ("glass", {"num_draws": 3, "glass_steps": 4}),
    "glass, g": ("glass", {"num_draws": 2, "glass_steps": 4, "estimator": "mfm-g", "chunk": 1}),
}


# both processes for each; batches that are whole and batches that are cut take turns
TURNS = [
    (name, (4096, 5)[(i + j) % 2], process) for i, name in enumerate(CALLS) for j, process in enumerate(("ode", "sde"))
]


@pytest.mark.parametrize(("name", "batch_size", "process"), TURNS)
def test_every_row_keeps_its_label(name, batch_size, process):
    """Labels 4 apart, deviations .5: a label that went astray once would be seen."""
    method, options = CALLS[name]
    path = PATHS["linear" if process == "ode" else "trigonometric"]
    got = steer(
        Labelled(path), of_label, N, method, steps=6, process=process, cond={"label": LABELS}, batch_size=batch_size,
        generator=stream(0), **options,
    )  # fmt: skip
    off = got.samples[:, 0] - 4 * LABELS
    # exact: SHIFT ± SPREAD; base: 0 ± .5. All within 5 base deviations (chance 1e-5 for 12), a wrong label is 8 away
    assert float(off.abs().max()) < 2.5
    torch.testing.assert_close(got.rewards, of_label(got.samples, {"label": LABELS}))
    if method != "none":
        assert float(off.mean()) > 0.1  # base: ±.14; the reward pulls by .61
    assert got.info["nonfinite"] == 0


@pytest.mark.parametrize("name", ["mfm-gf", "mfm-gf, 1 draw", "mfm-search", "mfm-smc"])
def test_draws_of_a_model_keep_their_label(name):
    method, options = CALLS[name]
    got = steer(
        Drawing(PATHS["linear"]), of_label, N, method, steps=12, cond={"label": LABELS}, generator=stream(0), **options
    )
    assert float((got.samples[:, 0] - 4 * LABELS).abs().max()) < 2.5


@pytest.mark.parametrize(
    "wrap", [lambda r: r, lambda r: mfm.rewards.WeightedSum([(1.0, mfm.rewards.Tempered(r, 1.0))])]
)
def test_an_observation_a_row_is_never_another_rows(wrap):
    """InverseProblem takes one y a row: its rows stay together, where chunks would score them against another row's y.

    (Chunks of 4 with 2 draws are 8 rows, as many as y has: that would not even be noticed.)
    """
    y = (4.0 * LABELS[:8] + 1).double()[:, None]
    reward = wrap(mfm.rewards.InverseProblem(lambda x: x, y, PULL))

    def run(method="mfm-gf", n=8, cond=True, **options):
        label = {"label": LABELS[:n]} if cond else None
        return steer(
            Labelled(PATHS["linear"]), reward, n, method, **{"num_draws": 2, "steps": 12, **options}, cond=label,
            generator=stream(0),
        )  # fmt: skip

    whole = run()
    assert float((whole.samples - y).abs().max()) < 2.5
    assert torch.equal(run(batch_size=4).samples, whole.samples)
    for method, options in (("mfm-search", {"particles": 3}), ("best-of-n", {}), ("mfm-smc", {"particles": 1})):
        assert float((run(method, batch_size=4, **options).samples - y).abs().max()) < 2.5
    with pytest.raises(mfm.InputError, match="num_samples=8"):
        run(n=4)
    # particles of one system replace each other, and a second pass leaves rows out
    for method, options in (("tds", {"particles": 2}), ("tds", {}), ("mfm-smc", {}), ("mfm-g", {"passes": 2})):
        with pytest.raises(mfm.InputError, match="one observation a sample"):
            run(method, **options)


def test_labels_of_a_map_reach_its_network(path):
    """A MetaFlowMap with classes: one label for all rows is that label's run, and labels matter."""
    model = random_map(path, num_classes=3)
    for method in ("none", "mfm-gf", "mfm-g", "dps", "glass"):
        made = {}
        for name, label in (
            ("0", torch.zeros(4)),
            ("2", torch.full((4,), 2.0)),
            ("mixed", torch.tensor([0.0, 2, 2, 0])),
        ):
            made[name] = steer(
                model, lambda x: -0.1 * x.square().sum(1), 4, method, steps=3, cond={"label": label.long()},
                generator=stream(0),
            ).samples  # fmt: skip
        assert not torch.isclose(made["0"], made["2"]).any()
        expected = torch.stack([made["0"][0], made["2"][1], made["2"][2], made["0"][3]])
        torch.testing.assert_close(made["mixed"], expected, rtol=1e-5, atol=1e-5)


def test_guidance_is_passed_as_it_is():
    """cond may hold floats too."""
    seen = []

    def drift(t, x, cond):
        seen.append(cond["guidance"])
        return -x

    guidance = torch.tensor([1.0, 2.5, 1.0, 4.0])
    model = SimpleNamespace(path=PATHS["linear"], event_shape=(2,), drift=drift)
    steer(
        model, own_reward, 4, "glass", num_draws=2, glass_steps=2, steps=2, cond={"guidance": guidance},
        generator=stream(0),
    )  # fmt: skip
    assert {len(v) for v in seen} == {4, 8}
    for v in seen:
        assert v.tolist() == guidance.repeat(len(v) // 4).tolist()


def test_particles_of_one_system_share_a_condition(path):
    labels = torch.tensor([1, 0, 1, 0])  # row m·S + s: system 0 is label 1, system 1 is label 0
    got = steer(
        Labelled(path), of_label, 4, "mfm-smc", num_draws=2, particles=2, steps=8, cond={"label": labels},
        generator=stream(0),
    )  # fmt: skip
    assert float((got.samples[:, 0] - 4 * labels).abs().max()) < 2.5
    with pytest.raises(mfm.InputError, match="share cond"):
        steer(Labelled(path), of_label, 4, "mfm-smc", particles=2, steps=8, cond={"label": torch.tensor([1, 1, 0, 0])})


def test_bad_conditions_are_refused():
    for bad in (torch.zeros(3), torch.zeros(4, 1), [0, 1, 2, 3]):
        with pytest.raises(mfm.InputError, match=r"cond\['label'\] must be a tensor of shape \(4,\)"):
            steer(Labelled(PATHS["linear"]), of_label, 4, "mfm-gf", steps=2, cond={"label": bad})


def test_no_condition_at_all():
    got = steer(own_model(PATHS["linear"]), own_reward, 4, "dps", steps=2, cond={}, generator=stream(0))
    same = steer(own_model(PATHS["linear"]), own_reward, 4, "dps", steps=2, generator=stream(0))
    assert torch.equal(got.samples, same.samples)


def test_modules_are_rewards_and_models(path):
    """An nn.Module reward keeps its parameters free of gradients; so does the model's network."""
    reward = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    model = random_map(path)
    got = steer(model, reward, 4, "mfm-g", steps=3, num_draws=2, generator=stream(0))
    assert got.samples.shape == (4, 2)
    assert not got.samples.requires_grad
    assert not got.rewards.requires_grad
    assert all(p.grad is None for p in [*reward.parameters(), *model.parameters()])


def test_every_method_is_covered():
    assert {method for method, _ in CALLS.values()} | {"exact", "rejection"} == set(choices(Method))


def test_samples_are_made_where_the_model_says_or_its_weights_are():
    assert device_of(SimpleNamespace(device="meta")) == torch.device("meta")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(SimpleNamespace()) == torch.device("cpu")
