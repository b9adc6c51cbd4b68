"""Turn published weights, or a run, into a checkpoint to use and share, with manifest and model card."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Name, Options, Results
from metaflowmaps.errors import InputError
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.sharing import Wanted, of_file, of_run
from metaflowmaps.networks.dit import DiT
from metaflowmaps.work.config import parse_settings


class Convert(Options):
    """Which file, and what it cannot tell."""

    shared = ("out", "as_json")

    file: Annotated[str, Argument("FILE")] = Field(
        description="A published SiT, REPA, DMF or MFM file, owner/name[/file][@revision], or a run of your own."
    )
    family: str = Field("auto", description="auto, mfm, dmf or sit, or a layout: dmf-512, sit-512, repa.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (),
        description="What shapes cannot tell: heads=N, encoder_depth=N, guidance=true; where guidance acts: "
        "guidance_since=T, guidance_until=T, guidance_channels=N (repeatable).",
    )
    vae: str | None = Field(None, description="The autoencoder of its latents: a hub id or folder (sd-vae-ft-mse).")
    guidance: float | None = Field(None, description="The scale that is meant where nobody says one.")
    revision: str | None = Field(None, description="Of the file on the hub.")
    check: bool = Field(True, description="Probe which way its time runs.")

    def next_command(self, results: Results, folder: str) -> str:
        """Is it what was published?"""
        return f"mfm sample {folder} --num 16"


def run(config: Convert, context: Context) -> Results:
    """The checkpoint's folder, and what is known of it."""
    given, place = parse_settings(config.settings), Path(config.file).expanduser()
    wanted = Wanted(config.vae, config.guidance)
    if place.is_dir() and not pretrained.holds_weights(place):
        if config.family != "auto" or given:
            raise InputError(
                f"{config.file} is a run or a checkpoint: --family and --set are for published files, leave them out"
            )
        made = of_run(str(place), wanted)
        usual = Path("runs") / f"{made.origin.file}-map"  # never the run itself
    else:
        published = pretrained.load_with_source(config.file, config.family, given, config.revision, config.check)
        made = of_file(published, given, wanted)
        if published.source.note:
            context.say(published.source.note)
        usual = Path("runs") / Path(made.origin.file).stem
    out, direction, network = context.out or usual, made.direction, made.model.network
    if not made.write(out):
        context.say(f"{out} holds this conversion already")
    if direction is not None and direction.verdict == "undecided":
        context.say(
            f"which way time runs could not be told (R = {direction.given:.2f}, reversed {direction.reversed:.2f}): "
            "untrained weights look like this; look at samples before relying on it"
        )
    metrics = {
        "family": made.origin.family,
        "left_out": made.notes.get("left_out", []),
        "parameters": sum(p.numel() for p in made.model.parameters()),
        "direction": "unchecked" if direction is None else direction.verdict,
    }
    if isinstance(network, DiT):
        metrics["parameters_of_parent"] = network.parameters_of_parent()
    origin = asdict(made.origin)
    return {"schema": 1, "command": "convert", "config": origin, "metrics": metrics, "cost": {}, "out": str(out)}
