"""Say which method to steer by, for a reward and a budget, from a pilot of a few thousand evaluations."""

import shlex

from pydantic import Field

from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import ConditionOptions
from metaflowmaps.cli.results import Request
from metaflowmaps.lab.named_rewards import REWARD_HELP, choose_reward
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.steering import advise
from metaflowmaps.steering.advise import BUDGET, PILOT
from metaflowmaps.steering.pilot import pilot_evaluations

PASSED_ON = (
    "reward",
    "strength",
    "label",
    "guidance",
    "vae",
    "precision",
    "compile",
    "data",
)  # options that mfm steer has too


class Advise(ConditionOptions):
    """The reward, the budget and how large the pilot may be."""

    reward: str | None = Field(None, description=REWARD_HELP)
    strength: float = Field(1.0, description="λ: the reward is multiplied by it.")
    budget: int = Field(BUDGET, ge=2, description="Evaluations a sample at most, of network and reward.")
    num: int = Field(1024, ge=1, description="How many samples are wanted.")
    pilot: int = Field(PILOT, ge=16, description="One-step samples of the pilot.")
    data: str | None = Field(None, description="Where the images are now that some rewards are made of.")

    def next_command(self, results: Results, folder: str) -> str:
        """What was recommended."""
        return str(results["metrics"]["command"])


def run(config: Advise, context: Context) -> Results:
    """A table of methods and one recommendation, with the line to type."""
    opened = OpenedModel.open(config.checkpoint, context.device)
    pictures, seed = config.pictures(opened, config.num), context.seed or 0
    chosen = choose_reward(config.reward, opened, config.strength, config.data)
    identity = config.identity(pictures, seed=seed, reward=chosen.name, reward_sha256=chosen.sha256)
    if context.dry_run:
        pool, cloud = pilot_evaluations(config.pilot)
        plan = {"pilot_evaluations": pool, "pilot_evaluations_where_the_reward_is_rare": pool + cloud}
        return context.plan("advise", identity, plan)
    request = Request(context, "advise", identity, opened.beside("advise"))
    if (done := request.begin()) is not None:
        return done
    with pictures.autocast():
        advice = advise(
            opened.model,
            pictures.on_samples(chosen.reward),
            config.budget,
            config.num,
            cond=pictures.cond,
            pilot=config.pilot,
            seed=seed,
        )
    rows = ["--batch-size", str(config.num * advice.method.copies)] if pictures.latent and advice.cloud else []
    command = advice.option.command(config.checkpoint, config.num, shlex.join([*_passed_on(config), *rows]))
    cost = {"evaluations": advice.pilot.evaluations, "seconds": advice.pilot.seconds}
    return request.write({**advice.to_json(), "command": command}, cost, opened.device)


def _passed_on(config: Advise) -> list[str]:
    """The options that the recommended command needs as well."""
    given = config.model_dump(include=set(PASSED_ON), exclude_defaults=True)
    return [word for name in PASSED_ON if name in given for word in (f"--{name}", str(given[name]))]
