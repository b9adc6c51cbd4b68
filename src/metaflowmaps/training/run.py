"""From a configuration to a trained map in a directory: build, resume, train.

With ``teacher=learned`` a drift is first trained from data alone (flow matching: the diagonal at context time 0) in
``out/drift``, by the same loop; GLASS on it then teaches the map.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from metaflowmaps.checkpoint import Checkpoint, CheckpointStore, load_model, resolve_checkpoint
from metaflowmaps.config import differences
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import make_network
from metaflowmaps.path import make_path
from metaflowmaps.training.config import TimesConfig, TrainConfig
from metaflowmaps.training.loop import Record, TrainResult, train
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher, Teacher


def build_map(config: TrainConfig) -> MetaFlowMap:
    """The untrained map, a function of the configuration and its seed."""
    network = {"dim": len(config.law.means[0]), **config.model.network.model_dump()}
    # module initialisers know only the global generator: fork it, so that nobody else's stream moves
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MetaFlowMap(
            make_network(network),
            make_path(config.model.path),
            config.model.parameterization,
            config.model.data_mean,
            config.model.data_std,
        )


def build_objective(config: TrainConfig, teacher: Teacher | None) -> Objective:
    """The objective of the configuration."""
    return Objective(config.law.build(), config.loss, config.times, teacher, config.batch_size, config.seed)


def run_training(
    config: TrainConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: str = "auto",
    report: Callable[[str, Record], None] = lambda stage, record: None,
    on_sample: Callable[[MetaFlowMap, int], None] | None = None,
) -> TrainResult:
    """Train in ``out``, going on from what is there; seconds include the drift's."""
    path, seconds_before = make_path(config.model.path), 0.0
    teacher: Teacher | None = None
    if config.teacher == "exact":
        teacher = ExactTeacher(path, config.law.build())
    elif config.teacher == "learned":
        stage = run_training(
            drift_config(config),
            out / "drift",
            device=device,
            report=lambda _, record: report("drift", record),
        )
        seconds_before = stage.seconds
        drift = load_model(stage.checkpoint).to(device).requires_grad_(False)
        teacher = GlassTeacher(path, drift.drift)
    result = train(
        build_map(config),
        build_objective(config, teacher),
        config,
        out,
        device=device,
        start=_starting_point(config, out, resume),
        report=lambda record: report("map", record),
        on_sample=on_sample,
    )
    return TrainResult(result.step, result.loss, result.seconds + seconds_before, result.checkpoint)


def drift_config(config: TrainConfig) -> TrainConfig:
    """The flow-matching run that makes a learned teacher: diagonal, data targets, context time 0, noise of its own."""
    return config.model_copy(
        update={
            "teacher": "none",
            "steps": config.drift_steps,
            "batch_size": config.drift_batch_size,
            "drift_steps": 0,
            "seed": config.seed + 1_000_003,
            "loss": config.loss.model_copy(update={"diagonal": "data", "consistency": "none", "velocity": "self"}),
            # GLASS at a late context asks for the drift later still, in a sliver of a: half of the rows go there
            "times": TimesConfig(context_at_zero=1.0, from_noise=0.0, last=1.0, late_share=0.5),
            "sample_every": 0,
        }
    )


def _check_source(config: TrainConfig, checkpoint: Checkpoint, resume: str) -> None:
    """Refuse to start from what cannot be gone on with."""
    if not checkpoint.has("optimizer.safetensors"):
        raise InputError(f"--resume {resume}: this checkpoint holds a model without a training state")
    theirs, ours = checkpoint.config.get("training", {}), config.model_dump(mode="json")
    for part in ("model", "optimizer"):
        lines = differences(theirs.get(part), ours[part])
        if lines:
            raise InputError(f"--resume {resume} has another {part} ({'; '.join(lines[:3])}): repeat its settings")
    step = checkpoint.document("position.json")["step"]
    if step >= config.steps:
        raise InputError(f"--resume {resume} stands at step {step}, this run ends at {config.steps}: raise steps")


def _starting_point(config: TrainConfig, out: Path, resume: str) -> Checkpoint | None:
    """auto: the newest valid checkpoint of ``out``. none: nothing, and there must be nothing. Else: that checkpoint."""
    store = CheckpointStore(out / "checkpoints", config.keep_last, config.keep_best)
    store.clean()
    if resume == "none":
        if store.steps():
            raise InputError(
                f"--resume none, but {out} already holds checkpoints: move it away or choose another --out"
            )
        return None
    checkpoint, skipped = store.latest_valid()
    for line in skipped:
        warnings.warn(f"skipped {line}", stacklevel=2)
    if checkpoint is not None:
        store.prune(checkpoint.document("position.json")["step"])  # a kill may have come between a save and its pruning
    if checkpoint is None and skipped:
        warnings.warn("no valid checkpoint is left: starting from step 0", stacklevel=2)
    if checkpoint is None and resume != "auto":
        checkpoint = resolve_checkpoint(resume)
        _check_source(config, checkpoint, resume)
    return checkpoint
