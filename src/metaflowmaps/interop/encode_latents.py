r"""Pictures in, latent shards out: resumable, shared among workers, the same bytes whoever does what.

Shard k holds pictures [k S, (k+1) S) of the source less those that cannot be read, so it depends on the source and the
settings alone. It is written under another name, synced and renamed; an entry with its hash, ``latents-00000.json``,
goes first, so a shard that is there is whole. Whoever finds all shards there joins the entries into ``latents.json``
and removes them. Until then ``encoding.json`` holds the settings, and other settings are refused.
"""

import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps.data.latents import CLAIM, INDEX, SCHEMA, SIDES, is_whole, read_index
from metaflowmaps.data.sources import BadPicture, Source, picture
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import Codec
from metaflowmaps.random import stream
from metaflowmaps.work.config import differences
from metaflowmaps.work.shards import Worker

SHARD = re.compile(r"latents-\d{5,}\.safetensors")
STALE = 3600.0  # seconds after which an unfinished file belongs to nobody: writing one takes a few
Say = Callable[[str], None]


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

    source: Source
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
    worker: Worker = Worker(0, 1),
    verify: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any] | None:
    """Make this worker's shards that are not there; the index once all are, else None.

    ``described`` goes into the index as it is. ``verify``: shards whose hash is wrong are made again.
    """
    _claim(plan.out, vars(plan.settings))
    chosen, each = plan.chosen, plan.settings.shard_size
    parts = [chosen[start : start + each] for start in range(0, len(chosen), each)]
    mine = [k for k in range(len(parts)) if k % worker.count == worker.index]
    before = _entries(plan.out, len(parts))
    wrong = {k for k in mine if k in before and not is_whole(plan.out / before[k]["file"], before[k], verify)}
    _sweep(plan.out)
    for k in sorted(wrong):
        say(f"{before[k]['file']} is missing or damaged: it is made again")
        (plan.out / before[k]["file"]).unlink(missing_ok=True)  # else its new entry could come to vouch for it
    todo = [k for k in mine if k not in before or k in wrong]
    began, done = time.perf_counter(), 0
    with ThreadPoolExecutor(plan.threads) as pool, _repeatable():
        for number, k in enumerate(todo, 1):
            entry = _write_shard(plan, k, parts[k], pool)
            done += len(parts[k])
            seconds = time.perf_counter() - began
            left = sum(len(parts[j]) for j in todo[number:]) * seconds / done
            bad = f", {len(entry['skipped'])} cannot be read" if entry["skipped"] else ""
            say(
                f"shard {number}/{len(todo)}: {done:,} images{bad}, {done / seconds:.0f} images/s, "
                f"{left / 60:.1f} min left" if left else f"shard {number}/{len(todo)}: {done:,} images{bad}"
            )  # fmt: skip
    return _finish(plan, len(parts), described)


# -- one shard -------------------------------------------------------------------------------------------------------


def _write_shard(plan: Plan, k: int, items: list[int], pool: ThreadPoolExecutor) -> dict[str, Any]:
    skipped: list[str] = []
    tensors, count = _encoded(plan, items, skipped, pool)
    data = safetensors.torch.save(tensors)
    file = f"{_stem(k)}.safetensors"
    entry = {
        "file": file,
        "examples": count,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "skipped": skipped,
    }
    write_whole(plan.out / f"{_stem(k)}.json", _json(entry))
    write_whole(plan.out / file, data)
    return entry


def _encoded(
    plan: Plan, items: list[int], skipped: list[str], pool: ThreadPoolExecutor
) -> tuple[dict[str, Tensor], int]:
    """The tensors of a shard; what cannot be read is appended to ``skipped``."""
    labels: list[int] = []
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
    return tensors, len(labels)


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


def _repeatable() -> Any:
    """The same kernels each time, on CUDA too."""
    return torch.backends.cudnn.flags(benchmark=False, deterministic=True)


# -- the directory ---------------------------------------------------------------------------------------------------


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Take the directory for these settings, or refuse one that holds others."""
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: give a directory")
        out.mkdir(parents=True, exist_ok=True)
        if (out / INDEX).exists():
            held = read_index(out)["settings"]
        elif (out / CLAIM).exists():
            held = _read_json(out / CLAIM)
        else:
            # shards whose index was damaged and deleted are made again
            others = [p.name for p in out.iterdir() if not p.name.startswith(".") and not SHARD.fullmatch(p.name)]
            if others:
                raise InputError(f"--out {out} holds other files ({others[0]}): give an empty directory")
            write_whole(out / CLAIM, _json(settings), replace=False)
            held = _read_json(out / CLAIM)  # of two who come at once, one wins
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}; choose another directory") from error
    lines = [_named(line) for line in differences(held, settings)]
    if lines:
        raise InputError(
            f"{out} holds latents made otherwise ({'; '.join(lines[:3])}): repeat its settings, or choose another --out"
        )


def _named(difference: str) -> str:
    """Hashes say nothing to a reader."""
    kind = difference.partition(":")[0]
    return {"source": "other pictures or classes", "vae": "another autoencoder"}.get(kind, difference)


def _entries(out: Path, shards: int) -> dict[int, dict[str, Any]]:
    """Of each shard that was finished, its entry: its own file's, or that of the index."""
    found: dict[int, dict[str, Any]] = {}
    for k in range(shards):
        with suppress(FileNotFoundError):
            if (out / f"{_stem(k)}.safetensors").exists():
                found[k] = _read_json(out / f"{_stem(k)}.json")
    if (out / INDEX).exists():  # looked at last: whoever writes it removes the others
        found = {**dict(enumerate(read_index(out)["shards"])), **found}
    return found


def _finish(plan: Plan, shards: int, described: dict[str, Any]) -> dict[str, Any] | None:
    """The index, written if all shards are there."""
    out = plan.out
    if (out / INDEX).exists() and not any(out.glob("latents-*.json")):
        return read_index(out)
    entries = _entries(out, shards)
    if len(entries) < shards or not all(is_whole(out / entry["file"], entry) for entry in entries.values()):
        return None
    if not any(entry["examples"] for entry in entries.values()):
        raise InputError(f"none of the pictures could be read: see {out / _stem(0)}.json for their names")
    index: dict[str, Any] = {
        "schema": SCHEMA,
        **described,
        "settings": vars(plan.settings),
        "event_shape": list(plan.codec.latent_shape(plan.settings.size)),
        "examples": sum(entries[k]["examples"] for k in range(shards)),
        "classes": list(plan.source.class_names),
        "skipped": sum(len(entries[k]["skipped"]) for k in range(shards)),
        **_moments([out / entries[k]["file"] for k in range(shards)]),
        "shards": [entries[k] for k in range(shards)],
    }
    write_whole(out / INDEX, _json(index))
    for k in range(shards):
        (out / f"{_stem(k)}.json").unlink(missing_ok=True)
    (out / CLAIM).unlink(missing_ok=True)
    return index


def _sweep(out: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for file in out.glob(".*.tmp"):
        with suppress(OSError):  # another worker may be at the same
            if time.time() - file.stat().st_mtime > STALE:
                file.unlink()


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


def _stem(k: int) -> str:
    return f"latents-{k:05d}"


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        held: Any = json.loads(file.read_text())
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{file} is damaged: delete it and run the same command again")
    return held
