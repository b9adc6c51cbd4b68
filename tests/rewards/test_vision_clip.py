"""CLIP scores: by the model's own forward pass, by open_clip's layout written out, from files, with any prompt."""

import contextlib
import json
import math

import pytest
import torch
from tiny_vision import EMBED, LENGTH, PLAIN, SIDE, check_gradient, clip, pictures, tokenizer, weights
from torch import nn
from torch.nn import functional as F

import metaflowmaps as mfm
from conftest import normal
from metaflowmaps.rewards import ClipScore, HPSv2, PickScore, Pixels
from metaflowmaps.rewards.vision.clip import HPS_FILE, from_open_clip, renamed

PIXELS = Pixels(**PLAIN)
X = pictures()
PROMPTS = ["a dog", "the cat on a mat", "zebra"]
TOKENS = tokenizer()


def score(prompt="a dog", kind=ClipScore, **options):
    return kind(clip(), prompt, TOKENS, PIXELS, **options)


def by_transformers(prompts, x=X):
    """exp(s) cos as CLIPModel.forward computes it: (rows, prompts)."""
    ids = TOKENS(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        return clip()(pixel_values=PIXELS(x), **ids).logits_per_image


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_the_score_is_the_models_own(kind):
    # sums of at most 54 terms of order 1, in another order, times e^s
    torch.testing.assert_close(score(kind=kind)(X), by_transformers(["a dog"])[:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        score(PROMPTS, kind=kind)(X), by_transformers(PROMPTS).diagonal(), rtol=1e-12, atol=1e-12
    )


def test_hps_is_the_cosine_alone():
    plain = score(kind=HPSv2)(X)
    torch.testing.assert_close(plain * clip().logit_scale.exp(), score()(X), rtol=1e-12, atol=1e-12)
    assert bool((plain.abs() <= 1).all())


def test_pictures_without_numbers_take_no_weights_along():
    """Weights that had been moved to the meta device would be lost."""
    reward = score()
    with contextlib.suppress(NotImplementedError):  # CLIP looks numbers up, and there are none
        reward(X.to("meta"))
    torch.testing.assert_close(reward(X), score()(X), rtol=0, atol=0)


def test_strength_and_repetition():
    torch.testing.assert_close(score(strength=2.5)(X), 2.5 * score()(X), rtol=1e-15, atol=0)
    reward = score()
    assert torch.equal(reward(X), reward(X))
    x = X.clone().requires_grad_(True)
    nothing = score(strength=0)(x)
    assert not nothing.detach().any()
    assert not torch.autograd.grad(nothing.sum(), x)[0].any()


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_a_row_and_copies_of_the_batch():
    reward = score(PROMPTS)
    assert reward.rows_for(X) == 3
    assert score().rows_for(X) is None
    twice = torch.cat([X, X.flip(0)])
    expected = torch.cat([by_transformers(PROMPTS).diagonal(), by_transformers(PROMPTS, X.flip(0)).diagonal()])
    torch.testing.assert_close(reward(twice), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(mfm.InputError, match="3 prompts, one a row, for 4 rows"):
        reward(twice[:4])


@pytest.mark.parametrize("classes", [["dog", "cat", "zebra"], {0: "dog", 1: "cat", 2: "zebra"}])
def test_a_template_is_filled_from_the_labels(classes):
    reward = score("a {label}", classes=classes)
    label = torch.tensor([2, 0, 2])
    table = by_transformers(["a dog", "a cat", "a zebra"])
    expected = table.gather(1, label[:, None])[:, 0]
    torch.testing.assert_close(reward(X, {"label": label}), expected, rtol=1e-12, atol=1e-12)
    some = torch.tensor([2, 1])  # in any order, any number of rows
    part = reward(X[some], {"label": label[some]})
    torch.testing.assert_close(part, expected[some], rtol=1e-12, atol=1e-12)
    for cond, says in (
        (None, r'needs cond\["label"\]'),
        ({"label": torch.tensor([0, 1])}, r"shape \(3,\)"),
        ({"label": torch.tensor([0, 3, 1])}, "0 … 2.*got 0 … 3 .the null class"),
    ):
        with pytest.raises(mfm.InputError, match=says):
            reward(X, cond)


def test_token_ids_need_no_tokenizer():
    ids = TOKENS(PROMPTS, padding="max_length", max_length=LENGTH, return_tensors="pt")["input_ids"]
    rowwise = ClipScore(clip(), ids, processor=PIXELS)
    assert torch.equal(rowwise(X), score(PROMPTS)(X))
    short = TOKENS("zebra", return_tensors="pt")["input_ids"][0]  # what pads a prompt plays no part
    torch.testing.assert_close(ClipScore(clip(), short, processor=PIXELS)(X), score("zebra")(X), rtol=1e-12, atol=1e-12)


def test_texts_are_embedded_once():
    reward, calls = score("a {label}", classes=["dog", "cat", "zebra"]), []
    reward.model.text_model.register_forward_hook(lambda module, args, out: calls.append(len(out.pooler_output)))
    for labels in ([0, 0, 1], [1, 0, 0], [2, 1, 0], [2, 2, 2]):
        reward(X, {"label": torch.tensor(labels)})
    assert calls == [1, 1, 1]  # dog and cat, then zebra
    fresh = score()
    with torch.inference_mode():
        fresh(X)
    check_gradient(fresh, X)  # what is kept from there serves here


def test_a_prompt_that_is_too_long_is_cut_and_says_so():
    with pytest.warns(UserWarning, match="18 tokens is cut to the 16"):
        reward = score("a b c d e f g h i j k l m n o p")
    # 14 letters and both marks are left
    assert torch.equal(reward(X), score("a b c d e f g h i j k l m n")(X))


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        (None, {}, "prompt must be a text"),
        ("", {}, "prompt must be a text"),
        ([], {}, "prompt must be a text"),
        (["a", 3], {}, "prompt must be a text"),
        ("a {label}", {}, "names of the classes"),
        ("a {label}", {"classes": {0: "a", 7: "b"}}, "every class from 0 to 1"),
        (torch.zeros(3), {}, "whole numbers"),
        (torch.zeros(3, LENGTH + 1, dtype=torch.long), {}, "length <= 16"),
        ("a", {"micro_batch": 0}, "micro_batch must be at least 1"),
        ("a", {"strength": -1}, "strength must be"),
    ],
)
def test_prompts_and_options_that_cannot_be_used(prompt, options, says):
    with pytest.raises(mfm.InputError, match=says):
        score(prompt, **options)


def test_objects_that_cannot_be_used():
    with pytest.raises(mfm.InputError, match="needs tokenizer"):
        ClipScore(clip(), "a dog", processor=PIXELS)
    with pytest.raises(mfm.InputError, match="model must be a CLIPModel"):
        ClipScore(nn.Linear(2, 2), "a dog", TOKENS, PIXELS)
    with pytest.raises(mfm.InputError, match="model must be a torch module"):
        ClipScore("openai/clip", "a dog", TOKENS, PIXELS)
    with pytest.raises(mfm.InputError, match=r"needs tokenizer=….*got int"):
        ClipScore(clip(), "a dog", 3, PIXELS)


# -- open_clip's layout ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of open_clip: x + A(ln_1 x), then x + W_2 gelu(W_1 ln_2 x)."""

    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width, heads, inner, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width, heads, inner, layers, patch, side, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, heads, inner, layers)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))[:, 0] @ self.proj


