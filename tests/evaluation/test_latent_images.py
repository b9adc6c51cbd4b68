"""The image experiments on a tiny map of latents that knows classes: a random autoencoder, synthetic pictures."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmarks.synthetic_pictures import write_synthetic
from PIL import Image
from test_images import Nearest, images, repeated
from tests.tiny_codec import tiny_codec, tiny_vae
from torch import nn

import metaflowmaps as mfm
from conftest import mfm_command as command
from metaflowmaps.checkpoint import save_model
from metaflowmaps.cli.context import Context
from metaflowmaps.cli.encode import Encode
from metaflowmaps.cli.encode import run as encode
from metaflowmaps.data import ImageSet, Latents
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.images import class_mixture as mixture
from metaflowmaps.lab.evaluate.images import experiments, race, steered
from metaflowmaps.lab.evaluate.images import inverse_problems as inverse
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scores_of, short
from metaflowmaps.lab.evaluate.images.setup import Conditions, ImageEvalConfig, ImageSetup, Judge
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.networks.dit import DiTConfig
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.work.choices import dumped
from metaflowmaps.work.config import override, validated

CLASSES, SIDE, SHAPE = 4, 64, (4, 8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:one draw carries all the weight")


def tiny_map() -> mfm.MetaFlowMap:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTConfig(
            patch=2, width=16, depth=2, heads=2, encoder_depth=1, num_classes=CLASSES, guidance=[1.0, 2.5]
        ).network((4, 8, 8))
        for p in network.parameters():
            p.data += 0.1 * torch.randn_like(p)  # as made, its last layer is zero
    return mfm.MetaFlowMap(network, mfm.LinearPath(), "plain")


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """Pictures of four classes, their latents, and a map of these with its autoencoder beside it."""
    folder = tmp_path_factory.mktemp("latent")
    write_synthetic(folder / "pictures", CLASSES, 9, SIDE)
    tiny_vae().save_pretrained(folder / "vae")
    latents = Encode(source=str(folder / "pictures"), vae=str(folder / "vae"), size=SIDE)
    encode(latents, Context(out=folder / "latents", device="cpu"))
    names = [f"kind {i}" for i in range(CLASSES)]
    mfm.Pipeline(tiny_map(), tiny_codec(), names, guidance=2.5).save_pretrained(folder / "map")
    return folder


def sets(*settings) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


class Watch:
    """What passes the map's network: rows, and for each the class and guidance that it was told."""

    def __init__(self) -> None:
        self.rows = 0
        self.labels: list[torch.Tensor | None] = []
        self.guidance: list[torch.Tensor | None] = []

    def on(self, model: mfm.MetaFlowMap) -> None:
        model.network.register_forward_hook(self._seen, with_kwargs=True)

    def _seen(self, module, args, kwargs, out) -> None:
        self.rows += len(out)
        self.labels.append(kwargs.get("label"))
        self.guidance.append(kwargs.get("guidance"))


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """The network of every map that an experiment opens."""
    watch, opened = Watch(), OpenedModel.open

    def opening(*arguments, **options):
        found = opened(*arguments, **options)
        watch.on(found.model)
        return found

    monkeypatch.setattr(OpenedModel, "open", opening)
    return watch


