"""General contexts: what an observation, a mask, an order and a time mean to a map, and every loss at the exact one."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps import losses
from metaflowmaps._shapes import repeat_rows
from metaflowmaps.context import ordered
from metaflowmaps.errors import InputError
from metaflowmaps.laws.processes import integrated_brownian, ornstein_uhlenbeck, two_ornstein_uhlenbecks
from metaflowmaps.metrics.two_sample import two_sample_test
from metaflowmaps.networks import DiTConfig, MLPConfig, ObservedConfig, UNetConfig
from metaflowmaps.random import stream
from metaflowmaps.training.teachers import ProcessTeacher

TIMES = torch.linspace(0.0, 3.0, 13)
PATH = mfm.LinearPath()


def small_map(awake=False, process=None, event=(1,), **options):
    """A small map whose Gaussian answer is that of a process at TIMES; awake: its network says something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = options.pop("body", MLPConfig(width=16, depth=2))
        network = ObservedConfig(body=body, nodes=13, width=16, heads=2, **options).network(event)
        if awake:
            for parameter in network.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
    network.span.copy_(torch.tensor([0.0, 3.0]))
    if process is not None:
        network.prior.nodes.copy_(TIMES)
        network.prior.root.copy_(torch.linalg.cholesky(process.covariance(TIMES, TIMES)))
    return mfm.MetaFlowMap(network, PATH)


def seen(values, times, query=2.0, **more):
    return mfm.Context(torch.tensor(values).reshape(1, -1, 1), torch.tensor(times), query=query, **more)


def drawn(model, context, num_draws=5):
    return model.draw(context, num_draws, generator=stream(0, "draw"))


def test_the_order_of_observations_means_nothing():
    model = small_map(awake=True)
    one = seen([0.5, -1.0, 2.0], [0.0, 1.0, 2.5])
    other = seen([2.0, 0.5, -1.0], [2.5, 0.0, 1.0])
    assert torch.equal(drawn(model, one), drawn(model, other))


def test_a_masked_observation_changes_no_bit():
    model = small_map(awake=True)
    plain = drawn(model, seen([0.5, -1.0], [0.0, 1.0]))
    mask = torch.tensor([True, False, True])
    assert torch.equal(plain, drawn(model, seen([0.5, 9.0, -1.0], [0.0, 0.5, 1.0], mask=mask)))
    assert torch.equal(plain, drawn(model, seen([0.5, math.nan, -1.0], [0.0, math.nan, 1.0], mask=mask)))
    assert torch.equal(plain, drawn(model, seen([0.5, math.nan, -1.0], [0.0, 0.5, 1.0], mask="finite")))


def test_empty_places_are_seen_by_nobody():
    encoder, query = small_map(awake=True).network.encoder, torch.tensor([2.0])
    given = seen([0.5, -1.0], [0.0, 1.0]).conditions()
    one, other = (
        encoder(ordered(given, length), query, torch.zeros(1, 1), torch.ones(1), torch.tensor([0.0, 3.0]))
        for length in (2, 7)
    )
    torch.testing.assert_close(one, other)  # sums of another length round otherwise


def test_what_was_observed_matters():
    model = small_map(awake=True)
    plain = drawn(model, seen([0.5, -1.0], [0.0, 1.0]))
    for other in (seen([0.5, -1.1], [0.0, 1.0]), seen([0.5, -1.0], [0.0, 1.2]), seen([0.5, -1.0], [0.0, 1.0], 2.1)):
        assert not torch.equal(plain, drawn(model, other))


def test_at_an_observed_time_the_map_returns_the_observation():
    model = small_map(awake=True, process=ornstein_uhlenbeck())
    draws = drawn(model, seen([0.5, -1.0], [0.0, 1.3], 1.3))
    torch.testing.assert_close(draws, torch.full_like(draws, -1.0), rtol=0, atol=1e-6)  # rounding of x + (m − x)


def test_of_two_observations_at_one_time_the_later_in_the_list_wins():
    model = small_map(awake=True)
    assert torch.equal(drawn(model, seen([9.0, 0.5], [1.0, 1.0])), drawn(model, seen([0.5], [1.0])))


