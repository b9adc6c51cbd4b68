"""Where states come from: shares, resampling, replay, conditions."""

import pytest
import torch
from exact import LEVEL, Case, MixtureMap

import metaflowmaps as mfm
from conftest import F64, ks_bound, ks_distance
from metaflowmaps.checkpoint.flatten import flatten_state, unflatten_state
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import StateMixture
from metaflowmaps.finetuning.state_laws import MixedStates, base_pool, samples_stream, student_samples
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import stream

LINEAR = mfm.LinearPath()


class Ones:
    """Data that cannot be taken for anything else."""

    def sample(self, n, generator=None):
        return torch.full((n, 2), 100.0)


def states(problem, own=None, **options):
    settings = {"pool": 64, "pool_steps": 1, "replay_pool": 64, "replay_steps": 2, "data": 0, "base": 0, "tilted": 0}
    return MixedStates(problem, StateMixture(**{**settings, **options}), 0, own)


def tuned(case):
    return MixtureMap(case.path, case.tilted, case.mean, case.std)


def origin(made, x_1):
    """Of each row: 0 data, 1 the pool, 2 replay."""
    pooled = (x_1[:, None] == made.pool[None]).all(2).any(1)
    replayed = torch.zeros_like(pooled) if made.replay is None else (x_1[:, None] == made.replay[None]).all(2).any(1)
    return torch.where(pooled, 1, torch.where(replayed, 2, torch.where((x_1 == 100).all(1), 0, 9))).tolist()


@pytest.mark.parametrize("n", [10, 64, 1001])
@pytest.mark.parametrize("shares", [(1, 0, 0, 0), (0, 1, 3, 0), (0.2, 0.1, 0.4, 0.3), (1, 1, 1, 1), (0, 0, 0, 2)])
def test_rows_come_from_the_sources_in_their_shares(shares, n):
    """To one row, in the order of the configuration, whatever their sum."""
    case = Case("gaussian-2d", LINEAR)
    names = ("data", "base", "tilted", "replay")
    made = states(case.problem(), Ones(), **dict(zip(names, shares, strict=True)))
    x_1, cond = made(tuned(case), 0, n, stream(1))
    assert x_1.shape == (n, 2)
    assert cond == {}
    found = origin(made, x_1)
    assert found == sorted(found)
    data, base, tilted, replay = (n * share / sum(shares) for share in shares)
    for source, expected in enumerate((data, base + tilted, replay)):
        assert abs(found.count(source) - expected) <= 1
    assert 9 not in found


def test_the_pool_is_resampled_by_its_tilt():
    """How often each of 64 samples comes in 40,000 rows: multinomial z-scores, e^r and its absence."""
    case = Case("gaussian-2d", LINEAR)
    n = 40_000
    for share, reward in (("tilted", case.reward), ("base", lambda x: torch.zeros(len(x), dtype=x.dtype))):
        made = states(case.problem(), **{share: 1})
        x_1, _ = made(tuned(case), 0, n, stream(1))
        counts = (x_1[:, None] == made.pool[None]).all(2).sum(0).double()
        expected = n * reward(made.pool).softmax(0)
        z = (counts - expected) / (expected * (1 - expected / n)).sqrt()
        assert z.abs().max() < LEVEL
        if share == "tilted":
            assert expected.max() > 4 * expected.min()
            assert float(1 / made.tilt().square().sum()) == pytest.approx(float(n**2 / expected.square().sum()))


def test_a_pool_without_hope_is_taken_as_it_is():
    """All rewards −inf: uniform. Some: those are never taken."""
    case = Case("gaussian-2d", LINEAR)
    nothing = states(case.problem(mfm.rewards.BlackBox(lambda x: torch.full((len(x),), -torch.inf))), tilted=1)
    assert torch.equal(nothing.tilt(), torch.ones(64, dtype=F64))
    assert len(nothing(None, 0, 2000, stream(1))[0].unique(dim=0)) == 64
    half = states(case.problem(mfm.rewards.BlackBox(lambda x: torch.where(x[:, 0] > 0.4, 0.0, -torch.inf))), tilted=1)
    x_1 = half(None, 0, 2000, stream(1))[0]
    assert (x_1[:, 0] > 0.4).all()
    assert (half.pool[:, 0] <= 0.4).any()


def test_the_pool_is_the_base_whatever_the_chunks():
    """KS of 8,000 one-step samples in both coordinates; the pool is a function of the seed."""
    case, one = Case("gaussian-2d", LINEAR), torch.ones(1, dtype=F64)
    problem = case.problem(chunk=3000)
    pool, cond = base_pool(problem, 8000, 1, 0)
    for i in range(2):
        assert ks_distance(pool[:, i], case.mean[i : i + 1], case.std**2 * one, one) < ks_bound(8000)
    assert cond == {}
    assert torch.equal(base_pool(problem, 8000, 1, 0)[0], pool)
    assert not torch.equal(base_pool(problem, 8000, 1, 1)[0], pool)
    assert problem.calls["forwards"] == 3 * 8000


