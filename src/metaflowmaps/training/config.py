"""What a training run is made of. Recipes are functions that return a :class:`TrainConfig`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from metaflowmaps.config import Config
from metaflowmaps.mixture import GaussianMixture

Beta = Annotated[float, Field(ge=0, lt=1)]
Consistency = Literal["none", "eulerian", "mean-flow", "lagrangian", "lagrangian-difference", "semigroup"]


class LawConfig(Config):
    """A Gaussian mixture."""

    means: list[Annotated[list[float], Field(min_length=1)]] = Field(min_length=1)
    covariances: Any = 1.0
    weights: list[float] | None = None

    def build(self) -> GaussianMixture:
        """The mixture itself."""
        return GaussianMixture(self.means, self.covariances, self.weights)


class NetworkConfig(Config):
    """The multilayer perceptron."""

    name: Literal["mlp"] = "mlp"
    width: int = Field(128, ge=1)
    depth: int = Field(4, ge=1)
    activation: Literal["silu", "gelu", "tanh"] = "silu"
    num_classes: int = Field(0, ge=0)


class ModelConfig(Config):
    """Path and parameterisation of the map."""

    path: Literal["linear", "trigonometric"] = "linear"
    parameterization: Literal["gaussian", "plain", "residual"] = "gaussian"
    data_mean: float = 0.0
    data_std: float = Field(1.0, gt=0)
    network: NetworkConfig = NetworkConfig()


class TimesConfig(Config):
    """Laws of the context time t and of the inner times (a, b)."""

    context: Literal["uniform", "release"] = "uniform"  # release: t = B·U²
    context_at_zero: float = Field(0.1, ge=0, le=1)  # probability that t = 0
    focus: tuple[float, float] = (0.0, 1.0)  # an interval of t that gets more than its share:
    focus_share: float = Field(0.0, ge=0, le=1)  # of the contexts, uniform on the interval
    from_noise: float = Field(0.5, ge=0, le=1)  # share of pairs with a = 0: the one-step jumps
    last: float = Field(0.9936, gt=0, le=1)  # inner times stay below: a teacher's target there divides by 1 − a
    late_share: float = Field(0.0, ge=0, le=1)  # of the rows, inner times late in the path's own time: s = 1 − U²

    @model_validator(mode="after")
    def _possible(self) -> "TimesConfig":
        if not 0 <= self.focus[0] < self.focus[1] <= 1:
            raise ValueError("focus must be an interval (low, high) inside [0, 1]")
        return self


class LossConfig(Config):
    """Which regressions, and where their velocities come from (method: losses.py)."""

    diagonal: Literal["data", "teacher"] = "teacher"
    consistency: Consistency = "lagrangian-difference"
    velocity: Literal["data", "teacher", "self"] = "teacher"
    diagonal_share: float = Field(0.25, ge=0, le=1)  # of the batch; the rest is consistency
    difference_step: float = Field(5e-3, gt=0, lt=0.5)
    adaptive_power_diagonal: float = Field(0.0, ge=0)
    adaptive_power_consistency: float = Field(0.0, ge=0)
    adaptive_constant: float = Field(0.01, gt=0)
    warmup_steps: int = Field(0, ge=0)  # diagonal only
    anneal_steps: int = Field(0, ge=0)  # then the longest jump grows from 0 to 1 over so many steps

    @model_validator(mode="after")
    def _possible(self) -> "LossConfig":
        if (self.consistency == "mean-flow") != (self.velocity == "data" and self.consistency != "none"):
            raise ValueError(
                "mean-flow takes velocity=data, and it is the only consistency loss that does: "
                "a data target is unbiased only where the loss is linear in it"
            )
        return self


class OptimizerConfig(Config):
    """Optimiser, schedule, clipping and averaging."""

    name: Literal["soap", "adam", "radam"] = "soap"
    lr: float = Field(3e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.95, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = Field(1.0, gt=0)
    ema: float = Field(0.998, ge=0, lt=1)


class TrainConfig(Config):
    """A whole run."""

    recipe: str
    law: LawConfig
    model: ModelConfig = ModelConfig()
    times: TimesConfig = TimesConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    teacher: Literal["exact", "learned", "none"] = "exact"
    drift_steps: int = Field(0, ge=0)  # steps of flow matching that make the learned teacher
    drift_batch_size: int = Field(2048, ge=1, le=2**24)  # larger: its targets are noisy, the map's are not
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(512, ge=1, le=2**24)
    micro_batches: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int = Field(2, ge=1, le=1024)
    precision: Literal["float32", "bf16"] = "float32"
    log_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(2000, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_best: bool = True
    sample_every: int = Field(0, ge=0)
    track: Literal["none", "tensorboard"] = "none"

    @model_validator(mode="after")
    def _possible(self) -> "TrainConfig":
        wanted = self.loss.diagonal == "teacher" or (
            self.loss.velocity == "teacher" and self.loss.consistency not in ("none", "semigroup")
        )
        if wanted and self.teacher == "none":
            raise ValueError("the loss asks for a teacher: set teacher=exact or teacher=learned")
        if self.model.network.num_classes:
            raise ValueError("a mixture has no labels to train classes with: leave model.network.num_classes at 0")
        if self.teacher == "learned" and self.drift_steps < 1:
            raise ValueError("teacher=learned needs drift_steps >= 1, the flow matching that makes it")
        if self.batch_size % self.micro_batches or self.drift_batch_size % self.micro_batches:
            raise ValueError("batch_size and drift_batch_size must be multiples of micro_batches")
        return self