class Means(nn.Module):
    """In place of Inception's extractor: mean and spread of each channel, in eighths of its range."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()

    def forward(self, x):
        x = x.float() / 32
        return (torch.cat([x.mean((2, 3)), x.std((2, 3))], 1),)


@pytest.fixture
def fidelity(monkeypatch):
    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Means
    package.feature_extractor_inceptionv3 = module
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.fixture
def no_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)


def by_means(pictures: torch.Tensor) -> torch.Tensor:
    """The same features, written out."""
    x = ((pictures.clamp(-1, 1) + 1) * 127.5).round() / 32
    return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


@pytest.fixture(scope="module")
def statistics(here) -> Path:
    """Of random features with the right number."""
    x = np.random.default_rng(0).normal(size=(40, 6)) + 4
    np.savez(here / "statistics.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    return here / "statistics.npz"


def done(capsys, here, *arguments, out) -> dict:
    code, _, err = command(capsys, "eval", arguments[0], here / "map", *arguments[1:], "--out", out)
    assert code == 0, err
    return json.loads((out / "results.json").read_text())


def refused(capsys, *arguments) -> str:
    code, out, err = command(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    return err


EXPERIMENTS = {
    "posterior": (
        "posterior",
        ["samples=10", "times=[0.2,0.8]", "glass_steps=[2]", "draws=2", "images=4"],
        {"draws.png", "spread.png", "frechet-against-calls.png"},
    ),
    "value": (
        "value",
        ["states=3", "times=[0.2]", "num_draws=[1,3]", "glass_steps=[2]", "rollout_steps=2", "rollout_particles=3",
         "reward=slant"],
        {"value-against-calls.png"},
    ),
    "generation": (
        "generation",
        ["samples=10", "refine_steps=[1,3]", "compose_steps=[2]", "ode_steps=[2]"],
        {"frechet-against-calls.png", "samples.png"},
    ),
    "race": (
        "steering",
        ["samples=64", "steps=2", "base_steps=2", "pool=128", "best_of=[1,16]", "strengths=[2]", "rescales=[1]",
         'methods=["mfm-g-1","tds-64"]', 'rewards=["slant","half"]'],
        {"reward-against-distance.png", "reward-against-frechet.png", "samples-slant.png", "samples-half.png"},
    ),
}  # fmt: skip


LONG = ("race",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.attack if n in LONG else ()) for n in EXPERIMENTS])
def test_experiments_on_latents(capsys, here, tmp_path, watch, no_fidelity, name):
    """Each ends with its figures, and takes as many network evaluations as its configuration says."""
    which, settings, drawn = EXPERIMENTS[name]
    results = done(capsys, here, which, *sets(*settings, f"data={here / 'latents'}"), out=tmp_path / "out")
    assert results["config"]["experiment"] == name  # of steering, the race where no task is named
    config = override(validated(experiments.EXPERIMENTS[name].config, {}), settings)
    assert watch.rows == config.calls() + 1  # one to see whether the network has this guidance
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == drawn == results["metrics"]["captions"].keys()
    for file in drawn:
        with Image.open(tmp_path / "out" / file) as picture:
            picture.load()
    metrics = results["metrics"]
    assert metrics.get("space", "components of the latents").endswith("components of the latents")
    assert metrics["conditional"]
    assert "FID" not in json.dumps({k: v for k, v in metrics.items() if k != "captions"})
    assert all(told is not None for told in (*watch.labels, *watch.guidance))
    assert {float(w) for part in watch.guidance for w in part} == {2.5}  # as pipeline.json has it
    assert "vae" not in results["config"]  # what is not asked for leaves no trace
    assert results["config"]["autoencoder"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(
            "posterior",
            ["samples=4", "times=[0.2]", "glass_steps=[2]", "draws=2", "images=2"],
            marks=pytest.mark.attack,
        ),
        pytest.param("value", EXPERIMENTS["value"][1], marks=pytest.mark.attack),
        ("generation", ["samples=4", "refine_steps=[1]", "compose_steps=[2]", "ode_steps=[2]"]),
    ],
)
def test_experiments_on_a_device_of_their_own(capsys, here, tmp_path, no_fidelity, accelerator, name, settings):
    """Data, noise, classes, autoencoder and judge meet on it, and on nothing else."""
    results = done(capsys, here, name, *sets(*settings, f"data={here / 'latents'}"), out=tmp_path / "out")
    assert results["environment"]["device"] == accelerator.type


# -- what the map is told ----------------------------------------------------------------------------------------------


def test_labels_and_guidance_reach_the_network(capsys, here, tmp_path, watch):
    generation = ["generation", *sets("samples=10", "refine_steps=[1]", "compose_steps=[2]", "ode_steps=[2]")]
    data = f"data={here / 'latents'}"
    done(capsys, here, *generation, *sets(data, "guidance=1.0"), out=tmp_path / "a")
    assert all(torch.equal(part, torch.arange(10) % CLASSES) for part in watch.labels[1:])
    assert {float(w) for part in watch.guidance for w in part} == {1.0}
    watch.labels.clear()
    watch.guidance.clear()
    done(capsys, here, *generation, *sets(data, "labels=none"), out=tmp_path / "b")
    assert set(watch.labels) == set(watch.guidance) == {None}
    watch.labels.clear()
    done(capsys, here, *generation, *sets(data, "labels=data"), out=tmp_path / "c")
    held = Latents(path=str(here / "latents")).load()[1].labels
    order = torch.randperm(len(held), generator=stream(0, "held-out", "generation"))
    wanted = held[order[torch.arange(10) % len(held)]]
    assert all(torch.equal(part, wanted) for part in watch.labels[1:])
    assert len(watch.labels) > 3
    for setting, says in (("guidance=3.0", "3"), ("labels=some", "labels"), ("precision=half", "precision")):
        err = refused(capsys, "eval", "generation", here / "map", *sets(data, setting), "--out", tmp_path / "x")
        assert says in err
    assert not (tmp_path / "x").exists() or not (tmp_path / "x" / "results.json").exists()


def test_a_noised_picture_keeps_its_class(capsys, here, tmp_path, watch):
    settings = ["samples=10", "times=[0.5]", "map_steps=[1]", "glass_steps=[]", "draws=2", "images=3",
                f"data={here / 'latents'}"]  # fmt: skip
    done(capsys, here, "posterior", *sets(*settings), out=tmp_path / "a")
    held = Latents(path=str(here / "latents")).load()[1].labels
    order = torch.randperm(len(held), generator=stream(0, "held-out", "recovery"))[torch.arange(10) % len(held)]
    single, several = watch.labels[1:3]
    assert torch.equal(single, held[order])
    assert torch.equal(several, held[order[:3]].repeat(2))
    assert len(set(held.tolist())) > 1  # or the test could not fail
    err = refused(
        capsys, "eval", "posterior", here / "map", *sets(*settings, "labels=uniform"), "--out", tmp_path / "b"
    )
    assert "labels=data" in err


def test_bf16_is_the_networks_alone(capsys, here, tmp_path, monkeypatch):
    seen = []
    opened = OpenedModel.open

    def opening(*arguments):
        found = opened(*arguments)
        found.model.network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        return found

    monkeypatch.setattr(OpenedModel, "open", opening)
    few = sets("samples=4", "refine_steps=[1]", "compose_steps=[]", "ode_steps=[]", f"data={here / 'latents'}")
    exact = done(capsys, here, "generation", *few, out=tmp_path / "a")["metrics"]["by_sampler"]["refine-1"]
    rough = done(capsys, here, "generation", *few, *sets("precision=bf16"), out=tmp_path / "b")
    assert seen == [False, False, True, True]  # the first of each only looks whether there is such guidance
    got = rough["metrics"]["by_sampler"]["refine-1"]["frechet"]
    assert got != exact["frechet"]
    assert got == pytest.approx(exact["frechet"], rel=0.1)  # 8 bits, a few layers


@pytest.mark.parametrize("name", ["tds-8", "mfm-gf-2", pytest.param("mfm-search-2", marks=pytest.mark.attack)])
def test_all_rows_of_a_sample_have_its_class(here, name):
    """Systems of particles have one class each; candidates of a sample its own."""
    setup = staged(here)
    watch = Watch()
    watch.on(setup.model)
    labels = steered.labels_of(name, torch.arange(20) % CLASSES)
    assert len(labels) == 20
    v = steered.image_variant(name)
    x, _ = steered.run(setup, v, image_reward(setup, "ink"), 20, mfm.ODE(steps=3), stream(0), labels)
    assert x.shape == (20, *SHAPE)
    if name == "tds-8":
        assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 4
        assert all(len(set(part.tolist())) == 1 for part in watch.labels)
        assert {int(part[0]) for part in watch.labels} == {0, 1, 2}
    else:
        assert labels.tolist() == [i % CLASSES for i in range(20)]
        for part in watch.labels:
            assert torch.equal(part, labels.repeat(len(part) // 20))


# -- what distances are to ---------------------------------------------------------------------------------------------


def samples_by_hand(n: int, guidance: float) -> torch.Tensor:
    """Pictures of refine-2, by the map alone."""
    seeds = fresh_seeds(n, stream(0, "generation", "refine-2"))
    cond = {"label": torch.arange(n) % CLASSES, "guidance": torch.full((n,), guidance)}
    return tiny_codec().decode(tiny_map().eval().generate(n, 2, cond=cond, seeds=seeds)).detach()


FEW = sets("samples=24", "refine_steps=[2]", "compose_steps=[]", "ode_steps=[]")


def test_fid_against_a_statistics_file(capsys, here, tmp_path, fidelity, statistics):
    """It is the distance of the pictures' features to these moments; no data are needed, and shards do not matter."""
    given = sets(f"statistics={statistics}", "features=inception")
    results = done(capsys, here, "generation", *FEW, *given, out=tmp_path / "a")
    metrics = results["metrics"]
    x = by_means(samples_by_hand(24, 2.5)).double()
    with np.load(statistics) as file:
        mu, sigma = torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])
    own = torch.cov(x.T)
    roots = torch.linalg.eigvals(own @ sigma).real.clamp_min(0).sqrt().sum()
    expected = (x.mean(0) - mu).square().sum() + own.trace() + sigma.trace() - 2 * roots
    # features are float32 of pictures of other batch sizes: 1e-5, twice in a square
    assert metrics["by_sampler"]["refine-2"]["frechet"] == pytest.approx(float(expected), rel=1e-3)
    assert (metrics["measure"], metrics["space"]) == ("FID", "Inception features")
    assert "floor" not in metrics
    assert "copying" not in metrics["by_sampler"]["refine-2"]
    assert metrics["captions"]["frechet-against-calls.png"].startswith("FID of samples")
    (table,) = metrics["tables"].values()
    assert table["head"][2] == "FID"
    few = done(capsys, here, "generation", *FEW, *given, "--shard-size", "7", out=tmp_path / "b")["metrics"]
    assert few["by_sampler"]["refine-2"]["frechet"] == pytest.approx(float(expected), rel=1e-3)
    # with data at hand: a floor, to the same file
    with_data = done(capsys, here, "generation", *FEW, *given, *sets(f"data={here / 'latents'}"), out=tmp_path / "c")[
        "metrics"
    ]
    assert with_data["by_sampler"]["refine-2"]["frechet"] == metrics["by_sampler"]["refine-2"]["frechet"]
    assert with_data["floor"]["frechet"] > 0