class OpenClip(nn.Module):
    """CLIP in the layout that HPSv2.1 is published in, other sizes for text than for pictures."""

    def __init__(self, width=12, text=10, heads=(3, 2), inner=(20, 18), layers=(3, 2), patch=8, vocabulary=54):
        super().__init__()
        self.visual = Visual(width, heads[0], inner[0], layers[0], patch, SIDE, EMBED)
        self.transformer = Tower(text, heads[1], inner[1], layers[1])
        self.token_embedding = nn.Embedding(vocabulary, text)
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, text))
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.zeros(text, EMBED))
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def encode_text(self, ids):
        mask = torch.full((ids.shape[1],) * 2, -math.inf, dtype=self.ln_final.weight.dtype).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]], mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(1)] @ self.text_projection

    def forward(self, pixels, ids):
        image, text = F.normalize(self.visual(pixels), dim=1), F.normalize(self.encode_text(ids), dim=1)
        return (image * text).sum(1)


def open_clip():
    model = OpenClip().double().eval()
    model.load_state_dict(weights({k: v.shape for k, v in model.state_dict().items()}, "open_clip"))
    return model


def padded(prompts):
    """Token ids as open_clip makes them: zeros behind the end mark."""
    ids = TOKENS(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return ids["input_ids"] * ids["attention_mask"]


def test_open_clips_layout_is_converted():
    theirs = open_clip()
    model = from_open_clip(theirs.state_dict(), vision_heads=3, text_heads=2)
    expected = theirs(PIXELS(X), padded(PROMPTS))
    reward = HPSv2(model, PROMPTS, TOKENS, PIXELS)
    # two independent forward passes in float64, five layers of sums of 20 terms
    torch.testing.assert_close(reward(X), expected.detach(), rtol=1e-11, atol=1e-12)
    assert len(set(expected.tolist())) == 3
    torch.testing.assert_close(model.logit_scale, theirs.logit_scale)
    check_gradient(reward, X)


@pytest.mark.parametrize("heads", [(1, 2), (3, 1)])
def test_heads_matter(heads):
    """They cannot be read from shapes: another number is another model."""
    theirs = open_clip()
    model = from_open_clip(theirs.state_dict(), *heads)
    other = HPSv2(model, PROMPTS, TOKENS, PIXELS)(X)
    assert float((other - theirs(PIXELS(X), padded(PROMPTS)).detach()).abs().max()) > 1e-3


def test_the_published_sizes_fit():
    """ViT-H/14 as it is configured in open_clip, without memory: every key has a place, and 986,109,441 numbers."""
    with torch.device("meta"):
        theirs = OpenClip.__new__(OpenClip)
        nn.Module.__init__(theirs)
        theirs.visual = Visual(1280, 16, 5120, 32, 14, 224, 1024)
        theirs.transformer = Tower(1024, 16, 4096, 24)
        theirs.token_embedding = nn.Embedding(49408, 1024)
        theirs.positional_embedding = nn.Parameter(torch.zeros(77, 1024))
        theirs.ln_final = nn.LayerNorm(1024)
        theirs.text_projection = nn.Parameter(torch.zeros(1024, 1024))
        theirs.logit_scale = nn.Parameter(torch.tensor(0.0))
    state = renamed(theirs.state_dict())
    import transformers

    size = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
    config = transformers.CLIPConfig(
        text_config={**size, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
        vision_config={
            **size,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "patch_size": 14,
        },
        projection_dim=1024,
    )
    with torch.device("meta"):
        wanted = transformers.CLIPModel(config).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(v.numel() for v in state.values()) == 986_109_441


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: s.pop("visual.transformer.resblocks.1.ln_2.bias"),
            "missing: vision_model.encoder.layers.1.layer_norm2",
        ),
        (lambda s: s.pop("text_projection"), "missing: text_projection.weight"),
        (lambda s: s.pop("visual.conv1.weight"), "missing: visual.conv1.weight"),
        (lambda s: s.update(extra=torch.zeros(2)), "unknown: extra"),
        (lambda s: s.update({"visual.proj": torch.zeros(12, 9)}), "other shapes: text_projection.weight"),
    ],
)
def test_other_weights_are_refused(change, says):
    state = open_clip().state_dict()
    change(state)
    with pytest.raises(mfm.InputError, match=says) as refused:
        from_open_clip(state, 3, 2)
    assert "\n" not in str(refused.value)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP as it is published: weights, tokenizer, preprocessing."""
    place = tmp_path_factory.mktemp("clip")
    clip().float().save_pretrained(place)
    TOKENS.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(
        json.dumps({"size": SIDE, "crop_size": SIDE, "do_center_crop": True, "resample": 3})
    )
    return place


@pytest.mark.parametrize("kind", [ClipScore, PickScore])
def test_from_a_folder(folder, kind):
    reward = kind.from_pretrained(folder, prompt="a dog", strength=2.0, micro_batch=2)
    assert reward.pixels == PIXELS
    # weights were rounded to float32, 6e-8 of values that add up over 54 terms
    torch.testing.assert_close(reward(X.float()).double(), 2 * score()(X), rtol=0, atol=2e-5)
    half = kind.from_pretrained(folder, prompt="a dog", dtype=torch.bfloat16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half(X.float()).dtype == torch.float32
    # weights and activations rounded to 8 bits, scores of order 1
    torch.testing.assert_close(half(X.float()).double(), score()(X), rtol=0, atol=0.1)


def test_weights_in_one_folder_and_tokenizer_in_another(folder, tmp_path, monkeypatch):
    clip().float().save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(mfm.InputError, match=r"laion/CLIP-ViT-H-14-laion2B-s32B-b79K.* cannot be loaded"):
        PickScore.from_pretrained(tmp_path, prompt="a dog")
    reward = PickScore.from_pretrained(tmp_path, prompt="a dog", processor_place=folder)
    torch.testing.assert_close(reward(X.float()).double(), score()(X), rtol=0, atol=2e-5)
    with pytest.raises(mfm.InputError, match=r"holds no preprocessor_config.json or processor_config.json"):
        ClipScore.from_pretrained(tmp_path, prompt="a dog")


@pytest.fixture
def released(tmp_path, monkeypatch):
    """HPS_v2.1_compressed.pt in small; heads are those of the small model."""
    import metaflowmaps.rewards.vision.clip as module

    state = {k: v.float() for k, v in open_clip().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / HPS_FILE)
    monkeypatch.setattr(module, "from_open_clip", lambda s: from_open_clip(s, 3, 2))
    return tmp_path


@pytest.mark.parametrize("name", ["", HPS_FILE])
def test_hps_from_its_file(released, folder, name):
    reward = HPSv2.from_pretrained(released / name, prompt=PROMPTS, tokenizer_place=folder, processor=PIXELS)
    expected = open_clip()(PIXELS(X), padded(PROMPTS)).detach()
    torch.testing.assert_close(reward(X.float()).double(), expected, rtol=0, atol=2e-6)


def test_a_file_that_is_not_one(tmp_path, folder):
    class Code:
        def __reduce__(self):
            return (print, ("run",))

    for content, says in (
        ({"state_dict": {"w": Code()}}, "refused: its pickle holds more than tensors"),
        ({"state_dict": {}}, "holds no dictionary of tensors"),
        ([1, 2], "holds no dictionary of tensors"),
        ({"state_dict": {"w": torch.zeros(2)}}, "missing: visual.conv1.weight"),
    ):
        torch.save(content, tmp_path / HPS_FILE)
        with pytest.raises(mfm.InputError, match=says) as refused:
            HPSv2.from_pretrained(tmp_path, prompt="a dog", tokenizer_place=folder)
        assert "\n" not in str(refused.value)
    (tmp_path / HPS_FILE).write_bytes(b"<html>not found</html>")
    with pytest.raises(mfm.InputError, match=r"damaged or no file of weights|refused"):
        HPSv2.from_pretrained(tmp_path, prompt="a dog", tokenizer_place=folder)
    with pytest.raises(mfm.InputError, match=r"holds no HPS_v2.1_compressed.pt"):
        HPSv2.from_pretrained(folder, prompt="a dog")


# -- gradients, parts, devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
@pytest.mark.parametrize("kind", [ClipScore, PickScore, HPSv2])
def test_gradients(kind, options):
    check_gradient(score(PROMPTS, kind=kind, **options), X)


def test_pixels_beyond_the_range_have_no_slope():
    x = X.clone()
    x[:, :, 5, 5] = 1.5
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(score()(x).sum(), x)
    assert not gradient[:, :, 5, 5].any()
    assert bool(gradient[:, :, 5, 6].any())


def test_parts_make_no_difference():
    x, up = X.clone().requires_grad_(True), normal(3, seed="up")
    whole = score(PROMPTS)(x)
    parted = score(PROMPTS, micro_batch=2)(x)
    torch.testing.assert_close(parted, whole, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(r, x, up)[0] for r in (whole, parted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_memory_that_runs_out_is_met_with_smaller_parts():
    reward = score(PROMPTS)
    limited = reward.model.vision_model.forward

    def hungry(pixel_values):
        if len(pixel_values) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return limited(pixel_values=pixel_values)

    reward.model.vision_model.forward = hungry
    with pytest.warns(UserWarning, match="micro_batch=1"):
        value = reward(X.clone().requires_grad_(True))
    torch.testing.assert_close(value.detach(), score(PROMPTS)(X), rtol=1e-12, atol=1e-13)


def test_weights_are_frozen_and_in_evaluation_mode():
    model = clip().train()
    reward = ClipScore(model, "a dog", TOKENS, PIXELS)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert reward.to("cpu") is reward
    assert reward.device.type == "cpu"
    assert repr(reward) == "ClipScore('a dog', strength=1)"
