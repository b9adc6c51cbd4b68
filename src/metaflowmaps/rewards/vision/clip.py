r"""Scores of a picture and a prompt by CLIP: the cosine of two embeddings, times a constant.

``ClipScore``, ``PickScore``   r(x) = λ e^s cos(f(x), g(prompt)), s the model's own logit scale (e^s ≈ 100)
``HPSv2``                      r(x) = λ cos(f(x), g(prompt)): what its release returns (its tables show 100 times that)

HPSv2.1 is published in open_clip's layout. A tower is the same network there and in transformers; names differ,
queries, keys and values lie in one matrix, and the two projections are transposed (they multiply from the right).
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision import weights
from metaflowmaps.rewards.vision.picture_reward import PictureReward, embedded, exact, unit
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.prompts import Names, Prompts, texts_of
from metaflowmaps.rewards.vision.weights import PublishedWeights, Weights, filled, pretrained, transformers

CLIP_L = PublishedWeights("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H = PublishedWeights("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")
PICKSCORE = PublishedWeights("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
HPS = PublishedWeights("xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a")
HPS_FILE = "HPS_v2.1_compressed.pt"
# the longest side becomes 224 with black around it, in floating point: overshoots of the kernel are not clipped
HPS_PIXELS = Pixels(fit="longest", crop=None, clip=False)

NAMES = {  # patterns in open_clip's names: what transformers says
    r"^visual\.transformer\.resblocks": "vision_model.encoder.layers",
    r"^transformer\.resblocks": "text_model.encoder.layers",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.(in|out)_proj": r".self_attn.\1_proj",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"^visual\.conv1": "vision_model.embeddings.patch_embedding",
    r"^visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.ln_pre": "vision_model.pre_layrnorm",
    r"^visual\.ln_post": "vision_model.post_layernorm",
    r"^token_embedding": "text_model.embeddings.token_embedding",
    r"^positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"^ln_final": "text_model.final_layer_norm",
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
}
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")


@dataclass(eq=False, repr=False)
class _Similarity(PictureReward):
    """λ · scale · cos(f(x), g(prompt)) by a CLIPModel of transformers; the embedding of a prompt is computed once.

    Args:
        model: a CLIPModel of transformers.
        prompt: one text, one a row, or one with ``{label}``.
        tokenizer: of the model; None where prompts are token ids.
        classes: the names that ``{label}`` stands for.
    """

    needs: ClassVar[tuple[str, ...]] = ("vision_model", "text_model", "visual_projection", "logit_scale")
    needed_kind: ClassVar[str] = "a CLIPModel of transformers"

    model: nn.Module
    prompt: Any
    tokenizer: Any = None
    processor: Any = None
    strength: float = 1.0
    _: KW_ONLY
    classes: Names | None = None
    micro_batch: int | None = None
    dtype: torch.dtype | None = None
    _known: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        config: Any = self.model.config
        length = config.text_config.max_position_embeddings
        self.prompts = Prompts(self.prompt, self.tokenizer, length, self.classes)

    def scale(self) -> Tensor | float:
        """What the cosine is multiplied by: e^s."""
        network: Any = self.model
        return exact(network.logit_scale).exp()

    def rows_for(self, x: Tensor) -> int | None:
        """How many prompts there are, one a row; None for one for all."""
        return self.prompts.rows

    def per_row(self, x: Tensor, cond: Cond) -> PerRow:
        """The embedding of each row's prompt."""
        numbers, place = self.prompts.which(x, cond).unique(return_inverse=True)
        known = [self._embedding(n) for n in numbers.tolist()] or [self._embedding(0)]
        return {"text": torch.stack(known).to(x.device)[place]}

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score, (b,)."""
        image = embedded(self.model, self.seen(x))
        return self.scale() * (image * rows["text"].to(image)).sum(-1)

    @torch.no_grad()
    def _embedding(self, number: int) -> Tensor:
        if number not in self._known:
            network: Any = self.model
            # causal attention, read at the end mark: what pads a prompt behind it plays no part
            ids = self.prompts.input_ids[number : number + 1].to(self.device)
            self._known[number] = unit(network.text_projection(network.text_model(input_ids=ids).pooler_output))[0]
        return self._known[number]

    def _shown(self) -> str:
        return f"{self.prompts.shown}, "


class _Published(_Similarity):
    """Scores whose weights lie in the layout of transformers."""

    hub: ClassVar[PublishedWeights]
    processor_hub: ClassVar[PublishedWeights | None] = None  # where tokenizer and preprocessing are, if elsewhere

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
        transformers(cls.__name__)
        if not isinstance(prompt, Tensor):
            texts_of(prompt, options.get("classes"))  # before gigabytes are loaded
        name, revision = cls.hub.at(place, revision)
        other: tuple[str, str | None] = (name, revision)
        if processor_place is not None:
            other = (str(processor_place), None)
        elif cls.processor_hub is not None and not (Path(name) / weights.PREPROCESSOR[0]).is_file():
            other = cls.processor_hub.at(None)
        pixels = Pixels.from_file(weights.fetched(*other, weights.PREPROCESSOR))
        tokenizer = pretrained("AutoTokenizer", *other)
        model = pretrained("CLIPModel", name, revision, dtype=dtype or torch.float32)
        return cls(model, prompt, tokenizer, pixels, dtype=dtype, **options)


class ClipScore(_Published):
    """r(x) = strength · e^s cos(f(x), g(prompt)): how well a picture goes with a prompt, by any CLIP.

    Examples:
        >>> reward = mfm.rewards.ClipScore.from_pretrained(prompt="a red fox")  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    hub = CLIP_L


