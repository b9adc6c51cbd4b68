"""Foreign networks in every convention, against an exact mixture whose posterior means are computed here."""

import math
from types import SimpleNamespace

import pytest
import torch

import metaflowmaps as mfm
from calls import steer
from metaflowmaps.errors import InputError

MEANS = torch.tensor([[-2.0, 1.0], [1.5, 0.5], [0.0, -2.0]], dtype=torch.float64)
LOG_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
VARIANCE = 0.3
LAW = mfm.GaussianMixture(MEANS, VARIANCE, LOG_WEIGHTS.exp())
TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def means(y, a, b, only=None):
    """E[ε | y], E[x_1 | y] for y = a ε + b x_1, by Bayes' rule: y given a component is N(b μ, (a² + b² v) Id)."""
    a, b = a[:, None], b[:, None]
    spread, off = a**2 + b**2 * VARIANCE, y[:, None] - b[..., None] * MEANS
    log = LOG_WEIGHTS - (off**2).sum(-1) / (2 * spread)
    if only is not None:  # label 3 is the null class
        log = torch.where((torch.arange(3) == only[:, None]) | (only == 3)[:, None], log, -torch.inf)
    share = log.softmax(1)[..., None]
    noise, data = (a / spread)[..., None] * off, MEANS + (b * VARIANCE / spread)[..., None] * off
    return (share * noise).sum(1), (share * data).sum(1)


def weights(schedule, clock, time):
    """(a, b, ȧ, ḃ) of the schedule at its own clock, the rates by that clock."""
    if schedule in ("linear", "trigonometric"):
        t = clock if time == "data-at-1" else 1 - clock
        sign = 1 if time == "data-at-1" else -1
        if schedule == "linear":
            return 1 - t, t, -sign * torch.ones_like(t), sign * torch.ones_like(t)
        h = math.pi / 2
        return (h * t).cos(), (h * t).sin(), -sign * h * (h * t).sin(), sign * h * (h * t).cos()
    if schedule == "exploding":
        return clock, torch.ones_like(clock), torch.ones_like(clock), torch.zeros_like(clock)
    table = TABLE if time == "data-at-0" else TABLE.flip(0)
    logs = (table / (1 - table)).log() / 2
    left = clock.floor().long().clamp(0, 998)
    ratio = logs[left] + (clock - left) * (logs[left + 1] - logs[left])  # log(b/a), linear between steps
    return torch.sigmoid(-2 * ratio).sqrt(), torch.sigmoid(2 * ratio).sqrt(), None, None


def network(predicts, schedule, time, calls=None, classes=False):
    def run(y, clock, label=None):
        if calls is not None:
            calls.append((y, clock, label))
        a, b, a_dot, b_dot = weights(schedule, clock, time)
        noise, data = means(y, a, b, label if classes else None)
        return {
            "data": lambda: data,
            "noise": lambda: noise,
            "score": lambda: -noise / a[:, None],
            "v": lambda: b[:, None] * noise - a[:, None] * data,
            "velocity": lambda: a_dot[:, None] * noise + b_dot[:, None] * data,
        }[predicts]()

    return run


CONVENTIONS = [
    (predicts, schedule, time)
    for schedule in ("linear", "trigonometric", "table", "exploding")
    for time in ("data-at-1", "data-at-0")
    for predicts in ("velocity", "noise", "data", "score", "v")
    if not (predicts == "velocity" and schedule in ("table", "exploding"))
    and not (schedule == "exploding" and time == "data-at-1")
]


def wrapped(predicts, schedule, time, **options):
    given = {"table": TABLE if time == "data-at-0" else TABLE.flip(0)}.get(schedule, schedule)
    make = network(predicts, schedule, time, options.pop("calls", None), options.get("num_classes", 0) > 0)
    return mfm.wrap(make, predicts, time, given, event_shape=(2,), **options)


@pytest.mark.parametrize(("predicts", "schedule", "time"), CONVENTIONS)
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_the_drift_is_the_exact_one_in_every_convention(predicts, schedule, time, path):
    model = wrapped(predicts, schedule, time)
    model.path = mfm.LinearPath() if path == "linear" else mfm.TrigonometricPath()
    g = torch.Generator().manual_seed(0)
    ours = model.path
    t = torch.tensor([0.02, 0.1, 0.35, 0.5, 0.77, 0.97], dtype=torch.float64)
    x = 2 * torch.randn(6, 2, generator=g, dtype=torch.float64)
    exact = LAW.drift(ours, t, x)
    # float64; forms that divide by the weight of data or of noise lose a factor 1/.02 at either end
    torch.testing.assert_close(model.drift(t, x), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("predicts", "schedule", "time"), CONVENTIONS)
