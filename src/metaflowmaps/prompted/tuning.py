r"""Fine-tuning of a pipeline: the tilt e^r of its pictures put into a LoRA of its network.

The objectives are those of :mod:`metaflowmaps.finetuning` that need a drift and values of r alone, tilt matching and
RAM: they regress the drift on the pipeline's own endpoints, noised anew, and neither the reward nor the decoder is
differentiated. What they take for a map is here the diagonal of one: the drift b_t(x) of the guided call, in the
coordinates of Gaussian data, which latents nearly are in scale.

The base and the levels of tilt matching are the same network with other factors, put in while they are evaluated
(B = 0 is the base): memory is that of one network. Evaluations with other factors take no gradient.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from metaflowmaps._files import write_whole
from metaflowmaps._shapes import Cond, Time
from metaflowmaps.checkpoint.models import Pretrained
from metaflowmaps.checkpoint.reading import read_checkpoint
from metaflowmaps.finetuning import TiltMatching, TuningObjective, TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.interop.diffusers.prompted_model import PromptedModel
from metaflowmaps.parameterization import GaussianChart
from metaflowmaps.prompted.adapters import ATTENTION, WEIGHTS, Adapter
from metaflowmaps.rewards.base import describe
from metaflowmaps.training.loop import Watch, train
from metaflowmaps.training.starting import starting_point
from metaflowmaps.training.state import EMA
from metaflowmaps.training.train_config import OptimizerConfig, RunConfig
from metaflowmaps.work.choices import Pick
from metaflowmaps.work.claims import claim, release
from metaflowmaps.work.config import merged, validated


class AdapterConfig(RunConfig):
    """A run that tunes a LoRA of a pipeline."""

    recipe: str = "adapter"
    pipeline: str  # its class
    asked_sha256: str  # of prompts, size and options
    reward: str

    method: Annotated[TuningObjective, Pick(TuningObjective)] = TiltMatching(levels=3, pool=256, pool_steps=14)
    rank: int = Field(8, ge=1)
    targets: tuple[str, ...] = Field(ATTENTION, min_length=1)  # ends of names of linear layers
    last: float = Field(0.9936, gt=0, lt=1)  # inner times of the states stay below
    chunk: int = Field(4, ge=1)  # samples made and judged at a time

    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1, le=2**24)
    micro_batches: int = Field(4, ge=1)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(name="adam", lr=1e-4, betas=(0.9, 0.99), warmup_steps=10, ema=0.98)

    @model_validator(mode="after")
    def _by_values(self) -> "AdapterConfig":
        if self.method.needs_states or self.method.differentiates(True):
            raise ValueError(
                f"{self.method.name} needs a map or gradients through the base, and a pipeline is tuned by the values "
                "of its reward: method=tilt-matching or method=ram"
            )
        return self


class AdaptedDrift(Pretrained):
    """The pipeline's drift with the factors of an adapter, to tuning objectives a map of which they ask the diagonal.

    A copy has factors of its own, which stand in the network while it is evaluated.

    Args:
        model: of the call that is tuned.
        adapter: on its network.
    """

    kind: ClassVar[str] = "prompted-adapter"
    guidance_law = None

    def __init__(self, model: PromptedModel, adapter: Adapter) -> None:
        super().__init__()
        self.parts = (model, adapter)  # a tuple: what learns here are the factors alone
        self.factors = nn.ParameterDict({name.replace(".", "/"): p for name, p in adapter.factors.items()})
        self.path, self.network = model.path, None
        self.event_shape, self.dtype, self.device = model.event_shape, model.dtype, model.device

    def __deepcopy__(self, memo: dict[int, Any]) -> "AdaptedDrift":
        made = AdaptedDrift(*self.parts)
        made.factors = copy.deepcopy(self.factors, memo)
        return made

    def describe(self) -> dict[str, Any]:
        """The pipeline's class."""
        return {"pipeline": type(self.parts[0].family.pipe).__name__}

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x) of the guided call: (B, *event)."""
        with self._in_place():
            return self.parts[0].drift(t, x, cond)

    def anchor(self, t: Tensor, x_t: Tensor, cond: Cond = None) -> "Diagonal":
        """The diagonal at context time 0."""
        return Diagonal(self, GaussianChart(self.path, t, x_t, 0.0, 1.0), cond)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The network with these factors."""
        live = self.parts[1].factors
        pairs = [(live[name.replace("/", ".")], mine) for name, mine in self.factors.items()]
        others = [(there, mine, there.data) for there, mine in pairs if there is not mine]
        if others and torch.is_grad_enabled():
            raise RuntimeError("factors that are put in for a moment take no gradient")
        for there, mine, _ in others:
            there.data = mine.data
        try:
            yield
        finally:
            for there, _, held in others:
                there.data = held


