r"""Scores of a picture and a prompt by CLIP: the cosine of two embeddings, times a constant.

``ClipScore``, ``PickScore``   r(x) = λ e^s cos(f(x), g(prompt)), s the model's own logit scale (e^s ≈ 100)
``HPSv2``                      r(x) = λ cos(f(x), g(prompt)): what its release returns (its tables show 100 times that)

HPSv2.1 is published in open_clip's layout. A tower is the same network there and in transformers; names differ,
queries, keys and values lie in one matrix, and the two projections are transposed (they multiply from the right).
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.picture_reward import PictureReward, exact, unit
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.prompts import Names, Prompts, check_prompt
from metaflowmaps.rewards.vision.weights import (
    PREPROCESSOR,
    depth,
    fetched,
    filled,
    loading,
    needed,
    published,
    published_tokenizer,
    read_tensors,
    transformers,
)

CLIP_L = ("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H = ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICKSCORE = ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
HPS = ("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
HPS_FILE = "HPS_v2.1_compressed.pt"
# the longest side becomes 224 with black around it, in floating point: overshoots of the kernel are not clipped
HPS_PIXELS = Pixels(fit="longest", crop=None, clip=False)

BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


class _Similarity(PictureReward):
    """λ · scale · cos(f(x), g(prompt)) by a CLIPModel of transformers; the embedding of a prompt is computed once.

    Args:
        model: a CLIPModel of transformers.
        prompt: one text, one a row, or one with ``{label}``.
        tokenizer: of the model; None where prompts are token ids.
        processor: how it sees pictures; None: as its release does.
        classes: the names that ``{label}`` stands for.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Any,
        tokenizer: Any = None,
        processor: Any = None,
        strength: float = 1.0,
        *,
        classes: Names | None = None,
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        processor = self._default_pixels() if processor is None else processor
        super().__init__(model, processor, strength, micro_batch, dtype)
        if not all(hasattr(model, part) for part in ("vision_model", "text_model", "visual_projection", "logit_scale")):
            raise InputError(f"model must be a CLIPModel of transformers, got {type(model).__name__}")
        config: Any = model.config
        self.prompts = Prompts(prompt, tokenizer, config.text_config.max_position_embeddings, classes)
        self._known: dict[int, Tensor] = {}

    @abstractmethod
    def _scale(self) -> Tensor | float:
        """What the cosine is multiplied by."""

    @staticmethod
    def _default_pixels() -> Pixels:
        return Pixels()

    def rows_for(self, x: Tensor) -> int | None:
        """How many prompts there are, one a row; None for one for all."""
        return self.prompts.rows

    def per_row(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        which = self.prompts.which(x, cond)
        numbers = [0] if len(self.prompts.input_ids) == 1 else which.unique().tolist()
        if fresh := [n for n in numbers if n not in self._known]:
            self._embed(fresh)
        place = torch.zeros(max(numbers) + 1, dtype=torch.long)
        place[numbers] = torch.arange(len(numbers))
        table = torch.stack([self._known[n].to(x.device) for n in numbers])
        return {"text": table[place.to(x.device)[which]]}

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        network: Any = self.model
        image = unit(network.visual_projection(network.vision_model(pixel_values=self.seen(x)).pooler_output))
        return self._scale() * (image * rows["text"].to(image)).sum(-1)

    @torch.no_grad()
    def _embed(self, numbers: list[int]) -> None:
        network: Any = self.model
        for part in torch.tensor(numbers, dtype=torch.long).split(64):
            # causal attention, read at the end mark: what pads a prompt behind it plays no part
            ids = self.prompts.input_ids[part].to(self.device)
            text = unit(network.text_projection(network.text_model(input_ids=ids).pooler_output))
            self._known.update(zip(part.tolist(), text, strict=True))

    def _shown(self) -> str:
        return f"{self.prompts.shown}, "


class _Published(_Similarity):
    """Scores whose weights lie in the layout of transformers, with e^s as their scale."""

    HUB: tuple[str, str]
    PROCESSOR: tuple[str, str] | None = None  # where tokenizer and preprocessing are, if elsewhere

    def _scale(self) -> Tensor:
        network: Any = self.model
        return exact(network.logit_scale).exp()

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path | None = None,
        prompt: Any = None,
        *,
        revision: str | None = None,
        processor_place: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The model in a folder or on the hub (pinned, unless a place is given), with its tokenizer and preprocessing.

        ``options``: strength, classes, micro_batch. ``processor_place``: where the tokenizer is, if not in ``place``.
        """
        package = transformers(cls.__name__)
        check_prompt(prompt, options.get("classes"))
        name = cls.HUB[0] if place is None else str(place)
        revision = cls.HUB[1] if name == cls.HUB[0] and revision is None else revision
        other: tuple[str, str | None] = (name, revision)
        if processor_place is not None:
            other = (str(processor_place), None)
        elif cls.PROCESSOR is not None and not (Path(name) / PREPROCESSOR[0]).is_file():
            other = cls.PROCESSOR
        pixels = Pixels.from_file(fetched(other[0], PREPROCESSOR, other[1]))
        with loading(other[0]):
            tokenizer = package.AutoTokenizer.from_pretrained(other[0], revision=other[1])
        with loading(name):
            model = package.CLIPModel.from_pretrained(name, revision=revision, dtype=dtype or torch.float32)
        return cls(model, prompt, tokenizer, pixels, dtype=dtype, **options)


class ClipScore(_Published):
    """r(x) = strength · e^s cos(f(x), g(prompt)): how well a picture goes with a prompt, by any CLIP."""

    HUB = CLIP_L


class PickScore(_Published):
    """r(x) = strength · e^s cos(f(x), g(prompt)) by PickScore v1, a CLIP ViT-H/14 tuned to human choices."""

    HUB = PICKSCORE
    PROCESSOR = CLIP_H  # whose tokenizer and preprocessing its model card takes


class HPSv2(_Similarity):
    """r(x) = strength · cos(f(x), g(prompt)) by the human preference score v2.1, a CLIP ViT-H/14."""

    @staticmethod
    def _default_pixels() -> Pixels:
        return HPS_PIXELS

    def _scale(self) -> float:
        return 1.0

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HPS[0],
        prompt: Any = None,
        *,
        revision: str | None = None,
        file: str = HPS_FILE,
        tokenizer_place: str | Path | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The released file (``place`` may be it, its folder or a hub id), converted; the tokenizer is CLIP's own.

        ``options``: strength, classes, micro_batch, processor.
        """
        transformers(cls.__name__)
        check_prompt(prompt, options.get("classes"))
        model = from_open_clip(read_tensors(published(place, file, revision, HPS), inside="state_dict"))
        return cls(model, prompt, published_tokenizer(tokenizer_place, CLIP_H), dtype=dtype, **options)


# -- open_clip ---------------------------------------------------------------------------------------------------------


def from_open_clip(
    state: Mapping[str, Tensor], vision_heads: int = 16, text_heads: int = 16, hidden_act: str = "gelu"
) -> nn.Module:
    """A CLIPModel of transformers with the weights of an open_clip one; sizes from shapes, heads are those of ViT-H."""
    package = transformers("HPSv2")
    what = "an open_clip CLIP"
    width, _, patch, _ = needed(state, "visual.conv1.weight", what).shape
    positions = len(needed(state, "visual.positional_embedding", what))
    vocabulary, text_width = needed(state, "token_embedding.weight", what).shape
    shared = {"hidden_act": hidden_act, "projection_dim": needed(state, "visual.proj", what).shape[1]}
    vision = {
        "hidden_size": width,
        "intermediate_size": len(needed(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", what)),
        "num_hidden_layers": depth(state, "visual.transformer.resblocks."),
        "num_attention_heads": vision_heads,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        **shared,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": len(needed(state, "transformer.resblocks.0.mlp.c_fc.weight", what)),
        "num_hidden_layers": depth(state, "transformer.resblocks."),
        "num_attention_heads": text_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": len(needed(state, "positional_embedding", what)),
        # the start and end marks are the last two entries of the vocabulary, and the text is read at its end
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
        **shared,
    }
    with loading(what):
        config = package.CLIPConfig(text_config=text, vision_config=vision, projection_dim=shared["projection_dim"])
    return filled(package.CLIPModel, config, renamed(state), what)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP under the names of transformers."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in OUTSIDE:
            out[OUTSIDE[key]] = value
        elif key in TRANSPOSED:
            out[TRANSPOSED[key]] = value.T.contiguous()
        elif key != "attn_mask":  # a constant of some versions
            out.update(_block(key, value))
    return out


def _block(key: str, value: Tensor) -> dict[str, Tensor]:
    head, _, rest = key.partition("transformer.resblocks.")
    number, _, name = rest.partition(".")
    tower = {"visual.": "vision_model", "": "text_model"}.get(head)
    if tower is None or not number.isdecimal():
        return {key: value}  # nothing we know: it is listed as such
    layer, (stem, _, leaf) = f"{tower}.encoder.layers.{number}", name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        return {
            f"{layer}.self_attn.{which}_proj.{kind}": part.clone()
            for which, part in zip("qkv", value.chunk(3), strict=True)
        }
    return {f"{layer}.{BLOCKS[stem]}.{leaf}" if stem in BLOCKS else key: value}
