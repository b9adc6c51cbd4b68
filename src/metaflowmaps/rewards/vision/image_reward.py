r"""ImageReward: BLIP reads the prompt while looking at the picture, and a chain of linear layers gives a number.

``r(x) = λ (h(T(prompt | V(x))) − μ)/σ`` with a vision tower V, a text tower T (BERT with cross-attention, not causal)
read at its first token, and a head h of five linear layers; μ = 0.167… and σ = 1.033… make the scores of the training
set standard. The published file has the layout of the original BLIP code: the towers are those of transformers under
other names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.picture_reward import PictureReward, exact
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.prompts import Names, Prompts, check_prompt
from metaflowmaps.rewards.vision.weights import (
    depth,
    filled,
    linear_chain,
    loading,
    needed,
    published,
    published_tokenizer,
    read_tensors,
    transformers,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens that are read of a prompt
HUB = ("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
FILE = "ImageReward.pt"
BERT = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
PIXELS = Pixels()  # its own: bicubic, shortest side 224, centre crop, CLIP's mean and std
WHAT = "ImageReward"

VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
BLOCKS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# in the file and of no use here: projections of the pretraining, and a constant
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageRewardNetwork(nn.Module):
    """h(T(ids | V(pixels))): (B,), before it is made standard.

    Args:
        vision: tower of the picture.
        text: tower of the prompt, which looks at the picture.
        head: from the text's first token to a number.
    """

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """h(T(ids | V(pixels))): (B,)."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False
        )
        first = read.last_hidden_state[:, 0]
        score: Tensor = exact(self.head(exact(first).to(next(self.head.parameters()).dtype)))[:, 0]
        return score


class ImageReward(PictureReward):
    """r(x) = strength · the score of ImageReward v1.0 for a picture and a prompt: (B,).

    Args:
        model: an :class:`ImageRewardNetwork`.
        prompt: one text, one a row, or one with ``{label}``.
        tokenizer: BERT's; None where prompts are token ids.
        processor: how it sees pictures; None: as its release does.
        classes: the names that ``{label}`` stands for.
    """

    def __init__(
        self,
        model: ImageRewardNetwork,
        prompt: Any,
        tokenizer: Any = None,
        processor: Any = None,
        strength: float = 1.0,
        *,
        classes: Names | None = None,
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, ImageRewardNetwork):
            raise InputError(f"model must be an ImageRewardNetwork(vision, text, head), got {type(model).__name__}")
        super().__init__(model, PIXELS if processor is None else processor, strength, micro_batch, dtype)
        if dtype in (torch.bfloat16, torch.float16):
            model.head.float()  # the last layers are small, and a score is a difference of large numbers
        text: Any = model.text
        self.prompts = Prompts(prompt, tokenizer, min(LENGTH, text.config.max_position_embeddings), classes)

    def rows_for(self, x: Tensor) -> int | None:
        """How many prompts there are, one a row; None for one for all."""
        return self.prompts.rows

    def per_row(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The prompt of each row, as tokens."""
        which = self.prompts.which(x, cond).cpu()
        ids, mask = self.prompts.input_ids[which], self.prompts.attention_mask[which]
        return {"input_ids": ids.to(x.device), "attention_mask": mask.to(x.device)}

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score, (b,)."""
        raw: Tensor = self.model(self.seen(x), rows["input_ids"], rows["attention_mask"])
        return (raw - MEAN) / STD

    def _shown(self) -> str:
        return f"{self.prompts.shown}, "

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HUB[0],
        prompt: Any = None,
        *,
        revision: str | None = None,
        file: str = FILE,
        tokenizer_place: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The released file (``place`` may be it, its folder or a hub id), converted; the tokenizer is BERT's.

        ``options``: strength, classes, micro_batch, processor.
        """
        transformers(cls.__name__)
        check_prompt(prompt, options.get("classes"))
        model = from_original(read_tensors(published(place, file, revision, HUB)))
        return cls(model, prompt, published_tokenizer(tokenizer_place, BERT), dtype=dtype, **options)


# -- the original layout -----------------------------------------------------------------------------------------------


def from_original(
    state: Mapping[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> ImageRewardNetwork:
    """The network of a state in the published layout; sizes from shapes, heads of width 64 unless they are given."""
    package = transformers(WHAT)
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, value in state.items():
        if key.startswith(UNUSED):
            continue
        prefix = next((p for p in parts if key.startswith(p)), None)
        if prefix is None:
            raise InputError(f"these are not the weights of {WHAT} (unknown: {key}): give its published file")
        parts[prefix][key.removeprefix(prefix)] = value
    vision, text, head = parts.values()
    vision_width, _, patch, _ = needed(vision, "patch_embed.proj.weight", WHAT).shape
    vocabulary, width = needed(text, "embeddings.word_embeddings.weight", WHAT).shape
    with loading(WHAT):
        vision_config = package.BlipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=len(needed(vision, "blocks.0.mlp.fc1.weight", WHAT)),
            num_hidden_layers=depth(vision, "blocks."),
            num_attention_heads=vision_heads or vision_width // 64,
            patch_size=patch,
            image_size=patch * round((needed(vision, "pos_embed", WHAT).shape[1] - 1) ** 0.5),
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text_config = package.BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=vision_width,
            intermediate_size=len(needed(text, "encoder.layer.0.intermediate.dense.weight", WHAT)),
            num_hidden_layers=depth(text, "encoder.layer."),
            num_attention_heads=text_heads or width // 64,
            max_position_embeddings=len(needed(text, "embeddings.position_embeddings.weight", WHAT)),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # which is what gives its layers cross-attention; it is called as an encoder
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
    return ImageRewardNetwork(
        filled(package.BlipVisionModel, vision_config, _vision_names(vision), f"the vision tower of {WHAT}"),
        filled(package.BlipTextModel, text_config, text, f"the text tower of {WHAT}", add_pooling_layer=False),
        linear_chain(head, width, f"the head of {WHAT}"),
    )


def _vision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        _, number, inner = (*stem.split(".", 2), "", "")[:3] if stem.startswith("blocks.") else ("", "", "")
        if key in VISION:
            out[VISION[key]] = value
        elif stem in VISION:
            out[f"{VISION[stem]}.{leaf}"] = value
        elif inner in BLOCKS:
            out[f"encoder.layers.{number}.{BLOCKS[inner]}.{leaf}"] = value
        else:
            out[key] = value  # nothing we know: it is listed as such
    return out