def test_an_untrained_map_is_exact_on_a_gaussian_process():
    law = integrated_brownian()
    model = small_map(process=ornstein_uhlenbeck())
    model.network.prior.root.copy_(torch.linalg.cholesky(law.covariance(TIMES, TIMES) + 1e-9 * torch.eye(13)))
    context = seen([0.3, 1.0], [0.5, 1.25], 2.5)
    posterior = law.given(context)
    mean, std = (model.encode(context.conditions())[name] for name in ("prior_mean", "prior_std"))
    # float32 nodes of a smooth covariance whose smallest eigenvalue is 1e-4 of its largest
    assert float(mean) == pytest.approx(float(posterior.mean), rel=1e-3)
    assert float(std) == pytest.approx(float(posterior.variance.sqrt()), rel=1e-3)
    draws = drawn(model, context, 1000)[:, 0]
    test = two_sample_test(draws, posterior.draw(1000, stream(1, "exact"))[:, 0].float(), generator=stream(0, "test"))
    assert test.p_value > 0.01


def test_draws_are_differentiable_in_the_observed_values():
    model = small_map(awake=True, process=ornstein_uhlenbeck()).double()
    values = torch.tensor([[[0.5], [-1.0]]], dtype=F64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=F64)
    torch.autograd.gradcheck(lambda v: drawn(model, mfm.Context(v, times, query=2.0), 2), (values,))


def test_a_map_of_contexts_is_saved_and_loaded(tmp_path):
    model = small_map(awake=True, process=ornstein_uhlenbeck())
    model.save_pretrained(tmp_path / "map")
    loaded = mfm.MetaFlowMap.from_pretrained(tmp_path / "map")
    context = seen([0.5, -1.0], [0.0, 1.0])
    assert torch.equal(drawn(model, context), drawn(loaded, context))
    assert loaded.network.config == model.network.config


def test_several_steps_and_a_batch_of_rows_are_drawn():
    model = small_map(awake=True)
    rows = mfm.Context(normal(3, 4, 1, dtype=torch.float32), uniform(3, 4).float(), query=torch.tensor([1.0, 2.0, 3.0]))
    assert model.draw(rows, 6, steps=3).shape == (6, 3, 1)
    assert model.draw(mfm.Context(torch.zeros(2, 0, 1), torch.zeros(0), query=1.0), num_draws=4).shape == (4, 2, 1)
    # a row does not depend on the others: its noise is the same in both batches
    noise = normal(3, 1, dtype=torch.float32)
    whole = model.push(noise, 0.0, torch.zeros(3, 1), cond=rows.conditions())
    one = {name: value[1:2] for name, value in rows.conditions().items()}
    torch.testing.assert_close(model.push(noise[1:2], 0.0, torch.zeros(1, 1), cond=one), whole[1:2])


class ExactFlow:
    """The flow map of a context's auxiliary process in the map's own chart, by rk4 on the exact velocity."""

    @torch.no_grad()
    def __init__(self, n=10, steps=12):
        self._velocities = {}
        self.law, self.n, self.steps = two_ornstein_uhlenbecks(), n, steps
        self.model = small_map(process=ornstein_uhlenbeck(std=math.sqrt(2.5))).double()
        self.model.network.prior.root = self.model.network.prior.root.double()
        paths = self.law.sample(TIMES, n, stream(0, "paths")).double()
        self.x_1, counts = paths[:, 9], torch.arange(n) % 5
        mask = torch.arange(4) < counts[:, None]
        context = mfm.Context(paths[:, [0, 4, 6, 11]], TIMES[[0, 4, 6, 11]].double(), mask, TIMES[9].double())
        self.cond = context.conditions()
        self.t = torch.where(torch.arange(n) % 2 == 0, 0.0, uniform(n, high=0.9))
        self.x_t = PATH.interpolate(normal(n, 1, seed="context"), self.x_1, self.t)
        self.a, self.b = torch.sort(uniform(n, 2, high=0.98, seed="ab")).values.T.contiguous()
        self.gamma = uniform(n, seed="gamma")
        self.chart = self.model.anchor(self.t, self.x_t, self.cond).chart
        end = self.chart.endpoint(self.x_1)
        self.z = self.chart.inner_path.interpolate(normal(n, 1, seed="inner"), end, self.a)

    def velocity(self, a, z):
        """The exact velocity; contexts are repeated where z is stacked."""
        copies = len(z) // self.n
        if copies not in self._velocities:
            self._velocities[copies] = self.at(copies)
        return self._velocities[copies](a, z)

    @torch.no_grad()
    def at(self, k):
        """Of k copies of the contexts."""
        t, x_t, cond = (self.t.repeat(k), self.x_t.repeat(k, 1), {n: repeat_rows(v, k) for n, v in self.cond.items()})
        chart = self.model.anchor(t, x_t, cond).chart
        return ProcessTeacher(PATH, self.law).at(chart, t, x_t, cond)

    def flow(self, a, b, z):
        h, total = ((b - a) / self.steps)[:, None], torch.zeros_like(z)
        for i in range(self.steps):
            x, time, half = z + h * total, a + i * h[:, 0], h[:, 0] / 2
            k1 = self.velocity(time, x)
            k2 = self.velocity(time + half, x + h / 2 * k1)
            k3 = self.velocity(time + half, x + h / 2 * k2)
            k4 = self.velocity(time + h[:, 0], x + h * k3)
            total = total + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return total / self.steps


