"""mfm run: a recipe that needs a map, on a checkpoint; and what it would take, without one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.commands.finetune import Subject, default_place, finetune, resolve_finetuning
from metaflowmaps.commands.images import EXPERIMENTS, evaluate_images
from metaflowmaps.commands.shared import Results, Say
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig
from metaflowmaps.networks import DiT, DiTConfig, NetworkConfig, read_network
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.recipes import task
from metaflowmaps.recipes.imagenet import LATENTS, SCALES
from metaflowmaps.training.plan import bytes_of_training, count
from metaflowmaps.work.config import override, validated

XL2 = DiTConfig(**SIZES["XL"], num_classes=1000, guidance=SCALES), LATENTS
PASSES = 3  # forward passes that an evaluation costs with its gradient


def run_task(
    name: str,
    checkpoint: str,
    out: Path | None,
    settings: Iterable[str],
    seed: int | None,
    device: str,
    fast: bool,
    resume: str,
    invocation: str,
    say: Say,
) -> Results:
    """The recipe on a checkpoint, its settings first and the user's after them."""
    known, given = task(name, fast), list(settings)
    if known.command != "finetune":
        own = [*known.settings, *given]
        return evaluate_images(known.command, checkpoint, out, own, seed or 0, device, invocation, say)
    options = dict(known.options)
    for key in ("reward", "strength", "guidance"):
        said = next((s.partition("=")[2] for s in reversed(given) if s.startswith(f"{key}=")), None)
        if said is not None:
            options[key] = said if key == "reward" else _number(key, said)
            given = [s for s in given if not s.startswith(f"{key}=")]
    subject = Subject(checkpoint, options["reward"], options["strength"], None, device)
    asked = {"guidance": options["guidance"], **({} if seed is None else {"seed": seed})}
    config = resolve_finetuning(subject, asked, [*known.settings, *given], None)
    return finetune(subject, config, out or default_place(subject, checkpoint), resume, invocation, say)


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--set {key}={text}: give a number") from None


def plan_task(name: str, checkpoint: str | None, settings: Iterable[str], fast: bool) -> Results:
    """Parameters, bytes of weights and calls of the map's own; of MFM-XL/2 where no checkpoint is given.

    Nothing is run, and the autoencoder and the reward come on top: their sizes are not known before they are there.
    """
    known, network = task(name, fast), on_meta(*(XL2 if checkpoint is None else _network(checkpoint)))
    assert isinstance(network, DiT)
    if known.command == "finetune":
        tuning, calls = _tuning(known.settings, settings, known.options)
        memory = bytes_of_training(network, tuning)
        memory["base"] = memory["weights"]
        dumped = tuning.model_dump()
    else:
        experiment = EXPERIMENTS[known.command]
        config = override(validated(experiment.config, {}), [*known.settings, *settings])
        assert isinstance(config, ImageEvalConfig)
        dumped, calls, memory = config.model_dump(), float(config.calls()), {"weights": 4 * count(network)}
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
    return {"schema": 1, "command": name, "dry_run": True, "config": dumped, "metrics": metrics, "cost": {}}


def _tuning(own: tuple[str, ...], settings: Iterable[str], options: dict[str, Any]) -> tuple[FinetuneConfig, float]:
    """A fine-tuning's configuration and evaluations.

    A row of the first stage costs what its method says; a row of the second the map's two differentiated calls and one
    of the tuned drift.
    """
    start = {"checkpoint": "MFM-XL/2", "checkpoint_sha256": "", **options}
    config = override(validated(FinetuneConfig, start), [*own, *(s for s in settings if not s.startswith("data="))])
    first = config.states.evaluations() + config.steps * config.batch_size * config.method.evaluations()
    second = config.distil.steps * config.distil.batch_size * (2 * PASSES + 1)
    second += config.distil.pool * config.distil.pool_steps
    return config, float(first + (second if config.map == "distil" else 0))


def _network(checkpoint: str) -> tuple[NetworkConfig, tuple[int, ...]]:
    config, shape = read_network(resolve_checkpoint(checkpoint).config["network"])
    if not isinstance(config, DiTConfig):
        raise InputError(f"{checkpoint} is no map of the ImageNet family: give one that mfm convert made")
    return config, shape
