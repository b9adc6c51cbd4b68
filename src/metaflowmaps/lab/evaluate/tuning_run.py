"""A fine-tuning as it is run on a checkpoint: checked, tried, trained with its meters, judged and drawn."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.meters import Watched, kept_records, measurements
from metaflowmaps.finetuning.reward_probe import Probe, probe
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tune import (
    Tuned,
    TuningContext,
    make_objective,
    make_problem,
    make_student,
    run_finetuning,
)
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate import tuning_error as tuning
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject, summary
from metaflowmaps.training.loop import NonFiniteLoss
from metaflowmaps.work.progress import training_progress

EVERY_RECORD = 2**62  # a step beyond all others
Metrics = dict[str, Any]


@dataclass(frozen=True)
class TuningRun:
    """A configuration on its subject, with the reward tried on samples of the base."""

    subject: TuningSubject
    config: FinetuneConfig
    tried: Probe

    @classmethod
    def ready(cls, subject: TuningSubject, config: FinetuneConfig) -> "TuningRun":
        """Refuse what cannot be tuned, and try the reward; nothing is written."""
        _check_guidance(subject, config.guidance)
        torch.set_num_threads(config.threads)
        return cls(subject, config, probe(config, make_problem(config, subject.base, subject.plain)))

    def check(self) -> None:
        """Refuse what cannot be stopped or made as configured."""
        rule = StopRule.of(self.config.stop)
        if rule is not None:
            rule.check(measurements(self.subject.others, self.config.tuned["drift"]))
        make_student(self.config, self.subject.base)

    def planned(self) -> Metrics:
        """What it will take: of the first stage two steps are run."""
        config, subject = self.config, self.subject
        student = make_student(config, subject.base)
        objective = make_objective(config, make_problem(config, subject.base, subject.reward), self._data())
        seconds = 0.0
        for step in range(2):  # the first allocates and warms up
            began = time.perf_counter()
            batch = objective.batch(student, step).to(subject.opened.device)
            objective(student, batch).mean().backward()
            seconds = time.perf_counter() - began
        return {
            **self._parameters(),
            "reward_mean": self.tried.mean,
            "reward_std": self.tried.std,
            "effective_base_samples": self.tried.ess,
            "seconds_per_step": seconds,
            "expected_seconds": seconds * config.steps,
        }

    def train(self, out: Path, resume: str, say: Callable[[str], None]) -> Tuned:
        """The run, with its meters, in the directory ``out``; a failed start leaves nothing there."""
        subject, setup = self.subject, self.subject.setup
        watched = Watched(subject.others, None if setup is None else setup.judge.features, subject.picture())
        try:
            with training_progress(say) as report:
                surroundings = TuningContext(subject.opened.device, resume, self._data(), report, watched)
                return run_finetuning(self.config, subject.base, subject.reward, out, surroundings)
        except NonFiniteLoss as error:
            _clear_failed_start(out)
            raise NonFiniteLoss(f"{error}; or a lower --strength ({self.tried.fitting:.2g})") from error
        except InputError:
            _clear_failed_start(out)
            raise

    def judge(self, trained: Tuned, out: Path, judged: tuning.TunedEvalConfig | None) -> tuple[Metrics, Metrics]:
        """Metrics and cost of a run that has reached its end; its figures are drawn into ``out``.

        Args:
            trained: what came of the training.
            out: the run's directory.
            judged: how many samples the tuned model is held to; None for the usual ones.
        """
        began, config, subject = time.perf_counter(), self.config, self.subject
        model = MetaFlowMap.from_pretrained(trained.result.checkpoint).to(subject.opened.device)
        conditions = make_problem(config, subject.base, subject.reward).conditions
        judged = judged or subject.usual_judgement()
        result = tuning.evaluate_tuned(
            model, subject.base, subject.judge, judged, config.seed, config.tuned, conditions
        )
        meters = kept_records(out / "drift" if config.map == "distil" else out, EVERY_RECORD)
        metrics = {
            **result.to_json(),
            **self._parameters(),
            "loss": trained.result.loss,
            "probe": self.tried._asdict(),
            "before": meters[0] if meters else {},
            "after": meters[-1] if meters else {},
            "summary": summary(config, result),
        }
        subject.draw(config, model, meters, self.tried.log_evidence, out)
        cost = {
            "seconds": sum(trained.seconds.values()),
            "seconds_by_stage": trained.seconds,
            "steps": trained.result.step,
            **trained.calls,
            "nfe": sum(trained.calls.values()),
            "seconds_of_judging": time.perf_counter() - began,
        }
        return metrics, cost

    def _data(self) -> Any:
        """The base's own data, where states are made from them."""
        return self.subject.source() if self.config.states.needs_data else None

    def _parameters(self) -> Metrics:
        trained = sum(p.numel() for p in make_student(self.config, self.subject.base).parameters() if p.requires_grad)
        return {"parameters": sum(p.numel() for p in self.subject.base.parameters()), "trained_parameters": trained}


def about(subject: TuningSubject, reward: str, reward_sha256: str | None) -> Metrics:
    """What a run is about, as its configuration keeps it."""
    if subject.data_moved is not None and subject.data is None:
        raise InputError(
            f"--data {subject.data_moved} is for bases of images, not for {subject.opened.name}: leave it out"
        )
    law, exact = subject.tilted, None
    if law is not None:
        exact = {name: getattr(law, name).tolist() for name in ("means", "covariances", "weights")}
    return {
        "checkpoint": subject.opened.name,
        "checkpoint_sha256": subject.opened.digest,
        "reward": reward,
        "reward_sha256": reward_sha256,
        "strength": subject.strength,
        "data": subject.data,
        "data_moved": subject.data_moved,
        "law": exact,
    }


def _check_guidance(subject: TuningSubject, scale: float) -> None:
    """Refuse a scale that the base never saw: its map and its drift are made for those of its training."""
    network, name, checkpoint = subject.base.network, subject.opened.name, subject.opened.checkpoint
    training, scales = checkpoint.training, getattr(getattr(network, "config", None), "guidance", None)
    usual = scales if isinstance(scales, list | tuple) else [1.0]  # a table, as published maps have
    seen = [training["guidance"]] if checkpoint.tuned else training.get("condition", {}).get("guidance", usual)
    if not int(getattr(network, "num_classes", 0)) and scale != 1:
        raise InputError(f"--guidance {scale:g} needs a base with classes, and {name} has none: leave it out")
    if scale not in [float(w) for w in seen]:
        raise InputError(
            f"--guidance {scale:g}: {name} was trained at {', '.join(f'{w:g}' for w in seen)} and knows no "
            "posterior at another scale; tune at one of these, or train a base with --set condition.guidance=[…]"
        )


def _clear_failed_start(out: Path) -> None:
    """Take back what a start that failed before its first checkpoint wrote: it must not occupy the directory."""
    stages = [stage for stage in (out / "drift", out) if stage.is_dir()]
    if any(CheckpointStore(stage / "checkpoints").steps() for stage in stages if (stage / "checkpoints").is_dir()):
        return
    for stage in stages:
        for name in ("meters.jsonl", "metrics.jsonl", "timings.jsonl"):
            (stage / name).unlink(missing_ok=True)
        for folder in (stage / "checkpoints", stage):
            if folder.is_dir() and folder != out and not any(folder.iterdir()):
                folder.rmdir()
