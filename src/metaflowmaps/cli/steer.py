"""Sample with a reward; samples.safetensors holds samples, rewards, seeds. --set gives a method's own options."""

import sys
from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import Context, Name, Results
from metaflowmaps.cli.pictures import DrawingOptions
from metaflowmaps.cli.rewards import REWARD_HELP


class Steer(DrawingOptions):
    """The reward, the method and the process."""

    reward: str | None = Field(None, description=REWARD_HELP)
    strength: float = Field(1.0, description="λ: the reward is multiplied by it.")
    num: int | None = Field(None, ge=1, description="How many samples (1024).")
    method: str = Field("mfm-g", description="none, mfm-g, mfm-gf, mfm-search, mfm-smc, dps, tds, best-of-n, …")
    num_draws: int = Field(4, ge=1, description="Posterior draws a step (N).")
    steps: int = Field(250, ge=1, description="Steps of the time grid.")
    process: str = Field("ode", description="ode or sde.")
    renormalize: str = Field("none", description="none, clip or rescale.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="An option of the method or the process (repeatable)."
    )


def run(config: Steer, context: Context) -> Results:
    """Steered samples of a checkpoint."""
    from metaflowmaps.commands import steering
    from metaflowmaps.commands.scene import Wish

    return steering.steer(
        config.checkpoint, config.reward, config.strength, config.count(config.num), config.method, config.num_draws,
        config.steps, config.process, config.renormalize, config.settings, context.out, context.seed or 0,
        context.device, context.invocation, sys.stderr.isatty(), config.only, context.share, context.say,
        Wish(config.label, config.guidance, config.vae, config.precision, config.images),
    )  # fmt: skip
