r"""Pictures in, latent shards out: resumable, shared among workers, the same bytes whoever does what.

Shard k holds pictures [k S, (k+1) S) of the source less those that cannot be read, so it depends on the source and the
settings alone. The shards are those of :mod:`metaflowmaps.work.shards`, with their plan, entries and locks in a folder
``encoding`` of the directory; the plan holds the settings, and other settings are refused. Whoever finds all shards
there joins the entries into ``latents.json`` and removes that folder.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from metaflowmaps._files import sweep, write_json
from metaflowmaps.data.latents import ENCODING, INDEX, SCHEMA, SHARD, SIDES, is_whole, read_index
from metaflowmaps.data.sources import BadPicture, PictureSource, picture
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import Codec
from metaflowmaps.random import stream
from metaflowmaps.work.config import differences
from metaflowmaps.work.shards import Say, Shard, ShardEntry, ShardFolder, Unfinished, Worker, discard, ranges, read_plan

PREFIX = "latents-"


@dataclass(frozen=True)
class Encoding:
    """What decides the result. ``vae`` identifies the weights, ``source`` the pictures and their classes."""

    source: str
    vae: str
    scale: float
    dtype: str
    size: int = 256
    flip: bool = False
    shard_size: int = 4096
    limit: int | None = None


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
    described: dict[str, Any],
    worker: Worker | None = None,
    verify: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any] | None:
    """Make what is missing of the shards, or this worker's part of it.

    Args:
        plan: Which pictures, encoded how, to where.
        described: Goes into the index as it is.
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
    folder = plan.out / ENCODING
    shards = ShardFolder(folder, worker, (plan.out / INDEX).exists, say, product=plan.out)
    if (plan.out / INDEX).exists() and not _reopen(plan, shards, verify):
        return read_index(plan.out)
    shards.begin(list(parts), size, vars(plan.settings))
    if verify:
        _drop_damaged(shards)
    rate = _Rate(say)
    with ThreadPoolExecutor(plan.threads) as pool, torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        try:
            shards.work(lambda name: rate.of(_encoded(plan, chosen[parts[name]], pool), name))
        except Unfinished:
            return read_index(plan.out) if shards.finished() else None
    try:
        index = _index(plan, shards, described)
        write_json(plan.out / INDEX, index)
    finally:
        shards.close()
    discard(folder)
    return index


class _Rate:
    """How fast pictures are encoded."""

    def __init__(self, say: Say) -> None:
        self.say, self.began, self.done = say, time.perf_counter(), 0

    def of(self, shard: Shard, name: str) -> Shard:
        count, bad = shard.facts["rows"], len(shard.facts["skipped"])
        self.done += count + bad
        rate = self.done / (time.perf_counter() - self.began)
        skipped = f", {bad} cannot be read" if bad else ""
        self.say(f"{name}: {count:,} images{skipped}, {rate:.0f} images/s")
        return shard


# -- one shard -------------------------------------------------------------------------------------------------------


def _encoded(plan: Plan, items: list[int], pool: ThreadPoolExecutor) -> Shard:
    """The tensors of a shard, and the names of what cannot be read."""
    labels: list[int] = []
    skipped: list[str] = []
    sides: list[list[tuple[Tensor, Tensor]]] = [[] for _ in SIDES[: 1 + plan.settings.flip]]
    batch: list[tuple[int, np.ndarray]] = []

    def flush() -> None:
        if not batch:
            return
        pixels = torch.from_numpy(np.stack([image for _, image in batch])).permute(0, 3, 1, 2).contiguous()
        x = pixels.to(plan.device).float() / 127.5 - 1
        for flipped, side in enumerate(sides):
            mean, std = (part.half().cpu().contiguous() for part in plan.codec.encode(x.flip(-1) if flipped else x))
            if not bool((mean.isfinite() & std.isfinite()).all()):
                raise InputError(
                    f"the autoencoder gives infinite or undefined latents, for {plan.source.name(batch[0][0])} or one "
                    f"of the {len(batch) - 1} after it: --dtype float32"
                )
            side.append((mean, std))
        labels.extend(plan.source.labels[i] for i, _ in batch)
        batch.clear()

    for i, image in _read(plan, items, pool):
        if isinstance(image, BadPicture):
            if not plan.skip_bad:
                raise image
            skipped.append(plan.source.name(i))
            continue
        batch.append((i, image))
        if len(batch) == plan.batch_size:
            flush()
    flush()
    shape = plan.codec.latent_shape(plan.settings.size)
    tensors = {"label": torch.tensor(labels, dtype=torch.int64)}
    tensors |= {name: torch.zeros(shape, dtype=torch.float64) for name in ("sum", "square")}
    for names, side in zip(SIDES, sides, strict=False):
        for name, j in zip(names, (0, 1), strict=True):
            tensors[name] = torch.cat([pair[j] for pair in side]) if side else torch.empty(0, *shape).half()
        mean, std = (tensors[name].double() for name in names)
        tensors["sum"] += mean.sum(0) / len(sides)
        tensors["square"] += (mean.square() + std.square()).sum(0) / len(sides)
    return Shard(tensors, {"rows": len(labels), "skipped": skipped})


