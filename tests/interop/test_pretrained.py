"""The tiny public checkpoints: recorded velocities, flow map and JVP; every wrapping of the keys; every refusal."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.opening import pipeline_document
from metaflowmaps.interop.pretrained.layout import reverse_time
from metaflowmaps.networks.embed import sinusoid
from metaflowmaps.path import LinearPath, glass_drift

CONFIG = {"heads": 4, "encoder_depth": 3}
FAMILIES = ("mfm", "dmf", "sit")
# outputs up to 6 through four blocks in float32 leave 7e-6 against the recorded ones; the issue of a wrong sign or time
# would be of order 1
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def files(interop_files):
    return {family: interop_files / f"{family}_weights.safetensors" for family in FAMILIES}


@pytest.fixture
def io(interop_files):
    return {family: load_file(interop_files / f"{family}_io.safetensors") for family in FAMILIES}


def load(path, family="auto", **config):
    return pretrained.load(path, family, {**CONFIG, **config})


def test_each_family_names_the_decoder_of_its_own_figures(files):
    """The released map decodes by -mse, the others' figures are by -ema; it is what a conversion writes."""
    for family, decoder in (("mfm", "mse"), ("dmf", "ema"), ("sit", "ema")):
        model = load(files[family])
        assert pipeline_document(model, ())["vae"] == f"stabilityai/sd-vae-ft-{decoder}"
        assert pipeline_document(model, (), "mine")["vae"] == "mine"


@torch.no_grad()
def raw(model, z, s, u, t, x_t, cond):
    """v_{s,u} with no check that s <= u: the recorded times are in any order."""
    return model.anchor(t, x_t, cond)(s, u, z)


def test_sit_gives_its_recorded_velocity(files, io):
    model, seen = load(files["sit"]), io["sit"]
    with torch.no_grad():
        torch.testing.assert_close(model.drift(seen["t"], seen["x"], {"label": seen["y"]}), seen["velocity"], **CLOSE)


def test_dmf_gives_its_recorded_output_with_time_and_sign_turned(files, io):
    model, seen = load(files["dmf"]), io["dmf"]
    out = -raw(model, seen["x"], 1 - seen["t"], 1 - seen["r"], seen["t"], seen["x"], {"label": seen["y"]})
    torch.testing.assert_close(out, seen["raw_output"], **CLOSE)


def test_mfm_gives_its_recorded_velocity_flow_map_and_jvp(files, io):
    model, seen = load(files["mfm"]), io["mfm"]
    cond = {"label": seen["y"], "guidance": seen["guidance"]}
    at = (seen["s"], seen["u"], seen["x"], seen["t"], seen["x_t"])
    with torch.no_grad():
        torch.testing.assert_close(model.velocity(*at, cond), seen["velocity"], **CLOSE)
        torch.testing.assert_close(model(*at, cond), seen["flow_map"], **CLOSE)
        flow = model.anchor(seen["t"], seen["x_t"], cond)
        along = (seen["tangent"], torch.ones_like(seen["s"]), torch.zeros_like(seen["u"]))
        jvp = torch.func.jvp(lambda x, s, u: flow(s, u, x), (seen["x"], seen["s"], seen["u"]), along)[1]
        torch.testing.assert_close(jvp, seen["jvp"], **CLOSE)


def test_time_is_reversed_inside_the_first_layer():
    g = torch.Generator().manual_seed(0)
    weight, t = torch.randn(5, 256, generator=g, dtype=torch.float64), torch.rand(7, generator=g, dtype=torch.float64)
    turned = sinusoid(t, 256) @ reverse_time(weight).T
    torch.testing.assert_close(turned, sinusoid(1 - t, 256) @ weight.T, rtol=0, atol=1e-12)  # rounding of 256 terms


