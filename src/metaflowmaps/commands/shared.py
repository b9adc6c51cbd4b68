"""What several commands do: open a checkpoint, find a place for results, keep tensors, draw the usual picture."""

import hashlib
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import Checkpoint, resolve_checkpoint
from metaflowmaps.data import DataSource, read_source
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_config import tuned_parts
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.random import randn, stream
from metaflowmaps.work.claims import claim
from metaflowmaps.work.devices import pick_device

Say = Callable[[str], None]
Results = dict[str, Any]
PICTURE_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)


def open_model(checkpoint: str, device: str, needs_map: bool = True) -> tuple[MetaFlowMap, Checkpoint, torch.device]:
    """The model, what it was read from, and its device; a map of which only the drift was tuned has no draws."""
    target, found = pick_device(device), resolve_checkpoint(checkpoint)
    if needs_map and tuned(found) and not tuned_parts(found.config["training"])["map"]:
        raise InputError(
            f"only the drift of {checkpoint} was tuned, its map belongs to no model: sample it with --method ode, "
            "steer it with none, dps or tds, or tune again with --map distil"
        )
    return MetaFlowMap.from_pretrained(checkpoint).to(target), found, target


def training_of(found: Checkpoint) -> dict[str, Any]:
    """The configuration a checkpoint was trained by; an exported one carries it along, a published one has none."""
    own: dict[str, Any] = found.config.get("training") or found.config.get("origin", {}).get("training") or {}
    return own


def tuned(found: Checkpoint) -> bool:
    """Did fine-tuning make this checkpoint?"""
    return bool(found.config.get("training", {}).get("recipe") == "finetune")


def typed(command: str, settings: Iterable[str]) -> str:
    """A command as one would type it."""
    return " ".join(["mfm", command, *(f"--set {shlex.quote(setting)}" for setting in settings)])


def run_of(found: Checkpoint) -> Path | None:
    """The run that made a checkpoint, if it lies in one."""
    run = found.path.parent.parent
    return run if (run / "run.json").exists() else None


def beside(checkpoint: str, found: Checkpoint, name: str) -> Path:
    """Results go into the run that made the checkpoint; from elsewhere, under runs/."""
    run = run_of(found)
    return run / name if run is not None else Path("runs") / f"{Path(checkpoint).name}-{name}"


def begun(out: Path, command: str, config: dict[str, Any]) -> Results | None:
    """Take ``out`` for this command; what it ended with, if it is complete already."""
    done = claim(out, command, config)
    return None if done is None else {**done, "out": str(out / "results.json")}


def judging_law(checkpoint: str, found: Checkpoint, law: DataSource, option: str) -> GaussianMixture:
    """The law to judge a checkpoint by: that of the option, refused if it was trained on another; a tuned one's own."""
    own = read_source(found.config.get("training", {}))
    known = None if own is None else own.law()
    if tuned(found):
        if known is None:
            raise InputError(f"{checkpoint} was tuned to a reward whose tilted law nobody knows: nothing to hold it to")
        return known
    if known is not None and own != law:
        raise InputError(f"{checkpoint} was trained on another law than that of {option}: judge it with its own")
    asked = law.law()
    if asked is None:
        raise InputError(f"{option} has no law: posteriors of examples are judged on images")
    return asked


def law_of(found: Checkpoint) -> GaussianMixture | None:
    """The law that a checkpoint was trained on or tuned to, where it is known."""
    source = read_source(found.config.get("training", {}))
    return None if source is None else source.law()


def panels(model: MetaFlowMap, law: GaussianMixture, seed: int) -> Any:
    """Draws for one noisy state a time: of eight seeded ones, the one whose posterior is the widest."""
    contexts, draws = [], []
    for t in PICTURE_TIMES:
        g = stream(seed, "picture", str(t))
        x_1 = law.sample(8, g)
        candidates = model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
        widest = int(law.posterior(model.path, t, candidates).variance.sum(-1).argmax())
        x_t = candidates[widest : widest + 1].to(model.device, model.dtype)
        with torch.no_grad():
            draws.append(model.draw(t, x_t, 1000, generator=g)[:, 0].cpu())
        contexts.append(x_t[0].cpu())
    title = "Draws of the map in one call, exact posteriors as contours"
    return figures.posterior_panels(model.path, law, PICTURE_TIMES, contexts, draws, title)


def sample_picture(model: MetaFlowMap, law: GaussianMixture, step: int, out: Path) -> None:
    figures.save(panels(model, law, 0), out / "samples" / f"step-{step:08d}.png")


def digest(found: Checkpoint) -> str:
    """What identifies a checkpoint: the hash of its manifest, which holds the hash of everything else."""
    return hashlib.sha256((found.path / "manifest.json").read_bytes()).hexdigest()


def print_tables(tables: dict[str, tuple[list[str], list[list[str]]]]) -> None:
    """Tables as text: title -> (head, rows)."""
    for title, (head, rows) in tables.items():
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        print(f"\n{title}")
        for row in [head, *rows]:
            print(
                "  ".join(
                    cell.ljust(w) if i == 0 else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                )
            )
    print()
