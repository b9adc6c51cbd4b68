"""A story in pictures, which the report lets a reader turn: draws for noisy pictures over t, steered samples by method.

A run tells it by ``metrics["story"]`` and the pictures beside it in ``story.safetensors``, uint8 (…, C, H, W) with
C = 1 or 3: ``noisy`` (times, k, …), ``draws`` (times, k, m, …) and ``steered.i.j`` (n, …), of method j for reward i.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from metaflowmaps._files import read_regular, write_tensors
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.results import Metrics, Number, ResultView
from metaflowmaps.random import RowNoise, fresh_seeds, randn, stream

FILE = "story.safetensors"
TIMES = (*(i / 10 for i in range(10)), 0.97)  # of the posterior
NOISY, DRAWS = 5, 8  # pictures, and draws for each
MAX_STORY_BYTES = 2**26
MAX_PICTURES = 4096  # in a page that opens at once
MAX_SIDE_PIXELS = 512


class Posterior(ResultView):
    """Draws for the same noisy pictures at several times.

    Args:
        sentence: what is seen.
        times: t of each panel, ascending.
        seeds: of the draws, the same at every time; none where they have none of their own.
    """

    sentence: str
    times: tuple[float, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = ()


class SteeredBy(ResultView):
    """Samples of one method, and what a sample of it is worth and costs.

    Args:
        title: what the method is called.
        method: its name among methods, for the glossary; "" for what is none.
        rewards: of each picture.
        seeds: of each picture; none where they have none of their own.
        reward: mean of all samples, shown or not.
        diversity: mean distance of two samples.
        evaluations: of networks and reward, a sample.
        seconds: a sample.
    """

    title: str
    method: str = ""
    rewards: tuple[Number, ...]
    seeds: tuple[int, ...] = ()
    reward: Number
    diversity: Number
    evaluations: Number
    seconds: Number


class Steered(ResultView):
    """What one reward makes of samples, by method.

    Args:
        wanted: what the reward says, in the words of a person.
        sentence: what is seen.
        methods: in the order of the table.
        first: which of them is shown first.
    """

    wanted: str
    sentence: str
    methods: tuple[SteeredBy, ...] = Field(min_length=1)
    first: int = 0


class Story(ResultView):
    """Both parts; a story may lack one."""

    posterior: Posterior | None = None
    steered: tuple[Steered, ...] = ()


@torch.no_grad()
def noised_and_drawn(
    model: MetaFlowMap, images: Tensor, seed: int, sentence: str
) -> tuple[Posterior, dict[str, Tensor]]:
    """A posterior and its pictures: each image under the same noise at every time, and draws for it.

    Args:
        model: the map.
        images: (k, C, H, W).
        seed: of the noise, and of the draws' own seeds, which are the same at every time.
        sentence: what is seen.

    Returns:
        What is told, with noisy (times, k, C, H, W) and draws (times, k, m, C, H, W).
    """
    g = stream(seed, "turned")
    seeds, noise = fresh_seeds(DRAWS, g), randn(tuple(images.shape), g, model.dtype, model.device)
    own = RowNoise(seeds.to(model.device), "posterior").normal(model.event_shape, dtype=model.dtype)
    noisy = torch.stack([model.path.interpolate(noise, images, t) for t in TIMES])
    start = own.repeat(len(images), *(1 for _ in model.event_shape))
    rows = noisy.repeat_interleave(len(seeds), 1)
    draws = torch.stack([model.push(start, t, x_t) for t, x_t in zip(TIMES, rows, strict=True)])
    told = Posterior(sentence=sentence, times=TIMES, seeds=tuple(seeds.tolist()))
    return told, {"noisy": noisy, "draws": draws.unflatten(1, (len(images), len(seeds)))}


def as_bytes(x: Tensor) -> Tensor:
    """Pictures in [−1, 1] as uint8; what is outside, as in a noisy state, is clipped, and what is no number is grey."""
    return ((x.detach().float().cpu().nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def keep_story(story: Story, pictures: Mapping[str, Tensor], out: Path) -> Json:
    """Write the pictures, in [−1, 1]; the value of ``metrics["story"]``.

    Args:
        story: what is told.
        pictures: by the names that the module's description gives.
        out: the run's directory.
    """
    kept = {name: as_bytes(x) for name, x in pictures.items()}
    _check(story, kept)
    write_tensors(out / FILE, kept)
    return story.model_dump()


def read_story(metrics: Metrics, directory: Path) -> tuple[Story, dict[str, Tensor]] | None:
    """The story of a run and its pictures; None where it tells none."""
    told = metrics.get("story")
    if told is None:
        return None
    story = Story.of(told)
    try:
        pictures = load(read_regular(directory / FILE, MAX_STORY_BYTES))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"its pictures in {FILE} cannot be read: {type(error).__name__}") from None
    _check(story, pictures)
    return story, pictures


def _check(story: Story, pictures: Mapping[str, Tensor]) -> None:
    """Refuse pictures that are not those of the story."""
    leading: dict[str, tuple[int | None, ...]] = {}
    if story.posterior is not None:
        times, seeds = len(story.posterior.times), len(story.posterior.seeds) or None
        leading |= {"noisy": (times, None), "draws": (times, None, seeds)}
    for i, steered in enumerate(story.steered):
        if not 0 <= steered.first < len(steered.methods):
            raise InputError(
                f"story.steered.{i}.first is {steered.first}, and there are {len(steered.methods)} methods"
            )
        for j, method in enumerate(steered.methods):
            if method.seeds and len(method.seeds) != len(method.rewards):
                raise InputError(f"story.steered.{i}.methods.{j} has not as many seeds as rewards")
            leading[f"steered.{i}.{j}"] = (len(method.rewards),)
    for name, sizes in leading.items():
        x = pictures.get(name)
        if x is None or x.dtype != torch.uint8 or x.ndim != len(sizes) + 3 or not x.numel():
            raise InputError(f"{name} of {FILE} must be uint8 pictures with {len(sizes)} dimensions before C, H, W")
        if any(wanted not in (None, size) for wanted, size in zip(sizes, x.shape, strict=False)):
            raise InputError(f"{name} of {FILE} is {tuple(x.shape)}, and the story tells of {sizes}")
        if x.shape[-3] not in (1, 3) or max(x.shape[-2:]) > MAX_SIDE_PIXELS:
            raise InputError(f"{name} of {FILE} must have 1 or 3 channels and sides of at most {MAX_SIDE_PIXELS}")
    if {"noisy", "draws"} <= leading.keys() and pictures["noisy"].shape[1] != pictures["draws"].shape[1]:
        raise InputError(f"noisy and draws of {FILE} are of different numbers of pictures")
    if sum(pictures[name].shape[:-3].numel() for name in leading) > MAX_PICTURES:
        raise InputError(f"a story has at most {MAX_PICTURES} pictures")
