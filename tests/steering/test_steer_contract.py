"""mfm.steer as a function: what it may depend on, what it refuses and how, what it keeps when something goes wrong."""

import json
import math
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from calls import steer
from conftest import CASES, F64, PATHS, normal
from metaflowmaps.draws import DrawOptions
from metaflowmaps.random import stream
from metaflowmaps.steering import GuidedMethod, Method, SteeringFailed
from metaflowmaps.work.choices import built, choices, choose, dumped
from metaflowmaps.work.progress import Bar

PATH = PATHS["linear"]
MODEL = random_map(PATH)
EXACT = mfm.ExactModel(PATH, CASES["per-component-full"].law)
LINEAR = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6]), 0.8, 1.0)
GRADIENT_METHODS = [
    ("mfm-g", {}), ("mfm-g", {"blend": False, "passes": 2}), ("dps", {}), ("tds", {}),
    ("glass", {"estimator": "mfm-g", "glass_steps": 2}), ("mfm-smc", {"guide": "mfm-g"}),
]  # fmt: skip


def mild(x):
    return -0.2 * (x - 0.5).square().sum(1)


def run(method, reward=mild, n=6, model=None, seed=0, **options):
    if method == "exact":
        model, reward = EXACT, LINEAR
    return steer(
        model or MODEL, reward, n, method, **{"num_draws": 2, "steps": 4, "generator": stream(seed), **options}
    )