class Diagonal:
    """F_{a,a}(z) of a drift, in a chart at context time 0."""

    def __init__(self, model: AdaptedDrift, chart: GaussianChart, cond: Cond) -> None:
        self.model, self.chart, self.cond = model, chart, cond

    def __call__(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        t = self.chart.time_out(a).clamp(0, 1)
        x = self.chart.state_out(t, z)
        return self.chart.velocity_in(t, x, self.model.drift(t, x, self.cond))


class PromptedProblem(TuningProblem):
    """Rows of a call: its prompts, all alike."""

    def conditions(self, n: int, generator: torch.Generator, label: Tensor | None = None) -> dict[str, Tensor]:
        """The number of each row's prompt."""
        base: Any = self.base
        prompts = base.parts[0].request.prompts
        return {"prompt": torch.randint(prompts, (n,), generator=generator).to(base.device)}


def configured(model: PromptedModel, reward: Callable[..., Tensor], given: Mapping[str, Any]) -> AdapterConfig:
    """The configuration of a run.

    Args:
        model: of the call.
        reward: of pictures.
        given: settings by name; groups and choices may be given in part.
    """
    request, hashed = model.request, hashlib.sha256()
    for rows in (request.positive, request.negative or {}):
        for name, value in rows.items():
            hashed.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    hashed.update(repr((request.size, sorted(request.options.items()), request.until)).encode())
    about = {
        "pipeline": type(model.family.pipe).__name__,
        "asked_sha256": hashed.hexdigest(),
        "reward": describe(reward),
    }
    settings = dict(given)
    first = {"method": settings.pop("method")} if not isinstance(settings.get("method", {}), dict) else {}
    return merged(validated(AdapterConfig, about | first), settings)


def tune_adapter(model: PromptedModel, reward: Callable[..., Tensor], out: Path, config: AdapterConfig) -> Path:
    """Tune a LoRA in ``out``, going on from what is there; the network keeps it.

    Args:
        model: of the call.
        reward: of states, λr.
        out: a directory.
        config: of the run.

    Returns:
        The file of weights.
    """
    claim(out, "finetune", config.model_dump(mode="json"))
    try:
        adapter = Adapter(model.family, config.rank, config.targets, config.seed)
        try:
            _train(AdaptedDrift(model, adapter), reward, out, config)
        except BaseException:
            adapter.take_off()
            raise
        adapter.save(out)
    finally:
        release(out)
    write_whole(out / "README.md", _card(config).encode())
    return out / WEIGHTS


def _train(student: AdaptedDrift, reward: Callable[..., Tensor], out: Path, config: AdapterConfig) -> None:
    """The loop; at its end the averaged factors stand in the network."""
    problem = PromptedProblem(copy.deepcopy(student), reward, config.last, chunk=config.chunk)  # type: ignore[arg-type]
    objective = config.method.start(TuningSetup(problem, None, config.batch_size, config.seed, steps=config.steps))
    start = starting_point(config, out, "auto")
    result = train(student, objective, config, out, device=student.device, start=start, watch=Watch(stage="adapter"))
    averaged = read_checkpoint(result.checkpoint).tensors(EMA)
    student.load_state_dict({name: value.to(student.device) for name, value in averaged.items()})
    student.eval().requires_grad_(False)


def _card(config: AdapterConfig) -> str:
    """README.md beside the weights."""
    rows = {
        "base": config.pipeline,
        "reward": config.reward,
        "objective": f"{config.method.title}, values of the reward alone",
        "rank": f"{config.rank}, on {', '.join(config.targets)}",
        "steps": f"{config.steps} of {config.batch_size} rows, learning rate {config.optimizer.lr:g}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: diffusers
tags: [lora, text-to-image, metaflowmaps]
---
# A LoRA that was tuned to a reward

| | |
|---|---|
{table}

```python
pipe = {config.pipeline}.from_pretrained("the base")
pipe.load_lora_weights("path/to/this/directory")
```

It was tuned on the guided call: use it with the `guidance_scale` that it was tuned at (`run.json` has the settings).
"""
