"""mfm convert: published weights, or a run of ours, as a checkpoint to share, with a model card."""

from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps import pretrained
from metaflowmaps.checkpoint import CheckpointError, load_model, resolve_checkpoint, save_model
from metaflowmaps.codec import SD_VAE
from metaflowmaps.commands.shared import Results, Say, digest
from metaflowmaps.config import parse_settings
from metaflowmaps.data.latents import INDEX, read_index
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.dit import DiT
from metaflowmaps.pipeline import DOCUMENT, is_latent
from metaflowmaps.runs import finite

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
}


class Origin(NamedTuple):
    """A map and where it came from: ``asked`` tells one conversion from another."""

    model: MetaFlowMap
    asked: dict[str, Any]
    notes: dict[str, Any]
    document: dict[str, Any]
    card: str
    direction: pretrained.Direction | None


def convert(
    source: str,
    out: Path | None,
    family: str,
    settings: Iterable[str],
    vae: str | None,
    guidance: float | None,
    revision: str | None,
    check: bool,
    say: Say,
) -> Results:
    """Write a checkpoint with manifest, ``pipeline.json`` and README.md; one that is there already is not touched."""
    given = parse_settings(settings)
    ours = Path(source).is_dir() and not any(p.suffix in pretrained.SUFFIXES[1:] for p in Path(source).iterdir())
    if ours and family == "auto" and not given:
        found = _of_run(source, vae, guidance)
    else:
        found = _of_file(source, family, given, vae, guidance, revision, check)
    out = out or Path("runs") / Path(found.asked["file"]).stem
    if out.exists() and any(out.iterdir()):
        _refuse_another(out, found.asked)
        say(f"{out} holds this conversion already")
    else:
        notes = {"origin": {**found.asked, **found.notes}}
        save_model(found.model, out, notes, {DOCUMENT: found.document})
        (out / "README.md").write_text(found.card)
    direction = found.direction
    if direction is not None and direction.verdict == "undecided":
        say(
            f"which way time runs could not be told (R = {direction.given:.2f}, reversed {direction.reversed:.2f}): "
            "untrained weights look like this; look at samples before relying on it"
        )
    metrics = {
        "family": found.asked["family"],
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "direction": "unchecked" if direction is None else direction.verdict,
    }
    if isinstance(found.model.network, DiT):
        metrics["parameters_of_parent"] = found.model.network.parameters_of_parent()
    return {"schema": 1, "command": "convert", "config": found.asked, "metrics": metrics, "cost": {}, "out": str(out)}


def _of_file(
    file: str,
    family: str,
    config: dict[str, Any],
    vae: str | None,
    guidance: float | None,
    revision: str | None,
    check: bool,
) -> Origin:
    """A published file."""
    model, kind, source, direction = pretrained.load_with_source(file, family, config, revision, check)
    scales = model.network.config["guidance"]  # type: ignore[index]
    usual = max(scales) if guidance is None and kind.guidance else guidance
    document = _document(model, (), vae, usual)
    asked = {"file": source.name, "revision": source.revision, "family": kind.name, "config": config}
    notes = {"direction": None if direction is None else finite(direction._asdict())}
    what, licence = FAMILIES[kind.name]
    place = f"`{source.name}`" + (f" at revision {source.revision}" if source.revision else "")
    how = (
        f"Converted on {date.today().isoformat()} from {place} (layout: {kind.name}); the tensors are those of the\n"
        f"file, with time direction and sign folded into them. Licence: {licence}."
    )
    probe = "not checked"
    if direction is not None:
        probe = f"{direction.verdict} (R {direction.given:.2f}, reversed {direction.reversed:.2f})"
    text = card(Path(source.name).stem, what, how, model, document, {"direction of time": probe})
    return Origin(model, asked, notes, document, text, direction)