def test_samples_of_the_student_follow_its_ode_whatever_the_chunks():
    """x_1 by an Euler grid written out here; the noise does not depend on the chunks."""
    case = Case("mixture-1d", LINEAR)
    model = tuned(case)
    made, _ = student_samples(case.problem(chunk=7), model, 50, 5, samples_stream(3, "name"))
    x = torch.randn(50, 1, generator=stream(3, "finetune-samples", "name"), dtype=F64)
    for k in range(5):
        x = x + 0.2 * case.tilted.drift(LINEAR, 0.2 * k, x)
    torch.testing.assert_close(made, x, rtol=1e-10, atol=1e-10)
    assert torch.equal(student_samples(case.problem(), model, 50, 5, samples_stream(3, "name"))[0], made)
    assert not torch.equal(student_samples(case.problem(), model, 50, 5, samples_stream(3, "other"))[0], made)


def test_the_replay_is_renewed_a_quarter_at_a_time():
    """At multiples of refresh_every, another quarter each: after four of them nothing is left of the first."""
    case = Case("gaussian-2d", LINEAR)
    made, model = states(case.problem(), replay=1, refresh_every=3), tuned(case)
    seen, changed = [], []
    for step in range(13):
        made(model, step, 8, stream(step))
        seen.append(made.replay.clone())
        if step:
            changed.append((seen[-1] != seen[-2]).any(1))
    for step, rows in enumerate(changed, start=1):
        assert rows.sum() == (16 if step % 3 == 0 else 0)
    assert torch.stack(changed).sum(0).tolist() == [1] * 64
    fresh = student_samples(case.problem(), model, 16, 2, samples_stream(0, "replay-12"))[0]
    assert torch.equal(seen[12][changed[11]], fresh)


def test_states_go_on_from_their_state():
    """Through a checkpoint's own encoding: a replay that was begun goes on bit for bit, and rows repeat by step."""
    case = Case("gaussian-2d", LINEAR)
    model, options = tuned(case), {"base": 1, "replay": 3, "refresh_every": 2}
    first = states(case.problem(), **options)
    for step in range(3):
        first(model, step, 16, stream(step))
    tensors, skeleton = flatten_state(first.state_dict())
    kept = {name: value.clone() for name, value in tensors.items()}
    ahead = [first(model, step, 16, stream(step))[0] for step in range(3, 8)]
    second = states(case.problem(), **options)
    assert second.replay is None
    second.load_state_dict(unflatten_state(kept, skeleton))
    for step, rows in zip(range(3, 8), ahead, strict=True):
        assert torch.equal(second(model, step, 16, stream(step))[0], rows)


def labelled(guidance=1.0, null_share=0.2):
    network = MLPConfig(width=8, depth=1, num_classes=4, guidance=True).network((2,))
    return TuningProblem(mfm.MetaFlowMap(network, LINEAR), lambda x: x[:, 0], guidance=guidance, null_share=null_share)


@pytest.mark.parametrize("null_share", [0.0, 0.2, 1.0])
def test_labels_are_drawn_alike_and_dropped_in_their_share(null_share):
    """20,000 labels: each count to 4.5 standard deviations."""
    label = labelled(null_share=null_share).conditions(20_000, stream(0))["label"]
    assert label.dtype == torch.int64
    shares = torch.tensor([(1 - null_share) / 4] * 4 + [null_share], dtype=F64)
    counts = torch.bincount(label, minlength=5).double()
    assert ((counts - 20_000 * shares).abs() <= LEVEL * (20_000 * shares * (1 - shares)).sqrt()).all()


def test_the_guidance_scale_is_one_but_for_the_null_class():
    cond = labelled(guidance=2.5).conditions(1000, stream(0))
    null = cond["label"] == 4
    assert null.any()
    assert torch.equal(cond["guidance"], torch.where(null, 1.0, 2.5))
    assert labelled().conditions(10, stream(0)).keys() == {"label"}
    assert Case("gaussian-2d", LINEAR).problem().conditions(10, stream(0)) == {}
    given = labelled(null_share=0.0).conditions(3, stream(0), torch.tensor([2, 0, 2]))
    assert given["label"].tolist() == [2, 0, 2]
    with pytest.raises(InputError, match="classes"):
        Case("gaussian-2d", LINEAR).problem(guidance=2.0)


def test_rows_keep_the_conditions_of_their_samples():
    """A row's label and scale are those that its sample was made with, from the pool and from the replay."""
    problem = labelled(guidance=2.5)
    made = states(problem, base=1, tilted=1, replay=2)
    x_1, cond = made(problem.base, 0, 200, stream(0))
    assert set(origin(made, x_1)) == {1, 2}
    for rows, held, known in ((slice(0, 100), made.pool, made.cond), (slice(100, 200), made.replay, made.replay_cond)):
        place = (x_1[rows][:, None] == held[None]).all(2).long().argmax(1)
        for name in ("label", "guidance"):
            assert torch.equal(cond[name][rows], known[name][place])
    made(problem.base, 500, 8, stream(1))  # a quarter of the replay anew
    fresh, known = student_samples(problem, problem.base, 16, 2, samples_stream(0, "replay-500"))
    place = (fresh[:, None] == made.replay[None]).all(2).long().argmax(1)
    for name in ("label", "guidance"):
        assert torch.equal(made.replay_cond[name][place], known[name])


def test_states_ask_for_what_is_missing():
    with pytest.raises(InputError, match=r"states.base"):
        states(Case("gaussian-2d", LINEAR).problem(), data=1)
    with pytest.raises(ValueError, match="share"):
        StateMixture(base=0, tilted=0)
