"""mfm convert."""

from typing import Annotated

import typer

from metaflowmaps.cli.options import Json, Out, app, emit, say

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="What shapes cannot tell: heads=N, encoder_depth=N, guidance=true (repeatable)."),
]


@app.command()
def convert(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A published SiT, DMF or MFM file, owner/name[/file][@revision], or a run of your own."
        ),
    ],
    out: Out = None,
    family: Annotated[str, typer.Option("--family", help="auto, mfm, dmf or sit.")] = "auto",
    settings: Settings = None,
    vae: Annotated[
        str | None, typer.Option("--vae", help="The autoencoder of its latents: a hub id or folder (sd-vae-ft-mse).")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="The scale that is meant where nobody says one.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the file on the hub.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Probe which way its time runs.")] = True,
    as_json: Json = False,
) -> None:
    """Turn published weights, or a run, into a checkpoint to use and share, with manifest and model card."""
    from metaflowmaps import commands

    emit(commands.convert(file, out, family, settings or [], vae, guidance, revision, check, say), as_json)
