"""mfm train."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from metaflowmaps.checkpoint import load_classifier
from metaflowmaps.commands import pictures
from metaflowmaps.commands.progress import training_progress
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.shared import Results, Say, begun, panels, sample_picture
from metaflowmaps.data import describe, load_data
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.training.classifier import accuracy
from metaflowmaps.training.config import ClassifierConfig, TrainConfig
from metaflowmaps.training.distributed import check_division, told
from metaflowmaps.training.loop import TrainResult
from metaflowmaps.training.plan import plan
from metaflowmaps.training.run import (
    build_classifier,
    build_map,
    fitted,
    run_classifier_training,
    run_training,
)
from metaflowmaps.work import ranks
from metaflowmaps.work.config import override, validated
from metaflowmaps.work.devices import pick_device

AnyConfig = TypeVar("AnyConfig", TrainConfig, ClassifierConfig, TrainConfig | ClassifierConfig)


def resolve_training(base: AnyConfig, settings: Iterable[str], seed: int | None, max_steps: int | None) -> AnyConfig:
    """The configuration after --set, --seed and --max-steps, with what is measured on the data filled in."""
    given = list(settings)
    # a network that is sized to the data exists only after they are read
    open_network = isinstance(base, TrainConfig) and base.model.network is None
    late = [s for s in given if open_network and s.startswith("model.network.")]
    config = override(base, [s for s in given if s not in late])
    changes: dict[str, Any] = {}
    if seed is not None:
        changes["seed"] = seed
    if max_steps is not None:
        changes["steps"] = min(config.steps, max_steps)
        if isinstance(config, TrainConfig):  # the drift's are steps too
            changes["drift_steps"] = min(config.drift_steps, max_steps)
    config = validated(type(config), {**config.model_dump(), **changes})
    return override(fitted(config), late) if isinstance(config, TrainConfig) else config


def train(
    config: TrainConfig | ClassifierConfig, out: Path, device: str, resume: str, invocation: str, say: Say
) -> Results:
    """Train in ``out``; complete runs report, interrupted ones go on. In a session of several ranks, all must enter."""
    target = ranks.together(lambda: pick_device(device))
    torch.set_num_threads(config.threads)
    # what cannot be built or divided among the ranks claims no directory
    parameters = ranks.together(lambda: _count(config))
    done = ranks.first(lambda: begun(out, "train", config.model_dump()))
    if done is not None:
        say(f"{out} is complete: {config.steps} steps of {config.recipe}")
        return done
    if config.data is not None:
        say(describe(config.data, *load_data(config.data)))
    if ranks.size() > 1:
        say(told(config, ranks.size()))
    with training_progress(config, say) as report:
        if isinstance(config, TrainConfig):
            result = run_training(
                config, out, device=target, resume=resume, report=report, on_sample=_sampler(config, out), note=say
            )
        else:
            result = run_classifier_training(config, out, device=target, resume=resume, report=report)
    return ranks.first(lambda: _finish(config, out, result, parameters, target, invocation))


def _count(config: TrainConfig | ClassifierConfig) -> int:
    """How many weights it has, if it can be built, and divided among the ranks."""
    check_division(config, ranks.size())
    model = build_map(config) if isinstance(config, TrainConfig) else build_classifier(config)
    return sum(p.numel() for p in model.parameters())


def _finish(
    config: TrainConfig | ClassifierConfig,
    out: Path,
    result: TrainResult,
    parameters: int,
    target: torch.device,
    invocation: str,
) -> Results:
    """The figures and the results of a run that has reached its end."""
    metrics: dict[str, Any] = {"loss": result.loss, "parameters": parameters}
    if isinstance(config, ClassifierConfig):
        classifier, parts = load_classifier(result.checkpoint), load_data(config.data)
        metrics |= {
            "accuracy": accuracy(classifier, parts[1]),
            "accuracy_on_training_images": accuracy(classifier, parts[0]),
        }
    else:
        _last_picture(config, MetaFlowMap.from_pretrained(result.checkpoint), out)
        if config.data is not None:
            words = pictures.RECOVERED + pictures.COLOURS * (config.data.name == "latents")
            metrics["captions"] = {"posteriors.png": words}
    figures.save(figures.training_curve(out / "metrics.jsonl"), out / "training.png")
    results = write_results(
        out,
        "train",
        config.model_dump(),
        metrics,
        {"seconds": result.seconds, "steps": result.step},
        seed=config.seed,
        device=target,
        invocation=invocation,
    )
    return {**results, "out": str(out / "results.json")}


def _sampler(config: TrainConfig, out: Path) -> Callable[[MetaFlowMap, int], None] | None:
    """What draws a picture of the map on its way; laws that are not in the plane have none."""
    if config.data is not None:
        held = load_data(config.data)[1]
        return lambda model, step: pictures.draws_picture(model, held, out / "samples" / f"step-{step:08d}.png")
    assert config.law is not None
    law = config.law.build()
    return (lambda model, step: sample_picture(model, law, step, out)) if law.dim == 2 else None


def _last_picture(config: TrainConfig, model: MetaFlowMap, out: Path) -> None:
    if config.data is not None:
        pictures.draws_picture(model, load_data(config.data)[1], out / "posteriors.png")
        return
    assert config.law is not None
    law = config.law.build()
    if law.dim == 2:
        figures.save(panels(model, law, config.seed), out / "posteriors.png")


def dry_run(config: TrainConfig | ClassifierConfig, device: str) -> Results:
    """Resolve the configuration, plan it, write nothing."""
    target = pick_device(device)
    torch.set_num_threads(config.threads)
    metrics = plan(config, target)
    dumped = config.model_dump()
    return {"schema": 1, "command": "train", "dry_run": True, "config": dumped, "metrics": metrics, "cost": {}}
