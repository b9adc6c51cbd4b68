"""What published networks give for a label, and what they teach, sample and warn of at a scale that is asked for."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.guidance import DMF, DMF_512, PLAIN, GuidanceLaw, guided_drift
from metaflowmaps.parameterization import chart_class
from metaflowmaps.recipes import recipe
from metaflowmaps.training.parents import taught_by

CONFIG = {"heads": 4, "encoder_depth": 3}
LABEL = torch.tensor([3, 0, 9, 7, 1, 5])
# float64 through four blocks, outputs up to 10
CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def load(interop_files):
    def load_file_of(name, family):
        found = mfm.pretrained.load_with_source(interop_files / f"{name}_weights.safetensors", family, CONFIG)
        return found.model

    return load_file_of


@torch.no_grad()
def own(model, t, x, label):
    """What the network gives for a label, without a look at any law."""
    return model.anchor(torch.zeros_like(t), torch.zeros_like(x), {"label": label})(t, t, x)


def by_the_family(model, t, x, w, last_noise):
    """DMF's own formula: where noise times are low it gives v_mg = v_∅ + 2.5 (v_y − v_∅), so v_y = .4 v_mg + .6 v_∅."""
    given, null = own(model, t, x, LABEL), own(model, t, x, torch.full_like(LABEL, model.network.num_classes))
    plain = 0.4 * given + 0.6 * null
    low = (1 - t <= last_noise)[:, None, None, None]
    return torch.where(low, null + w * (plain - null), given)


@pytest.mark.parametrize(("name", "last_noise"), [("dmf_logvar", 0.7), ("dmf512", 0.8)])
@pytest.mark.parametrize("w", [1.0, 2.5, 4.0])
def test_a_dmf_teaches_the_scale_that_is_asked_for(load, tmp_path, name, last_noise, w):
    """GLASS on its own formula, from the checkpoint that `mfm convert` writes; at 2.5 its own output is the target."""
    load(name, "dmf").save_pretrained(tmp_path / "dmf")
    parent = mfm.MetaFlowMap.from_pretrained(tmp_path / "dmf").double()
    config = recipe("latents").model_copy(update={"parent": str(tmp_path / "dmf")})
    s, t = torch.linspace(0.02, 0.9, 6, dtype=F64), torch.tensor([0.05, 0.1, 0.1, 0.3, 0.1, 0.7], dtype=F64)
    x, x_bar = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed="x_bar")
    seen = []

    def drift(at, x):
        seen.append(at)
        return by_the_family(parent, at, x, w, last_noise)

    with torch.no_grad():
        expected = mfm.glass_drift(parent.path, drift, s, x_bar, t, x)
        chart = chart_class("plain")(parent.path, t, x, torch.zeros(()), 1.0)
        cond = {"label": LABEL, "guidance": torch.full((6,), w)}
        taught = taught_by(parent, config).at(chart, t, x, cond)(s, x_bar)
        unasked = mfm.glass_drift(parent.path, lambda at, x: own(parent, at, x, LABEL), s, x_bar, t, x)
    assert float(seen[0].min()) < 1 - last_noise < float(seen[0].max())  # both sides of where guidance acts
    torch.testing.assert_close(taught, expected, **CLOSE)
    assert torch.equal(taught, unasked) == (w == 2.5)


def test_plain_parents_teach_the_usual_formula_with_and_without_an_embedding_of_scales(interop_files):
    """An embedding that a map begins with has learned no scale: the parent's law guides."""
    config = recipe("latents").model_copy(update={"parent": "sit"})
    x, t, w = normal(6, 4, 8, 8), torch.linspace(0.1, 0.9, 6, dtype=F64), torch.linspace(1, 4, 6, dtype=F64)
    for guidance in (False, [1.0, 2.5]):
        path = interop_files / "sit_weights.safetensors"
        parent = mfm.pretrained.load(path, config={"heads": 4, "guidance": guidance}).double()
        teacher = taught_by(parent, config)
        with torch.no_grad():
            taught = teacher._conditioned({"label": LABEL, "guidance": w})(t, x)
            null = own(parent, t, x, torch.full_like(LABEL, 10))
            expected = null + w[:, None, None, None] * (own(parent, t, x, LABEL) - null)
            torch.testing.assert_close(taught, expected, **CLOSE)
            # and it samples what it teaches
            torch.testing.assert_close(parent.drift(t, x, {"label": LABEL, "guidance": w}), expected, **CLOSE)


def test_sit_gives_its_own_guided_forward_on_three_of_four_channels(interop_files, load):
    seen, model = load_file(interop_files / "sit512_io.safetensors"), load("sit512", "sit")
    at, label = (seen["cfg_t"], seen["cfg_x"]), seen["cfg_y"]
    cond = {"label": label, "guidance": torch.full((2,), 2.5)}
    with torch.no_grad():
        everywhere = model.drift(*at, cond)
        model.guidance_law = GuidanceLaw(channels=3)
        out = model.drift(*at, cond)
        same = guided_drift(lambda t, x, c: own(model, t, x, c["label"]), cond, 10, model.guidance_law)(*at)
    # as in test_layouts, times 2.5
    torch.testing.assert_close(out, seen["cfg_out"], rtol=0, atol=1e-5)
    torch.testing.assert_close(same, seen["cfg_out"], rtol=0, atol=1e-5)
    assert (everywhere - seen["cfg_out"])[:, 3].abs().max() > 0.1  # the fourth is guided there


