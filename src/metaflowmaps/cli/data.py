"""mfm encode-latents."""

from pathlib import Path
from typing import Annotated

import typer

from metaflowmaps.cli.options import Device, Json, app, emit, say
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import SD_VAE


@app.command("encode-latents")
def encode_latents(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="Class folders of pictures, a tar, a dataset saved to disk, or hf:owner/name[:split].",
        ),
    ] = None,
    vae: Annotated[
        str, typer.Option("--vae", help="The autoencoder: a folder in diffusers' layout or a hub id.")
    ] = SD_VAE,
    out: Annotated[Path | None, typer.Option("--out", help="Directory for the shards and their index.")] = None,
    size: Annotated[int, typer.Option("--size", min=8, max=4096, help="Side that pictures are cropped to.")] = 256,
    flip: Annotated[bool, typer.Option("--flip", help="Encode mirror images too.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures encoded at a time.")] = 16,
    shard_size: Annotated[int, typer.Option("--shard-size", min=1, help="Pictures a shard.")] = 4096,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many, spread over the set.")] = None,
    classes: Annotated[
        str, typer.Option("--classes", help="Numbers of classes: auto, own (by name) or imagenet (its 1,000).")
    ] = "auto",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be read.")] = False,
    worker: Annotated[
        str | None,
        typer.Option("--worker", metavar="I/K", help="Every K-th shard, from I on: 0/8 … 7/8 (torchrun: its rank)."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check hashes; with a SOURCE, damaged shards are made again.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the autoencoder on the hub.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="The encoder's: float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=256, help="That read and crop (all cores, at most 8).")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode pictures into latent shards to train on. Run the same command again to go on after an interruption."""
    from metaflowmaps.commands import encode as command

    if out is None:
        raise InputError("where to? add --out DIR")
    if source is None:
        if not verify:
            raise InputError("which pictures? mfm encode-latents SOURCE --out DIR: a folder, a tar or hf:owner/name")
        emit(command.verify_latents(out, say), as_json)
        return
    results = command.encode_latents(
        source, vae, out, say, size=size, flip=flip, batch_size=batch_size, shard_size=shard_size, limit=limit,
        classes=classes, skip_bad=skip_bad, worker=worker, check=verify, revision=revision, dtype=dtype,
        threads=threads, device=device,
    )  # fmt: skip
    emit(results, as_json)