def test_held_out_pictures_are_the_reference_without_one(capsys, here, tmp_path, fidelity):
    """And that is not called FID. torch-fidelity being there, its features are taken."""
    metrics = done(capsys, here, "generation", *FEW, *sets(f"data={here / 'latents'}"), out=tmp_path / "a")["metrics"]
    held = Latents(path=str(here / "latents")).load()[1]
    pictures = tiny_codec().decode(held.tensor())
    expected = frechet_distance(by_means(samples_by_hand(24, 2.5)), by_means(pictures))
    assert metrics["by_sampler"]["refine-2"]["frechet"] == pytest.approx(expected, rel=1e-3)  # as above
    assert metrics["space"] == "Inception features"
    assert "measure" not in metrics
    assert metrics["captions"]["frechet-against-calls.png"].startswith(
        "Fréchet distance (Inception features, not FID) of samples to the held-out images"
    )


def test_posterior_fid(capsys, here, tmp_path, fidelity, statistics):
    settings = sets("samples=10", "times=[0.5]", "map_steps=[1]", "glass_steps=[]", "draws=2", "images=3",
                    f"data={here / 'latents'}", f"statistics={statistics}")  # fmt: skip
    metrics = done(capsys, here, "posterior", *settings, out=tmp_path / "a")["metrics"]
    assert metrics["measure"] == "FID"
    assert "FID of draws to the statistics file, in Inception features" in metrics["tables"]
    again = done(capsys, here, "posterior", *settings, "--shard-size", "3", out=tmp_path / "b")["metrics"]
    # draws belong to their row, not to their shard
    assert again["frechet"]["0.5"]["map-1"] == pytest.approx(metrics["frechet"]["0.5"]["map-1"], rel=1e-3)


