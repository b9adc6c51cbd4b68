"""A call of a pipeline, made ready: from prompts, sizes and options to a model and the scheduler's times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers.family import Family, Request, Size, check_rows
from metaflowmaps.interop.diffusers.prompted_model import GLASS_STEPS, PromptedModel
from metaflowmaps.interop.diffusers.schedule import FollowedSchedule, follow

AT_A_TIME = 4  # samples, where nobody says
Texts = str | Sequence[str] | None


@dataclass(frozen=True)
class Settings:
    """How a pipeline computes: what bounds its memory, and what changes no sample.

    Args:
        batch_size: samples at a time.
        micro_batch: rows that the network is given at a time; None: all of them.
        decoded_at_a_time: rows that are decoded, and judged by their pictures, at a time.
        glass_steps: of draws, for methods that draw from the model.
        checkpointing: whether gradients recompute blocks of the network and the decoder instead of remembering them.
        progress: whether calls show a bar.
    """

    batch_size: int = AT_A_TIME
    micro_batch: int | None = None
    decoded_at_a_time: int = 1
    glass_steps: int = GLASS_STEPS
    checkpointing: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "decoded_at_a_time", "glass_steps"):
            check_count(getattr(self, name), name)
        if self.micro_batch is not None:
            check_count(self.micro_batch, "micro_batch")


@dataclass(frozen=True)
class Asked:
    """A call, made ready: the model, which prompt each sample has, and the scheduler's times."""

    model: PromptedModel
    schedule: FollowedSchedule
    prompts: Tensor  # (n,)
    each: int  # samples a prompt


def ask(family: Family, settings: Settings, prompt: Texts, steps: int, call: dict[str, Any]) -> Asked:
    """The call, encoded.

    Args:
        family: of the pipeline.
        settings: how it computes.
        prompt: texts; None where ``call`` has embeddings.
        steps: of the scheduler.
        call: the call's other arguments; those that are used are taken out.
    """
    check_count(steps, "num_inference_steps")
    each = call.pop("num_images_per_prompt", 1)
    check_count(each, "num_images_per_prompt")
    size = size_of(family, call.pop("height", None), call.pop("width", None), call.pop("num_frames", None))
    until = float(call.pop("guidance_until", 1.0))
    negative = call.pop("negative_prompt", None)
    given = {name: call.pop(name) for name in list(call) if name.removeprefix("negative_") in family.embeddings}
    options = family.settle(call)
    texts = _texts(prompt, "prompt")
    if (texts is None) == (not given):
        raise InputError("give either prompts or embeddings (prompt_embeds=…), one of the two")
    shape = event_shape(family, size)
    schedule = follow(family.pipe.scheduler, setting(family, steps, shape))
    positive, other = _encoded(family, texts, _texts(negative, "negative_prompt"), given, options)
    request = Request(positive, other, size, options, schedule.grid.times[:-1], until)
    model = PromptedModel(family, request, schedule, shape, settings.micro_batch, settings.glass_steps)
    return Asked(model, schedule, torch.arange(request.prompts).repeat_interleave(each), each)


def _encoded(
    family: Family,
    texts: list[str] | None,
    negative: list[str] | None,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[Any, Any]:
    """Rows of prompts, and of negative ones where guidance compares with them."""
    count = len(texts) if texts is not None else len(next(iter(given.values())))
    if negative is not None and len(negative) == 1:
        negative = negative * count
    if negative is not None and len(negative) != count:
        raise InputError(f"{len(negative)} negative prompts for {count} prompts: give one, or one a prompt")
    guided = family.needs_negative(options, negative is not None or family.negatives(given))
    if texts is None and guided and not family.negatives(given):
        name = f"negative_{next(iter(given))}"
        raise InputError(f"guidance compares with a negative prompt: give {name}=…, or a scale without guidance")
    given = {name: _moved(value, family.device) for name, value in given.items()}
    positive, other = family.encode(texts, negative, given, options)
    rows = check_rows(positive, "embeddings of prompts")
    if other is not None and check_rows(other, "embeddings of negative prompts") != rows:
        raise InputError(f"{rows} prompts and {check_rows(other, '')} negative ones: give one a prompt")
    return positive, other


def size_of(family: Family, height: int | None = None, width: int | None = None, frames: int | None = None) -> Size:
    """The size of what is made, the usual one where nobody says."""
    usual, multiple = family.usual_size(), family.multiple()
    size = Size(height or usual.height, width or usual.width, (frames or usual.frames) if family.video else 0)
    if frames and not family.video:
        raise InputError(f"{type(family.pipe).__name__} makes pictures: leave num_frames out")
    for name, pixels in (("height", size.height), ("width", size.width)):
        if pixels % multiple:
            raise InputError(f"{name} must be a multiple of {multiple} for this pipeline, got {pixels}")
    return size


def event_shape(family: Family, size: Size) -> tuple[int, ...]:
    """Of a state."""
    return tuple(family.noise(1, size, torch.Generator(family.device).manual_seed(0)).shape[1:])


def setting(family: Family, steps: int, shape: tuple[int, ...]) -> Callable[[Any], None]:
    """What sets a scheduler's times, as the pipeline does."""
    return lambda scheduler: family.set_timesteps(scheduler, steps, shape)


def _texts(given: Texts, name: str) -> list[str] | None:
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} is a text or a list of texts, got {given!r}")
    return texts


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return [_moved(row, device) for row in value]
    if not isinstance(value, Tensor):
        raise InputError(f"embeddings are tensors, one row a prompt, got {type(value).__name__}")
    return value.to(device)
