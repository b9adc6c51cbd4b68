"""From a diffusers pipeline, its folder or its hub id to one that steers."""

from typing import Any

import torch

from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers import Family, family_of
from metaflowmaps.prompted.call import Settings
from metaflowmaps.prompted.prompted_pipeline import PromptedPipeline
from metaflowmaps.work.choices import with_options


def from_diffusers(
    pipeline: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    family: type[Family] | None = None,
    quick_vae: Any = None,
    **options: Any,
) -> PromptedPipeline:
    """A diffusers pipeline that steers.

    Args:
        pipeline: a pipeline of diffusers, or the folder or hub id of one.
        dtype: what it computes in; states are float32 at any.
        device: where; leave it out for a pipeline that is offloaded.
        family: a class of your own, for a kind of pipeline that this package does not know.
        quick_vae: another autoencoder for the same latents, for rewards on the way.
        options: those of :class:`Settings`: ``batch_size``, ``micro_batch``, ``decoded_at_a_time``, ``glass_steps``,
            ``checkpointing``, ``progress``.

    Returns:
        The pipeline, in evaluation mode.

    Examples:
        >>> pipe = mfm.from_diffusers("stabilityai/stable-diffusion-3.5-medium", device="cuda")  # doctest: +SKIP
        >>> made = pipe.steer("a red fox", mfm.rewards.Ink(strength=50.0), mfm.DPS(), seed=0)  # doctest: +SKIP
        >>> made.images[0].save("fox.png")  # doctest: +SKIP
    """
    pipe = _opened(pipeline, dtype)
    if dtype is not None or device is not None:
        pipe.to(*(given for given in (device, dtype) if given is not None))
    _check_devices(pipe)
    return PromptedPipeline(family_of(pipe, family), quick_vae, with_options(Settings, options))


def _opened(pipeline: Any, dtype: torch.dtype | None) -> Any:
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise InputError("pipelines need diffusers: pip install 'metaflowmaps[latent]'") from None
    if isinstance(pipeline, DiffusionPipeline):
        return pipeline
    if not isinstance(pipeline, str) and not hasattr(pipeline, "__fspath__"):
        raise InputError(
            f"give a pipeline of diffusers, or its folder or hub id, got {type(pipeline).__name__}; a network alone is "
            "wrapped by mfm.wrap"
        )
    try:
        return DiffusionPipeline.from_pretrained(pipeline, torch_dtype=dtype)
    except Exception as error:  # the hub, the disk and the parsers have many kinds
        reason = " ".join(str(error).split())[:160]
        fix = "give a folder in diffusers' layout or a hub id"
        if isinstance(error, ImportError):  # text encoders need more than diffusers asks for
            fix = "pip install 'metaflowmaps[latent,rewards]' brings diffusers and transformers"
        kind = type(error).__name__
        raise InputError(f"the pipeline {pipeline} cannot be loaded ({kind}: {reason}): {fix}") from error


def _check_devices(pipe: Any) -> None:
    """Parts that are not offloaded are together."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    where = {name: str(part.device) for name, part in parts.items() if not hasattr(part, "_hf_hook")}
    if len(set(where.values())) > 1:
        told = ", ".join(f"{name} on {device}" for name, device in where.items())
        raise InputError(f"the pipeline is on several devices ({told}): move it with .to(device), or offload it")
