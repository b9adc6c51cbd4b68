"""mfm encode-latents."""

import os
import time
from pathlib import Path

import torch

from metaflowmaps.commands.shared import Results, Say
from metaflowmaps.data.latents import read_index, verify
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.interop.autoencoder import AutoencoderCodec
from metaflowmaps.interop.encode_latents import Encoding, Plan, encode
from metaflowmaps.work.devices import pick_device
from metaflowmaps.work.shards import own_device, share_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode_latents(
    source: str,
    vae: str,
    out: Path,
    say: Say,
    *,
    size: int = 256,
    flip: bool = False,
    batch_size: int = 16,
    shard_size: int = 4096,
    limit: int | None = None,
    classes: str = "auto",
    skip_bad: bool = False,
    worker: str | None = None,
    check: bool = False,
    revision: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "auto",
) -> Results:
    """Encode the pictures of a source into ``out``, going on from what is there."""
    from metaflowmaps.data.sources import open_source  # brings Pillow

    share, target = share_of(worker, None).worker, pick_device(own_device(device))
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    pictures = open_source(source, classes)
    codec = AutoencoderCodec.from_pretrained(vae, revision, DTYPES[dtype], micro_batch=batch_size).to(target)
    codec.latent_shape(size)
    settings = Encoding(pictures.fingerprint, codec.identity, codec.scale, dtype, size, flip, shard_size, limit)
    plan = Plan(pictures, codec, settings, out, batch_size, skip_bad, threads or min(8, os.cpu_count() or 1), target)
    known = f"{len(pictures.class_names):,} classes" if pictures.class_names else "no classes"
    say(f"{source}: {len(pictures):,} pictures, {known}")
    began = time.perf_counter()
    index = encode(plan, {"source": source, "vae": vae}, share, check, say)
    metrics = {} if index is None else summary(index)
    if index is None:
        say(f"{out}: this worker's shards are there; the index is written by the worker that finds all of them")
    elif index["skipped"]:
        say(f"{index['skipped']} of the pictures could not be read and were left out: {out}/latents.json names them")
    return {
        "schema": 1,
        "command": "encode-latents",
        "config": {"source": source, "vae": vae, "worker": worker, **vars(settings)},
        "complete": index is not None,
        "metrics": metrics,
        "cost": {"seconds": time.perf_counter() - began},
        "out": str(out),
    }


def verify_latents(out: Path, say: Say) -> Results:
    """Hash every shard of a finished directory; damage is an error that names the files."""
    index = read_index(out)
    began = time.perf_counter()
    bad = verify(out)
    if bad:
        raise InputError(
            f"{len(bad)} of {len(index['shards'])} shards of {out} are missing or damaged ({', '.join(bad[:3])}): run "
            "the mfm encode-latents command that made them with --verify, which makes them again"
        )
    say(f"{out}: all {len(index['shards'])} shards are what was written")
    return {
        "schema": 1,
        "command": "encode-latents",
        "config": index["settings"],
        "complete": True,
        "metrics": summary(index),
        "cost": {"seconds": time.perf_counter() - began},
        "out": str(out),
    }


def summary(index: Results) -> Results:
    """What a user wants to know of an index."""
    return {
        "examples": index["examples"],
        "classes": len(index["classes"]),
        "shards": len(index["shards"]),
        "skipped": index["skipped"],
        "bytes": sum(entry["bytes"] for entry in index["shards"]),
        "mean": index["mean"],
        "std": index["std"],
    }
