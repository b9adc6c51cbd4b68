"""The aesthetic head and image classifiers: by hand, from files, and as parts of steering and of the command line."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_vision import EMBED, PLAIN, SIDE, check_gradient, clip, pictures, refill, tokenizer, weights
from torch import nn

import metaflowmaps as mfm
from calls import steer
from conftest import F64, mfm_command
from metaflowmaps.lab.named_rewards import JUDGES, choose_reward
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.rewards import AestheticScore, ClassifierMixture, ImageClassifierReward, LogitMargin, Pixels
from metaflowmaps.rewards.vision.aesthetic import FILE
from metaflowmaps.rewards.vision.weights import linear_chain

PIXELS = Pixels(**PLAIN)
X = pictures()
WIDTHS = (EMBED, 1024, 128, 64, 16, 1)
NAMES = ["tench, Tinca tinca", "crane", "tabby, tabby cat", "crane, lifting device"]


def chain():
    """Names and shapes of the published head: layers 0, 2, 4, 6, 7."""
    shapes = {}
    for k, columns, rows in zip((0, 2, 4, 6, 7), WIDTHS[:-1], WIDTHS[1:], strict=True):
        shapes[f"layers.{k}.weight"], shapes[f"layers.{k}.bias"] = (rows, columns), (rows,)
    return weights(shapes, "aesthetic", scale=0.2)


def aesthetic(**options):
    return AestheticScore(clip(), linear_chain(chain(), EMBED, "the head"), PIXELS, **options)


def rating():
    with torch.no_grad():
        image = clip().get_image_features(pixel_values=PIXELS(X)).pooler_output
        r, state = image / image.norm(dim=1, keepdim=True), chain()
        for k in (0, 2, 4, 6, 7):
            r = r @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"]
    return r[:, 0]


def vit():
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8,
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return refill(transformers.ViTForImageClassification(config), "vit")


def logits(x):
    return vit()(pixel_values=PIXELS(x)).logits


def classified(label, **options):
    return ImageClassifierReward(vit(), label, PIXELS, **options)


# -- aesthetic -------------------------------------------------------------------------------------------------------


def test_a_rating_by_hand():
    # two ways through sums of 1024 terms, scaled by ~30 in all
    torch.testing.assert_close(aesthetic()(X), rating(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(aesthetic(micro_batch=1, strength=3.0)(X), 3 * rating(), rtol=1e-10, atol=1e-10)
    check_gradient(aesthetic(), X)
    one_by_one = torch.cat([aesthetic()(X[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(one_by_one, rating(), rtol=1e-10, atol=1e-10)


def test_ratings_from_files(tmp_path):
    torch.save({k: v.float() for k, v in chain().items()}, tmp_path / FILE)
    vision = transformers.CLIPVisionModelWithProjection(clip().config.vision_config).double()
    vision.load_state_dict({k: v for k, v in clip().state_dict().items() if k.startswith("vis")})
    vision.float().save_pretrained(tmp_path / "clip")
    reward = AestheticScore.from_pretrained(tmp_path, clip=tmp_path / "clip", processor=PIXELS, strength=2.0)
    torch.testing.assert_close(reward(X.float()).double(), 2 * rating(), rtol=1e-4, atol=1e-4)  # float32 weights
    assert repr(reward) == "AestheticScore(strength=2)"
    half = AestheticScore.from_pretrained(tmp_path, clip=tmp_path / "clip", processor=PIXELS, dtype=torch.bfloat16)
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    # embeddings of 8 bits, scaled by ~30
    torch.testing.assert_close(half(X.float()).double(), rating(), rtol=0.1, atol=0.5)
    with pytest.raises(mfm.InputError, match=r"holds no other.pth"):
        AestheticScore.from_pretrained(tmp_path, file="other.pth", clip=tmp_path / "clip")
    torch.save({"w": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(mfm.InputError, match="not the weights of the aesthetic predictor"):
        AestheticScore.from_pretrained(tmp_path, clip=tmp_path / "clip")


def test_heads_that_do_not_fit():
    with pytest.raises(mfm.InputError, match="lead from 9 numbers to 1"):
        linear_chain(chain(), 9, "the head")
    with pytest.raises(mfm.InputError, match="head must be a torch module"):
        AestheticScore(clip(), "head.pth", PIXELS)
    with pytest.raises(mfm.InputError, match="CLIPVisionModelWithProjection"):
        AestheticScore(nn.Linear(2, 2), nn.Linear(2, 1), PIXELS)


# -- classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [2, "2", "tabby", "Tabby Cat", "tabby, tabby cat"])
def test_a_class_by_number_or_name(label):
    reward = classified(label)
    torch.testing.assert_close(reward(X), ClassifierMixture(logits, torch.eye(4)[2])(X), rtol=1e-12, atol=1e-12)
    assert repr(reward) == "ImageClassifierReward(label=2, log-probability, strength=1)"


def test_the_margin_is_the_log_odds():
    torch.testing.assert_close(
        classified(1, kind="margin", strength=0.3)(X), LogitMargin(logits, 1, 0.3)(X), rtol=1e-12, atol=1e-12
    )


def test_a_class_for_each_row():
    label = torch.tensor([2, 0, 3])
    reward = classified(None, micro_batch=2)
    torch.testing.assert_close(reward(X, {"label": label}), logits(X).log_softmax(1)[range(3), label].detach())
    for cond, says in ((None, r'needs cond\["label"\]'), ({"label": torch.tensor([0, 4, 1])}, "0 … 3.*got 0 … 4")):
        with pytest.raises(mfm.InputError, match=says):
            reward(X, cond)


@pytest.mark.parametrize("kind", ["log-probability", "margin"])
def test_gradients(kind):
    check_gradient(classified(2, kind=kind), X)


@pytest.mark.parametrize(
    ("label", "options", "says"),
    [
        ("taby", {}, "no class 'taby' among its 4: did you mean 'tabby'"),
        ("qqqq", {}, "give its number"),
        ("crane", {}, "may be class 1 or 3: give the number"),
        (4, {}, "label 4 is not among 0 … 3"),
        (-1, {}, "label -1 is not among 0 … 3"),
        (1.5, {}, "label 1.5 is not among 0 … 3"),
        (1, {"kind": "odds"}, "unknown kind 'odds'"),
    ],
)
def test_classes_that_are_not_there(label, options, says):
    with pytest.raises(mfm.InputError, match=says):
        classified(label, **options)


def test_a_classifier_from_a_folder(tmp_path):
    vit().float().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": SIDE, "image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2})
    )
    reward = ImageClassifierReward.from_pretrained(tmp_path, "tabby", strength=2.0)
    assert reward.pixels == Pixels((SIDE, SIDE), "exact", None, (0.4,) * 3, (0.3,) * 3, "bilinear")
    own = ImageClassifierReward(vit(), 2, reward.pixels)
    torch.testing.assert_close(reward(X.float()).double(), 2 * own(X), rtol=0, atol=1e-4)  # float32 weights
    half = ImageClassifierReward.from_pretrained(tmp_path, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(half(X.float()).double(), own(X), rtol=0, atol=0.2)  # 8 bits
    with pytest.raises(mfm.InputError, match="cannot be loaded") as refused:
        ImageClassifierReward.from_pretrained(tmp_path / "nowhere" / "at" / "all", 2)
    assert "\n" not in str(refused.value)


# -- what all have in common -----------------------------------------------------------------------------------------

ALL = {"aesthetic": aesthetic, "classifier": lambda **options: classified(2, **options)}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_rewards_on_pictures_keep_the_rules(make):
    reward = make(strength=1.3)
    assert isinstance(reward, mfm.rewards.Reward)
    assert reward.differentiable
    assert mfm.rewards.is_differentiable(reward)
    for dtype in (torch.float32, F64):
        assert reward(X.to(dtype)).dtype == dtype
    assert reward(X[:0]).shape == (0,)
    x, state = X.clone(), torch.random.get_rng_state()
    first = reward(x, {"label": torch.arange(3)})
    assert torch.equal(first, reward(x))
    assert torch.equal(x, X)
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(mfm.InputError, match="decode latents first"):
        reward(torch.zeros(2, 4, 32, 32))
    grey = X[:, :1]
    assert torch.equal(reward(grey), reward(grey.expand(-1, 3, -1, -1)))


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import is an ImportError now
    for load in (
        lambda: mfm.rewards.PickScore.from_pretrained(prompt="a dog"),
        lambda: mfm.rewards.ClipScore.from_pretrained(prompt="a dog"),
        lambda: mfm.rewards.HPSv2.from_pretrained(prompt="a dog"),
        lambda: mfm.rewards.ImageReward.from_pretrained(prompt="a dog"),
        lambda: mfm.rewards.AestheticScore.from_pretrained(),
        lambda: mfm.rewards.ImageClassifierReward.from_pretrained(label=3),
    ):
        with pytest.raises(mfm.InputError, match=r"needs transformers: pip install 'metaflowmaps\[rewards\]'$"):
            load()


def test_steering_a_model_of_pictures():
    """Exact draws of an exact mixture, judged by a tiny CLIP: the reward of the samples rises."""
    law = mfm.GaussianMixture(torch.zeros(1, 3 * 8 * 8), 0.05)

    def drift(t, x, cond=None):
        return law.drift(mfm.LinearPath(), t, x.flatten(1)).reshape(x.shape)

    model = SimpleNamespace(path=mfm.LinearPath(), event_shape=(3, 8, 8), drift=drift)
    reward = mfm.rewards.ClipScore(clip().float(), "a dog", tokenizer(), PIXELS, strength=30.0, micro_batch=3)

    def steered(method):
        return steer(model, reward, 8, method=method, steps=10, generator=torch.Generator().manual_seed(0))

    plain, better = steered("none").rewards, steered("dps").rewards
    assert bool((better > plain).all())


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    for name, model in (("clip", clip()), ("vit", vit())):
        model.float().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(
            json.dumps({"size": SIDE, "crop_size": SIDE, "do_center_crop": True, "resample": 3})
        )
    return root


def test_names_on_the_command_line(places):
    digits = OpenedModel.open("digits", "cpu")
    for text, shown in (
        (f"clip@{places / 'clip'}:a dog", "ClipScore('a dog', strength=3)"),
        (f"pickscore@{places / 'clip'}:a dog: or so", "PickScore('a dog: or so', strength=3)"),
        (f"classifier@{places / 'vit'}:tabby", "ImageClassifierReward(label=2, log-probability, strength=3)"),
    ):
        chosen = choose_reward(text, digits, 3.0)
        assert (repr(chosen.reward), chosen.known, chosen.name) == (shown, None, text)
        assert chosen.reward(torch.zeros(2, 1, 8, 8)).shape == (2,)


def test_a_template_on_the_command_line(places):
    """{label} is the first name of each of ImageNet's classes."""
    imagenet = SimpleNamespace(checkpoint=SimpleNamespace(config={"network": {"num_classes": 1000}}))
    with pytest.warns(UserWarning, match="is cut to the 16"):  # a token a letter
        reward = choose_reward(f"clip@{places / 'clip'}:a {{label}}", imagenet, 1.0).reward
    label = torch.tensor([281, 1, 281])
    for row, text in ((0, "a tabby"), (1, "a goldfish")):
        named = mfm.rewards.ClipScore(reward.model, text, tokenizer(), reward.pixels)
        torch.testing.assert_close(
            reward(X.float(), {"label": label})[row], named(X.float())[row], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pickscore", "say what for, as in --reward 'pickscore:a photo of a tabby cat'"),
        ("clip@{clip}: ", "say what for"),
        ("classifier", "classifier:tabby"),
        ("aesthetic:a dog", "takes no prompt"),
        ("clip@{clip}:a {{label}}", "type the name of the class"),
        ("classifier@{vit}:taby", "did you mean 'tabby'"),
        ("hpsv2@{clip}:a dog", "holds no HPS_v2.1_compressed.pt"),
        ("imagereward@{clip}:a dog", "holds no ImageReward.pt"),
        ("aesthetic@{clip}", "holds no aesthetic-model.pth"),
        ("pikscore:a dog", "did you mean 'pickscore:PROMPT'"),
    ],
)
def test_names_that_cannot_be_used(places, text, says):
    with pytest.raises(mfm.InputError, match=says):
        choose_reward(text.format(clip=places / "clip", vit=places / "vit"), OpenedModel.open("digits", "cpu"), 1.0)
    assert set(JUDGES) == {"clip", "pickscore", "hpsv2", "imagereward", "aesthetic", "classifier"}


def test_mfm_steer_with_a_judge(places, tmp_path, capsys):
    reward = f"clip@{places / 'clip'}:a dog"
    code, text, err = mfm_command(
        capsys, "steer", "digits", "--reward", reward, "--strength", "2", "--num", "4", "--steps", "2",
        "--method", "mfm-g", "--num-draws", "2", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(text)
    assert results["config"]["reward"] == reward
    assert results["cost"]["reward_backwards"] == 4 * 2 * 2
