"""A command whose work is cut into shards: claim a directory with others, make what is missing, put it together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.commands.shared import Results, Say
from metaflowmaps.work.claims import claim, read_json, release
from metaflowmaps.work.shards import (
    SHARD_SIZE,
    Shard,
    ShardFolder,
    ShardInterrupted,
    Share,
    Unfinished,
    discard,
    joined,
    ranges,
    read_plan,
    total_cost,
)

WHOLE_SIZE = 4096  # samples at a time where nobody shares the work


@contextmanager
def shared_claim(
    out: Path,
    command: str,
    config: dict[str, Any],
    folder: str,
    share: Share,
    say: Say,
    complete: Callable[[Results], bool] = lambda results: True,
    shared: bool = True,
) -> Iterator[tuple[Results | None, ShardFolder]]:
    """The results, if ``out`` is complete, and its shards; other processes may claim it for the very same."""

    def finished() -> bool:
        return (out / "results.json").exists() and complete(read_json(out / "results.json"))

    shards = ShardFolder(out / folder, share.worker, finished, lambda line: say(f"{command}: {line}"))
    done = claim(out, command, config, shared=shared)
    try:
        if done is not None and complete(done):
            discard(shards.folder)
            yield {**done, "out": str(out / "results.json")}, shards
        else:
            yield None, shards
    finally:
        shards.close()
        release(out)


def usual_size(share: Share, unit: int = 1, copies: int = 1) -> int:
    """Samples a shard where nobody says: so many whole systems of ``unit`` particles, of ``copies`` rows a sample."""
    most = SHARD_SIZE if share.worker is not None else max(SHARD_SIZE, WHOLE_SIZE // copies)
    return max(1, most // unit) * unit


def left_to_others(out: Path, shards: ShardFolder, left: Unfinished) -> Results:
    """What a worker returns that does not put things together: the results, if others have, or how far they are."""
    if shards.finished():
        discard(shards.folder)
        return {**read_json(out / "results.json"), "out": str(out / "results.json")}
    shards.say(
        "another process is putting the shards together"
        if left.missing == 0
        else f"{left.missing} of {left.shards} shards are still missing: they are other workers'; to make them here, "
        "run the command without --worker"
    )
    return {"metrics": {"shards": left.shards, "missing": left.missing}}


def draw_in_shards(
    out: Path,
    command: str,
    config: dict[str, Any],
    count: int,
    share: Share,
    say: Say,
    size: int,
    make: Callable[[slice], Shard],
    finish: Callable[[Shard], Results],
    keep: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Results:
    """Samples 0 to count − 1, ``make`` of a range of indices at a time; ``finish`` writes all of them and the results.

    ``size``: samples a shard, unless told otherwise. ``keep``: writes what there is where work that nobody shares
    breaks off.
    """
    alone = share.worker is None and count <= (share.size or size) and read_plan(out / "shards") is None
    with shared_claim(out, command, config, "shards", share, say, shared=not alone) as (done, shards):
        if done is not None:
            return done
        size = shards.size(share, size)
        parts = ranges(count, size)
        shards.begin(list(parts), size)
        try:
            shards.work(lambda name: make(parts[name]))
        except Unfinished as left:
            return left_to_others(out, shards, left)
        except ShardInterrupted as interrupted:
            if keep is not None and share.worker is None:
                kept = [*filter(None, map(shards.read, parts)), interrupted.shard]
                kept = [shard for shard in kept if shard.facts["rows"]]
                if kept:
                    keep(joined(kept))
            raise interrupted.cause from None
        drawn = [shards.get(name, lambda name: make(parts[name])) for name in parts]
        results = finish(Shard(joined(drawn), {"cost": total_cost([shard.facts for shard in drawn])}))
        discard(shards.folder)
    return results
