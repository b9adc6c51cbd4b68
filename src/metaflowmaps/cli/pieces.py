"""A request whose work is cut into pieces: claim a directory with others, make what is missing, put it together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from metaflowmaps.cli.context import Results
from metaflowmaps.cli.results import Request, read_json, release
from metaflowmaps.work.shards import SHARD, Elsewhere, Made, Pieces, Share, discard, ranges, read_plan, total_cost

WHOLE = 4096  # samples at a time where nobody shares the work


class Broken(Exception):
    """A shard that was not finished: what there is of it, and why."""

    def __init__(self, made: Made, why: BaseException) -> None:
        super().__init__(str(why))
        self.made, self.why = made, why


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
    make: Callable[[slice], Made]
    finish: Callable[[Made], Results]
    keep: Callable[[dict[str, torch.Tensor]], None] | None = None


def draw(request: Request, drawing: Drawing) -> Results:
    """Make all the samples of a drawing, or this worker's share of them."""
    share = request.context.share
    place = request.context.out or request.out
    in_one = share.worker is None and drawing.count <= (share.size or drawing.size)
    alone = in_one and read_plan(place / "shards") is None
    with shared_claim(request, "shards", shared=not alone) as (done, pieces):
        if done is not None:
            return done
        size = pieces.size(share, drawing.size)
        parts = ranges(drawing.count, size)
        pieces.begin(list(parts), size)
        try:
            pieces.work(lambda name: drawing.make(parts[name]))
        except Elsewhere as left:
            return elsewhere(request, pieces, left)
        except Broken as broken:
            if drawing.keep is not None and share.worker is None:
                found = [*filter(None, map(pieces.read, parts)), broken.made]
                found = [part for part in found if part.facts["rows"]]
                if found:
                    drawing.keep(joined(found))
            raise broken.why from None
        made = [pieces.get(name, lambda name: drawing.make(parts[name])) for name in parts]
        results = drawing.finish(Made(joined(made), {"cost": total_cost([part.facts for part in made])}))
        discard(pieces.folder)
    return results


@contextmanager
def shared_claim(
    request: Request,
    folder: str,
    complete: Callable[[Results], bool] = lambda results: True,
    shared: bool = True,
) -> Iterator[tuple[Results | None, Pieces]]:
    """The results, if the request is complete, and its pieces; other processes may claim it for the very same."""
    done = request.begin(shared)
    out = request.out

    def finished() -> bool:
        return (out / "results.json").exists() and complete(read_json(out / "results.json"))

    def say(line: str) -> None:
        request.context.say(f"{request.command}: {line}")

    pieces = Pieces(out / folder, request.context.share.worker, finished, say)
    try:
        if done is not None and complete(done):
            discard(pieces.folder)
            yield done, pieces
        else:
            yield None, pieces
    finally:
        pieces.close()
        release(out)


def usual_size(share: Share, unit: int = 1, copies: int = 1) -> int:
    """Samples a shard where nobody says: so many whole systems of ``unit`` particles, of ``copies`` rows a sample."""
    most = SHARD if share.worker is not None else max(SHARD, WHOLE // copies)
    return max(1, most // unit) * unit


def elsewhere(request: Request, pieces: Pieces, left: Elsewhere) -> Results:
    """What a worker returns that does not put things together: the results, if others have, or how far they are."""
    if pieces.finished():
        discard(pieces.folder)
        return request.told(read_json(request.out / "results.json"))
    pieces.say(
        "another process is putting the shards together"
        if left.missing == 0
        else f"{left.missing} of {left.pieces} shards are still missing: they are other workers'; to make them here, "
        "run the command without --worker"
    )
    return {"metrics": {"shards": left.pieces, "missing": left.missing}}


def joined(parts: Sequence[Made]) -> dict[str, torch.Tensor]:
    """Tensors of several pieces: rows one after another; what is called mean.… averaged, by number of samples."""
    total = sum(part.facts["rows"] for part in parts)
    return {
        key: torch.stack([part.tensors[key] * (part.facts["rows"] / total) for part in parts]).sum(0)
        if key.startswith("mean.")
        else torch.cat([part.tensors[key] for part in parts])
        for key in parts[0].tensors
    }
