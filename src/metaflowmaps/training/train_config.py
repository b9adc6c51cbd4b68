"""What a training run is made of. Recipes are functions that return a :class:`TrainConfig`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from metaflowmaps.data import DataSource, Process
from metaflowmaps.losses import Consistency, LagrangianDifference
from metaflowmaps.networks import ClassifierNetworkConfig, ConvClassifierConfig, MLPConfig, NetworkConfig
from metaflowmaps.training.trackers import Tracker
from metaflowmaps.work.choices import Pick, choose
from metaflowmaps.work.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Config):
    """Path and parameterisation of the map."""

    path: Literal["linear", "trigonometric"] = "linear"
    parameterization: Literal["gaussian", "plain", "residual"] = "gaussian"
    data_mean: float | Literal["image"] = 0.0  # image: the mean of the images trained on
    data_std: float | None = Field(1.0, gt=0)  # of a coordinate about that mean; None: measured
    network: Annotated[NetworkConfig, Pick(NetworkConfig)] | None = MLPConfig()  # None: sized to the images
    event_shape: tuple[int, int, int] | None = None  # of images or latents, where it is known before they are read


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
    """Which regressions, and where their velocities come from: the objects of losses.py."""

    diagonal: Literal["data", "teacher"] = "teacher"
    consistency: Annotated[Consistency, Pick(Consistency)] = LagrangianDifference()
    diagonal_share: float = Field(0.25, ge=0, le=1)  # of the batch; the rest is consistency
    adaptive_power_diagonal: float = Field(0.0, ge=0)
    adaptive_power_consistency: float = Field(0.0, ge=0)
    adaptive_constant: float = Field(0.01, gt=0)
    warmup_steps: int = Field(0, ge=0)  # diagonal only
    anneal_steps: int = Field(0, ge=0)  # then the longest jump grows from 0 to 1 over so many steps

    @model_validator(mode="after")
    def _possible(self) -> "LossConfig":
        if self.consistency.source == "data" and self.consistency.moves:
            raise ValueError(
                f"{self.consistency.titled()} asks for the velocity at points of the flow's own, and data targets are "
                "known at sampled points alone: give it another source"
            )
        return self

    @property
    def taught(self) -> bool:
        """Whether it asks for a teacher."""
        return "teacher" in (self.diagonal, self.consistency.source)


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


class ConditionConfig(Config):
    """What conditional training sees (§4): labels that are dropped now and then, and guidance baked in."""

    dropout: float = Field(0.2, ge=0, le=1)  # of labels, to the null class
    guidance: tuple[Annotated[float, Field(ge=1)], ...] = Field((1.0,), min_length=1)  # scales w, one drawn a row

    @property
    def guided(self) -> bool:
        return any(w != 1 for w in self.guidance)


class RunConfig(Config):
    """What every training run has, whatever it trains."""

    recipe: str
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(512, ge=1, le=2**24)
    micro_batches: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int = Field(2, ge=1, le=1024)
    precision: Literal["float32", "bf16"] = "float32"
    compile: Literal["auto"] | bool = "auto"  # by torch.compile; auto: on CUDA, where it computes what is written
    checkpoint_activations: bool = False  # blocks are computed again in the backward pass instead of remembered
    shard: int = Field(0, ge=0)  # ranks that share one copy of the weights; 0: all there are, 1: a copy each
    log_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(2000, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_best: bool = True
    sample_every: int = Field(0, ge=0)
    track: str = "none"  # tensorboard, wandb, trackio, or file.py:Name

    @field_validator("track")
    @classmethod
    def _known(cls, track: str) -> str:
        """One that is outside of the package is read when the run begins."""
        if ":" not in track:
            choose(Tracker, track)
        return track

    @model_validator(mode="after")
    def _divisible(self) -> "RunConfig":
        if self.batch_size % self.micro_batches:
            raise ValueError("batch_size must be a multiple of micro_batches")
        return self


class TrainConfig(RunConfig):
    """A map's whole run."""

    data: Annotated[DataSource, Pick(DataSource)]
    model: ModelConfig = ModelConfig()
    times: TimesConfig = TimesConfig()
    loss: LossConfig = LossConfig()
    condition: ConditionConfig = ConditionConfig()
    teacher: Literal["exact", "learned", "pretrained", "none"] = "exact"
    parent: str | None = None  # the checkpoint of teacher=pretrained: a flow model as mfm convert writes it
    drift_steps: int = Field(0, ge=0)  # steps of flow matching that make the learned teacher
    start_from_drift: bool = False  # the map begins with the learned teacher's weights: its diagonal is right at t = 0
    # noise, times and conditions of batches: made here, or where the model is; auto: the latter on CUDA
    stream: Literal["auto", "host", "device"] = "auto"
    drift_batch_size: int = Field(2048, ge=1, le=2**24)  # larger: its targets are noisy, the map's are not

    @model_validator(mode="after")
    def _possible(self) -> "TrainConfig":
        law = self.data.law()
        if self.loss.taught and self.teacher == "none":
            raise ValueError("the loss asks for a teacher: set teacher=exact or teacher=learned")
        if law is None and self.teacher == "exact" and not isinstance(self.data, Process):
            raise ValueError("nobody knows the exact drift of examples: set teacher=learned, pretrained or none")
        if (self.teacher == "pretrained") != (self.parent is not None):
            raise ValueError("teacher=pretrained and parent=CHECKPOINT go together: give both or neither")
        if self.start_from_drift and self.teacher not in ("learned", "pretrained"):
            raise ValueError("start_from_drift needs teacher=learned or pretrained: there is no drift to start from")
        if self.teacher == "learned" and self.drift_steps < 1:
            raise ValueError("teacher=learned needs drift_steps >= 1, the flow matching that makes it")
        if self.drift_batch_size % self.micro_batches:
            raise ValueError("drift_batch_size must be a multiple of micro_batches")
        if law is not None and None in (self.model.data_std, self.model.network):
            raise ValueError("a law's data_std and network are not measured: give both")
        if law is not None and self.model.data_mean == "image":
            raise ValueError("data_mean=image is for images: give a number")
        if self.model.network is None:
            return self
        classes, known = self.model.network.num_classes, self.data.classes
        if classes and known is not None and classes != known:
            raise ValueError(
                f"model.network.num_classes={classes}, and the data have {known} classes that are trained with: set "
                f"data.labels, or model.network.num_classes={known}"
            )
        labelled = classes or known is None  # their number is filled in from the data
        if self.condition.guided and self.condition.dropout == 0:
            raise ValueError("condition.guidance guides away from the null class, which needs condition.dropout > 0")
        if self.condition.guided and not (labelled and self.model.network.guidance):
            raise ValueError(
                "condition.guidance bakes class guidance in: it needs labels and model.network.guidance=true"
            )
        return self

    @property
    def num_classes(self) -> int:
        return self.model.network.num_classes if self.model.network is not None else 0


class DistillConfig(TrainConfig):
    """A run whose teacher is a drift that somebody else has made."""

    teacher: Literal["exact", "learned", "pretrained", "none"] = "pretrained"
    low_rank: int = Field(0, ge=0)  # 0: all weights; else the parent's stay, beside factors of this rank and a context
    check: bool = True  # refuse a parent whose predictions do not fit the data

    @model_validator(mode="after")
    def _adapter(self) -> "DistillConfig":
        if self.low_rank and not self.start_from_drift:
            raise ValueError(
                "low_rank adapts the parent's own network: give a checkpoint of ours (mfm convert), or low_rank=0 for "
                "a network of another kind, whose map is a network of its own"
            )
        return self


class ClassifierConfig(RunConfig):
    """A classifier's whole run, on labelled images."""

    data: Annotated[DataSource, Pick(DataSource)]
    network: Annotated[ClassifierNetworkConfig, Pick(ClassifierNetworkConfig)] = ConvClassifierConfig()
    shift: int = Field(1, ge=0)  # pixels: images move by up to so many, at random
    noise: float = Field(0.2, ge=0)  # standard deviation of noise added to pixels
    smoothing: float = Field(0.0, ge=0, lt=1)  # of labels: it leaks probability to all classes, which a reward feels
