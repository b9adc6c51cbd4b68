"""What ``check`` says of networks that were wrapped right and wrong, against the mixture that they know exactly."""

import pytest
import torch
from test_foreign import CONVENTIONS, LAW, TABLE, network, wrapped

import metaflowmaps as mfm
from metaflowmaps.errors import InputError

DATA = LAW.sample(64, torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("predicts", "schedule", "time"), CONVENTIONS[::3])
def test_nothing_looks_wrong_in_a_network_that_is_read_as_it_is(predicts, schedule, time):
    model = wrapped(predicts, schedule, time)
    assert model.check(DATA) is None
    assert model.check() is None


def net(*convention, sign=1, clock=1.0):
    inner = network(*convention)
    return lambda y, t: sign * inner(y, t / clock)


VELOCITY, NOISE = ("velocity", "linear", "data-at-1"), ("noise", "linear", "data-at-1")
WRONG = {  # what is wrapped, how, and what the check says of it with the data
    "reversed": (net("velocity", "linear", "data-at-0"), ("velocity",), "with time='data-at-0' by"),
    "negated": (net(*VELOCITY, sign=-1), ("velocity",), "with its output negated by"),
    "kind": (net("noise", "table", "data-at-0"), ("v", "data-at-0", TABLE), "with predicts='noise' by"),
    "clock": (net(*NOISE, clock=1000), ("noise", "data-at-1", "linear"), "with time_scale=1000 by"),
    "back": (net("noise", "linear", "data-at-0"), ("noise", "data-at-1", "linear"), "with time='data-at-0' by"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_convention_is_named_with_its_fix(name):
    made, arguments, said = WRONG[name]
    told = mfm.wrap(made, *arguments, event_shape=(2,)).check(DATA)
    assert said in told
    assert "\n" not in told


@pytest.mark.parametrize("name", ["negated", "kind", "clock", "back"])
def test_without_data_most_are_seen(name):
    """A reversed velocity is a flow to something, and without data nobody knows that it is not the data."""
    made, arguments, _ = WRONG[name]
    assert "check(data) tells which" in mfm.wrap(made, *arguments, event_shape=(2,)).check()


def test_other_defects_are_said_in_a_line():
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, y, t):
            return self.drop(y)

    assert "network.eval()" in mfm.wrap(Noisy(), event_shape=(2,)).check()
    assert "not finite" in mfm.wrap(lambda y, t: y / 0, event_shape=(2,)).check(DATA)
    far = mfm.wrap(lambda y, t: 40 + 0 * y, event_shape=(2,)).check(DATA)
    assert "worse than their mean" in far
    with pytest.raises(InputError, match=r"examples have shape \(3,\)"):
        wrapped(*VELOCITY).check(torch.zeros(8, 3))


def test_clipped_predictions_stay_in_range_and_the_rest_as_it_is():
    """Inside the range nothing changes; outside, the drift is that of the data at the bound."""
    plain, tight, wide = (
        mfm.wrap(network("data", "linear", "data-at-1"), "data", "data-at-1", "linear", event_shape=(2,), clip=c)
        for c in (None, (-1.0, 0.5), 50)
    )
    x, t = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.4
    torch.testing.assert_close(wide.drift(t, x), plain.drift(t, x))
    data = LAW.denoise(mfm.LinearPath(), t, x)
    held = data.clamp(-1, 0.5)
    assert not torch.equal(held, data)
    torch.testing.assert_close(tight.drift(t, x), (held - x) / (1 - t))  # b = (D − x)/(1 − t)


def test_a_dynamic_threshold_is_each_samples_own():
    clip = mfm.DynamicThreshold(quantile=1.0, least=2.0)
    x = torch.tensor([[1.0, -1.5], [8.0, -4.0]])
    torch.testing.assert_close(clip(x), torch.tensor([[1.0, -1.5], [2.0, -1.0]]))
    x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([100.0])])[None]
    assert float(mfm.DynamicThreshold(0.99)(x).max()) == 1.0
    with pytest.raises(InputError, match="quantile"):
        mfm.DynamicThreshold(quantile=0)
    for wrong in (True, (1, -1), "1", (0, float("nan")), -1):
        with pytest.raises(InputError, match=r"clip is c for \[−c, c\]"):
            mfm.wrap(lambda y, t: y, event_shape=(2,), clip=wrong)