# -- data --------------------------------------------------------------------------------------------------------------


class Large:
    """A set that must not be read whole."""

    def __init__(self, n: int, most: int) -> None:
        self.n, self.most, self.read = n, most, []
        self.name, self.top, self.event_shape = "latents", 1.0, SHAPE
        self.labels, self.class_names, self.num_classes = torch.arange(n) % 3, ("a", "b", "c"), 3

    def __len__(self) -> int:
        return self.n

    def tensor(self, index=slice(None)):
        rows = torch.arange(self.n)[index]
        assert len(rows) <= self.most, "the whole set was read"
        self.read.append(rows)
        return rows[:, None, None, None].expand(len(rows), *SHAPE).float()


def test_of_a_large_set_a_seeded_choice_is_read():
    def setup(most):
        train, held = Large(2000, max(most, 1000)), Large(500, most)  # components are found from the first thousand
        return ImageSetup(tiny_map(), train, held, Judge(None, train), most=most)

    one, two = setup(50), setup(50)
    assert one.everything().shape == (100, *SHAPE)
    assert torch.equal(one.seen, two.seen)
    chosen = one.train.read[0]
    assert len(set(chosen.tolist())) == 50
    assert int(chosen.max()) > 500  # not the first ones: P(none of 50 above 500 of 2,000) = 4^-50
    assert one.reference.shape[0] == 50
    one.floor()
    x, labels = one.images(1200, "some", 0, slice(30, 60))
    assert torch.equal(x[:, 0, 0, 0].long() % 3, labels)
    assert x.shape == (30, *SHAPE)