@pytest.mark.parametrize("family", FAMILIES)
def test_every_wrapping_of_a_file_is_the_same_model(files, tmp_path, family):
    weights = {key.removeprefix("dit."): value for key, value in load_file(files[family]).items()}
    expected = load(files[family]).state_dict()
    other = {key: torch.zeros_like(value) for key, value in weights.items()}
    wrapped = {
        "plain.pt": weights,
        "module.pt": {f"module.{key}": value for key, value in weights.items()},
        "model.safetensors": {f"model.{key}": value for key, value in weights.items()},
        "compiled.pth": {f"module._orig_mod.{key}": value for key, value in weights.items()},
        "ema.pt": {"model": other, "ema": weights, "opt": {"lr": 1.0}, "steps": 7},
        "ema-module.pt": {"ema": {f"module.{key}": value for key, value in weights.items()}, "args": {"a": "b"}},
        "state.ckpt": {"state_dict": weights, "epoch": 3},
        "half.safetensors": {key: value.half() for key, value in weights.items()},
    }
    for name, content in wrapped.items():
        path = tmp_path / f"{family}-{name}"
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        # halves are rounded to 11 bits, and turned times and signs after that
        bound = 2e-3 if name.startswith("half") else 0
        for key, value in load(path).state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=bound, msg=f"{name}: {key}")
    folder = tmp_path / f"{family}-folder"
    folder.mkdir()
    save_file(weights, folder / "weights.safetensors")
    assert all(torch.equal(v, expected[k]) for k, v in load(folder).state_dict().items())


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    with path.open("wb") as file:
        pickle.dump({"weights": _Code()}, file)
    torch.save({"weights": _Code()}, tmp_path / "zip.pt")
    for name in ("evil.pt", "zip.pt"):
        with pytest.raises(InputError, match=r"refused, its pickle would run code.*safetensors") as refused:
            pretrained.load(tmp_path / name)
        assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_corrupted_copies_are_refused(files, tmp_path, family):
    def refused(change, message, **options):
        weights = load_file(files[family])
        change(weights)
        path = tmp_path / "changed.safetensors"
        save_file(weights, path)
        with pytest.raises(InputError, match=message) as error:
            load(path, **options)
        assert "\n" not in str(error.value)

    first = next(key for key in load_file(files[family]) if key.endswith("blocks.2.attn.qkv.weight"))
    prefix = first.removesuffix("blocks.2.attn.qkv.weight")
    refused(lambda w: w.pop(first), rf"nearest is {family}.*missing: blocks\.2\.attn\.qkv\.weight")
    refused(lambda w: w.update({f"{prefix}surplus": torch.zeros(3)}), rf"nearest is {family}.*unexpected: surplus")
    refused(lambda w: w.update({first: w[first][:-1]}), r"qkv\.weight is \(143, 48\), not \(144, 48\)")
    refused(lambda w: w[first].view(-1)[3].fill_(float("nan")), r"not finite: blocks\.2\.attn\.qkv\.weight")
    refused(lambda w: w.pop(f"{prefix}x_embedder.proj.weight"), "has no x_embedder")
    broken = tmp_path / "cut.safetensors"
    broken.write_bytes(files[family].read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged.*fetch it again"):
        load(broken)


def test_a_wrong_family_names_the_right_one(files):
    for family in FAMILIES:
        for asked in FAMILIES:
            if asked != family and (family, asked) != ("dmf", "sit"):  # a SiT without doubled outputs looks the same
                with pytest.raises(InputError, match=rf"is no {asked} file .*it is a {family} file: family='{family}'"):
                    load(files[family], asked)
        assert load(files[family], family).state_dict().keys() == load(files[family]).state_dict().keys()
    with pytest.raises(InputError, match=r"unknown family 'site'.*did you mean 'sit'"):
        load(files["sit"], "site")


def test_what_shapes_do_not_tell_is_asked_for(files):
    with pytest.raises(InputError, match=r"does not say heads or encoder_depth.*--set heads=N --set encoder_depth=N"):
        pretrained.load(files["dmf"])
    with pytest.raises(InputError, match="does not say heads:"):
        pretrained.load(files["sit"])
    with pytest.raises(InputError, match="heads"):
        pretrained.load(files["sit"], config={"heads": 5})
    with pytest.raises(InputError, match="2 guidance scales"):
        load(files["mfm"], guidance=[1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="did you mean 'heads'"):
        pretrained.load(files["sit"], config={"head": 4})
    with pytest.raises(InputError, match="no such file"):
        pretrained.load(files["sit"].with_name("nothing.safetensors"))


@pytest.mark.parametrize("family", ["dmf", "sit"])
@pytest.mark.parametrize("guidance", [False, True, [1.0, 2.5]])
def test_the_child_is_its_parent_at_any_context(files, io, family, guidance):
    """The first part reads s, the second u; the context, and a guidance embedding to be trained, add nothing yet."""
    model, seen = load(files[family], guidance=guidance), io[family]
    g = torch.Generator().manual_seed(1)
    cond = {"label": seen["y"], **({"guidance": torch.full((6,), 2.5)} if guidance else {})}
    base = None
    for _ in range(3):
        t, x_t = torch.rand(6, generator=g), torch.randn(seen["x"].shape, generator=g)
        out = raw(model, seen["x"], seen["t"], seen["t"], t, x_t, cond)
        base = out if base is None else base
        torch.testing.assert_close(out, base, rtol=0, atol=1e-6)
    with torch.no_grad():
        drift = model.drift(seen["t"], seen["x"], {"label": seen["y"]})
    torch.testing.assert_close(base, drift, rtol=0, atol=1e-6)
    early = raw(model, seen["x"], seen["t"] / 2, seen["t"], seen["t"], seen["x"], cond)
    late = raw(model, seen["x"], seen["t"], seen["t"] / 2, seen["t"], seen["x"], cond)
    assert (early - base).abs().max() > 1e-3 < (late - base).abs().max()  # both times matter
    grads = torch.autograd.grad(
        model.anchor(seen["t"], seen["x"], cond)(seen["t"], seen["t"], seen["x"]).square().sum(),
        [model.network.context_patches.weight, model.network.context_time.mlp[2].weight],
        allow_unused=True,
    )
    assert float(grads[0].abs().max()) > 0  # and the context is learned from the first step on


def test_the_null_class_is_the_models_own(files):
    model = load(files["sit"])
    assert model.network.num_classes == 10
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        named = model.drift(0.3, x, {"label": torch.full((2,), 10)})
        assert torch.equal(named, model.drift(0.3, x))
        with pytest.raises(InputError, match=r"0\.\.10"):
            model.drift(0.3, x, {"label": torch.full((2,), 1000)})


@pytest.mark.parametrize("family", ["dmf", "sit"])
def test_glass_on_a_converted_parent_with_guidance_is_the_formula_by_hand(files, family):
    """b̄ = [t*(1−s)t/den] x + […] x̄ + t* q b_{t*}(x*), b = b_∅ + w (b_y − b_∅), on the linear path (§2, §4)."""
    from metaflowmaps.parameterization import chart_class
    from metaflowmaps.training.teachers import GlassTeacher

    model = load(files[family]).double()
    g = torch.Generator().manual_seed(2)
    x, x_bar = (torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    s, t = torch.tensor([0.2, 0.6, 0.9]).double(), torch.tensor([0.4, 0.1, 0.7]).double()
    y, w = torch.tensor([3, 0, 9]), torch.tensor([2.5, 1.0, 4.0]).double()
    with torch.no_grad():
        chart = chart_class("plain")(LinearPath(), t, x, torch.zeros(()), 1.0)
        taught = GlassTeacher(model.path, model.drift, 10).at(chart, t, x, {"label": y, "guidance": w})(s, x_bar)
        t_, s_, w_ = (v[:, None, None, None] for v in (t, s, w))
        den = t_**2 * (1 - s_) ** 2 + (1 - t_) ** 2 * s_**2
        p = (1 - t_) ** 2 / den
        q = p.sqrt()
        star = 1 / (1 + (1 - s_) * q)
        x_star = star * (t_ * (1 - s_) ** 2 / den * x + s_ * p * x_bar)
        null = model.drift(star.flatten(), x_star, {"label": torch.full((3,), 10)})
        guided = null + w_ * (model.drift(star.flatten(), x_star, {"label": y}) - null)
        inner = (((1 - t_) ** 2 * s_ - t_**2 * (1 - s_)) / den - q) / (1 + (1 - s_) * q)
        by_hand = star * (1 - s_) * t_ / den * x + inner * x_bar + star * q * guided
    torch.testing.assert_close(taught, by_hand, rtol=0, atol=1e-10)  # float64, outputs of order 10
    assert torch.isfinite(glass_drift(model.path, model.drift, s, x_bar, t, x)).all()


def test_a_converted_map_is_saved_and_loaded_like_any_other(files, tmp_path):
    model = load(files["mfm"])
    model.save_pretrained(tmp_path / "map")
    again = mfm.MetaFlowMap.from_pretrained(tmp_path / "map")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = {"label": torch.tensor([1, 2]), "guidance": torch.tensor([2.5, 1.0])}
    with torch.no_grad():
        assert torch.equal(again.drift(0.4, x, cond), model.drift(0.4, x, cond))
        with pytest.raises(InputError, match=r"1, 2\.5"):
            model.drift(0.4, x, {**cond, "guidance": torch.tensor([3.0, 1.0])})