def _read(plan: Plan, items: list[int], pool: ThreadPoolExecutor) -> Iterator[tuple[int, np.ndarray | BadPicture]]:
    """The pictures in order, read and cropped ahead of time by the pool."""

    def one(i: int) -> np.ndarray | BadPicture:
        try:
            return picture(plan.source, i, plan.settings.size)
        except BadPicture as bad:
            return bad

    ahead: deque[tuple[int, Future[np.ndarray | BadPicture]]] = deque()
    try:
        for i in items:
            ahead.append((i, pool.submit(one, i)))
            if len(ahead) > 2 * plan.batch_size + plan.threads:
                place, future = ahead.popleft()
                yield place, future.result()
        while ahead:
            place, future = ahead.popleft()
            yield place, future.result()
    finally:
        for _, future in ahead:
            future.cancel()


# -- the directory ---------------------------------------------------------------------------------------------------


def _check_place(plan: Plan) -> None:
    """Make the directory, or refuse one that holds something else."""
    out, folder = plan.out, plan.out / ENCODING
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: give a directory")
        out.mkdir(parents=True, exist_ok=True)
        begun = read_plan(folder)
        if (out / INDEX).exists():
            held = read_index(out)["settings"]
        elif begun is not None:
            held = begun.settings
        else:  # shards whose index was damaged and deleted are made again
            held = vars(plan.settings)
            own = (p.name for p in out.iterdir() if not p.name.startswith(".") and not SHARD.fullmatch(p.name))
            others = sorted(name for name in own if name != ENCODING)
            if others:
                raise InputError(f"--out {out} holds other files ({others[0]}): give an empty directory")
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}; choose another directory") from error
    lines = [_named(line) for line in differences(held, vars(plan.settings))]
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
    entries = read_index(plan.out)["shards"]
    if all(is_whole(plan.out / entry["file"], entry, verify) for entry in entries):
        discard(plan.out / ENCODING)  # of a process that was killed after it wrote the index
        return False
    shards.folder.mkdir(exist_ok=True)
    names = [entry["file"].removesuffix(".safetensors") for entry in entries]
    for name, entry in zip(names, entries, strict=True):
        facts = {"rows": entry["examples"], "skipped": entry["skipped"], "span": [0.0, 0.0]}
        shards.vouch(name, ShardEntry(entry["sha256"], entry["bytes"], facts))
    shards.begin(names, plan.settings.shard_size, vars(plan.settings))
    (plan.out / INDEX).unlink(missing_ok=True)
    return True


def _drop_damaged(shards: ShardFolder) -> None:
    """Withdraw the entries of shards whose hash is wrong."""
    for name in shards.names:
        entry = shards.entry(name)
        if entry is not None and not is_whole(shards.tensors_of(name), entry._asdict(), by_hash=True):
            shards.vouch(name, None)


def _index(plan: Plan, shards: ShardFolder, described: dict[str, Any]) -> dict[str, Any]:
    """latents.json."""
    entries = []
    for name in shards.names:
        entry = shards.entry(name)
        assert entry is not None, "work returns where all shards are there"
        held = {"file": f"{name}.safetensors", "examples": entry.facts["rows"], "bytes": entry.bytes}
        entries.append({**held, "sha256": entry.sha256, "skipped": entry.facts["skipped"]})
    if not any(entry["examples"] for entry in entries):
        first = shards.folder / f"{shards.names[0]}.json"
        raise InputError(f"none of the pictures could be read: see {first} for their names")
    return {
        "schema": SCHEMA,
        **described,
        "settings": vars(plan.settings),
        "event_shape": list(plan.codec.latent_shape(plan.settings.size)),
        "examples": sum(entry["examples"] for entry in entries),
        "classes": list(plan.source.class_names),
        "skipped": sum(len(entry["skipped"]) for entry in entries),
        **_moments([shards.tensors_of(name) for name in shards.names]),
        "shards": entries,
    }


def _moments(files: list[Path]) -> dict[str, float]:
    """Mean and spread over pictures and coordinates, of what is drawn."""
    total = square = 0.0
    count = 0
    for file in files:
        with safetensors.safe_open(file, "pt") as opened:
            total += float(opened.get_tensor("sum").sum())
            square += float(opened.get_tensor("square").sum())
            count += opened.get_slice("label").get_shape()[0] * opened.get_tensor("sum").numel()
    mean = total / count if count else 0.0
    return {"mean": mean, "std": max(0.0, square / count - mean**2) ** 0.5 if count else 0.0}
