r"""ImageReward: BLIP reads the prompt while looking at the picture, and a chain of linear layers gives a number.

``r(x) = λ (h(T(prompt | V(x))) − μ)/σ`` with a vision tower V, a text tower T (BERT with cross-attention, not causal)
read at its first token, and a head h of five linear layers; μ = 0.167… and σ = 1.033… make the scores of the training
set standard. The published file has the layout of the original BLIP code: the towers are those of transformers under
other names.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.picture_reward import PictureReward, exact
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.prompts import Names, Prompts, texts_of
from metaflowmaps.rewards.vision.weights import (
    PublishedWeights,
    Weights,
    filled,
    linear_chain,
    loading,
    pretrained,
    read_tensors,
    renamed,
    transformers,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35  # tokens that are read of a prompt
HUB = PublishedWeights("THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72")
FILE = "ImageReward.pt"
BERT = PublishedWeights("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
PIXELS = Pixels()  # its own: bicubic, shortest side 224, centre crop, CLIP's mean and std
WHAT = "ImageReward"

NAMES = {  # patterns in the names of BLIP's vision tower: what transformers says
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}
# in the file and of no use here: projections of the pretraining, and a constant
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageRewardNetwork(nn.Module):
    """h(T(ids | V(pixels))): (B,), before it is made standard.

    Args:
        vision: tower of the picture.
        text: tower of the prompt, which looks at the picture.
        head: from the text's first token to a number.

    Examples:
        >>> network = mfm.rewards.ImageRewardNetwork(vision, text, head)  # of transformers  # doctest: +SKIP
        >>> reward = mfm.rewards.ImageReward(network, "a red fox", tokenizer, processor)  # doctest: +SKIP
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


@dataclass(eq=False, repr=False)
class ImageReward(PictureReward):
    """r(x) = strength · the score of ImageReward v1.0 for a picture and a prompt: (B,).

    Args:
        model: an :class:`ImageRewardNetwork`.
        prompt: one text, one a row, or one with ``{label}``.
        tokenizer: BERT's; None where prompts are token ids.
        classes: the names that ``{label}`` stands for.

    Examples:
        >>> reward = mfm.rewards.ImageReward.from_pretrained(prompt="a red fox")  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    needs: ClassVar[tuple[str, ...]] = ("vision", "text", "head")
    needed_kind: ClassVar[str] = "an ImageRewardNetwork(vision, text, head)"

    model: nn.Module
    prompt: Any
    tokenizer: Any = None
    processor: Any = None
    strength: float = 1.0
    _: KW_ONLY
    classes: Names | None = None
    micro_batch: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        network: Any = self.model
        if self.dtype in (torch.bfloat16, torch.float16):
            network.head.float()  # the last layers are small, and a score is a difference of large numbers
        length = min(LENGTH, network.text.config.max_position_embeddings)
        self.prompts = Prompts(self.prompt, self.tokenizer, length, self.classes)

    def rows_for(self, x: Tensor) -> int | None:
        """How many prompts there are, one a row; None for one for all."""
        return self.prompts.rows

    def per_row(self, x: Tensor, cond: Cond) -> PerRow:
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
        place: str | Path = HUB.hub,
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
        if not isinstance(prompt, Tensor):
            texts_of(prompt, options.get("classes"))  # before gigabytes are loaded
        model = from_original(read_tensors(HUB.path(place, revision, file)))
        return cls(model, prompt, pretrained("AutoTokenizer", *BERT.at(tokenizer_place)), dtype=dtype, **options)


# -- the original layout -----------------------------------------------------------------------------------------------


def from_original(
    state: Mapping[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> ImageRewardNetwork:
    """The network of a state in the published layout; sizes from shapes, heads of width 64 unless they are given."""
    package = transformers(WHAT)
    vision, text, head = (
        Weights({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, WHAT)
        for prefix in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
    )
    text.pop("embeddings.position_ids", None)
    left = [k for k in state if not k.startswith(("blip.visual_encoder.", "blip.text_encoder.", "mlp.", *UNUSED))]
    if left:
        raise vision.refused(f"unknown: {left[0]}")
    vision_width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    vocabulary, width = text["embeddings.word_embeddings.weight"].shape
    with loading(WHAT):
        vision_config = package.BlipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.weight"]),
            num_hidden_layers=vision.depth("blocks."),
            num_attention_heads=vision_heads or vision_width // 64,
            patch_size=patch,
            image_size=patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5),
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )
        text_config = package.BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=vision_width,
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=text.depth("encoder.layer."),
            num_attention_heads=text_heads or width // 64,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            is_decoder=True,  # which is what gives its layers cross-attention; it is called as an encoder
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
    return ImageRewardNetwork(
        filled(package.BlipVisionModel, vision_config, renamed(vision, NAMES), f"the vision tower of {WHAT}"),
        filled(package.BlipTextModel, text_config, text, f"the text tower of {WHAT}", add_pooling_layer=False),
        linear_chain(head, width, f"the head of {WHAT}"),
    )