def _of_run(run: str, vae: str | None, guidance: float | None) -> Origin:
    """A run of ours: its averaged weights, and what its data say of the autoencoder and the classes."""
    found = resolve_checkpoint(run)
    model, training = load_model(run), found.config.get("training", {})
    stored = found.document(DOCUMENT) if found.has(DOCUMENT) else {}
    data, names = training.get("data") or {}, stored.get("class_names") or ()
    if data.get("name") == "latents" and (Path(data["path"]).expanduser() / INDEX).exists():
        index = read_index(Path(data["path"]).expanduser())
        vae, names = vae or index["vae"], names or index["classes"]
    if guidance is None:
        guidance = stored.get("guidance") or max(training.get("condition", {}).get("guidance") or [1.0])
    document = _document(model, names, vae or stored.get("vae"), guidance if guidance != 1 else None)
    asked: dict[str, Any] = {
        "file": Path(run).resolve().name,
        "revision": digest(found)[:16],
        "family": "ours",
        "config": {},
    }
    recipe, position = training.get("recipe", "a checkpoint"), "position.json"
    steps = f" at step {found.document(position)['step']:,}" if found.has(position) else ""
    how = f"Exported on {date.today().isoformat()} from a run of `{recipe}`{steps}: its averaged weights."
    what = "A meta flow map: one-step draws from every posterior p(x_1 | x_t)."
    return Origin(
        model, asked, {"training": training}, document, card(asked["file"], what, how, model, document, {}), None
    )


def _document(model: MetaFlowMap, names: Sequence[str], vae: str | None, guidance: float | None) -> dict[str, Any]:
    """pipeline.json."""
    classes = int(getattr(model.network, "num_classes", 0))
    known = "imagenet" if classes == 1000 else list(names) if len(names) == classes else []
    document: dict[str, Any] = {"schema": 1, "guidance": guidance, "class_names": known}
    if vae is not None or is_latent(model):
        document["vae"] = vae or SD_VAE
    return document


def _refuse_another(out: Path, asked: dict[str, Any]) -> None:
    """Is what lies in ``out`` the same conversion? Anything else is refused and left as it is."""
    try:
        held = resolve_checkpoint(str(out)).config.get("origin")
    except CheckpointError as error:
        raise InputError(f"--out {out} holds other files ({error.problem}): choose another directory") from None
    if held is None or any(held.get(key) != value for key, value in asked.items()):
        raise InputError(f"--out {out} holds another checkpoint: choose another directory")


def card(name: str, what: str, how: str, model: MetaFlowMap, document: dict[str, Any], more: dict[str, str]) -> str:
    """README.md of a checkpoint to share."""
    network: dict[str, Any] = model.network.config  # type: ignore[assignment]
    classes, guidance = network.get("num_classes", 0), network.get("guidance")
    parts = [f"{network['depth']} blocks of width {network['width']}"] if "depth" in network else []
    shape = " × ".join(map(str, model.event_shape))
    rows = {
        "network": ", ".join([str(model.network.name), *parts]),
        "samples": shape + (f", latents of {document['vae']}" if "vae" in document else ""),
        "classes": f"{classes} (number {classes} is the null class)" if classes else "none",
        "guidance": ("scales " + ", ".join(f"{w:g}" for w in guidance)) if isinstance(guidance, list)
        else "any scale" if guidance else "none learned",
        "path": f"{model.path.name}, data at t = 1; parameterisation {model.parameterization}",
        **more,
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    label = "" if not classes else '"tabby cat", ' if document["class_names"] == "imagenet" else "0, "
    return f"""---
library_name: metaflowmaps
tags: [flow-matching, meta-flow-map, image-generation]
---
# {name}

{what}

{how}

| | |
|---|---|
{table}

```python
import metaflowmaps as mfm

pipe = mfm.Pipeline.from_pretrained("path/to/this/directory", device="cuda")
pipe({label}steps=4).images[0]
```

`manifest.json` holds the sha256 of every file that is read; a damaged one is refused.
"""