# -- a function of its generator -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", choices(Method))
def test_results_are_a_function_of_the_generator(method):
    state = torch.random.get_rng_state()
    one, again, other = (run(method, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's own generator is left alone
    assert torch.equal(one.samples, again.samples)
    assert torch.equal(one.rewards, again.rewards)
    assert not torch.isclose(one.samples, other.samples).any()
    assert one.info.keys() == again.info.keys()
    for name in one.info:
        torch.testing.assert_close(one.info[name], again.info[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(one.seeds, again.seeds)
    assert not (one.seeds == other.seeds).any()


def test_the_bar_is_as_long_as_the_work(monkeypatch):
    """Else it tells a wrong time left: two batches of four steps."""
    done = []

    class Counted(Bar):
        def __init__(self, total, title):
            super().__init__(0, title)
            done.append(-total)

        def advance(self, by=1):
            done.append(by)

    monkeypatch.setattr(sys.modules["metaflowmaps.steering.steer"], "Bar", Counted)
    run("mfm-gf", n=4, batch_size=2, progress=True)
    assert done == [-8] + 8 * [1]


@pytest.mark.parametrize("method", choices(Method))
def test_watching_changes_nothing(method, capsys, monkeypatch):
    """A callback, a progress bar on a terminal, and a graph around the call."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = []
    plain = run(method)
    watched = run(method, callback=told.append, progress=True)
    with torch.enable_grad():
        inside = run(method)
    assert torch.equal(plain.samples, watched.samples)
    assert torch.equal(plain.samples, inside.samples)
    assert not inside.samples.requires_grad
    assert [(s.batch, s.batches, s.step, s.steps) for s in told] == [(0, 1, k, len(told)) for k in range(len(told))]
    assert len(told) == (1 if method in ("rejection", "resampling") else 4)
    times = [s.time for s in told]
    assert times[-1] == 1
    assert times == sorted(times)
    out, err = capsys.readouterr()
    assert out == ""  # progress is for stderr
    assert "100%" in err


@pytest.mark.parametrize("method", choices(Method))
def test_shapes_and_scores(method):
    got = run(method, n=8, process="sde" if method not in ("mfm-search", "mfm-smc", "tds") else "ode")
    assert got.samples.shape == (8, 2)
    assert got.rewards.shape == (8,)
    torch.testing.assert_close(got.rewards, (LINEAR if method == "exact" else mild)(got.samples))
    assert len(got.samples) == 8
    assert not got.interrupted
    one_step = method in ("rejection", "resampling")
    assert len(got.info["time"]) == (1 if one_step else 4)
    assert got.cost["nfe"] > 0


def test_chunks_of_samples_are_independent_and_in_order():
    """A generator that was used before gives other numbers."""
    got = run("mfm-gf", n=7, batch_size=3)
    assert got.samples.shape == (7, 2)
    assert not torch.isclose(got.samples[:3], got.samples[3:6]).any()
    assert torch.equal(run("mfm-gf", n=3, batch_size=3).samples, got.samples[:3])
    g = stream(0)
    first, second = (steer(MODEL, mild, 3, "none", steps=2, generator=g).samples for _ in range(2))
    assert not torch.isclose(first, second).any()


def test_info_is_averaged_over_all_chunks():
    seen = []
    got = run("mfm-gf", n=7, batch_size=3, callback=lambda s: seen.append((s.step, s.info["ess"])))
    for k in range(4):
        expected = torch.cat([ess for step, ess in seen if step == k]).double().mean()
        torch.testing.assert_close(got.info["ess"][k], expected)
    assert got.info["time"].tolist() == [0, 0.25, 0.5, 0.75]


# -- rewards that are wrong ------------------------------------------------------------------------------------------


def refused(match, method="mfm-gf", error=mfm.InputError, **options):
    with pytest.raises(error, match=match) as caught:
        run(method, **options)
    message = str(caught.value)
    assert "\n" not in message
    return caught.value


WRONG = {
    "a matrix": (lambda x: x, r"shape \(\d+,\), got \(\d+, 2\)"),
    "a number": (lambda x: 1.0, "must return a tensor of shape"),
    "a sum over the batch": (lambda x: x.sum(), r"one number a sample.*all dimensions but the first"),
    "nothing": (lambda x: None, r"got NoneType; does it end with return"),
    "nan": (lambda x: x[:, 0] * math.nan, "is nan for"),
    "inf": (lambda x: x[:, 0] * 0 + math.inf, "is inf for"),
    "elsewhere": (lambda x: x.sum(1).to("meta"), "move it there"),
    "in place": (lambda x: x.mul_(2).sum(1), r"changed its input in place.*clone"),
    "in place, past autograd": (lambda x: x.data.mul_(2).sum(1) + x.sum(1), r"changed its input in place.*clone"),
    "in place, through numpy": (
        lambda x: torch.from_numpy(np.multiply(x.detach().numpy(), 2, out=x.detach().numpy())).sum(1) + x.sum(1),
        r"changed its input in place.*clone",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("method", [m for m in choices(Method) if m != "exact"])
def test_wrong_rewards_are_refused_by_every_method(name, method):
    """Also by "none", whose samples are scored by it at the end."""
    reward, match = WRONG[name]
    refused(match, method, reward=reward)


@pytest.mark.parametrize(("method", "options"), GRADIENT_METHODS, ids=str)
def test_rewards_without_a_gradient_are_refused_where_one_is_needed(method, options):
    for reward in (
        lambda x: x.detach().sum(1),
        torch.no_grad()(mild),
        mfm.rewards.BlackBox(lambda x: x.sum(1).numpy()),
    ):
        assert "mfm-gf" in str(refused("not differentiable", method, reward=reward, **options))
        # and welcome where not
        assert run("mfm-gf", reward).samples.shape == (6, 2)


def root(x):
    """√0 at a plane that no draw meets by chance; its gradient there is not a number: 0 · ∞."""
    return -(0 * x[:, 0]).sqrt()


@pytest.mark.parametrize(("method", "options"), GRADIENT_METHODS, ids=str)
def test_a_gradient_that_is_not_finite_is_refused_by_name(method, options):
    refused("the gradient of the reward is not finite at .* mfm.MFMGF", method, reward=root, **options)
    assert run("mfm-gf", root).samples.isfinite().all()


def test_a_forbidden_draw_has_no_gradient():
    """log 0 = −inf is allowed, and what is forbidden pulls nowhere: 0 · ∞ must not reach the others."""
    got = run("mfm-g", lambda x: torch.log(x[:, 0] * (x[:, 0] > 0)), n=64, num_draws=8, blend=False)
    assert got.samples.isfinite().all()


@pytest.mark.parametrize("method", ["mfm-g", "mfm-gf", "dps", "tds"])
def test_weights_require_no_gradient_while_steering(method):
    """Their activations would be kept for a gradient nobody takes. Afterwards all is as it was."""
    seen, model = [], random_map(PATH)
    weights = [w for module in (model, HeldJudge.judge) for w in module.parameters()]
    weights[0].requires_grad_(False)
    before = [w.requires_grad for w in weights]
    reward = HeldJudge(lambda: seen.append([w.requires_grad for w in weights]))
    steer(model, reward, 3, method, num_draws=2, steps=2)
    mfm.value_gradient(model, reward, 0.5, normal(3, 2).float(), 2)
    assert len(seen) > 2
    assert sum(any(flags) for flags in seen) == 1  # the finished samples are scored outside, without any graph
    assert [w.requires_grad for w in weights] == before


class HeldJudge:
    """A reward that holds a network, as most do."""

    judge = torch.nn.Linear(2, 1)

    def __init__(self, look):
        self.network, self.look = self.judge, look

    def __call__(self, x):
        self.look()
        return self.network(x)[:, 0]


def test_sigma_cap_is_for_gradients():
    """The release caps σ² for MFM-G alone; a mean of draws needs none, and ignoring it would be silent."""
    refused("sigma_cap bounds reward gradients", "mfm-gf", sigma_cap=50.0)
    refused("sigma_cap bounds reward gradients", "glass", sigma_cap=50.0)
    free, capped = (run("mfm-g", blend=False, **cap).samples for cap in ({}, {"sigma_cap": 0.5}))
    assert not torch.allclose(free, capped)


def test_not_a_reward():
    refused("a reward is a function of x", reward=3.0)


def test_exact_needs_a_reward_that_it_knows():
    with pytest.raises(mfm.InputError, match="LinearGaussian"):
        steer(EXACT, mild, 4, "exact", steps=2)


def test_exact_draws_have_no_gradient():
    refused("pick a component.*mfm-gf", "mfm-g", model=EXACT)
    refused("pick a component.*mfm-gf", "mfm-smc", model=EXACT, guide="mfm-g")
    refused("noise='quasi' needs a posterior with push", "mfm-gf", model=EXACT, noise="quasi")


# -- calls that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid", [[0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 0.5], [0.0], [0.0, 0.5], [-0.1, 1.0], [0.0, math.nan, 1.0], [0.5, 1.1]]
)
def test_bad_grids(grid):
    refused("strictly increasing|to exactly 1", grid=torch.tensor(grid, dtype=F64))


def test_glass_refuses_an_estimator_that_makes_no_draws():
    with pytest.raises(mfm.InputError, match="the estimator of GLASS is a guided method that draws"):
        mfm.Glass(estimator=mfm.DPS())


def test_numbers_out_of_range():
    refused("num_draws must be at least 1", num_draws=0)
    refused("num_samples must be at least 1", n=0)
    refused("steps must be at least 1", steps=0)
    refused("batch_size must be at least 1", batch_size=0)
    refused("recycle must be at least 1", recycle=0)
    refused("chunk must be at least 1", chunk=0)
    refused("steps must be at least 1", "glass", glass_steps=0)
    refused("particles must be at least 1", "mfm-search", particles=0)
    refused("steps must be at least 1", map_steps=0)
    refused("map_steps belongs to a MetaFlowMap", model=EXACT, map_steps=2)
    refused("num_draws must be at least 2", num_draws=1, recycle=1, correction="jackknife")
    refused("passes must be 1", "mfm-g", passes=3)


@pytest.mark.parametrize("cap", [-3.0, 0.0, math.nan])
def test_a_cap_must_be_positive(cap):
    refused("sigma_cap", sigma_cap=cap)


def test_unknown_names_and_the_nearest():
    refused("unknown method 'mfm-gg'.*did you mean 'mfm-g'", "mfm-gg")
    refused("unknown process 'sed'.*did you mean 'sde'", process="sed")
    refused("unknown renormalize 'rescaled'.*did you mean 'rescale'", renormalize="rescaled")
    refused("unknown integrator 'eular'.*did you mean 'euler'", integrator="eular")
    refused("unknown integrator 'rk4'.*allowed are euler, heun", process="sde", integrator="rk4")
    refused("unknown grid 'unifrom'.*did you mean 'uniform'", grid="unifrom")
    refused("unknown option of mfm-gf 'recylce'.*did you mean 'recycle'", recylce=2)
    refused("unknown option of dps 'recycle'", "dps", recycle=2)
    refused("unknown centre", centre="denoize")
    refused("did you mean 'jackknife'", correction="jackknive")
    refused("did you mean 'antithetic'", noise="antithetic?")
    refused("did you mean 'global'", "mfm-search", selection="globle")
    refused("did you mean 'stochastic'", "mfm-search", transition="stochastik")
    refused("did you mean 'mfm-gf'", "glass", estimator="mfm-f")
    refused("did you mean 'systematic'", "tds", resampler="systemic")
    refused("did you mean 'all'", "mfm-smc", returns="al")
    refused("unknown guide", "mfm-smc", guide="gradients")


@pytest.mark.parametrize("method", ["mfm-search", "mfm-smc", "tds"])
def test_unknown_names_are_refused_where_they_would_not_matter(method):
    refused("did you mean 'sde'", method, process="sed")
    refused("did you mean 'euler'", method, integrator="eular")
    refused("did you mean 'rescale'", method, renormalize="rescaled")
    refused("has no integrator", method, integrator="heun")
    refused("has no renormalize", method, renormalize="clip")
    refused("has no sigma_cap", method, sigma_cap=50.0)


@pytest.mark.parametrize("method", choices(Method))
def test_methods_come_back_from_their_dumps(method):
    """What is written beside a result makes the method again, options, nested choices and all."""
    made = choose(Method, method)()
    made = made.with_draws(3) if made.draws else made
    assert built(Method, json.loads(json.dumps(dumped(made)))) == made
    assert dumped(made)["name"] == method


def test_results_come_back_from_disk(tmp_path):
    result = run("mfm-gf")
    result.save(tmp_path / "new" / "result.safetensors")  # as commands do, it makes its folder
    again = mfm.SteerResult.load(tmp_path / "new" / "result.safetensors")
    assert torch.equal(again.samples, result.samples)
    assert torch.equal(again.seeds, result.seeds)
    assert again.cost == result.cost
    assert again.info.keys() == result.info.keys()
    (tmp_path / "other.txt").write_text("no tensors")
    with pytest.raises(mfm.InputError, match="no saved result"):
        mfm.SteerResult.load(tmp_path / "other.txt")


def test_results_print_one_line():
    cost, rewards = {"nfe": 90.0}, torch.tensor([1.0, 2.0])
    result = mfm.SteerResult(torch.zeros(2, 3, 4, 4), rewards, torch.arange(2), cost, {}, True, ("few draws",))
    line = "SteerResult(2×3×4×4, mean reward 1.5, 90 evaluations each, interrupted, notes=['few draws'])"
    assert repr(result) == line


@pytest.mark.parametrize("shape", [(2,), (3,), (1, 4, 4), (3, 4, 4)])
def test_results_plot_whatever_their_shape(shape):
    x = torch.randn(7, *shape, generator=stream(0))
    result = mfm.SteerResult(x, x.flatten(1).sum(1), torch.arange(7), {"nfe": 3.0}, {})
    figure = result.plot()
    assert len(figure.axes) >= 2
    if len(shape) == 3:  # seven pictures in rows of three, a line between them; white where there are no more
        drawn = figure.axes[0].images[0].get_array()
        assert drawn.shape[:2] == (3 * 5, 3 * 5)
        assert float(drawn[10:, 5:].min()) == 1.0


# -- what is kept ----------------------------------------------------------------------------------------------------


class Breaks:
    """Good for so many calls, then not."""

    def __init__(self, calls, then):
        self.calls, self.then = calls, then

    def __call__(self, x):
        self.calls -= 1
        return mild(x) if self.calls >= 0 else self.then(x)


def fail(error):
    def then(x):
        raise error

    return then


def test_a_reward_that_breaks_in_a_later_chunk_loses_nothing():
    """4 steps a chunk: the third chunk of three samples fails, six are kept."""
    whole = run("mfm-gf", n=9, batch_size=3)
    error = refused(
        "is nan for.*6 finished samples are kept", "mfm-gf", SteeringFailed, n=9, batch_size=3,
        reward=Breaks(10, lambda x: mild(x) * math.nan),
    )  # fmt: skip
    assert isinstance(error, mfm.InputError)
    assert torch.equal(error.result.samples, whole.samples[:6])
    assert error.result.interrupted
    assert error.result.info["ess"].shape == (4,)


@pytest.mark.parametrize(
    "then", [lambda x: 3.0, lambda x: x, fail(mfm.InputError("no more")), fail(RuntimeError("out of memory"))],
    ids=["a number", "a matrix", "an InputError", "an error of its own"],
)  # fmt: skip
def test_a_broken_reward_may_not_take_the_samples_with_it(then):
    with pytest.raises(SteeringFailed) as caught:
        run("mfm-gf", Breaks(10, then), n=9, batch_size=3)
    assert caught.value.result.samples.shape == (6, 2)
    assert caught.value.result.rewards.shape == (6,)


def test_in_the_first_chunk_there_is_nothing_to_keep():
    with pytest.raises(mfm.InputError, match="is nan for") as caught:
        run("mfm-gf", Breaks(2, lambda x: mild(x) * math.nan), n=9, batch_size=3)
    assert not isinstance(caught.value, SteeringFailed)


def stop(step):
    if (step.batch, step.step) == (2, 1):
        raise KeyboardInterrupt


@pytest.mark.parametrize("callback", [stop, lambda step: (step.batch, step.step) == (2, 1)], ids=["ctrl-c", "True"])
@pytest.mark.parametrize("method", ["mfm-gf", "best-of-n", "mfm-search"])
def test_ctrl_c_keeps_finished_chunks(callback, method):
    copies = 1 if method == "mfm-gf" else 2
    options = {"particles": 2} if method == "mfm-search" else {}
    whole = run(method, n=9, batch_size=3 * copies, **options)
    got = run(method, n=9, batch_size=3 * copies, callback=callback, **options)
    assert got.interrupted
    assert len(got.samples) == 6
    assert torch.equal(got.samples, whole.samples[:6])
    assert torch.equal(got.rewards, whole.rewards[:6])


def test_ctrl_c_in_the_first_chunk_returns_no_samples():
    def at_once(step):
        raise KeyboardInterrupt

    got = run("mfm-gf", callback=at_once)
    assert got.interrupted
    assert got.samples.shape == (0, 2)
    assert got.rewards.shape == (0,)


def test_ctrl_c_keeps_conditions_apart():
    model = random_map(PATH, num_classes=3)

    def reward(x, cond):
        return mild(x) - cond["label"]

    got = steer(
        model, reward, 9, "mfm-gf", num_draws=2, steps=4, batch_size=3, cond={"label": torch.arange(9) % 3},
        callback=stop, generator=stream(0),
    )  # fmt: skip
    torch.testing.assert_close(got.rewards, mild(got.samples) - torch.arange(6) % 3)


# -- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mfm-gf", "mfm-g", "mfm-smc", "glass"])
def test_one_draw_that_has_it_all_is_said(method):
    options = {"glass_steps": 2} if method == "glass" else {}
    sharp = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6]), 0.8, 1e-3)
    with pytest.warns(UserWarning, match=r"one draw carries all the weight.*more draws.*recycle"):
        run(method, sharp, num_draws=4, **({"recycle": 1} | options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method, mild, num_draws=4, **options)


def test_a_grid_that_starts_late_is_said():
    """Pure noise is the law at t = 0; .01, where the release starts, is as good."""
    with pytest.warns(UserWarning, match=r"starts at t = 0\.3 with pure noise"):
        run("none", grid=torch.tensor([0.3, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("none", grid=torch.tensor([0.01, 1.0]))


def test_samples_that_are_not_finite_are_said():
    """A drift too stiff for its steps: every step multiplies by 1e30, which float32 leaves at the second."""
    stiff = SimpleNamespace(path=PATH, event_shape=(2,), drift=lambda t, x, cond=None: 1e30 * x)
    with pytest.warns(UserWarning, match=r"of 6 samples are not finite.*more steps.*clip"):
        got = run("none", lambda x: 0 * x.nan_to_num(0, 0, 0)[:, 0], model=stiff)
    assert int(got.info["nonfinite"]) == 6


@pytest.mark.parametrize(
    ("misplaced", "says"),
    [
        ({"steps": 4}, r"steps is an option of the process: steer\(…, process=mfm.ODE\(steps=4\)\)"),
        ({"num_draws": 8}, r"num_draws is an option of the method: steer\(…, method=mfm.MFMGF\(num_draws=8\)\)"),
        ({"batchsize": 8}, "did you mean 'batch_size'"),
    ],
    ids=["process", "method", "unknown"],
)
def test_an_option_in_the_wrong_place_is_told_where_it_belongs(misplaced, says):
    with pytest.raises(mfm.InputError, match=says):
        mfm.steer(MODEL, mild, 4, "mfm-gf", **misplaced)


# -- methods of one's own that are wrong -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair(GuidedMethod):
    """Returns a pair."""

    name = "pair"

    def guide(self, problem, memory, t, x):
        return x, x


@dataclass(frozen=True)
class Unopened(GuidedMethod):
    """Draws without having opened a posterior."""

    name = "unopened"

    def guide(self, problem, memory, t, x):
        return problem.draws(t, x, DrawOptions(2))


@pytest.mark.parametrize(("method", "says"), [(Pair(), r"must return Guidance\(drift"), (Unopened(), "open_posterior")])
def test_a_method_of_ones_own_that_is_wrong_is_told_what_to_do(method, says):
    with pytest.raises(mfm.InputError, match=says):
        mfm.steer(MODEL, mild, 4, method, mfm.ODE(steps=2), seed=0)