def test_the_ends_are_finite_and_near_the_exact_drift(predicts, schedule, time):
    model = wrapped(predicts, schedule, time)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in (0.0, 1.0):
        held = 0.02 if schedule == "table" else 0.01  # ratios are held at 1e-3, at 1/80 and at the table's ends
        exact = LAW.drift(mfm.LinearPath(), min(max(t, 1e-6), 1 - 1e-6), x)
        assert (model.drift(t, x) - exact).abs().max() < 10 * held * (1 + exact.abs().max())


def test_a_wrong_convention_is_another_drift():
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64), 0.3
    right = LAW.drift(mfm.LinearPath(), t, x)
    reversed_time = mfm.wrap(network("velocity", "linear", "data-at-0"), "velocity", "data-at-1", event_shape=(2,))
    other_kind = mfm.wrap(network("noise", "linear", "data-at-1"), "data", "data-at-1", "linear", event_shape=(2,))
    for wrong in (reversed_time, other_kind):
        assert (wrong.drift(t, x) - right).abs().max() > 0.3


def test_the_clock_is_scaled_and_the_state_rescaled():
    calls = []
    model = wrapped("velocity", "linear", "data-at-0", calls=calls)
    x = torch.ones(2, 2, dtype=torch.float64)
    model.network.scale = 1000.0
    with pytest.raises(AssertionError):  # fed 700 where the stand-in knows [0, 1]: only what it was fed matters here
        assert model.drift(0.3, x).isnan().any()
    torch.testing.assert_close(calls[0][1], torch.full((2,), 700.0, dtype=torch.float64))
    torch.testing.assert_close(calls[0][0], x)  # the same path: the state as it is


def test_guidance_and_the_null_class():
    calls = []
    model = wrapped("noise", "table", "data-at-0", num_classes=3, calls=calls)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y, w, t = torch.tensor([0, 1, 2, 3]), torch.tensor([2.0, 1.0, 3.0, 5.0], dtype=torch.float64), 0.6
    each = [mfm.GaussianMixture(MEANS[k : k + 1], VARIANCE).drift(model.path, t, x) for k in range(3)]
    null = LAW.drift(model.path, t, x)
    of_class = torch.stack([each[0][0], each[1][1], each[2][2], null[3]])
    out = model.drift(t, x, {"label": y, "guidance": w})
    torch.testing.assert_close(out, null + w[:, None] * (of_class - null), rtol=1e-9, atol=1e-9)  # float64
    assert len(calls) == 2
    torch.testing.assert_close(model.drift(t, x), null, rtol=1e-9, atol=1e-9)
    assert bool((calls[-1][2] == 3).all())
    with pytest.raises(InputError, match=r"0\.\.3"):
        model.drift(t, x, {"label": torch.tensor([0, 1, 2, 4])})
    with pytest.raises(InputError, match="needs a label"):
        model.drift(t, x, {"guidance": w})
    with pytest.raises(InputError, match="num_classes=N"):
        wrapped("noise", "table", "data-at-0").drift(t, x, {"label": y})


def test_the_null_class_is_where_the_state_is():
    """The meta device stands in for a GPU, whose embeddings take no index from the CPU."""
    label, _ = wrapped("noise", "table", "data-at-0", num_classes=3)._conditions(None, torch.empty(4, 2, device="meta"))
    assert label.device.type == "meta"
    assert label.shape == (4,)


@pytest.mark.parametrize("method", ["none", "dps", "tds", "glass", "best-of-n"])
def test_drift_only_methods_steer_it_as_they_steer_the_mixture(method):
    """The wrapped network in a convention far from ours, and the mixture itself: the same samples, call for call."""
    model = wrapped("noise", "table", "data-at-0")
    own = SimpleNamespace(path=model.path, event_shape=(2,), drift=lambda t, x, cond=None: LAW.drift(model.path, t, x))
    reward = mfm.rewards.LinearGaussian([[1.0, 0.5]], [0.3], 0.7)
    drawn = [
        steer(m, reward, 8, method=method, num_draws=2, steps=6, generator=torch.Generator().manual_seed(4))
        for m in (model, own)
    ]
    # float32 through six steps; near t = 0 the table's end holds the ratio at .0063
    torch.testing.assert_close(drawn[0].samples, drawn[1].samples, rtol=0, atol=0.05)
    assert drawn[0].cost["forwards"] == drawn[1].cost["forwards"] > 0


