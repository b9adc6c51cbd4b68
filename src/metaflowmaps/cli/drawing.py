"""A request whose work is cut into shards: claim a directory with others, make what is missing, put it together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from metaflowmaps.cli.context import Results
from metaflowmaps.cli.results import Request
from metaflowmaps.work.claims import read_json, release
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


@dataclass(frozen=True)
class Drawing:
    """Samples 0 to count − 1 as a function of ranges of indices.

    Args:
        count: how many samples.
        size: samples a shard, unless told otherwise.
        make: the samples of a range.
        finish: writes all of them, and the results.
        keep: writes what there is where work that nobody shares breaks off.
    """

    count: int
    size: int
    make: Callable[[slice], Shard]
    finish: Callable[[Shard], Results]
    keep: Callable[[dict[str, torch.Tensor]], None] | None = None


def draw(request: Request, drawing: Drawing) -> Results:
    """Make all the samples of a drawing, or this worker's share of them."""
    share = request.context.share
    place = request.context.out or request.out
    in_one = share.worker is None and drawing.count <= (share.size or drawing.size)
    alone = in_one and read_plan(place / "shards") is None
    with shared_claim(request, "shards", shared=not alone) as (done, shards):
        if done is not None:
            return done
        size = shards.size(share, drawing.size)
        parts = ranges(drawing.count, size)
        shards.begin(list(parts), size)
        try:
            shards.work(lambda name: drawing.make(parts[name]))
        except Unfinished as left:
            return left_to_others(request, shards, left)
        except ShardInterrupted as interrupted:
            if drawing.keep is not None and share.worker is None:
                kept = [*filter(None, map(shards.read, parts)), interrupted.shard]
                kept = [shard for shard in kept if shard.facts["rows"]]
                if kept:
                    drawing.keep(joined(kept))
            raise interrupted.cause from None
        drawn = [shards.get(name, lambda name: drawing.make(parts[name])) for name in parts]
        results = drawing.finish(Shard(joined(drawn), {"cost": total_cost([shard.facts for shard in drawn])}))
        discard(shards.folder)
    return results


@contextmanager
def shared_claim(
    request: Request,
    folder: str,
    complete: Callable[[Results], bool] = lambda results: True,
    shared: bool = True,
) -> Iterator[tuple[Results | None, ShardFolder]]:
    """The results, if the request is complete, and its shards; other processes may claim it for the very same."""
    done = request.begin(shared)
    out = request.out

    def finished() -> bool:
        return (out / "results.json").exists() and complete(read_json(out / "results.json"))

    def say(line: str) -> None:
        request.context.say(f"{request.command}: {line}")

    shards = ShardFolder(out / folder, request.context.share.worker, finished, say)
    try:
        if done is not None and complete(done):
            discard(shards.folder)
            yield done, shards
        else:
            yield None, shards
    finally:
        shards.close()
        release(out)


def usual_size(share: Share, unit: int = 1, copies: int = 1) -> int:
    """Samples a shard where nobody says: so many whole systems of ``unit`` particles, of ``copies`` rows a sample."""
    most = SHARD_SIZE if share.worker is not None else max(SHARD_SIZE, WHOLE_SIZE // copies)
    return max(1, most // unit) * unit


def left_to_others(request: Request, shards: ShardFolder, left: Unfinished) -> Results:
    """What a worker returns that does not put things together: the results, if others have, or how far they are."""
    if shards.finished():
        discard(shards.folder)
        return request.told(read_json(request.out / "results.json"))
    shards.say(
        "another process is putting the shards together"
        if left.missing == 0
        else f"{left.missing} of {left.shards} shards are still missing: they are other workers'; to make them here, "
        "run the command without --worker"
    )
    return {"metrics": {"shards": left.shards, "missing": left.missing}}
