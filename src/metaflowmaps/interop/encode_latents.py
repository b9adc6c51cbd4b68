r"""Pictures in, latent shards out: resumable, shared among workers of one kind, the same bytes whoever does what.

Shard k holds pictures [k S, (k+1) S) of the source less those that cannot be read, so it depends on the source and the
settings alone. The shards are those of :mod:`metaflowmaps.work.shards`, with their plan, entries and locks in a folder
``encoding`` of the directory; the plan holds the settings, and other settings are refused. Whoever finds all shards
there joins the entries into ``latents.json`` and removes that folder.
"""

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from metaflowmaps._files import sweep
from metaflowmaps.data.latents import (
    ENCODING,
    INDEX,
    SHARD,
    SIDES,
    Encoding,
    LatentIndex,
    LatentShard,
    LatentShards,
    read_index,
)
from metaflowmaps.data.sources import BadPicture, PictureSource, picture
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import Codec
from metaflowmaps.random import stream
from metaflowmaps.work.config import differences
from metaflowmaps.work.shards import Say, Shard, ShardEntry, ShardFolder, Unfinished, Worker, discard, ranges, read_plan

PREFIX = "latents-"
BATCHES_AHEAD = 2  # that are read while one is encoded


@dataclass(frozen=True)
class Plan:
    """Which pictures, encoded how, to where."""

    source: PictureSource
    codec: Codec
    settings: Encoding
    out: Path
    batch_size: int = 16
    skip_bad: bool = False
    threads: int = 4
    device: torch.device | str = "cpu"

    @property
    def chosen(self) -> list[int]:
        """The pictures, in order: all of them, or so many, spread over the set."""
        n, limit = len(self.source), self.settings.limit
        if limit is None or limit >= n:
            return list(range(n))
        picked = torch.randperm(n, generator=stream(0, "encode-limit"))[:limit]
        return sorted(picked.tolist())


def encode(
    plan: Plan,
    described: Mapping[str, str],
    worker: Worker | None = None,
    verify: bool = False,
    say: Say = lambda line: None,
) -> LatentIndex | None:
    """Make what is missing of the shards, or this worker's part of it.

    Args:
        plan: Which pictures, encoded how, to where.
        described: What the user calls the "source" and the "vae", for the index.
        worker: Which of several this process is; None makes all that is missing.
        verify: Whether to hash every shard that is there; one that is damaged is made again.
        say: Takes a line of progress.

    Returns:
        The index once all shards are there, else None.
    """
    chosen, size = plan.chosen, plan.settings.shard_size
    parts = ranges(len(chosen), size, PREFIX)
    _check_place(plan)
    sweep(plan.out)
    shards = ShardFolder(plan.out / ENCODING, worker, (plan.out / INDEX).exists, say, product=plan.out)
    if (plan.out / INDEX).exists() and not _reopen(plan, shards, verify):
        return read_index(plan.out)
    shards.begin(list(parts), size, vars(plan.settings))
    if verify:
        _withdraw_damaged(plan.out, shards)
    with ThreadPoolExecutor(plan.threads) as pool, torch.backends.cudnn.flags(benchmark=False, deterministic=True):

        def make(name: str) -> Shard:
            began = time.perf_counter()
            shard = _encoded(plan, chosen[parts[name]], pool)
            rows, bad = shard.facts["rows"], len(shard.facts["skipped"])
            rate = (rows + bad) / (time.perf_counter() - began)
            say(f"{name}: {rows:,} images{f', {bad} cannot be read' if bad else ''}, {rate:.0f} images/s")
            return shard

        try:
            shards.work(make)
        except Unfinished:
            return read_index(plan.out) if shards.finished() else None
    try:
        index = _index(plan, shards, described)
        index.write(plan.out)
    finally:
        shards.close()
    discard(shards.folder)
    return index


# -- one shard -------------------------------------------------------------------------------------------------------


def _encoded(plan: Plan, items: list[int], pool: ThreadPoolExecutor) -> Shard:
    """The tensors of a shard, and the names of what cannot be read."""
    shape, sides = plan.codec.latent_shape(plan.settings.size), SIDES[: 1 + plan.settings.flip]
    rows = {name: [torch.empty(0, *shape).half()] for side in sides for name in side}
    labels: list[int] = []
    skipped: list[str] = []
    for batch in _read_ahead(plan, items, pool):
        good: dict[int, np.ndarray] = {}
        for i, image in batch:
            if not isinstance(image, BadPicture):
                good[i] = image
            elif plan.skip_bad:
                skipped.append(plan.source.name(i))
            else:
                raise image
        if not good:
            continue
        labels += [plan.source.labels[i] for i in good]
        pixels = torch.from_numpy(np.stack(list(good.values()))).permute(0, 3, 1, 2).contiguous()
        x = pixels.to(plan.device).float() / 127.5 - 1
        for names, pictures in zip(sides, (x, x.flip(-1)), strict=False):
            for name, part in zip(names, plan.codec.encode(pictures), strict=True):
                rows[name].append(part.half().cpu())
                if not bool(rows[name][-1].isfinite().all()):
                    first = plan.source.name(next(iter(good)))
                    raise InputError(
                        f"the autoencoder gives infinite or undefined latents, for {first} or one of the "
                        f"{len(good) - 1} after it: --dtype float32"
                    )
    tensors = {name: torch.cat(parts) for name, parts in rows.items()}
    total, square = torch.zeros(2, *shape, dtype=torch.float64)
    for names in sides:
        mean, std = (tensors[name].double() for name in names)
        total += mean.sum(0) / len(sides)
        square += (mean.square() + std.square()).sum(0) / len(sides)
    tensors |= {"label": torch.tensor(labels, dtype=torch.int64), "sum": total, "square": square}
    return Shard(tensors, {"rows": len(labels), "skipped": skipped})