CONSISTENCY = {
    "eulerian": losses.Eulerian(),
    "lagrangian": losses.Lagrangian(),
    "lagrangian-difference": losses.LagrangianDifference(),
    "semigroup": losses.Semigroup(),
}


@pytest.mark.parametrize("name", CONSISTENCY)
def test_a_loss_vanishes_at_the_exact_map_of_contexts_and_nowhere_else(name):
    exact, loss = ExactFlow(), CONSISTENCY[name]
    step = 5e-3 if name == "lagrangian-difference" else None
    jumps = losses.Jumps(exact.a, exact.b, exact.z, exact.gamma, step)
    # rk4 errs by (1/12)⁴ of fourth derivatives, differences by h² of third ones: both below 1e-3, here squared
    assert float(loss(exact.flow, jumps, exact.velocity).max()) < 1e-5
    off = loss(lambda a, b, z: 1.3 * exact.flow(a, b, z) + 0.3 * (b - a)[:, None], jumps, exact.velocity)
    assert float(off.mean()) > 1e-4


def test_the_diagonal_loss_vanishes_at_the_exact_velocity_of_contexts():
    exact = ExactFlow()
    target = exact.velocity(exact.a, exact.z)
    assert float(losses.diagonal(exact.flow, exact.a, exact.z, target).max()) < 1e-20  # nothing but rounding


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: seen([math.nan], [0.0]), 'mask="finite"'),
        (lambda m: seen([1.0], [math.nan]), "times must be finite"),
        (lambda m: seen([1.0, 2.0], [0.0]), r"times must have shape \(2,\)"),
        (lambda m: mfm.Context(torch.zeros(1, 2), torch.zeros(2)), r"\(B, M, \*event\)"),
        (lambda m: seen([1.0], [0.0], mask="some"), "mask must be"),
        (lambda m: m.draw(seen([1.0], [0.0], None), 2), "no time is asked for"),
        (lambda m: m.draw(mfm.Context(torch.zeros(1, 1, 2), torch.zeros(1), query=1.0), 2), "observations must have"),
        (lambda m: m.draw(mfm.Context(torch.zeros(1, 1, 1, dtype=F64), torch.zeros(1), query=1.0), 2), "convert one"),
        (lambda m: m.draw(0.0, torch.zeros(1, 1), 2), "this map reads observations"),
        (lambda m: m.draw(seen([1.0], [0.0]), 0), "num_draws"),
        (lambda m: m.draw(seen([1.0], [0.0]), 10**15), "draw fewer at a time"),
        (lambda m: m.draw(seen([1.0], [0.0]), 2, cond={}), "own conditions"),
        (lambda m: m.draw(seen([1.0], [0.0]), torch.zeros(1, 1), 2), "no noisy state"),
        (lambda m: m.conditions_of(torch.zeros(1, 1, 1)), r"mfm\.Context"),
        (lambda m: seen([1.0], [0.0], query=math.inf), "query must be finite"),
        (lambda m: seen([1.0], [0.0], query="now"), "query must be numbers"),
        (lambda m: mfm.Context(torch.zeros(1, 1, 1), None), "times must be numbers"),
        (lambda m: mfm.Context(torch.zeros(1, 1, 1).numpy(), [0.0]), r"\(B, M, \*event\)"),
        (lambda m: seen([1.0], [0.0], mask=torch.ones(1, 1, 1).bool()), r"mask must have shape \(1,\)"),
        (lambda m: seen([1.0], [0.0], mask=torch.ones(1)), "mask must hold bools"),
        (lambda m: seen([1.0], [0.0], cond=[1]), "cond is a mapping"),
        (lambda m: seen([1.0], [0.0], cond={"label": torch.zeros(2).long()}), "1 rows"),
        (lambda m: seen([1.0], [0.0]).seen(torch.zeros(1), 1.0), r"shape \(1, 1\), one a row"),
        (lambda m: seen([1.0], [0.0]).seen(torch.zeros(1, 1), torch.zeros(3)), "time must have shape"),
        (lambda m: seen([1.0], [0.0]).repeated(0), "copies must be"),
        (lambda m: seen([1.0], [1j]), "times must be real numbers"),
        (lambda m: seen([1.0], [0.0], cond={"values": torch.zeros(1, 9)}), "cannot be called 'values'"),
        (lambda m: m.draw(seen([1.0], [0.0], cond={"summary": torch.zeros(1, 16)}), 2), "this map reads observations"),
        (lambda m: m.drift(0.5, torch.zeros(1, 1), cond={"query": torch.zeros(1)}), "this map reads observations"),
        (lambda m: m.draw(seen([1.0], [0.0]), 2, generator=5), r"generator must be a torch\.Generator"),
        (lambda m: mfm.observation_gradient(m, lambda x: x[:, 0], None, 4), r"mfm\.Context"),
    ],
)
def test_what_is_no_context_is_refused_in_one_line(make, words):
    with pytest.raises(InputError, match=words) as refused:
        make(small_map())
    assert "\n" not in str(refused.value)