def test_wrap_does_not_guess():
    scheduler = type(
        "Scheduler", (), {"alphas_cumprod": TABLE, "config": type("C", (), {"prediction_type": "epsilon"})}
    )
    for predicts in ("noise", "data", "score", "v"):
        with pytest.raises(InputError, match="give schedule="):
            mfm.wrap(lambda y, t: y, predicts, "data-at-0", event_shape=(2,))
    with pytest.raises(InputError, match="predicts='noise'"):
        mfm.wrap(lambda y, t: y, "v", "data-at-0", scheduler(), event_shape=(2,))
    assert mfm.wrap(lambda y, t: y, "noise", "data-at-0", scheduler(), event_shape=(2,)).event_shape == (2,)


# -- padding -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def padded(**options):
    """Beads of N(0, 4 Id), D = 4 t x/((1−t)² + 4 t²), by a network that moves padding too; and what it was shown."""

    def run(y, t, mask):
        seen.append((y, mask))
        t = t[:, None, None]
        data = 4 * t * y / ((1 - t) ** 2 + 4 * t**2)
        return data + 7 * (1 - mask[..., None])

    seen: list = []
    return mfm.wrap(run, "data", "data-at-1", "linear", event_shape=(3, 2), **options), seen


def test_padding_is_seen_as_nothing_and_its_drift_leads_to_0():
    model, seen = padded()
    x, t = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)), 0.25
    drift = model.drift(t, x, {"mask": MASK})
    kept = MASK[..., None].bool().expand_as(x)
    assert bool((seen[0][0][~kept] == 0).all())
    assert torch.equal(seen[0][1], MASK)
    torch.testing.assert_close(drift[~kept], -x[~kept] / 0.75)  # D = 0: b = −x/(1 − t)
    torch.testing.assert_close(drift[kept], ((4 * t / (0.75**2 + 4 * t**2) * x - x) / 0.75)[kept])


@pytest.mark.parametrize("method", ["none", "dps", "glass", "mfm-gf", "mfm-g", "mfm-smc", "best-of-n", "tds"])
def test_padded_entries_stay_0_through_every_method(method):
    model, _ = padded()
    particles = method in ("tds", "mfm-smc")  # they replace each other: one mask a system
    cond, seen = {"mask": MASK[:1].repeat(8, 1) if particles else MASK.repeat(4, 1)}, []

    def reward(x, cond):
        seen.append((x, cond["mask"]))
        return -(x - 1).square().sum((1, 2))  # would pull padding to 1

    for process in (mfm.SDE(steps=4),) if particles else (mfm.ODE(steps=4), mfm.SDE(steps=4)):
        steered = mfm.steer(model, reward, 8, method, process, cond=cond, seed=0).samples
        assert bool((steered[cond["mask"][..., None].expand_as(steered) == 0] == 0).all())
        assert bool((steered[cond["mask"][..., None].expand_as(steered) == 1] != 0).all())
    assert all(bool((x[mask[..., None].expand_as(x) == 0] == 0).all()) for x, mask in seen)


def test_draws_samples_and_values_of_padded_states():
    model, _ = padded()
    x, cond = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0)), {"mask": MASK}
    off = (MASK[..., None] == 0).expand(2, 3, 2)
    assert bool((model.draw(0.5, x, 5, cond=cond)[:, off] == 0).all())
    assert bool((model.generate(2, 6, cond=cond)[off] == 0).all())
    reward = lambda x: x.sum((1, 2))  # noqa: E731
    for way in ("gradient", "gradient-free"):
        made = mfm.value_gradient(model, reward, 0.5, x, 6, way, generator=torch.Generator().manual_seed(1), cond=cond)
        assert bool((made.draws[:, off] == 0).all())
        assert bool((made.gradient[off] == 0).all()), way


def test_masks_are_checked_in_a_line():
    model, _ = padded()
    x = torch.zeros(2, 3, 2)
    for mask, said in ((MASK[:, :2], "first dimensions"), (MASK / 2, "must hold 0"), ([1], "got list")):
        with pytest.raises(InputError, match=said):
            model.drift(0.5, x, {"mask": mask})
