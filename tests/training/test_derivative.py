"""Derivatives of the network in losses: every form against float64, what auto picks, and how a run is set up."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.losses import Consistency, Eulerian, Lagrangian, MeanFlow
from metaflowmaps.networks.dit import SIZES, DiTConfig
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.training import derivative
from metaflowmaps.training.derivative import Differentiation, choose, prepare
from metaflowmaps.training.loop import Watch
from metaflowmaps.training.objective import Batch, Objective
from metaflowmaps.training.teachers import GlassTeacher, guided_drift
from metaflowmaps.training.train_config import LossConfig, TimesConfig, TrainConfig
from metaflowmaps.training.training_run import run_training
from metaflowmaps.work.choices import build

ROWS = 6
LOSSES = {
    "mean-flow": MeanFlow,
    "eulerian": Eulerian,
    "lagrangian": Lagrangian,
}


def network(**options):
    """A transformer whose every layer matters."""
    sizes = {"width": 32, "depth": 3, "heads": 2, "encoder_depth": 2, "num_classes": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = DiTConfig(patch=2, **{**sizes, **options}).network((2, 8, 8))
        with torch.no_grad():
            for p in made.parameters():
                p += 0.1 * torch.randn_like(p)
    return made


@pytest.fixture(scope="module")
def model():
    return mfm.MetaFlowMap(network(), mfm.LinearPath(), "plain")


def batch(dtype=F64):
    """Rows with a jump inside, at an end and without length; the latter two where no difference is central."""
    a = torch.tensor([0.2, 0.3, 0.0, 0.0, 0.45, 0.6], dtype=dtype)
    b = torch.tensor([0.7, 0.8, 0.4, 0.9, 0.45, 0.605], dtype=dtype)
    x_1, x_t, eps = (normal(ROWS, 2, 8, 8, seed=name).to(dtype) for name in ("x_1", "x_t", "eps"))
    t, gamma = uniform(ROWS, high=0.9).to(dtype), uniform(ROWS, seed="g").to(dtype)
    return Batch(x_1, t, x_t, eps, a, b, gamma, 0, {"label": torch.tensor([0, 1, 2, 3, 0, 1])})


def losses_and_gradient(model, loss, dtype, inside=False):
    model.to(dtype)
    frozen = mfm.MetaFlowMap(network(), mfm.LinearPath(), "plain").to(dtype).requires_grad_(False)
    teacher = GlassTeacher(model.path, frozen.drift, 3)
    loss = LossConfig(diagonal="data" if loss.source == "data" else "teacher", consistency=loss)
    objective = Objective(None, loss, TimesConfig(), teacher, ROWS, 0)
    rows = batch(dtype)
    value = objective(model, rows.rows(0, 4) if inside else rows)
    gradient = torch.autograd.grad(value.mean(), model.network.blocks[1].mlp[0].weight)[0]
    return value.detach().double(), gradient.double()


def error(got, exact):
    return [float((x - y).norm() / y.norm()) for x, y in zip(got, exact, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_differences_converge_to_the_jvp_through_a_transformer(model, name):
    """Value and gradient at second order in the step, which the Lagrangian has where b need not move."""
    inside = name == "lagrangian"
    exact = losses_and_gradient(model, LOSSES[name](derivative="forward"), F64, inside)
    steps = (8e-3, 4e-3)
    first, last = (
        error(
            losses_and_gradient(model, LOSSES[name](derivative="difference", h=h), F64, inside),
            exact,
        )
        for h in steps
    )
    for one, other in zip(first, last, strict=True):
        assert abs(math.log2(one / other) - 2) < 0.25
        assert other < 1e-2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form", ["forward", "difference"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_every_form_is_near_the_exact_one(model, name, form, precision):
    """Against float64, at the step of the precision; benchmarks/precision.py measures a trained network.

    Units of rounding u (2⁻²⁴, 2⁻⁹) of a dozen products in a row add up to √12 u in F, twice that in a square and its
    gradient: 8 u, with half as much on top. A difference divides √2·√12 u/2 by h: 2.5 u/h, with as much on top again
    for machines that add up in another order; truncation is of order h².
    """
    u, h = {"float32": (2**-24, 5e-3), "bf16": (2**-9, 5e-2)}[precision]
    inside = name == "lagrangian"
    exact = losses_and_gradient(model, LOSSES[name](derivative="forward"), F64, inside)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        got = losses_and_gradient(model, LOSSES[name](derivative=form), torch.float32, inside)
    bound = 12 * u if form == "forward" else 4 * u / h + h**2
    for part in error(got, exact):
        assert u / 100 < part < bound  # and something was rounded


def test_a_wrong_step_for_bf16_would_show(model):
    """The step of float32 in bf16: several times the error, which is why the step goes by precision."""
    exact = losses_and_gradient(model, Eulerian(derivative="forward"), F64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, small = (
            error(losses_and_gradient(model, Eulerian(derivative="difference", **extra), torch.float32), exact)[0]
            for extra in ({}, {"h": 5e-3})
        )
    assert small > 2 * ours


# -- the choice ------------------------------------------------------------------------------------------------------


def meta(size):
    with torch.device("meta"):
        return DiTConfig(patch=2, **SIZES[size]).network((4, 32, 32))


XL, NANO = meta("XL"), network()


def pick(network, consistency="eulerian", asked="auto", device="cpu", precision="float32", rows=4, recompute=False):
    loss = build(Consistency, consistency, {} if asked == "auto" else {"derivative": asked})
    return choose(loss, network, device, precision, rows, recompute)


# XL: 16 heads · 256² · 4 bytes · 6 maps = 25 MB a row, 8 GiB at 341 rows; through all 28 blocks at 12
@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"network": NANO}, "forward"),
        ({"network": MLPConfig(width=8, depth=1).network((2,)), "rows": 10**6}, "forward"),
        ({"network": XL, "rows": 341}, "forward"),
        ({"network": XL, "rows": 342}, "difference"),
        ({"network": XL, "rows": 341, "consistency": "mean-flow", "device": "cuda", "precision": "bf16"}, "forward"),
        ({"network": XL, "rows": 12, "consistency": "lagrangian"}, "forward"),
        ({"network": XL, "rows": 13, "consistency": "lagrangian"}, "difference"),
        ({"network": NANO, "consistency": "lagrangian"}, "forward"),
        ({"network": NANO, "consistency": "lagrangian", "recompute": True}, "difference"),
        ({"network": NANO, "consistency": "eulerian", "recompute": True}, "forward"),
        ({"network": NANO, "consistency": "eulerian", "asked": "difference"}, "difference"),
        ({"network": NANO, "consistency": "lagrangian-difference"}, "difference"),
        ({"network": NANO, "consistency": "semigroup"}, "none"),
        ({"network": NANO, "consistency": "none"}, "none"),
    ],
)
def test_auto_picks_by_size_device_and_loss(given, form):
    choice = pick(**given)
    assert choice.form == form
    assert choice.step == {"float32": 5e-3, "bf16": 5e-2}[given.get("precision", "float32")]
    assert choice.why
    assert "\n" not in str(choice)


def test_auto_fuses_where_it_can(monkeypatch):
    large = {"network": XL, "rows": 1000, "device": "cuda", "precision": "bf16"}
    monkeypatch.setattr(derivative.importlib.util, "find_spec", lambda name: object())
    for wrong, form in ((0.01, "fused"), (0.5, "difference")):
        monkeypatch.setattr(derivative, "fused_error", lambda device, width, wrong=wrong: wrong)
        assert pick(**large).form == form
    assert "relative error 0.5" in pick(**large).why
    monkeypatch.setattr(derivative, "fused_error", lambda device, width: 0.01)
    assert pick(**{**large, "precision": "float32"}).form == "difference"
    assert pick(**{**large, "consistency": "lagrangian"}).form == "difference"
    monkeypatch.setattr(derivative.importlib.util, "find_spec", lambda name: None)
    assert "needs Triton" in pick(**large).why


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"asked": "fused"}, "is for CUDA, not cpu: set loss.consistency.derivative=auto"),
        ({"asked": "fused", "device": "cuda"}, "is for precision=bf16"),
        ({"asked": "fused", "consistency": "lagrangian"}, "has no gradient"),
        (
            {"asked": "forward", "consistency": "lagrangian", "recompute": True},
            "loss.consistency.derivative=difference, or",
        ),
        (
            {"asked": "forward", "consistency": "lagrangian-difference"},
            "option of lagrangian-difference 'derivative'",
        ),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(InputError, match=message) as refusal:
        pick(NANO, **given)
    assert "\n" not in str(refusal.value)


# -- a run -----------------------------------------------------------------------------------------------------------


def config(**options):
    network = {"name": "dit", "width": 16, "depth": 2, "heads": 2, "encoder_depth": 1}
    made = {
        "recipe": "test",
        "data": {"name": "digits"},
        "model": {"network": network, "data_std": 0.5},
        "loss": {"diagonal": "data", "consistency": "mean-flow", "diagonal_share": 0.5},
        "teacher": "none",
        "optimizer": {"name": "adam", "lr": 1e-3},
        "steps": 3,
        "batch_size": 8,
        "threads": 1,
    }
    return TrainConfig.model_validate({**made, **options})


def test_a_run_says_how_and_does_not_depend_on_recomputation(tmp_path):
    lines = {}
    for recompute in (False, True):
        lines[recompute] = []
        run_training(
            config(checkpoint_activations=recompute),
            tmp_path / str(recompute),
            watch=Watch(note=lines[recompute].append),
        )
    assert [line.split(",")[0] for line in lines[False]] == ["derivatives: forward"]
    assert lines[True][1:] == ["blocks: computed again in the backward pass instead of remembered"]
    one, other = (
        (tmp_path / str(r) / "checkpoints").glob("*3/model.safetensors").__next__().read_bytes() for r in (False, True)
    )
    assert one == other


def test_preparing_sets_the_objective_and_the_network_up():
    made = config(batch_size=64, micro_batches=4)
    model = mfm.MetaFlowMap(network(num_classes=0), mfm.LinearPath(), "plain")
    objective = Objective(None, made.loss, made.times, None, 64, 0)
    asked = []

    def remembered(loss, network, device, precision, rows, recompute):
        asked.append((precision, rows, recompute))
        return Differentiation("difference", "", 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivative, "choose", remembered)
        made = made.model_copy(update={"precision": "bf16", "checkpoint_activations": True})
        prepare(model, made, "cpu", objective, ranks=2)
    assert asked == [("bf16", 4, True)]  # half of 64 rows, in 4 pieces, on 2 ranks
    assert objective.differentiation == Differentiation("difference", "", 0.1)
    assert model.network.recompute


def test_other_networks_have_no_blocks_to_compute_again():
    made = config(checkpoint_activations=True)
    model = mfm.MetaFlowMap(MLPConfig(width=8, depth=1).network((2,)), mfm.LinearPath())
    says = "checkpoint_activations=true is for model.network.name=dit: set checkpoint_activations=false"
    with pytest.raises(InputError, match=says):
        prepare(model, made, "cpu", Objective(None, made.loss, made.times, None, 8, 0))


@pytest.mark.parametrize(("ranks", "shard", "name"), [(1, 0, "adam"), (2, 1, "adam"), (2, 0, "soap"), (2, 0, "adam")])
def test_a_network_is_compiled_whole_unless_its_weights_are_spread(ranks, shard, name, monkeypatch):
    asked = []
    monkeypatch.setattr(derivative, "use_compiled", lambda network, choice, device, precision: asked.append(choice))
    made = config(compile=True, shard=shard, optimizer={"name": name})
    model = mfm.MetaFlowMap(MLPConfig(width=8, depth=1).network((2,)), mfm.LinearPath())
    objective = Objective(None, made.loss, made.times, None, 8, 0)
    if (ranks, shard, name) == (2, 0, "adam"):
        with pytest.raises(InputError, match="must not be spread: set shard=1"):
            prepare(model, made, "cpu", objective, ranks)
        made = made.model_copy(update={"compile": "auto"})
    prepare(model, made, "cpu", objective, ranks)
    assert asked == [made.compile is True]


# -- the teacher's calls ---------------------------------------------------------------------------------------------


def test_a_guided_teacher_is_called_once_and_for_guided_rows_twice():
    seen = []

    def drift(t, x, cond):
        seen.append((t, cond["label"].tolist()))
        return t[:, None] * x * (1 + cond["label"][:, None])

    x, t, label = normal(4, 2), uniform(4), torch.tensor([0, 1, 3, 2])
    w = torch.tensor([2.5, 1.0, 1.0, 4.0], dtype=F64)
    out = guided_drift(drift, {"label": label, "guidance": w}, 3)(t, x)
    assert len(seen) == 1
    assert seen[0][1] == [0, 1, 3, 2, 3, 3]
    assert torch.equal(seen[0][0], torch.cat([t, t[[0, 3]]]))
    expected = (t * (4 + w * (label + 1 - 4)))[:, None] * x
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