def test_it_draws_from_posteriors_and_generates():
    """Exact up to the error of the ODE, which 60 Euler steps keep below the noise of 4,000 draws."""
    model = wrapped("noise", "table", "data-at-0")
    t, x_t = 0.5, torch.tensor([[0.4, -0.2]])
    exact = LAW.denoise(model.path, t, x_t)[0]
    g = torch.Generator().manual_seed(0)
    draws = model.draw(t, x_t, 4000, steps=60, generator=g)
    assert draws.shape == (4000, 1, 2)
    bound = 4 * draws[:, 0].std(0) / 4000**0.5 + 0.02
    assert bool(((draws[:, 0].mean(0) - exact).abs() < bound).all())
    samples, truth = model.generate(4000, steps=60, generator=g), LAW.sample(4000, g)
    bound = 4 * (truth.var(0) / 2000) ** 0.5 + 0.05
    assert bool(((samples.mean(0) - truth.mean(0)).abs() < bound).all())
    assert bool(((samples.std(0) / truth.std(0) - 1).abs() < 0.1).all())
    # to the few-draws methods it is a model like any other, its draws counted by their steps
    reward = mfm.rewards.LinearGaussian([[1.0, 0.5]], [0.3], 0.7)
    one, two = (mfm.steer(model, reward, 4, mfm.MFMGF(num_draws=n), mfm.ODE(steps=2), seed=0) for n in (1, 3))
    assert two.cost["forwards"] - one.cost["forwards"] >= 4 * 2 * 2 * 30


def test_a_map_is_taught_by_it():
    from metaflowmaps.parameterization import chart_class
    from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher

    model = wrapped("data", "exploding", "data-at-0")
    g = torch.Generator().manual_seed(5)
    z, x_t = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(2))
    a, t = (torch.rand(5, generator=g, dtype=torch.float64) * 0.9 for _ in range(2))
    chart = chart_class("gaussian")(model.path, t, x_t, torch.zeros(2, dtype=torch.float64), 1.5)
    taught = GlassTeacher(model.path, model.drift).at(chart, t, x_t)(a, z)
    exact = ExactTeacher(model.path, LAW).at(chart, t, x_t)(a, z)
    torch.testing.assert_close(taught, exact, rtol=1e-7, atol=1e-7)  # float64, two routes of some ten divisions


