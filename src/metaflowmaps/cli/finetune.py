"""Put a reward into the weights: a map that samples p_1 e^{λr} without guidance. Run it again to go on."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import TRAINS, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.rewards import REWARD_HELP
from metaflowmaps.work import ranks

METHODS = "mfm-ft, self-normalised, adjoint-matching, draft, direct, or file.py:Name."


class Finetune(OnCheckpoint):
    """The reward, the method and what is tuned."""

    shared = TRAINS

    reward: str | None = Field(None, description=REWARD_HELP)
    strength: float = Field(1.0, description="λ: the reward is multiplied by it.")
    method: str = Field("mfm-ft", description=METHODS)
    map: str | None = Field(None, description="distil (another stage makes the tuned drift's map) or none.")
    num_draws: int | None = Field(None, ge=1, description="Posterior draws a state (N).")
    guidance: float = Field(1.0, description="Scale w of a base with classes, throughout.")
    vae: str | None = Field(None, description="Autoencoder of latents: a folder or hub id, where not known.")
    stop: str = Field("none", description='Stop early: "distance<2", "reward>5", "reward stalls 4".')
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting: key.sub=value (repeatable)."
    )


def run(config: Finetune, context: Context) -> Results:
    """A tuned map."""
    from metaflowmaps.commands import finetune as command

    ranks.alone("mfm finetune")
    given = {"method": config.method, "guidance": config.guidance, "stop": config.stop}
    more = {"map": config.map, "num_draws": config.num_draws, "seed": context.seed}
    given |= {k: v for k, v in more.items() if v is not None}
    moved = next((s.partition("=")[2] for s in config.settings if s.startswith("data=")), None)
    own = [s for s in config.settings if not s.startswith("data=")]
    subject = command.Subject(config.checkpoint, config.reward, config.strength, moved, context.device, config.vae)
    resolved = command.resolve_finetuning(subject, given, own, context.max_steps)
    if context.dry_run:
        return command.dry_run(subject, resolved)
    place = context.out or command.default_place(subject, config.checkpoint)
    return command.finetune(subject, resolved, place, context.resume, context.invocation, context.say)
