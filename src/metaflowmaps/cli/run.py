"""Run a recipe on a map: steering, posterior, value, FID, fine-tuning at ImageNet scale."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.cli.context import COMPUTES, Argument, Context, Name, Options, Results
from metaflowmaps.cli.evaluate import measure_images
from metaflowmaps.cli.finetune import Finetune, choose_subject, tune
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.lab.evaluate.images.experiments import EXPERIMENTS
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.evaluate.tuning_run import about
from metaflowmaps.lab.imagenet_tasks import TaskConfig, task
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.networks import DiT, DiTConfig, NetworkConfig, read_network
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.recipes.imagenet import LATENTS, SCALES
from metaflowmaps.training.plan import bytes_of_training, count
from metaflowmaps.work.config import merged, override

XL2 = DiTConfig(**SIZES["XL"], num_classes=1000, guidance=SCALES)
PASSES = 3  # forward passes that an evaluation costs with its gradient


class RunTask(Options):
    """Which recipe, on which map."""

    shared = (*COMPUTES, "resume")

    task: Annotated[str, Argument("TASK")] = Field(description="A recipe that needs a map: see mfm recipes.")
    checkpoint: Annotated[str | None, Argument("[CHECKPOINT]")] = Field(
        None, description="The map: a run, a checkpoint or a hub id; MFM-XL/2, where --dry-run counts without one."
    )
    fast: bool = Field(False, description="A fraction of the time, less exact.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting of the recipe: key.sub=value (repeatable)."
    )


def run(config: RunTask, context: Context) -> Results:
    """What the recipe's command returns."""
    if context.dry_run:
        return plan_task(config, context)
    if config.checkpoint is None:
        raise InputError(f"which map? mfm run {config.task} CHECKPOINT, or --dry-run to count without one")
    given = _resolved(config, context)
    if not isinstance(given, FinetuneConfig):
        return measure_images(_experiment(given), config.checkpoint, given, context)
    opened = OpenedModel.open(config.checkpoint, context.device)
    asked = Finetune(checkpoint=config.checkpoint, reward=given.reward, strength=given.strength, data=given.data_moved)
    subject, chosen = choose_subject(opened, asked)
    return tune(subject, merged(given, about(subject, chosen.name, chosen.sha256)), context)


def plan_task(config: RunTask, context: Context) -> Results:
    """Parameters, bytes of weights and calls of the map's own; of MFM-XL/2 where no checkpoint is given.

    Nothing is run, and the autoencoder and the reward come on top: their sizes are not known before they are there.
    """
    given, network = _resolved(config, context), on_meta(*_network(config.checkpoint))
    assert isinstance(network, DiT)
    if isinstance(given, FinetuneConfig):
        memory, calls = bytes_of_training(network, given), _calls(given)
        memory["base"] = memory["weights"]
    else:
        memory, calls = {"weights": 4 * count(network)}, float(given.calls())
    flops = forward_flops(network)
    metrics = {
        "parameters": count(network),
        "parameters_of_parent": network.parameters_of_parent(),
        "memory_bytes": sum(memory.values()),
        **{f"memory_{part}_bytes": size for part, size in memory.items()},
        "calls": calls,
        "gflops_per_call": flops / 1e9,
        "pflops": calls * flops / 1e15,
        "not_measured": "a map, a decoder and a reward are needed to time it: run it with --fast",
    }
    return context.plan(config.task, given.model_dump(), metrics)


def _resolved(config: RunTask, context: Context) -> TaskConfig:
    """The recipe with --set and --seed."""
    seed = () if context.seed is None else (f"seed={context.seed}",)
    return override(task(config.task, config.fast), [*config.settings, *seed])


def _experiment(config: ImageEvalConfig) -> str:
    """The experiment that a configuration is of."""
    return next(name for name, experiment in EXPERIMENTS.items() if experiment.config is type(config))


def _calls(config: FinetuneConfig) -> float:
    """A tuning's evaluations.

    A row of the first stage costs what its method says; a row of the second the map's two differentiated calls and one
    of the tuned drift.
    """
    method, steps = config.method, config.steps
    pools = method.pool_evaluations(steps) + (config.states.evaluations() if method.needs_states else 0)
    first = pools + steps * config.batch_size * method.evaluations()
    second = config.distil.steps * config.distil.batch_size * (2 * PASSES + 1)
    second += config.distil.pool * config.distil.pool_steps
    return float(first + (second if config.map == "distil" else 0))


def _network(checkpoint: str | None) -> tuple[NetworkConfig, tuple[int, ...]]:
    if checkpoint is None:
        return XL2, LATENTS
    config, shape = read_network(resolve_checkpoint(checkpoint).config["network"])
    if not isinstance(config, DiTConfig):
        raise InputError(f"{checkpoint} is no map of the ImageNet family: give one that mfm convert made")
    return config, shape