def test_what_is_missing_is_said_in_one_line(capsys, here, tmp_path, no_fidelity, statistics):
    data = f"data={here / 'latents'}"
    for arguments, says in (
        (["generation"], "--set data=DIR, as mfm encode-latents SOURCE --out DIR makes it"),
        (["generation", *sets(f"data={here / 'pictures'}")], "mfm encode-latents SOURCE --out"),
        (["generation", *sets(f"statistics={statistics}")], "pip install 'metaflowmaps[metrics]'"),
        (["generation", *sets(data, "features=inception")], "pip install 'metaflowmaps[metrics]'"),
        (["generation", *sets(data, "features=classifier")], "--set judge=RUN"),
        (["generation", *sets(data, "features=components", f"statistics={here / 'none.npz'}")], "no statistics file"),
        (["generation", *sets(data, f"vae={here / 'pictures'}")], "not an autoencoder"),
        (["steering", "--task", "inverse", *sets(data)], "--task race"),
        (["steering", "--task", "class-mixture", *sets(data)], "--task race"),
        (["value", *sets(data)], "clip:PROMPT"),
        (["value", *sets(data, "reward=clop:a cat")], "allowed are aesthetic, classifier, clip"),
        (["value", *sets(data, "reward=clippe")], "did you mean 'clip'"),
    ):
        assert says in refused(capsys, "eval", arguments[0], here / "map", *arguments[1:], "--out", tmp_path / "x")


def test_an_exported_run_knows_its_data(capsys, here, tmp_path):
    """And where they are gone, that is said."""
    training = {"data": dumped(Latents(path=str(here / "latents")))}
    document = {"schema": 1, "guidance": None, "class_names": [], "vae": str(here / "vae")}
    save_model(tiny_map(), tmp_path / "exported", {"origin": {"training": training}}, {"pipeline.json": document})
    few = sets("samples=4", "refine_steps=[1]", "compose_steps=[]", "ode_steps=[]")
    code, _, err = command(capsys, "eval", "generation", tmp_path / "exported", *few, "--out", tmp_path / "a")
    assert code == 0, err
    training["data"]["path"] = "/no/such/place"
    save_model(tiny_map(), tmp_path / "moved", {"origin": {"training": training}}, {"pipeline.json": document})
    err = refused(capsys, "eval", "generation", tmp_path / "moved", *few, "--out", tmp_path / "b")
    assert "not in /no/such/place" in err
    assert "--set data=DIR" in err


# -- rewards -----------------------------------------------------------------------------------------------------------


def staged(here) -> ImageSetup:
    """The map on its latents, told its classes."""
    train, held = Latents(path=str(here / "latents")).load()
    model, codec = tiny_map(), tiny_codec()
    setup = ImageSetup(model, train, held, Judge(None, train, decode=codec.decode), open_codec=lambda: codec)
    setup.conditions = Conditions(mfm.Pipeline(model, guidance=2.5))
    return setup


def test_rewards_see_pictures_decoded_once(here):
    setup = staged(here)
    rewards = {name: image_reward(setup, name) for name in ("slant", "ink", "half")}
    x = setup.held_out.tensor()
    decoded = []
    setup.codec.register_forward_hook(lambda module, args, out: decoded.append(len(out)))
    scores = scores_of(rewards, x)
    assert decoded == [len(x)]
    pictures = tiny_codec().decode(x)
    torch.testing.assert_close(scores["ink"], mfm.rewards.Ink()(pictures))
    torch.testing.assert_close(scores["slant"], mfm.rewards.Slant()(pictures))
    assert float(scores["half"].std()) > 0
    assert image_reward(setup, "ink", on_pictures=True)(pictures).shape == (len(x),)