def test_guidance_acts_on_its_interval_alone_and_costs_nothing_outside(load):
    model, calls = load("sit512", "sit"), []
    model.network.register_forward_pre_hook(lambda _module, given: calls.append(len(given[0])))
    model.guidance_law = dataclasses.replace(model.guidance_law, since=0.3, until=0.8)
    x, t, w = normal(6, 4, 8, 8).float(), torch.tensor([0.1, 0.29, 0.31, 0.5, 0.79, 0.9]), torch.full((6,), 2.5)
    with torch.no_grad():
        out = model.drift(t, x, {"label": LABEL, "guidance": w})
        assert calls == [6, 3]
        plain = model.drift(t, x, {"label": LABEL})
        null = model.drift(t, x)
        assert calls[2:] == [6, 6]
        torch.testing.assert_close(out[[0, 1, 5]], plain[[0, 1, 5]], rtol=0, atol=0)
        torch.testing.assert_close(out[2:5], (null + 2.5 * (plain - null))[2:5], rtol=0, atol=1e-5)
        # the null class has nothing to guide, and no label is the null class
        assert torch.equal(model.drift(t, x, {"guidance": w}), null)
        steered = mfm.steer(
            model, lambda x: x.mean((1, 2, 3)), 2, "none", mfm.ODE(steps=4), seed=0,
            cond={"label": LABEL[:2], "guidance": w[:2]},
        )  # fmt: skip
    assert torch.isfinite(steered.samples).all()


def test_the_released_map_warns_once_of_a_label_at_scale_one(load):
    x, label = normal(2, 4, 8, 8).float(), torch.tensor([3, 10])
    one = torch.ones(2)
    for cond in ({"label": label}, {"label": label, "guidance": one}):
        model = load("mfm", "mfm")
        with pytest.warns(UserWarning, match=r"learned labels at guidance 2\.5 alone.*guidance=2\.5") as said:
            model.drift(0.5, x, cond)
        assert [warning.filename for warning in said] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(2, cond=cond)
    model = load("mfm", "mfm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.drift(0.5, x, {"label": label, "guidance": torch.tensor([2.5, 1.0])})
        model.drift(0.5, x)


def test_a_checkpoint_keeps_its_law_and_one_of_old_has_its_familys(load, tmp_path):
    for name, family, law in (("dmf_logvar", "dmf", DMF), ("dmf512", "dmf", DMF_512), ("repa", "repa", PLAIN)):
        model = load(name, family)
        assert model.guidance_law == law
        model.save_pretrained(tmp_path / name)
        assert mfm.MetaFlowMap.from_pretrained(tmp_path / name).guidance_law == law
    described = load("dmf", "dmf").describe()
    assert described.pop("guidance_law")["scale"] == 2.5
    old = json.loads(json.dumps({**described, "origin": {"family": "dmf"}}))
    assert mfm.MetaFlowMap.from_description(old, {}).guidance_law == DMF
    assert mfm.MetaFlowMap.from_description(described, {}).guidance_law is None


def test_a_plain_family_is_converted_with_the_times_and_channels_of_its_guidance(interop_files):
    path = {name: interop_files / f"{name}_weights.safetensors" for name in ("sit", "dmf")}
    given = {"guidance_since": 0.3, "guidance_channels": 3}
    model = mfm.pretrained.load(path["sit"], config={**CONFIG, **given})
    assert model.guidance_law == GuidanceLaw(since=0.3, channels=3)
    with pytest.raises(InputError, match="a dmf is guided by its training: guidance_since, guidance_channels cannot"):
        mfm.pretrained.load(path["dmf"], config={**CONFIG, **given})
    for wrong in ({"guidance_since": 2}, {"guidance_until": "late"}, {"guidance_channels": 1.5}):
        with pytest.raises(InputError, match="guid"):
            mfm.pretrained.load(path["sit"], config={**CONFIG, **wrong})


def test_a_dmf_is_tuned_at_the_scale_that_it_gives(load):
    def problem(model, **options):
        return TuningProblem(model, lambda x: x.mean((1, 2, 3)), **options)

    dmf = load("dmf_logvar", "dmf")
    assert problem(dmf, guidance=2.5).guided(LABEL).keys() == {"label"}
    with pytest.raises(InputError, match=r"gives labels at guidance 2\.5.*tune it at guidance=2\.5"):
        problem(dmf)
    assert problem(load("sit512", "sit")).guided(LABEL).keys() == {"label"}
    with pytest.raises(InputError, match="tune it at guidance=1,"):
        problem(load("sit512", "sit"), guidance=2.5)


def test_laws_that_cannot_be_are_refused():
    nan = float("nan")
    for wrong in ({"scale": 0.0}, {"since": 0.6, "until": 0.5}, {"until": 1.5}, {"channels": 0}, {"scale": nan}):
        with pytest.raises(InputError):
            GuidanceLaw(**wrong)
