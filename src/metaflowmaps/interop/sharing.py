"""Published weights, or a run of ours, as a checkpoint to share: with its autoencoder, ``pipeline.json``, a card."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps._files import finite, write_whole
from metaflowmaps.checkpoint import CheckpointError, resolve_checkpoint, save_model
from metaflowmaps.data import Latents, read_examples
from metaflowmaps.data.latents import INDEX, read_index
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.opening import DOCUMENT, beside, pipeline_document, stored

VAE = "vae"  # the folder of an autoencoder beside its map
FAMILIES = {  # what the map is, and under whose licence
    "mfm": (
        "A meta flow map: one-step draws from every posterior p(x_1 | x_t).",
        "that of the published weights (adh1s/mfm)",
    ),
    "dmf": (
        "The meta flow map that a decoupled flow map initialises: equal to it at any context, to be distilled.",
        "that of the published weights (kyungmnlee/DMF)",
    ),
    "sit": (
        "The meta flow map that a SiT initialises: its drift is SiT's, to be distilled.",
        "that of the published weights (nyu-visionx/SiT-collections)",
    ),
    "repa": (
        "The meta flow map that a REPA initialises: its drift is REPA's, to be distilled.",
        "that of the published weights",
    ),
}


class Wanted(NamedTuple):
    """What a user says of a map that its file does not: its autoencoder, the usual guidance."""

    vae: str | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was converted from: this tells one conversion from another."""

    file: str
    revision: str | None
    family: str
    config: Mapping[str, Any]
    sha256: str | None = None


@dataclass(frozen=True)
class Shareable:
    """A map to be shared, where it came from, and what its card says of it."""

    model: MetaFlowMap
    origin: Origin
    document: Mapping[str, Any]  # pipeline.json
    title: str
    story: str
    vae: Path | None  # an autoencoder of this machine, to be put beside the map
    notes: Mapping[str, Any]  # kept in its configuration
    direction: pretrained.Direction | None = None

    def write(self, out: Path) -> bool:
        """A checkpoint with manifest, ``pipeline.json`` and README.md; False where it is there already, untouched."""
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: name a directory")
        there = out.exists() and any(out.iterdir())
        if there:
            _refuse_another(out, self)
        else:
            save_model(self.model, out, {"origin": {**asdict(self.origin), **self.notes}}, {DOCUMENT: self.document})
        _put_autoencoder(out, self.vae)
        if not (out / "README.md").exists():
            write_whole(out / "README.md", card(self).encode())
        return not there


def of_file(published: pretrained.Published, config: Mapping[str, Any], wanted: Wanted) -> Shareable:
    """What becomes of a published file.

    Args:
        published: the map, the family of its file, where it came from, which way its time runs.
        config: what was said of its shapes.
        wanted: the autoencoder and the guidance.
    """
    model, kind, source, direction = published
    network: Any = model.network
    scales = network.config.guidance
    _check_guidance(wanted.guidance, scales)
    usual = max(scales) if wanted.guidance is None and kind.guidance else wanted.guidance
    folder, vae = _autoencoder(wanted.vae)
    what, licence = FAMILIES["repa" if kind.layout == "repa" else kind.name]
    place = f"`{source.name}`" + (f" at revision {source.revision}" if source.revision else "")
    story = (
        f"{what}\n\nConverted on {date.today().isoformat()} from {place} (layout: {kind.layout}); the tensors are "
        f"those of the\nfile, with time direction and sign folded into them. Licence: {licence}."
    )
    return Shareable(
        model,
        Origin(source.name, source.revision, kind.name, dict(config), source.sha256),
        pipeline_document(model, (), vae, usual),
        Path(source.name).stem,
        story,
        folder,
        {"direction": None if direction is None else finite(direction._asdict()), "left_out": list(source.left_out)},
        direction,
    )


def of_run(run: str, wanted: Wanted) -> Shareable:
    """A run of ours: its averaged weights, and what its data say of the autoencoder and the classes."""
    checkpoint, (vae, guidance) = resolve_checkpoint(run), wanted
    model, training = MetaFlowMap.from_pretrained(run), checkpoint.config.get("training", {})
    known = stored(checkpoint)
    data, names = read_examples(training), known.get("class_names") or ()
    if isinstance(data, Latents) and data.path and (Path(data.path).expanduser() / INDEX).exists():
        index = read_index(Path(data.path).expanduser())
        vae, names = vae or index.vae, names or index.classes
    _check_guidance(guidance, getattr(getattr(model.network, "config", None), "guidance", False))
    if guidance is None:
        guidance = known.get("guidance") or max(training.get("condition", {}).get("guidance") or [1.0])
    own = beside(checkpoint, str(known.get("vae")))
    folder, vae = _autoencoder(vae or (known.get("vae") if own is None else str(own)))
    position = "position.json"
    steps = f" at step {checkpoint.document(position)['step']:,}" if checkpoint.has(position) else ""
    recipe, name = training.get("recipe", "a checkpoint"), Path(run).resolve().name
    story = (
        "A meta flow map: one-step draws from every posterior p(x_1 | x_t).\n\n"
        f"Exported on {date.today().isoformat()} from a run of `{recipe}`{steps}: its averaged weights."
    )
    document = pipeline_document(model, names, vae, guidance if guidance != 1 else None)
    origin = Origin(name, checkpoint.digest[:16], "ours", {})
    return Shareable(model, origin, document, name, story, folder, {"training": training})


