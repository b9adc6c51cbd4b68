r"""The layout that SiT, REPA, DMF and MFM share, and the way from it to :class:`~metaflowmaps.networks.dit.DiT`.

All are the same transformer under the same names; they differ in the times they know, in the direction these run, in
the sign and the number of the outputs, and in whether queries and keys are normalised. Nothing of that is left at run
time: it is folded into the weights, or an option of the network. What training leaves in a file and the map does not
use is declared by its layout, and left out; anything else that is surplus is refused.

**Time reversed.** The first layer after the sinusoid sees ``f(t) = (cos ω_i t, sin ω_i t)``. Since
``cos ω(1−t) = cos ω cos ωt + sin ω sin ωt`` and ``sin ω(1−t) = sin ω cos ωt − cos ω sin ωt``, f(1−t) = R f(t) with a
constant matrix R, and a network that was fed 1−t is, with ``W R`` in place of W, one that is fed t.

**Output negated**: its last layer is. **Outputs doubled** (a second half that SiT never trains): the first C of the 2C
numbers of each pixel of a patch are kept.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.guidance import PLAIN, GuidanceLaw
from metaflowmaps.networks.dit import SIZES, DiT

Weights = Mapping[str, Tensor]

COMMON = {  # theirs -> ours, as beginnings of keys
    "x_embedder.proj": "state_patches",
    "pos_embed": "positions",
    "y_embedder.embedding_table.weight": "labels.table",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation": "final.modulation",
}
BLOCK = {  # inside blocks.N
    "attn.qkv": "attention.qkv",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation": "modulation",
}
LAW = {"guidance_since": "since", "guidance_until": "until", "guidance_channels": "channels"}  # where guidance acts
OVERRIDES = ("heads", "encoder_depth", "guidance", *LAW)
COUNTERS = ("n_averaged",)  # what torch's averaged models count, in a file of any layout


class Family(NamedTuple):
    """A published layout: what its file holds beside the common part, and how that becomes ours."""

    name: str  # of the family, "dmf", which may have published several layouts
    layout: str  # "dmf-512"
    own: dict[str, tuple[str, ...]]  # their embedders -> those of ours that become it
    reversed_times: tuple[str, ...]  # of ours, those that were fed 1 − time
    negated: bool
    doubled: bool
    guidance: bool = False
    head_norms: bool = False
    harmless: tuple[str, ...] = ()  # beginnings of keys that training leaves in the file and the map does not use
    law: GuidanceLaw = PLAIN  # what it gives for a label
    decoder: str = "stabilityai/sd-vae-ft-ema"  # the autoencoder that its own figures are decoded by
    marks: str = ""  # the beginning of keys by which the layout is told from one with the same network

    def leaves_out(self, key: str) -> bool:
        """Is this key of a file harmless surplus?"""
        return key.startswith((*self.harmless, *COUNTERS))


def expected(family: Family, shape: "Shape") -> dict[str, tuple[int, ...]]:
    """Every key of a file of the family, with its shape."""
    w, p, c = shape.width, shape.patch, shape.channels
    outputs = p * p * c * (2 if family.doubled else 1)
    keys: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (shape.size // p) ** 2, w),
        "y_embedder.embedding_table.weight": (shape.classes + 1, w),
        **_layer("x_embedder.proj", (w, c, p, p)),
        **_layer("final_layer.linear", (outputs, w)),
        **_layer("final_layer.adaLN_modulation.1", (2 * w, w)),
    }
    for name in family.own:
        if name == "guidance_embedder":
            keys["guidance_embedder.embedding_table.weight"] = (shape.scales, w)
        elif name == "x_cond_embedder":
            keys |= _layer("x_cond_embedder.proj", (w, c, p, p))
        elif name == "x_cond_adaLN":
            keys |= _layer("x_cond_adaLN.1", (2 * w, w))
        else:
            keys |= _layer(f"{name}.mlp.0", (w, shape.features)) | _layer(f"{name}.mlp.2", (w, w))
    for i in range(shape.depth):
        block = f"blocks.{i}"
        keys |= _layer(f"{block}.attn.qkv", (3 * w, w)) | _layer(f"{block}.attn.proj", (w, w))
        keys |= _layer(f"{block}.mlp.fc1", (shape.hidden, w)) | _layer(f"{block}.mlp.fc2", (w, shape.hidden))
        keys |= _layer(f"{block}.adaLN_modulation.1", (6 * w, w))
        if family.head_norms:
            keys |= {f"{block}.attn.{part}_norm.scale": (shape.head_dim,) for part in "qk"}
    return keys


def _layer(name: str, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


class Shape(NamedTuple):
    """What the tensors say of the network."""

    width: int
    depth: int
    patch: int
    channels: int
    size: int
    classes: int
    hidden: int
    features: int
    scales: int
    head_dim: int = 0  # 0: the file does not say


def shape_of(weights: Weights) -> Shape:
    """Read off a file that has the common part; InputError names the first tensor that is missing or misshapen."""
    patches, tokens = _of(weights, "x_embedder.proj.weight", 4), _of(weights, "pos_embed", 3)
    table = _of(weights, "y_embedder.embedding_table.weight", 2)
    hidden, features = _of(weights, "blocks.0.mlp.fc1.weight", 2), _of(weights, "t_embedder.mlp.0.weight", 2)
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.") and key.split(".")[1].isdigit()}
    side = math.isqrt(tokens[1])
    if side * side != tokens[1]:
        raise InputError(f"pos_embed has {tokens[1]} positions, which make no square image")
    scales = weights.get("guidance_embedder.embedding_table.weight")
    norm = weights.get("blocks.0.attn.q_norm.scale")
    return Shape(
        width=patches[0],
        depth=len(blocks),
        patch=patches[2],
        channels=patches[1],
        size=side * patches[2],
        classes=table[0] - 1,
        hidden=hidden[0],
        features=features[1],
        scales=0 if scales is None else scales.shape[0],
        head_dim=0 if norm is None else norm.numel(),
    )


def _of(weights: Weights, key: str, ndim: int) -> tuple[int, ...]:
    if key not in weights:
        raise InputError(f"has no {key}")
    if weights[key].ndim != ndim:
        raise InputError(f"{key} has {weights[key].ndim} dimensions, not {ndim}")
    return tuple(weights[key].shape)


def network_config(family: Family, shape: Shape, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``DiT`` is made with; ``given`` says what shapes cannot tell, and the released sizes say it themselves."""
    known = next((s for s in SIZES.values() if (s["width"], s["depth"]) == (shape.width, shape.depth)), {})
    heads = given.get("heads", shape.width // shape.head_dim if shape.head_dim else known.get("heads"))
    early = given.get("encoder_depth", known.get("encoder_depth"))
    if heads is None or (early is None and family.name != "sit"):
        missing = [name for name, value in (("heads", heads), ("encoder_depth", early)) if value is None]
        if family.name == "sit" and "encoder_depth" in missing:
            missing.remove("encoder_depth")
        example = ", ".join(f'"{name}": N' for name in missing)
        raise InputError(
            f"width {shape.width} with {shape.depth} blocks is none of the released sizes, and the file does not say "
            f"{' or '.join(missing)}: give config={{{example}}} ({' '.join(f'--set {m}=N' for m in missing)})"
        )
    guidance = given.get("guidance", False)
    if family.guidance:
        guidance = given.get("guidance", [1.0, 2.5])
        if not isinstance(guidance, list | tuple) or len(guidance) != shape.scales:
            raise InputError(
                f"the file has {shape.scales} guidance scales and config['guidance'] names "
                f"{guidance!r}: give one number for each of them"
            )
    return {
        "channels": shape.channels,
        "size": shape.size,
        "patch": shape.patch,
        "width": shape.width,
        "depth": shape.depth,
        "heads": heads,
        "encoder_depth": early if early is not None else max(2 * shape.depth // 3, 1),
        "num_classes": shape.classes,
        "guidance": list(guidance) if isinstance(guidance, list | tuple) else guidance,
        "mlp_ratio": shape.hidden / shape.width,
        "head_norms": family.head_norms,
    }


def law_of(family: Family, config: Mapping[str, Any], given: Mapping[str, Any]) -> GuidanceLaw:
    """What the family gives for a label, and where guidance acts: of a plain one as ``given`` says it."""
    asked = {LAW[key]: value for key, value in given.items() if key in LAW}
    law = family.law
    if law.asked:  # released for other scales than ours it has learned labels at the largest of them
        law = replace(law, scale=max(config["guidance"]))
    if asked and law != PLAIN:
        names = ", ".join(key for key in given if key in LAW)
        raise InputError(f"a {family.layout} is guided by its training: {names} cannot change where, leave it out")
    try:
        return replace(law, **asked)
    except TypeError:
        raise InputError(f"guidance_since and guidance_until are times in [0, 1], got {asked}") from None


def fill(network: DiT, family: Family, weights: Weights) -> None:
    """Put a file's tensors, which fit, into ``network``; what the family does not have stays as it began."""
    ours = network.state_dict()
    for key, value in weights.items():
        if family.leaves_out(key):
            continue
        if key.startswith("final_layer.linear"):
            value = _first_half(value, network.config.patch) if family.doubled else value
            value = -value if family.negated else value
        for name in _renamed(family, key):
            turned = name.removesuffix(".mlp.0.weight") in family.reversed_times
            ours[name] = (reverse_time(value) if turned else value).to(ours[name].dtype)
    network.load_state_dict(ours)


def _renamed(family: Family, key: str) -> tuple[str, ...]:
    """Where a tensor of theirs goes, once or more."""
    if key.startswith("blocks."):
        _, number, rest = key.split(".", 2)
        old, new = next((old, new) for old, new in BLOCK.items() if rest.startswith(old))
        return (f"blocks.{number}.{new}{rest.removeprefix(old)}",)
    for old, new in COMMON.items():
        if key.startswith(old):
            return (new + key.removeprefix(old),)
    name, _, rest = key.partition(".")
    if name == "guidance_embedder":
        return ("guidance.table",)
    return tuple(f"{new}.{rest.removeprefix('proj.')}" for new in family.own[name])


def _first_half(layer: Tensor, patch: int) -> Tensor:
    """The rows of C of the 2C numbers of each pixel, rows being (patch, patch, channel): (2 p² C, …) -> (p² C, …)."""
    kept: Tensor = layer.unflatten(0, (patch * patch, 2, -1))[:, 0].flatten(0, 1)
    return kept


def reverse_time(weight: Tensor, max_period: float = 1e4) -> Tensor:
    """W R, with R f(t) = f(1 − t): (width, features) -> (width, features)."""
    half = weight.shape[1] // 2
    omega = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float64))
    cos, sin = weight.double().split(half, 1)
    turned = torch.cat([cos * omega.cos() + sin * omega.sin(), cos * omega.sin() - sin * omega.cos()], 1)
    return turned.to(weight.dtype)


def misfit(family: Family, weights: Weights) -> list[str]:
    """How a file differs from the family's layout, part by part; empty where it fits."""
    try:
        shape = shape_of(weights)
    except InputError as error:
        return [str(error)]
    needed = expected(family, shape)
    wrong = sorted(k for k in needed.keys() & weights.keys() if tuple(weights[k].shape) != needed[k])
    shapes = [f"{k} is {tuple(weights[k].shape)}, not {needed[k]}" for k in wrong]
    floats = sorted(k for k in needed.keys() & weights.keys() if not weights[k].is_floating_point())
    broken = sorted(
        k
        for k in needed.keys() & weights.keys()
        if weights[k].is_floating_point() and not bool(weights[k].isfinite().all())
    )
    parts = {
        "missing": sorted(needed.keys() - weights.keys()),
        "unexpected": sorted(key for key in weights.keys() - needed.keys() if not family.leaves_out(key)),
        "wrong shape": shapes,
        "not numbers": floats,
        "not finite": broken,
    }
    return [f"{what}: {_some(keys)}" for what, keys in parts.items() if keys]


def _some(keys: list[str], most: int = 4) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
