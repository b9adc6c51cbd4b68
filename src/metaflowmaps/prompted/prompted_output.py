"""What a call of a prompted pipeline made."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PromptedOutput:
    """Pictures, as the call's ``output_type`` has them, and what they are made of and cost.

    Args:
        images: PIL images, an array or a tensor; of videos ``frames`` is the same.
        latents: the states (n, *event), as the pipeline's own ``output_type="latent"`` has them.
        prompts: the number of each sample's prompt.
        seeds: of each sample.
        cost: read off the meter.
        rewards: of steered samples, of the full decoder's pictures.
        info: what was seen on the way.
        interrupted: whether fewer were made than were asked for.
    """

    images: Any
    latents: Tensor
    prompts: Tensor
    seeds: Tensor
    cost: dict[str, float]
    rewards: Tensor | None = None
    info: dict[str, Tensor] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def frames(self) -> Any:
        """The images, by the name that pipelines for videos have for them."""
        return self.images
