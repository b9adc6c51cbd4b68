"""Runs on several gloo ranks, as processes forked from a warm server; each ends with an exit code and leaves files."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.checkpoint import resolve_checkpoint, writing
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks.dit import DiT, DiTConfig
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.path import LinearPath
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.loop import Interrupted, Watch, train
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.starting import starting_point
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher
from metaflowmaps.training.train_config import LossConfig, TimesConfig, TrainConfig
from metaflowmaps.work import ranks

PRELOADED = ["ranks_worker", "torch.distributed.fsdp", "torch.distributed.tensor"]
MEANS = [[-1.0, 0.5, 0.2], [1.0, -0.5, 0.4]]

FORMS: dict[str, dict[str, Any]] = {
    "diagonal": {"consistency": "none", "diagonal": "data"},
    "eulerian": {"consistency": "eulerian"},
    "mean-flow": {"consistency": "mean-flow", "diagonal": "data"},
    "lagrangian": {"consistency": "lagrangian"},
    "lagrangian-difference": {"consistency": "lagrangian-difference"},
    "semigroup": {"consistency": "semigroup", "diagonal": "data"},
    "eulerian-self": {"consistency": {"name": "eulerian", "velocity": "self"}, "diagonal": "data"},
}


class Pictures:
    """Noisy gradients, (n, 1, 8, 8)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        slope = torch.randn(n, 1, 1, 8, generator=generator)
        return slope + 0.3 * torch.randn(n, 1, 8, 8, generator=generator)


class Double(Objective):
    """An objective whose inputs are float64, so that sums in another order differ in the sixteenth digit only."""

    def batch(self, model: MetaFlowMap, step: int) -> Any:
        drawn = super().batch(model, step)
        doubled = {name: v.double() for name, v in vars(drawn).items() if isinstance(v, Tensor)}
        return replace(drawn, **doubled)


class Counting(Double):
    """It remembers something from step to step, and weighs the loss by it."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.level = torch.zeros((), dtype=torch.float64)

    def batch(self, model: MetaFlowMap, step: int) -> Any:
        drawn = super().batch(model, step)
        self.level = 0.5 * self.level + drawn.x_t.square().mean()
        return replace(drawn, weight=self.level.expand(len(drawn)).clone())

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level = state["level"]


def config_of(form: str = "lagrangian-difference", **changes: Any) -> TrainConfig:
    """A few steps on 16 rows, 4 of them on the diagonal; clipped, averaged, logged and written often."""
    data = gmm().model_dump()
    data.update(
        steps=4, batch_size=16, log_every=1, checkpoint_every=2, keep_last=9, threads=1, micro_batches=2,
        loss=LossConfig(**FORMS[form]).model_dump(), teacher="exact",
    )  # fmt: skip
    data["optimizer"].update(name="adam", lr=0.01, clip=0.5, ema=0.9, warmup_steps=2)
    data["optimizer"].update(changes.pop("optimizer", {}))
    data.update(changes)
    return TrainConfig.model_validate(data)


def build(kind: str, dtype: torch.dtype = torch.float64) -> MetaFlowMap:
    """A small map whose weights are all in play from the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "dit":
            network: Any = DiTConfig(patch=4, width=16, depth=2, heads=2, encoder_depth=1).network((1, 8, 8))
        else:
            network = MLPConfig(width=10, depth=3, modulation=True).network(
                (3,)
            )  # widths that four ranks cannot share evenly
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return MetaFlowMap(network.to(dtype), LinearPath())


def objective_of(kind: str, config: TrainConfig, model: MetaFlowMap, remembers: bool = False) -> Objective:
    """The objective; for images the teacher is another network, frozen."""
    made: Any = Counting if remembers else Double if model.dtype == torch.float64 else Objective
    if kind == "mlp":
        law, exact = (GaussianMixture(torch.tensor(MEANS, dtype=d), 0.3) for d in (torch.float32, model.dtype))
        return made(law, config.loss, config.times, ExactTeacher(LinearPath(), exact), config.batch_size, 3)
    frozen = build("dit", model.dtype).requires_grad_(False)
    teacher = GlassTeacher(LinearPath(), frozen.drift)
    return made(Pictures(), config.loss, TimesConfig(last=0.9), teacher, config.batch_size, 3)


