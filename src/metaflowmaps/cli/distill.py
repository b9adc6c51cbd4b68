"""Distil a flow or diffusion model into a meta flow map. Run the same command again to go on after an interruption."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import TRAINS, Argument, Context, Name, Options, Results
from metaflowmaps.cli.train import Job, carried_out
from metaflowmaps.errors import InputError
from metaflowmaps.training.distillation import data_named, distilling, refuse_wrong
from metaflowmaps.training.parents import open_parent


class Distill(Options):
    """Whose drift, on what."""

    shared = TRAINS

    model: Annotated[str, Argument("MODEL")] = Field(
        description="file.py:make, a function that returns mfm.wrap(network, …); or a checkpoint, as of mfm convert."
    )
    data: Annotated[str, Name(("--data",), "DIR")] = Field(
        "",
        description="What it was trained on: pictures, latents of mfm encode-latents, an .npy of floats (n, …) taken "
        "as they are, digits, or file.py:Name.",
    )
    fast: bool = Field(False, description="A fraction of the steps, less exact.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting: low_rank=8, steps=3000, key.sub=value (repeatable)."
    )

    def next_command(self, results: Results, folder: str) -> str:
        """What the map is for."""
        return f"mfm posterior {folder}"


def run(config: Distill, context: Context) -> Results:
    """Distil a drift; several ranks of torchrun are one run."""
    if not config.data:
        raise InputError("mfm distill needs the data that the model was trained on, or like it: --data DIR")
    parent, data = open_parent(config.model), data_named(config.data)
    job = Job(
        "distill",
        lambda: distilling(config.model, parent, data, config.fast),
        lambda resolved: refuse_wrong(resolved, parent),
    )
    return carried_out(job, config.settings, context, parent)
