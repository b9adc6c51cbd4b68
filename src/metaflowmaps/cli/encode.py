"""Encode pictures into latent shards to train on. Run the same command again to go on after an interruption."""

from typing import Annotated, Literal

from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Name, Options, Results
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import SD_VAE


class Encode(Options):
    """Which pictures, by which autoencoder."""

    shared = ("out", "device", "as_json")

    source: Annotated[str | None, Argument("[SOURCE]")] = Field(
        None, description="Class folders of pictures, a tar, a dataset saved to disk, or hf:owner/name[:split]."
    )
    vae: str = Field(SD_VAE, description="The autoencoder: a folder in diffusers' layout or a hub id.")
    size: int = Field(256, ge=8, le=4096, description="Side that pictures are cropped to.")
    flip: bool = Field(False, description="Encode mirror images too.")
    batch_size: int = Field(16, ge=1, description="Pictures encoded at a time.")
    shard_size: int = Field(4096, ge=1, description="Pictures a shard.")
    limit: int | None = Field(None, ge=1, description="At most so many, spread over the set.")
    classes: Literal["auto", "own", "imagenet"] = Field(
        "auto", description="Numbers of classes: auto, own (by name) or imagenet (its 1,000)."
    )
    skip_bad: bool = Field(False, description="Leave out pictures that cannot be read.")
    worker: Annotated[str | None, Name(("--worker",), "I/K")] = Field(
        None, description="Every K-th shard, from I on: 0/8 … 7/8 (torchrun: its rank)."
    )
    verify: bool = Field(False, description="Check hashes; with a SOURCE, damaged shards are made again.")
    revision: str | None = Field(None, description="Of the autoencoder on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="The encoder's.")
    threads: int | None = Field(None, ge=1, le=256, description="That read and crop (all cores, at most 8).")


def run(config: Encode, context: Context) -> Results:
    """A directory of latents."""
    from metaflowmaps.commands.encode import encode_latents, verify_latents

    if context.out is None:
        raise InputError("where to? add --out DIR")
    if config.source is None:
        if not config.verify:
            raise InputError("which pictures? mfm encode-latents SOURCE --out DIR: a folder, a tar or hf:owner/name")
        return verify_latents(context.out, context.say)
    options = config.model_dump(exclude={"source", "vae", "verify"})
    return encode_latents(
        config.source, config.vae, context.out, context.say, check=config.verify, device=context.device, **options
    )