class At:
    """An objective in whose batch of a step one rank meets with something."""

    def __init__(self, objective: Objective, event: str, step: int, rank: int) -> None:
        self.objective, self.event, self.step, self.rank = objective, event, step, rank

    def __call__(self, model: MetaFlowMap, batch: Any) -> Tensor:
        loss = self.objective(model, batch)
        return loss * (float("nan") if self.event == "nan" and self._here(self.now) else 1.0)

    def _here(self, step: int) -> bool:
        return step == self.step and ranks.rank() == self.rank

    def batch(self, model: MetaFlowMap, step: int) -> Any:
        self.now = step
        if self._here(step):
            if self.event == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.event == "error":
                raise RuntimeError("something unforeseen")
            elif self.event == "killed while gathering":  # the others wait for its part of a weight
                ranks.whole = lambda named: os.kill(os.getpid(), signal.SIGKILL)
            elif self.event == "killed before the rename":
                writing._swap = lambda staging, target: os.kill(os.getpid(), signal.SIGKILL)
            elif self.event == "disk full":
                writing.write_new = _no_space
        return self.objective.batch(model, step)


def _no_space(file: Path, data: bytes) -> None:
    raise OSError(28, "No space left on device")


class Looks:
    """``on_sample``: keeps the weights that it sees, and whose rank saw them; enough after a step."""

    def __init__(self, out: str, last: int) -> None:
        self.out, self.last = Path(out), last

    def __call__(self, model: MetaFlowMap, step: int) -> bool:
        self.out.mkdir(exist_ok=True)
        torch.save(model.state_dict(), self.out / f"{step}-rank{ranks.rank()}-{model.training}.pt")
        return step >= self.last


def go(
    kind: str,
    config: dict[str, Any],
    out: str,
    dtype: str = "float64",
    remembers: bool = False,
    looks: Looks | None = None,
    event: tuple[str, int, int] | None = None,
) -> None:
    """Train in ``out``, going on from what is there."""
    settings = TrainConfig.model_validate(config)
    model = build(kind, getattr(torch, dtype))
    objective: Any = objective_of(kind, settings, model, remembers)
    if event is not None:
        objective = At(objective, *event)
    if isinstance(model.network, DiT):
        model.network.configure(settings.checkpoint_activations)
    start = starting_point(settings, Path(out), "auto")
    train(model, objective, settings, Path(out), start=start, watch=Watch(on_sample=looks))
    if settings.shard == 1:  # copies are copies, to the bit
        bits = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        assert len(set(ranks.collected(lambda: bits))) == 1


def go_all(kind: str, runs: list[tuple[dict[str, Any], str]], dtype: str = "float64") -> None:
    """Several runs, one after the other."""
    for config, out in runs:
        go(kind, config, out, dtype)


def outcome(out: Path) -> dict[str, Any]:
    """Losses and gradient norms of each step, final weights and averages, in one piece."""
    held = resolve_checkpoint(out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": [record["step"] for record in records],
        "loss": torch.tensor([record["loss"] for record in records], dtype=torch.float64),
        "norm": torch.tensor([record["grad_norm"] for record in records], dtype=torch.float64),
        "weights": held.tensors("model.safetensors"),
        "average": held.tensors("ema.safetensors"),
        "optimizer": held.tensors("optimizer.safetensors"),
    }


# -- processes ---------------------------------------------------------------------------------------------------------


def launch(
    size: int, job: Callable[..., None], *given: Any, said: Path | None = None, seconds: float = 300, **named: Any
) -> list[int]:
    """Run ``job`` on so many ranks; their exit codes. A rank that hangs is killed, and its code is -9.

    Errors are appended to the file ``said``.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_rank, args=(n, size, port, job, given, named, said)) for n in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _rank(
    number: int, size: int, port: int, job: Callable[..., None], given: Any, named: Any, said: Path | None
) -> None:
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with ranks.session():
            job(*given, **named)
    except Interrupted:
        os._exit(130)
    except BaseException as error:
        line = f"rank {number}: {type(error).__name__}: {error}"
        print(line, flush=True)
        if said is not None:
            with said.open("a") as file:
                file.write(line + "\n")
        os._exit(3)
    os._exit(0)
