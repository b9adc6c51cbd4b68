"""mfm run: a recipe that needs a map, on a checkpoint; and what it would take, without one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.commands.finetune import Subject, default_place, finetune, resolve_finetuning
from metaflowmaps.commands.images import EXPERIMENTS, evaluate_images
from metaflowmaps.commands.shared import Results, Say
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.config import FinetuneConfig
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig
from metaflowmaps.networks.dit import SIZES, DiT
from metaflowmaps.networks.flops import forward_flops
from metaflowmaps.recipes import task
from metaflowmaps.recipes.imagenet import LATENTS, SCALES
from metaflowmaps.training.plan import GIB, bytes_of_training, gpu_named, kept_bytes
from metaflowmaps.work.config import override, validated

XL2: dict[str, Any] = {
    **SIZES["XL"], "channels": LATENTS[0], "size": LATENTS[1], "patch": 2, "num_classes": 1000, "guidance": SCALES,
    "mlp_ratio": 4.0,
}  # fmt: skip
ROWS = 64  # evaluated at a time without a gradient
PASSES = 3  # forward passes that an evaluation costs with its gradient
BESIDE = 8.0 * GIB  # assumed for a decoder and a reward of CLIP-H's size, with a micro-batch of each


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


def plan_task(
    name: str, checkpoint: str | None, settings: Iterable[str], fast: bool, gpu: str, gpus: int, mfu: float = 0.4
) -> Results:
    """Parameters, memory, calls and hours of the map's own calls; of MFM-XL/2 where no checkpoint is given.

    What the autoencoder and the reward take comes on top: their sizes are not known before they are there.
    """
    known, machine = task(name, fast), gpu_named(gpu)
    spec = XL2 if checkpoint is None else _spec(checkpoint)
    network = DiT.on_meta(spec)
    parameters = sum(p.numel() for p in network.parameters())
    if known.command == "finetune":
        if gpus != 1:
            raise InputError(f"{name} runs on one GPU, as mfm finetune does: leave --gpus out")
        dumped, calls, memory = _tuning(known.settings, settings, known.options, spec, parameters)
    else:
        experiment = EXPERIMENTS[known.command]
        config = override(validated(experiment.config, {}), [*known.settings, *settings])
        assert isinstance(config, ImageEvalConfig)
        dumped, calls = config.model_dump(), float(config.calls())
        memory = {
            "weights": 4.0 * parameters,
            "batch": kept_bytes(spec, True, True) * ROWS,
            "decoder_and_reward": BESIDE,
        }
    total = sum(memory.values())
    if total > machine.memory * GIB:
        parts = ", ".join(f"{part.replace('_', ' ')} {size / GIB:.1f}" for part, size in memory.items())
        raise InputError(
            f"{name} needs {total / GIB:.0f} GiB on one GPU ({parts}), and {gpu} has {machine.memory:.0f}: "
            "take a larger one (--gpu)" + ", or --set micro_batches=N" * (known.command == "finetune")
        )
    flops = calls * forward_flops(spec)
    metrics = {
        "parameters": parameters,
        "parameters_of_parent": network.parameters_of_parent(),
        "gpu": f"{gpus} × {gpu}",
        **{f"memory_{part}_gib": size / GIB for part, size in memory.items()},
        "memory_gib": total / GIB,
        "calls": calls,
        "gflops_per_call": forward_flops(spec) / 1e9,
        "assumed_mfu": mfu,
        "expected_hours": flops / (machine.tflops * 1e12 * mfu * gpus) / 3600,
    }
    return {"schema": 1, "command": name, "dry_run": True, "config": dumped, "metrics": metrics, "cost": {}}


def _tuning(
    own: tuple[str, ...], settings: Iterable[str], options: dict[str, Any], spec: dict[str, Any], parameters: int
) -> tuple[dict[str, Any], float, dict[str, float]]:
    """A fine-tuning's configuration, evaluations and memory.

    A row of the first stage is the student with its gradient, the base's drift, and a differentiated draw for each of
    ``num_draws``; a row of the second the map's two differentiated calls and one of the tuned drift.
    """
    start = {"checkpoint": "MFM-XL/2", "checkpoint_sha256": "", **options}
    config = override(validated(FinetuneConfig, start), [*own, *(s for s in settings if not s.startswith("data="))])
    first = config.steps * config.batch_size * (PASSES + 1 + PASSES * config.num_draws)
    second = config.distil_steps * config.distil_batch_size * (2 * PASSES + 1)
    second += config.distil_pool * config.distil_pool_steps
    pool = config.states.pool * config.states.pool_steps
    rows = -(-config.batch_size // config.micro_batches)
    kept = kept_bytes(spec, config.precision == "bf16", config.checkpoint_activations)
    memory = {
        **bytes_of_training(parameters, config.precision == "bf16"),
        "base": 4.0 * parameters,
        "activations": kept * rows * (1 + config.num_draws),
        "decoder_and_reward": BESIDE,
    }
    return config.model_dump(), float(first + pool + (second if config.map == "distil" else 0)), memory


def _spec(checkpoint: str) -> dict[str, Any]:
    network = resolve_checkpoint(checkpoint).config.get("network", {})
    if network.get("name") != "dit":
        raise InputError(f"{checkpoint} is no map of the ImageNet family: give one that mfm convert made")
    return {key: value for key, value in network.items() if key != "name"}
