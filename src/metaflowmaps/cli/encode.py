"""Encode pictures into latent shards to train on. Run the same command again to go on after an interruption."""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Name, Options, Results
from metaflowmaps.data.latents import Encoding, LatentIndex, read_index, verify
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import SD_VAE, AutoencoderCodec
from metaflowmaps.interop.encode_latents import Plan, encode
from metaflowmaps.work.devices import pick_device
from metaflowmaps.work.shards import share_of


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

    def next_command(self, results: Results, folder: str) -> str:
        """A map of the latents, once all of them are there."""
        return f"mfm train latents --data {folder}" if results["complete"] else ""


def run(config: Encode, context: Context) -> Results:
    """A directory of latents; workers share its shards."""
    if context.out is None:
        raise InputError("where to? add --out DIR")
    began = time.perf_counter()
    if config.source is not None:
        settings, index = _encoded(config, context, context.out)
    elif config.verify:
        settings, index = _verified(context.out, context)
    else:
        raise InputError("which pictures? mfm encode-latents SOURCE --out DIR: a folder, a tar or hf:owner/name")
    return {
        "schema": 1,
        "command": "encode-latents",
        "config": settings,
        "complete": index is not None,
        "metrics": {} if index is None else summary(index),
        "cost": {"seconds": time.perf_counter() - began},
        "out": str(context.out),
    }


def _encoded(config: Encode, context: Context, out: Path) -> tuple[Results, LatentIndex | None]:
    """The settings, and the index where all shards are there."""
    from metaflowmaps.data.sources import open_source  # brings Pillow

    worker, device = share_of(config.worker, None).worker, pick_device(context.device)
    dtype = getattr(torch, config.dtype)
    pictures = open_source(str(config.source), config.classes)
    codec = AutoencoderCodec.from_pretrained(config.vae, config.revision, dtype, micro_batch=config.batch_size)
    codec = codec.to(device)
    codec.latent_shape(config.size)
    encoding = Encoding(
        pictures.fingerprint,
        codec.identity,
        codec.scale,
        config.dtype,
        config.size,
        config.flip,
        config.shard_size,
        config.limit,
    )
    threads = config.threads or min(8, os.cpu_count() or 1)
    plan = Plan(pictures, codec, encoding, out, config.batch_size, config.skip_bad, threads, device)
    known = f"{len(pictures.class_names):,} classes" if pictures.class_names else "no classes"
    context.say(f"{config.source}: {len(pictures):,} pictures, {known}")
    named = {"source": str(config.source), "vae": config.vae}
    index = encode(plan, named, worker, config.verify, context.say)
    if index is None:
        context.say(f"{out}: this worker's shards are there; the index is written by the worker that finds all of them")
    elif index.skipped:
        skipped = f"{index.skipped} of the pictures could not be read and were left out"
        context.say(f"{skipped}: {out}/latents.json names them")
    return {**named, "worker": config.worker, **vars(encoding)}, index


def _verified(out: Path, context: Context) -> tuple[Results, LatentIndex]:
    """Hash every shard of a finished directory; damage is an error that names the files."""
    index, bad = read_index(out), verify(out)
    if bad:
        raise InputError(
            f"{len(bad)} of {len(index.shards)} shards of {out} are missing or damaged ({', '.join(bad[:3])}): run "
            "the mfm encode-latents command that made them with --verify, which makes them again"
        )
    context.say(f"{out}: all {len(index.shards)} shards are what was written")
    return vars(index.settings), index


def summary(index: LatentIndex) -> Results:
    """What a user wants to know of an index."""
    counts = {"examples": index.examples, "classes": len(index.classes), "shards": len(index.shards)}
    return {**counts, "skipped": index.skipped, "bytes": index.bytes, "mean": index.mean, "std": index.std}