def test_a_guide_of_pictures_and_a_judge_of_latents(here):
    """A classifier sees what it was made for."""
    setup = staged(here)
    pictures = tiny_codec().decode(setup.train.tensor(slice(CLASSES)))
    setup.guide = Nearest(pictures)
    assert image_reward(setup, "margin:2")(setup.train.tensor(slice(CLASSES))).argmax() == 2
    latents = setup.train.tensor(slice(CLASSES))
    setup.guide = Nearest(latents)
    assert image_reward(setup, "margin:2")(latents).argmax() == 2
    for known in (Nearest(latents), Nearest(pictures)):
        judge = Judge(known, setup.train, decode=setup.decode)
        assert judge.classes(latents).tolist() == list(range(CLASSES))


def test_a_reward_by_its_text(capsys, here, tmp_path):
    rehearsal = pytest.importorskip("benchmarks.rehearsal", reason="needs the repository, not the package alone")
    rehearsal.save_clip(here / "clip")
    which, settings, _ = EXPERIMENTS["value"]
    text = f"clip@{here / 'clip'}:a red disc"
    results = done(
        capsys, here, which, *sets(*settings, f"data={here / 'latents'}", f"reward={text}"), out=tmp_path / "a"
    )
    assert results["metrics"]["reward"] == text
    assert results["metrics"]["value_std"]["0.2"] > 0
    assert short([text, "slant", "margin:7"]) == {text: "clip:a red disc", "slant": "slant", "margin:7": "margin:7"}
    other = "clip@elsewhere:a red disc"
    assert short([text, other])[other] == other  # two of one name are told apart


# -- calls -------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network of one layer for 1×8×8 pixels."""

    event_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        nn.init.normal_(self.layer.weight, std=0.02, generator=stream(0, "small"))

    def forward(self, z, a, b, context, context_time):
        return self.layer(z.flatten(1)).reshape(z.shape)


@pytest.fixture
def pixels() -> tuple[ImageSetup, Watch]:
    x = images(4)
    train = repeated(x, 40)
    setup = ImageSetup(mfm.MetaFlowMap(Small(), mfm.LinearPath()), train, train, Judge(Nearest(x), train), Nearest(x))
    watch = Watch()
    watch.on(setup.model)
    return setup, watch


@pytest.mark.parametrize("name", dict.fromkeys([*mixture.METHODS, *race.METHODS, "best-of-n-3", "glass-2"]))
def test_calls_of_a_method(pixels, name):
    setup, watch = pixels
    sizes = ((7, 2),) if name == "rejection" else ((64, 5), (7, 2))  # it has no steps, and needs thousands of calls
    for n, steps in sizes:
        watch.rows = 0
        v = steered.image_variant(name)
        steered.run(setup, v, image_reward(setup, "margin"), n, mfm.ODE(steps=steps), stream(0))
        said = steered.calls(v, n, steps)  # of rejection, which stops at the first good sample, the most
        assert 0 < watch.rows <= said if name == "rejection" else watch.rows == said


def test_calls_of_the_experiments_of_pixels(pixels, monkeypatch):
    setup, watch = pixels
    monkeypatch.setattr(mixture, "BASE", 50)
    config = mixture.MixtureConfig(methods=("none", "mfm-gf-4", "tds-64"), samples=70, steps=4)
    mixture.ClassMixture(setup, config).run()
    assert watch.rows == config.calls()
    watch.rows = 0
    config = inverse.InverseConfig(
        methods=("mfm-gf-4", "dps", "tds-64"), problems=("sr2", "inpaint"), images=8, draws=3, steps=3
    )
    inverse.Inverse(setup, config).run()
    assert watch.rows == config.calls()


def test_settings_that_are_not_asked_for_leave_no_trace():
    """A run of before is the same run."""
    old = {"guide", "judge", "drift", "data", "seed"}
    assert ImageEvalConfig().asked().keys() == old
    assert ImageEvalConfig(guidance=1.0, labels="none").asked().keys() == old | {"guidance", "labels"}
    assert ImageSet("a", torch.empty(0, *SHAPE)).labels is None
    with pytest.raises(InputError, match="did you mean 'statistics'"):
        override(ImageEvalConfig(), ["statistic=x"])
