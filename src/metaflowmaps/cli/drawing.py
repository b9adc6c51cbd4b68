"""Commands that draw samples: their options, and a request whose work is cut into shards.

Several processes may claim a request's directory, make what is missing, and one puts it together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.cli.context import IN_SHARDS, Context, OnCheckpoint, Results
from metaflowmaps.cli.results import Request
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.sample_pictures import ALL_CLASSES, PictureOptions, SamplePictures
from metaflowmaps.networks.compiling import Compile
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.sample_files import write_samples
from metaflowmaps.work.claims import read_json, release
from metaflowmaps.work.shards import (
    Shard,
    ShardFolder,
    ShardInterrupted,
    Unfinished,
    discard,
    joined,
    ranges,
    read_plan,
    total_cost,
)

SAMPLES = 1024  # where nobody says how many
COMPILE: dict[str, Compile] = {"auto": "auto", "true": True, "false": False}
Tensors = dict[str, Tensor]


class ConditionOptions(OnCheckpoint):
    """What samples are told, and what their networks compute in."""

    label: str | None = Field(None, description="Class, by number or name; all: the classes in turn.")
    guidance: float | None = Field(None, description="Scale w of class guidance, of maps that know it.")
    vae: str | None = Field(None, description="Autoencoder of latents: a folder or hub id, where not known.")
    precision: Literal["float32", "bf16"] = Field("float32", description="What the networks compute in.")
    compile: Literal["auto", "true", "false"] = Field(
        "auto", description="Networks by torch.compile; auto: on CUDA, where that computes what is written."
    )

    def pictures(self, opened: OpenedModel, num: int, each: bool = False) -> SamplePictures:
        """What ``num`` samples of a map are told, and their pictures."""
        half, compiled = self.precision == "bf16", COMPILE[self.compile]
        options = PictureOptions(self.label, self.guidance, self.vae, half, compiled, each)
        return SamplePictures(opened, options, num)

    def identity(self, pictures: SamplePictures, **known: Any) -> Results:
        """What tells a request from others: the options, with checkpoint and class as they are resolved."""
        dumped = self.model_dump(mode="json")
        if pictures.labels is not None and self.label != ALL_CLASSES:
            dumped["label"] = int(pictures.labels[0])
        return {**dumped, "checkpoint": pictures.opened.digest, **known}


class DrawingOptions(ConditionOptions):
    """What sample, posterior and steer have in common."""

    shared = IN_SHARDS

    images: bool = Field(False, description="Write every sample as a PNG too.")
    format: Literal["safetensors", "npz", "png"] = Field(
        "safetensors", description="Of the file of samples: safetensors or npz; png: safetensors, and --images."
    )
    only: tuple[int, ...] = Field((), description="Make the sample with this saved seed again (repeatable).")

    def count(self, num: int | None) -> int:
        """How many samples: ``num``, or as many as ``only`` names."""
        if any(not 0 <= seed < 2**63 for seed in self.only):
            raise InputError(f"--only takes saved seeds, from 0 to {2**63 - 1}, got {min(self.only)}")
        if self.only and num is not None and num != len(self.only):
            raise InputError(f"--only names {len(self.only)} samples and --num asks for {num}: leave --num out")
        return len(self.only) or num or SAMPLES

    def open(self, context: Context, num: int, needs_map: bool = True) -> SamplePictures:
        """The map, what ``num`` samples of it are told, and their pictures."""
        opened, each = OpenedModel.open(self.checkpoint, context.device, needs_map), self.format == "png"
        if each and not opened.is_pictorial:
            raise InputError(
                f"--format png is for pictures, and samples of {self.checkpoint} have the shape "
                f"{opened.model.event_shape}: give --format npz or safetensors"
            )
        return self.pictures(opened, num, each or self.images)

    def write(self, folder: Path, name: str, tensors: Tensors) -> None:
        """Write a file of samples in the format that was asked for."""
        write_samples(folder, name, tensors, "npz" if self.format == "npz" else "safetensors")

    def by_seed(
        self, pictures: SamplePictures, name: str, points: Callable[[Tensor, Cond], Tensor], seed: int, role: str
    ) -> Callable[[slice], Shard]:
        """What makes the samples of a range.

        Args:
            pictures: the map, and what its samples are told.
            name: what the samples are called in the file.
            points: seeds (n,) and their condition -> samples (n, *event).
            seed: of all samples,
            role: and what their own seeds are for, unless ``only`` names them.
        """
        seeds = torch.tensor(self.only) if self.only else fresh_seeds(pictures.num, stream(seed, role))

        @torch.no_grad()
        def make(part: slice) -> Shard:
            own = seeds[part]
            with Meter(pictures.opened.model.network) as meter, pictures.autocast():
                x = points(own, pictures.rows(part))
            return Shard({name: x, "seeds": own}, {"cost": meter.cost(), "rows": len(own)})

        return make


@dataclass(frozen=True)
class Drawing:
    """All samples of a request as a function of ranges of indices.

    Args:
        command: what is asked for.
        identity: what tells it from others.
        calls: evaluations of the network, by the paper's count.
        size: samples a shard, unless told otherwise.
        make: the samples of a range.
        finish: writes all of them, and the results.
        keep: writes what there is where work that nobody shares breaks off.
        expected: seconds that it will take, by a probe; None where a probe does not tell.
    """

    command: str
    identity: Results
    calls: float
    size: int
    make: Callable[[slice], Shard]
    finish: Callable[[Request, Shard], Results]
    keep: Callable[[Request, Tensors], None] | None = None
    expected: Callable[[], float | None] = lambda: None


def draw(pictures: SamplePictures, drawing: Drawing, context: Context, folder: str | None = None) -> Results:
    """Make all the samples of a request, or this worker's share of them; the results lie in ``folder`` by default."""
    if context.dry_run:
        cost, seconds = pictures.opened.cost_of(drawing.calls), drawing.expected()
        if seconds is not None:
            cost["expected_seconds"] = seconds
        return context.plan(drawing.command, drawing.identity, cost)
    request = Request(context, drawing.command, drawing.identity, pictures.opened.beside(folder or drawing.command))
    share = context.share
    in_one = share.worker is None and pictures.num <= (share.size or drawing.size)
    alone = in_one and read_plan((context.out or request.out) / "shards") is None
    with shared_claim(request, "shards", shared=not alone) as (done, shards):
        if done is not None:
            return done
        pictures.settle()  # what is missing is said before the work
        told = pictures.pipe.use_compiled()
        if told is not None:
            context.say(f"network: {told}")
        size = shards.size(share, drawing.size)
        parts = ranges(pictures.num, size)
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
                    drawing.keep(request, joined(kept))
            raise interrupted.cause from None
        drawn = [shards.get(name, lambda name: drawing.make(parts[name])) for name in parts]
        whole = Shard(joined(drawn), {"cost": total_cost([shard.facts for shard in drawn])})
        results = drawing.finish(request, whole)
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
