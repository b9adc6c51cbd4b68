"""ImageReward against its published layout, written out: every layer by hand, in float64."""

import math

import pytest
import torch
import transformers
from tiny_vision import PLAIN, SIDE, check_gradient, pictures, weights
from torch import nn
from torch.nn import functional as F

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import ImageReward, ImageRewardNetwork, Pixels
from metaflowmaps.rewards.vision.image_reward import FILE, PIXELS, from_original

SMALL = Pixels(**PLAIN)
X = pictures()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "on", "the", "mat", "zebra"]
PROMPTS = ["a dog", "the cat on the mat", "zebra"]
# vision width, layers, heads, inner; text width, layers, heads, inner; patch, positions of text
SIZES = (24, 2, 3, 40, 16, 2, 2, 28, 8, 40)


def tokenizer():
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, do_lower_case=True)


TOKENS = tokenizer()


def shapes(width, layers, inner, text, text_layers, text_inner, patch, side, positions, vocabulary):
    """Names and shapes of ImageReward.pt: blip.visual_encoder (ViT), blip.text_encoder (BERT), mlp."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    out = {
        f"{v}cls_token": (1, 1, width),
        f"{v}pos_embed": (1, (side // patch) ** 2 + 1, width),
        f"{v}patch_embed.proj.weight": (width, 3, patch, patch),
        f"{v}patch_embed.proj.bias": (width,),
        f"{v}norm.weight": (width,),
        f"{v}norm.bias": (width,),
        f"{t}embeddings.word_embeddings.weight": (vocabulary, text),
        f"{t}embeddings.position_embeddings.weight": (positions, text),
        f"{t}embeddings.LayerNorm.weight": (text,),
        f"{t}embeddings.LayerNorm.bias": (text,),
        f"{t}embeddings.position_ids": (1, positions),
        "blip.vision_proj.weight": (4, width),
        "blip.vision_proj.bias": (4,),
        "blip.text_proj.weight": (4, text),
        "blip.text_proj.bias": (4,),
    }

    def linear(name, rows, columns):
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name, size):
        out[f"{name}.weight"], out[f"{name}.bias"] = (size,), (size,)

    for i in range(layers):
        b = f"{v}blocks.{i}."
        norm(f"{b}norm1", width)
        norm(f"{b}norm2", width)
        linear(f"{b}attn.qkv", 3 * width, width)
        linear(f"{b}attn.proj", width, width)
        linear(f"{b}mlp.fc1", inner, width)
        linear(f"{b}mlp.fc2", width, inner)
    for i in range(text_layers):
        b = f"{t}encoder.layer.{i}."
        for kind, source in (("attention", text), ("crossattention", width)):
            linear(f"{b}{kind}.self.query", text, text)
            linear(f"{b}{kind}.self.key", text, source)
            linear(f"{b}{kind}.self.value", text, source)
            linear(f"{b}{kind}.output.dense", text, text)
            norm(f"{b}{kind}.output.LayerNorm", text)
        linear(f"{b}intermediate.dense", text_inner, text)
        linear(f"{b}output.dense", text, text_inner)
        norm(f"{b}output.LayerNorm", text)
    for k, (rows, columns) in zip(
        (0, 2, 4, 6, 7), ((1024, text), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
    ):
        linear(f"mlp.layers.{k}", rows, columns)
    return out


def published():
    width, layers, _, inner, text, text_layers, _, text_inner, patch, positions = SIZES
    names = shapes(width, layers, inner, text, text_layers, text_inner, patch, SIDE, positions, len(WORDS))
    state = weights(names, "image reward", scale=0.2)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(positions)[None]
    return state


def attention(q, k, v, heads, mask=None):
    def parted(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    q, k, v = parted(q), parted(k), parted(v)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + torch.where(mask.bool(), 0.0, -math.inf)[:, None, None, :]
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def by_hand(s, pixels, ids, mask, vision_heads, text_heads):
    """(h(T(prompt | V(x))) − μ)/σ from the named tensors of the file, by the layout it was trained in."""

    def linear(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder.", "blip.text_encoder."
    patch = s[f"{v}patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(pixels, s[f"{v}patch_embed.proj.weight"], s[f"{v}patch_embed.proj.bias"], stride=patch)
    x = torch.cat([s[f"{v}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + s[f"{v}pos_embed"]
    for i in range(sum(key.endswith("norm1.weight") for key in s)):
        b = f"{v}blocks.{i}."
        x = x + linear(
            f"{b}attn.proj", attention(*linear(f"{b}attn.qkv", norm(f"{b}norm1", x, 1e-6)).chunk(3, -1), vision_heads)
        )
        x = x + linear(f"{b}mlp.fc2", F.gelu(linear(f"{b}mlp.fc1", norm(f"{b}norm2", x, 1e-6))))
    seen = norm(f"{v}norm", x, 1e-6)
    h = s[f"{t}embeddings.word_embeddings.weight"][ids]
    h = norm(f"{t}embeddings.LayerNorm", h + s[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]], 1e-12)
    for i in range(sum(key.endswith("intermediate.dense.weight") for key in s)):
        b = f"{t}encoder.layer.{i}."
        for kind, source, keep in (("attention", None, mask), ("crossattention", seen, None)):
            other = h if source is None else source
            q, k, w = (linear(f"{b}{kind}.self.{n}", h if n == "query" else other) for n in ("query", "key", "value"))
            h = norm(
                f"{b}{kind}.output.LayerNorm",
                linear(f"{b}{kind}.output.dense", attention(q, k, w, text_heads, keep)) + h,
                1e-12,
            )
        inner = F.gelu(linear(f"{b}intermediate.dense", h))
        h = norm(f"{b}output.LayerNorm", linear(f"{b}output.dense", inner) + h, 1e-12)
    r = h[:, 0]
    for k in (0, 2, 4, 6, 7):
        r = linear(f"mlp.layers.{k}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


def network():
    return from_original(published(), SIZES[2], SIZES[6])


def score(prompt=PROMPTS, **options):
    return ImageReward(network(), prompt, TOKENS, SMALL, **options)


def expected(prompts=PROMPTS, x=X):
    given = TOKENS(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    return by_hand(published(), SMALL(x), given["input_ids"], given["attention_mask"], SIZES[2], SIZES[6])


def test_the_published_layout_is_converted():
    # two independent forward passes in float64: sums of at most 1024 terms through a chain that scales by ~30
    torch.testing.assert_close(score()(X), expected(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(score("a dog")(X), expected(["a dog"] * 3), rtol=1e-10, atol=1e-10)
    assert float(score()(X).std()) > 0.1  # it does look


def test_padding_is_not_read():
    """It would be, without the mask: the tower attends both ways."""
    ids = TOKENS("a dog", return_tensors="pt")["input_ids"][0]
    torch.testing.assert_close(
        ImageReward(network(), ids, processor=SMALL)(X), score("a dog")(X), rtol=1e-10, atol=1e-10
    )
    careless = by_hand(published(), SMALL(X), score("a dog").prompts.input_ids.expand(3, -1), torch.ones(3, 35), 3, 2)
    assert float((careless - score("a dog")(X)).abs().max()) > 1e-3


def test_the_published_sizes_fit():
    """ViT-L/16 and BERT-base, without memory."""
    names = shapes(1024, 24, 4096, 768, 12, 3072, 16, 224, 512, 30524)
    state = {key: torch.empty(shape, device="meta") for key, shape in names.items()}
    seen = {}

    def stop(kind, config, given, what, **options):
        with torch.device("meta"):
            wanted = kind(config, **options).state_dict()
        assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in wanted.items()}
        seen[what] = config
        return nn.Identity()

    import metaflowmaps.rewards.vision.image_reward as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "filled", stop)
        patch.setattr(module, "linear_chain", lambda head, width, what: nn.Linear(width, 1))
        from_original(state)
    vision, text = seen.values()
    assert (vision.num_attention_heads, vision.image_size, vision.layer_norm_eps) == (16, 224, 1e-6)
    assert (text.num_attention_heads, text.encoder_hidden_size, text.layer_norm_eps) == (12, 1024, 1e-12)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}])
def test_gradients(options):
    check_gradient(score(**options), X)


def test_rows_parts_and_strength():
    whole = score()(X)
    torch.testing.assert_close(score(micro_batch=2, strength=0.5)(X), 0.5 * whole, rtol=1e-12, atol=1e-12)
    for i in range(3):
        torch.testing.assert_close(score(PROMPTS[i])(X[i : i + 1]), whole[i : i + 1], rtol=1e-11, atol=1e-12)
    twice = torch.cat([X, X.flip(0)])
    torch.testing.assert_close(score()(twice), torch.cat([expected(), expected(x=X.flip(0))]), rtol=1e-10, atol=1e-10)
    assert score().rows_for(X) == 3
    labels = {"label": torch.tensor([1, 0, 1])}
    named = score("a {label}", classes=["dog", "cat"])(X, labels)
    torch.testing.assert_close(named, expected(["a cat", "a dog", "a cat"]), rtol=1e-10, atol=1e-10)


def test_half_precision_towers_with_a_float_head():
    reward = ImageReward(network(), PROMPTS, TOKENS, SMALL, dtype=torch.bfloat16)
    assert {p.dtype for p in reward.model.vision.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.model.head.parameters()} == {torch.float32}
    value = reward(X.float())
    assert value.dtype == torch.float32
    # 8 bits through six layers, then a chain that scales by ~30
    torch.testing.assert_close(value.double(), expected(), rtol=0.2, atol=1.0)
    assert not any(m.training for m in reward.model.modules())
    assert not any(p.requires_grad for p in reward.model.parameters())


@pytest.fixture
def released(tmp_path, monkeypatch):
    import metaflowmaps.rewards.vision.image_reward as module

    torch.save({k: v.float() if v.is_floating_point() else v for k, v in published().items()}, tmp_path / FILE)
    TOKENS.save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(module, "from_original", lambda s: from_original(s, SIZES[2], SIZES[6]))
    return tmp_path


@pytest.mark.parametrize("name", ["", FILE])
def test_from_its_file(released, name):
    reward = ImageReward.from_pretrained(
        released / name, prompt=PROMPTS, tokenizer_place=released / "bert", processor=SMALL
    )
    # weights rounded to 24 bits
    torch.testing.assert_close(reward(X.float()).double(), expected(), rtol=1e-4, atol=1e-4)
    assert repr(reward).startswith("ImageReward('a dog', strength=1)")
    assert ImageReward(network(), "a dog", TOKENS).pixels == PIXELS == Pixels(size=(224, 224), crop=(224, 224))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"), "text tower.*missing"),
        (lambda s: s.pop("blip.visual_encoder.norm.weight"), "vision tower.*missing: post_layernorm.weight"),
        (lambda s: s.pop("mlp.layers.4.bias"), "head.*missing: 4.bias"),
        (lambda s: s.update({"mlp.layers.7.weight": torch.zeros(1, 15)}), "lead from 16 numbers to 1"),
        (lambda s: s.update({"blip.visual_encoder.blocks.0.extra": torch.zeros(1)}), "unknown"),
        (lambda s: s.update(epoch=torch.zeros(1)), "unknown: epoch"),
    ],
)
def test_other_weights_are_refused(change, says):
    state = published()
    change(state)
    with pytest.raises(mfm.InputError, match=says) as refused:
        from_original(state, SIZES[2], SIZES[6])
    assert "\n" not in str(refused.value)


def test_other_objects_are_refused():
    with pytest.raises(mfm.InputError, match="ImageRewardNetwork"):
        ImageReward(nn.Linear(2, 2), "a dog", TOKENS)
    assert isinstance(network(), ImageRewardNetwork)
    assert normal(1).dtype == F64