def _read_ahead(
    plan: Plan, items: list[int], pool: ThreadPoolExecutor
) -> Iterator[list[tuple[int, np.ndarray | BadPicture]]]:
    """Batches of pictures in order, read and cropped by the pool while earlier ones are encoded."""

    def read(i: int) -> tuple[int, np.ndarray | BadPicture]:
        try:
            return i, picture(plan.source, i, plan.settings.size)
        except BadPicture as bad:
            return i, bad

    size = plan.batch_size
    begun = (pool.map(read, items[start : start + size]) for start in range(0, len(items), size))
    ahead = deque(islice(begun, BATCHES_AHEAD))
    while ahead:
        ahead.extend(islice(begun, 1))
        yield list(ahead.popleft())


# -- the directory ---------------------------------------------------------------------------------------------------


def _check_place(plan: Plan) -> None:
    """Make the directory, or refuse one that holds something else."""
    out, folder = plan.out, plan.out / ENCODING
    wanted = asdict(plan.settings)
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: give a directory")
        out.mkdir(parents=True, exist_ok=True)
        begun = read_plan(folder)
        if (out / INDEX).exists():
            held = asdict(read_index(out).settings)
        elif begun is not None:
            held = begun.settings
        else:  # shards whose index was damaged and deleted are made again
            held = wanted
            names = sorted(file.name for file in out.iterdir() if not file.name.startswith("."))
            others = [name for name in names if name != ENCODING and not re.fullmatch(SHARD, name)]
            if others:
                raise InputError(f"--out {out} holds other files ({others[0]}): give an empty directory")
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}; choose another directory") from error
    lines = [_named(line) for line in differences(held, wanted)]
    if lines:
        raise InputError(
            f"{out} holds latents made otherwise ({'; '.join(lines[:3])}): repeat its settings, or choose another --out"
        )


def _named(difference: str) -> str:
    """Hashes say nothing to a reader."""
    kind = difference.partition(":")[0]
    return {"source": "other pictures or classes", "vae": "another autoencoder"}.get(kind, difference)


def _reopen(plan: Plan, shards: ShardFolder, verify: bool) -> bool:
    """Where a shard of a finished directory is missing or damaged, take the index apart into entries again."""
    listed = {Path(shard.file).stem: shard for shard in read_index(plan.out).shards}
    if all(shard.is_whole(plan.out, verify) for shard in listed.values()):
        discard(plan.out / ENCODING)  # of a process that was killed after it wrote the index
        return False
    shards.folder.mkdir(exist_ok=True)
    for name, shard in listed.items():
        facts = {"rows": shard.examples, "skipped": list(shard.skipped), "span": [0.0, 0.0]}
        shards.vouch(name, ShardEntry(shard.sha256, shard.bytes, facts))
    shards.begin(list(listed), plan.settings.shard_size, vars(plan.settings))
    (plan.out / INDEX).unlink(missing_ok=True)
    return True


def _listed(name: str, shards: ShardFolder) -> LatentShard | None:
    """A shard's line in the index; None where it is not there."""
    entry = shards.entry(name)
    if entry is None:
        return None
    facts = entry.facts
    return LatentShard(f"{name}.safetensors", facts["rows"], entry.bytes, entry.sha256, tuple(facts["skipped"]))


def _withdraw_damaged(out: Path, shards: ShardFolder) -> None:
    """Withdraw the entries of shards whose hash is wrong."""
    for name in shards.names:
        shard = _listed(name, shards)
        if shard is not None and not shard.is_whole(out, by_hash=True):
            shards.vouch(name, None)


def _index(plan: Plan, shards: ShardFolder, described: Mapping[str, str]) -> LatentIndex:
    """latents.json, once all shards are there."""
    listed = tuple(shard for name in shards.names if (shard := _listed(name, shards)))
    if not any(shard.examples for shard in listed):
        first = shards.folder / f"{shards.names[0]}.json"
        raise InputError(f"none of the pictures could be read: see {first} for their names")
    index = LatentIndex(
        **described,
        settings=plan.settings,
        event_shape=plan.codec.latent_shape(plan.settings.size),
        examples=sum(shard.examples for shard in listed),
        classes=tuple(plan.source.class_names),
        skipped=sum(len(shard.skipped) for shard in listed),
        mean=0.0,
        std=0.0,
        shards=listed,
    )
    held = LatentShards(plan.out, index)
    return replace(index, mean=held.mean, std=held.std)
