"""Vision models of the published architectures, a few thousand weights each, in float64: no download, no network."""

from functools import cache

import torch
import transformers
from torch import nn

from conftest import F64, normal, uniform
from metaflowmaps.random import randn, stream

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

SIDE, LENGTH, EMBED = 16, 16, 8
PLAIN = {"size": (SIDE, SIDE), "crop": (SIDE, SIDE)}


def weights(shapes, seed, scale=0.3):
    """Normals that depend on their name."""
    return {k: v.clone() for k, v in _weights(tuple((k, tuple(v)) for k, v in shapes.items()), seed, scale).items()}


@cache
def _weights(shapes, seed, scale):
    state = {}
    for name, shape in shapes:
        value = scale * randn(shape, stream(0, seed, name), F64)
        # the weight of a norm, by any of its names, is near 1; the other vectors are biases
        state[name] = 1 + value if name.endswith("weight") and value.ndim == 1 else value
    return state


def refill(model: nn.Module, seed: str) -> nn.Module:
    """The model with weights large enough for every part of it to matter, in float64 and evaluation mode."""
    model = model.double().eval()
    model.load_state_dict(weights({k: v.shape for k, v in model.state_dict().items()}, seed))
    return model


def tokenizer():
    """Letters as tokens; the start and end marks come last, as in CLIP's vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {piece: i for i, piece in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[])


def clip(seed="clip"):
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": LENGTH, "bos_token_id": 52, "eos_token_id": 53}
    config = transformers.CLIPConfig(
        text_config={**size, **text, "pad_token_id": 0, "projection_dim": EMBED},
        vision_config={**size, "image_size": SIDE, "patch_size": 8, "projection_dim": EMBED},
        projection_dim=EMBED,
    )
    return refill(transformers.CLIPModel(config), seed)


def pictures(batch=3, height=20, width=20, seed="pictures", limit=0.6):
    """(B, 3, H, W) in ±limit, where no pixel overshoots 1 when it is resized."""
    return uniform(batch, 3, height, width, low=-limit, high=limit, seed=seed)


def slope(reward, x, v, h=1e-5):
    """Central difference of Σ r along v."""
    with torch.no_grad():
        return (reward(x + h * v).sum() - reward(x - h * v).sum()) / (2 * h)


def check_gradient(reward, x):
    """Autograd = central differences along three directions, and no row's reward depends on another row."""
    x = x.clone().requires_grad_(True)
    value = reward(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert bool(gradient.flatten(1).any(1).all())
    for k in range(3):
        v = normal(*x.shape, seed=f"direction {k}")
        by_hand = slope(reward, x.detach(), v)
        # differences are off by h² r'''/6, and by rounding 1e-16 · r/h = 1e-11; a direction has length ~60
        torch.testing.assert_close((gradient * v).sum(), by_hand, rtol=1e-6, atol=1e-7)
    (first,) = torch.autograd.grad(reward(x)[0], x)
    assert not first[1:].any()
