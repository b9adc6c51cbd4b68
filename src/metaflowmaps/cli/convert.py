"""Turn published weights, or a run, into a checkpoint to use and share, with manifest and model card."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Name, Options, Results


class Convert(Options):
    """Which file, and what it cannot tell."""

    shared = ("out", "as_json")

    file: Annotated[str, Argument("FILE")] = Field(
        description="A published SiT, DMF or MFM file, owner/name[/file][@revision], or a run of your own."
    )
    family: str = Field("auto", description="auto, mfm, dmf or sit.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="What shapes cannot tell: heads=N, encoder_depth=N, guidance=true (repeatable)."
    )
    vae: str | None = Field(None, description="The autoencoder of its latents: a hub id or folder (sd-vae-ft-mse).")
    guidance: float | None = Field(None, description="The scale that is meant where nobody says one.")
    revision: str | None = Field(None, description="Of the file on the hub.")
    check: bool = Field(True, description="Probe which way its time runs.")


def run(config: Convert, context: Context) -> Results:
    """The checkpoint's folder, and what is known of it."""
    from metaflowmaps.commands.convert import convert

    return convert(
        config.file, context.out, config.family, config.settings, config.vae, config.guidance, config.revision,
        config.check, context.say,
    )  # fmt: skip