def _check_guidance(scale: float | None, known: Any) -> None:
    """Refuse a usual scale that every later call would be refused for."""
    if scale is None or (scale == 1 and not isinstance(known, list)):
        return
    if not math.isfinite(scale):
        raise InputError(f"--guidance must be a finite number, got {scale}")
    if not known:
        raise InputError(
            f"--guidance {scale:g}: this map has no embedding of scales; leave it out, or begin one with "
            "--set guidance=true"
        )
    if isinstance(known, list) and scale not in known:
        raise InputError(f"--guidance {scale:g}: this map knows {', '.join(f'{w:g}' for w in known)}")


def _autoencoder(vae: str | None) -> tuple[Path | None, str | None]:
    """The folder to put beside the map, and what ``pipeline.json`` calls it: the same from every directory."""
    if vae is None or not Path(vae).expanduser().is_dir():
        return None, vae
    folder = Path(vae).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"--vae {vae} is no autoencoder in diffusers' layout: give the folder with its config.json")
    return folder, VAE


def _put_autoencoder(out: Path, vae: Path | None) -> None:
    """The files of an autoencoder of this machine, beside the map; what is there already stays."""
    if vae is None or (out / VAE).exists():
        return
    staging = out / f".tmp-{VAE}"
    shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
    try:
        staging.mkdir()
        for file in (vae / "config.json", *sorted(vae.glob("*.safetensors*"))):
            shutil.copyfile(file, staging / file.name)
        staging.rename(out / VAE)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_another(out: Path, shareable: Shareable) -> None:
    """Is what lies in ``out`` the same conversion? Anything else is refused and left as it is."""
    try:
        there = resolve_checkpoint(str(out))
    except CheckpointError as error:
        raise InputError(f"--out {out} holds other files ({error.problem}): choose another directory") from None
    held = there.config.get("origin")
    if held is None or any(held.get(key) != value for key, value in asdict(shareable.origin).items()):
        raise InputError(f"--out {out} holds another checkpoint: choose another directory")
    if stored(there) != shareable.document:
        raise InputError(
            f"--out {out} holds this conversion with another autoencoder, guidance or names: choose another directory"
        )


def card(shareable: Shareable) -> str:
    """README.md of a checkpoint to share."""
    model, document, direction = shareable.model, shareable.document, shareable.direction
    network: Any = model.network.config
    classes, guidance, vae = network.num_classes, network.guidance, document.get("vae")
    rows = {
        "network": network.name,
        "samples": " × ".join(map(str, model.event_shape)),
        "classes": f"{classes} (number {classes} is the null class)" if classes else "none",
        "guidance": "any scale" if guidance else "none learned",
        "path": f"{model.path.name}, data at t = 1; parameterisation {model.parameterization}",
    }
    if hasattr(network, "depth"):
        rows["network"] += f", {network.depth} blocks of width {network.width}"
    if vae is not None:
        rows["samples"] += f", latents of {f'the autoencoder in `{VAE}/`' if vae == VAE else vae}"
    if isinstance(guidance, list):
        rows["guidance"] = "scales " + ", ".join(f"{w:g}" for w in guidance)
    if direction is not None:
        measured = f"R {direction.given:.2f}, reversed {direction.reversed:.2f}"
        rows["direction of time"] = f"{direction.verdict} ({measured})"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    label = "" if not classes else '"tabby cat", ' if document["class_names"] == "imagenet" else "0, "
    return f"""---
library_name: metaflowmaps
tags: [flow-matching, meta-flow-map, image-generation]
---
# {shareable.title}

{shareable.story}

| | |
|---|---|
{table}

```python
import metaflowmaps as mfm

pipe = mfm.Pipeline.from_pretrained("path/to/this/directory", device="cuda")
pipe({label}steps=4).images[0]
```

`manifest.json` holds the sha256 of the map's files; a damaged one is refused.
"""