class PickScore(_Published):
    """r(x) = strength · e^s cos(f(x), g(prompt)) by PickScore v1, a CLIP ViT-H/14 tuned to human choices.

    Examples:
        >>> reward = mfm.rewards.PickScore.from_pretrained(prompt="a red fox", strength=25.0)  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    hub = PICKSCORE
    processor_hub = CLIP_H  # whose tokenizer and preprocessing its model card takes


class HPSv2(_Similarity):
    """r(x) = strength · cos(f(x), g(prompt)) by the human preference score v2.1, a CLIP ViT-H/14.

    Examples:
        >>> reward = mfm.rewards.HPSv2.from_pretrained(prompt="a red fox")  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    own_pixels = HPS_PIXELS

    def scale(self) -> float:
        """The cosine as it is."""
        return 1.0

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HPS.hub,
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
        if not isinstance(prompt, Tensor):
            texts_of(prompt, options.get("classes"))
        model = from_open_clip(weights.read_tensors(HPS.path(place, revision, file), inside="state_dict"))
        return cls(model, prompt, pretrained("AutoTokenizer", *CLIP_H.at(tokenizer_place)), dtype=dtype, **options)


# -- open_clip ---------------------------------------------------------------------------------------------------------


def from_open_clip(
    state: Mapping[str, Tensor], vision_heads: int = 16, text_heads: int = 16, hidden_act: str = "gelu"
) -> nn.Module:
    """A CLIPModel of transformers with the weights of an open_clip one; sizes from shapes, heads are those of ViT-H."""
    package, what = transformers("HPSv2"), "an open_clip CLIP"
    given = Weights(state, what)
    width, _, patch, _ = given["visual.conv1.weight"].shape
    vocabulary, text_width = given["token_embedding.weight"].shape
    side = round((len(given["visual.positional_embedding"]) - 1) ** 0.5)
    shared: dict[str, int | str] = {"hidden_act": hidden_act, "projection_dim": given["visual.proj"].shape[1]}

    def tower(prefix: str, width: int, heads: int) -> dict[str, int | str]:
        return {
            "hidden_size": width,
            "intermediate_size": len(given[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": given.depth(f"{prefix}transformer.resblocks."),
            "num_attention_heads": heads,
            **shared,
        }

    vision = {**tower("visual.", width, vision_heads), "patch_size": patch, "image_size": patch * side}
    text = {
        **tower("", text_width, text_heads),
        "vocab_size": vocabulary,
        "max_position_embeddings": len(given["positional_embedding"]),
        # the start and end marks are the last two entries of the vocabulary, and the text is read at its end
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    with weights.loading(what):
        config = package.CLIPConfig(text_config=text, vision_config=vision, projection_dim=shared["projection_dim"])
    return filled(package.CLIPModel, config, renamed(state), what)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip CLIP under the names of transformers."""
    out: dict[str, Tensor] = {}
    for key, value in weights.renamed(state, NAMES).items():
        if "in_proj_" in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            out |= {key.replace("in_proj_", f"{which}_proj."): part.clone() for which, part in parts}
        elif key != "attn_mask":  # a constant of some versions
            out[key] = value.T.contiguous() if key in TRANSPOSED else value
    return out