def test_contexts_without_rows_or_observations_are_drawn_for():
    model = small_map()
    assert model.draw(mfm.Context(torch.zeros(0, 2, 1), [0.0, 1.0], query=1.0), 3).shape == (3, 0, 1)
    unseen = mfm.Context(torch.full((2, 2, 1), math.nan), [0.0, 1.0], "finite", 1.0)
    none = mfm.Context(torch.zeros(2, 0, 1), [], query=1.0)
    assert torch.equal(drawn(model, unseen), drawn(model, none))


def test_contexts_beyond_those_trained_with_are_told():
    model = small_map()
    with pytest.warns(UserWarning, match="5 observations: this map was trained on at most 4"):
        model.draw(seen([0.0] * 5, [0.0, 0.5, 1.0, 1.5, 2.0]), 1)
    with pytest.warns(UserWarning, match="reach beyond those trained with"):
        model.draw(seen([0.0], [0.0], -1.0), 1)
    model.network.least.fill_(2)
    with pytest.raises(InputError, match="at least 2 observations"):
        model.draw(seen([0.0], [0.0]), 1)
    plain = mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((1,)), PATH)
    with pytest.raises(InputError, match="reads no observations"):
        plain.draw(seen([0.0], [0.0]), 1)


def test_observations_are_read_by_time_and_those_that_are_none_last():
    held = ordered(seen([1.0, 2.0, 3.0], [2.0, 0.0, 1.0], mask=torch.tensor([True, True, False])).conditions(), 4)
    assert held.values[0, :, 0].tolist() == [2.0, 1.0, 0.0, 0.0]
    assert held.mask.tolist() == [[True, True, False, False]]


def test_the_latest_frame_is_always_in_one_channel():
    model, (one, two) = small_map(event=(1, 8, 8)), normal(2, 1, 1, 1, 8, 8, dtype=torch.float32)
    for frames, place in ((one, [3]), (torch.cat([one, two], 1), [2, 3])):
        times = torch.arange(float(frames.shape[1]))
        known = model.encode(mfm.Context(frames, times, query=2.5).conditions())["frames"]
        torch.testing.assert_close(known[0, place], frames[0, :, 0])  # data of mean 0 and spread 1
        assert float(known[0, : place[0]].abs().sum()) == 0


BODIES = {
    "mlp": MLPConfig(width=16, depth=2),
    "unet": UNetConfig(width=8, multipliers=(1, 1), blocks=1),
    "dit": DiTConfig(width=16, depth=2, heads=2),
}


@pytest.mark.parametrize("body", BODIES)
def test_frames_are_observations_too(body):
    model = small_map(awake=True, event=(1, 8, 8), body=BODIES[body])
    frames, times = normal(2, 3, 1, 8, 8, dtype=torch.float32), torch.tensor([0.0, 1.0, 2.0])
    draws = drawn(model, mfm.Context(frames, times, query=2.5), 2)
    assert draws.shape == (2, 2, 1, 8, 8)
    # each of them matters, in any order, and what is masked does not
    turned = mfm.Context(frames.flip(1), times.flip(0), query=2.5)
    assert torch.equal(draws, drawn(model, turned, 2))
    for place in range(3):
        other = frames.clone()
        other[:, place] += 1
        assert not torch.equal(draws, drawn(model, mfm.Context(other, times, query=2.5), 2))
        mask = torch.arange(3) != place
        kept = drawn(model, mfm.Context(other, times, mask, 2.5), 2)
        assert torch.equal(kept, drawn(model, mfm.Context(frames, times, mask, 2.5), 2))
    with pytest.raises(InputError, match="channels for 4"):
        drawn(model, mfm.Context(normal(2, 5, 1, 8, 8, dtype=torch.float32), torch.arange(5.0) / 2, query=2.5))