def test_networks_of_diffusers():
    """A U-Net as diffusers has it: called by its own argument names, unwrapped, converted by the formula."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
            num_class_embeds=5,
        ).eval()  # fmt: skip
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=1, sample_size=8,
            num_embeds_ada_norm=5, norm_num_groups=1,
        ).eval()  # fmt: skip
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
    x, t, y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), 0.4, torch.tensor([1, 4])
    table = scheduler.alphas_cumprod.double()
    logs = (table / (1 - table)).log() / 2
    wanted = math.log(0.4 / 0.6)
    left = int((logs > wanted).sum()) - 1
    k = left + float((logs[left] - wanted) / (logs[left] - logs[left + 1]))
    for network, classes in ((unet, 4), (transformer, 5)):
        model = mfm.wrap(network, "noise", "data-at-0", scheduler, num_classes=classes)
        assert model.event_shape == (3, 8, 8)
        with torch.no_grad():
            out = model.drift(t, x, {"label": y})
            eps = network(x / math.sqrt(0.4**2 + 0.6**2), torch.full((2,), k), class_labels=y).sample[:, :3]
        # y = x/√(α² + β²) has unit weights, as the table has; D = (x − α ε)/β, b = D − ε; k is known to 1e-4 in float32
        torch.testing.assert_close(out, (x - 0.6 * eps) / 0.4 - eps, rtol=1e-3, atol=1e-3)
    assert mfm.wrap(unet, "noise", "data-at-0", "ddpm", num_classes=4).drift(t, x).shape == x.shape


def test_what_cannot_be_wrapped_is_refused_with_the_fix():
    good = network("noise", "table", "data-at-0")
    for arguments, message in (
        ((good, "noize"), "did you mean 'noise'"),
        ((good, "noise", "data-at-2"), "data-at-0"),
        ((good, "noise", "data-at-0", "liner"), "did you mean 'linear'"),
        ((good, "velocity", "data-at-0", TABLE), "predicts='v'"),
        ((good, "noise", "data-at-1", TABLE), "must rise"),
        ((good, "noise", "data-at-1", "exploding"), "time='data-at-0'"),
        ((3,), "must be callable"),
    ):
        with pytest.raises(InputError, match=message) as error:
            mfm.wrap(*arguments, event_shape=(2,))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="event_shape=\\(C, H, W\\)"):
        steer(mfm.wrap(good, "noise", "data-at-0", TABLE), lambda x: x.sum(1), 2, method="none", steps=2)
    with pytest.raises(InputError, match="must return a tensor"):
        mfm.wrap(lambda x, t: "no", event_shape=(2,)).drift(0.5, torch.zeros(1, 2))
    with pytest.raises(InputError, match="returns \\(1, 3\\)"):
        mfm.wrap(lambda x, t: torch.zeros(1, 3), event_shape=(2,)).drift(0.5, torch.zeros(1, 2))


def test_a_guided_drift_is_counted_as_its_two_calls():
    rows = []

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.size = torch.nn.Parameter(torch.ones(()))

        def forward(self, y, clock, label=None):
            rows.append(len(y))
            return self.size * y * 0.1 * (1 + label[:, None])

    model = mfm.wrap(Network(), event_shape=(2,), num_classes=3)
    label = torch.tensor([0, 1, 2])
    for method, scale in (("none", 1.0), ("none", 2.0), ("dps", 2.0), ("best-of-n", 2.0), ("glass", 2.0)):
        rows.clear()
        out = steer(
            model, lambda x: -x.square().sum(1), 3, method, 2, 3, cond={"label": label, "guidance": scale + 0 * label}
        )
        assert out.cost["forwards"] == sum(rows), (method, scale)
        if method == "dps":
            assert out.cost["backwards"] == 2 * 3 * 3  # two calls in each of three steps of three samples


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_networks_of_any_precision_take_states_of_any(low):
    """States keep their dtype; the weights of noise and data, and the clock, do not come down to the network's."""
    clocks = []

    class Network(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.size = torch.nn.Parameter(torch.ones((), dtype=dtype))

        def forward(self, y, timestep):
            clocks.append(timestep)
            assert y.dtype == self.size.dtype
            return self.size * y * 0.5

    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    model, exact = (mfm.wrap(Network(d), "noise", "data-at-0", "ddpm", event_shape=(2,)) for d in (low, torch.float32))
    right = exact.drift(0.05, x)
    torch.testing.assert_close(clocks[-1], clocks[-1].float())
    for given in (low, torch.float32, torch.float64):
        out = model.drift(0.05, x.to(given))
        assert out.dtype == given
        # half a unit in the last place of y and of f, times 1/β = 20 of the drift's form
        bound = 40 * torch.finfo(low).eps * x.abs().max() + 2 * torch.finfo(low).eps * right.abs().max()
        assert (out.double() - right.double()).abs().max() < bound
        torch.testing.assert_close(clocks[-1].double(), clocks[0].double(), rtol=1e-5, atol=0)
    assert model.dtype == torch.float32  # what steering draws its noise in


def test_the_clock_goes_by_its_name_and_what_is_given_once_goes_to_every_row():
    seen = {}

    def network(hidden, encoder_hidden_states, timestep):
        seen.update(text=encoder_hidden_states, clock=timestep)
        return hidden * encoder_hidden_states.mean((1, 2))[:, None]

    text = torch.ones(1, 3, 5)
    model = mfm.wrap(network, "velocity", "data-at-0", time_scale=1000.0, event_shape=(2,), encoder_hidden_states=text)
    assert model.drift(0.25, torch.ones(4, 2)).shape == (4, 2)
    assert seen["text"].shape == (4, 3, 5)
    torch.testing.assert_close(seen["clock"], torch.full((4,), 750.0))


def test_tables_of_numpy_and_of_schedulers_that_end_in_noise():
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    for table in (TABLE.numpy(), TABLE.tolist()):
        one, two = (
            mfm.wrap(lambda y, k: y * k[:, None] / 1e3, "v", "data-at-0", t, event_shape=(2,)) for t in (table, TABLE)
        )
        assert torch.equal(one.drift(0.3, x), two.drift(0.3, x))
    lifted = TABLE.clone()
    lifted[-2:] = torch.tensor([4e-9, 6e-8])  # as diffusers' Euler scheduler has it with zero terminal SNR
    drift = mfm.wrap(lambda y, k: y, "v", "data-at-0", lifted, event_shape=(2,)).drift(0.0, x)
    torch.testing.assert_close(drift, -x - x, rtol=0, atol=1e-3)  # D = (b y − a f), E = (a y + b f) at b = 0: −y, y


def test_conditions_and_schedules_are_checked_in_one_line():
    model = wrapped("noise", "table", "data-at-0", num_classes=3)
    x = torch.zeros(3, 2)
    for cond, message in (
        ({"label": torch.tensor([0.0, 1.0, 2.0])}, "whole numbers"),
        ({"label": [0, 1, 2]}, "got list"),
        ({"label": torch.tensor([0])}, r"shape \(3,\)"),
        ({"label": torch.tensor([0, 1, 2]), "guidance": 2.0}, "got float"),
        ({"labels": torch.tensor([0, 1, 2])}, "did you mean 'label'"),
    ):
        with pytest.raises(InputError, match=message):
            model.drift(0.5, x, cond)
    long = SimpleNamespace()
    for options, message in (
        ({"schedule": long}, "unknown schedule 'SimpleNamespace'"),
        ({"schedule": ("exploding", "a")}, "largest σ"),
        ({"schedule": ("exploding", 1.0, 2.0)}, "one number"),
        ({"num_classes": -1}, "num_classes"),
    ):
        with pytest.raises(InputError, match=message) as error:
            mfm.wrap(lambda y, k: y, "noise", "data-at-0", **options)
        assert "\n" not in str(error.value)
