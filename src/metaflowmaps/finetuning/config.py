"""What a fine-tuning run is made of."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from metaflowmaps.data import DataSource, Mixture
from metaflowmaps.losses import MeanFlow
from metaflowmaps.training.config import LossConfig, OptimizerConfig, RunConfig, TimesConfig
from metaflowmaps.work.choices import Pick
from metaflowmaps.work.config import Config

Method = Literal["mfm-ft", "self-normalised", "adjoint-matching", "draft"]
Form = Literal["auto", "blend", "gradient", "gradient-free"]
Share = Annotated[float, Field(ge=0)]


class StatesConfig(Config):
    """Whose x_1 the states x_t = α ε + β x_1 are made from: shares of the rows. Any law will do (off-policy)."""

    data: Share = 0.0  # the images or the mixture that the base was trained on
    base: Share = 0.25  # samples of the base model, made once
    tilted: Share = 0.75  # the same, resampled by e^r: where the tuned model will be
    replay: Share = 0.0  # samples of the student, made anew as it learns
    pool: int = Field(16_384, ge=64)  # samples of the base
    pool_steps: int = Field(4, ge=1)  # network calls each, by refinement
    replay_pool: int = Field(4_096, ge=64)
    replay_steps: int = Field(32, ge=1)  # ODE steps each
    refresh_every: int = Field(500, ge=1)  # steps; a quarter of the replay is replaced

    @model_validator(mode="after")
    def _possible(self) -> "StatesConfig":
        if self.data + self.base + self.tilted + self.replay <= 0:
            raise ValueError("states needs a share above 0: states.base=1 will do")
        return self


class BaselineConfig(Config):
    """c(t, x), which keeps e^{r − c} in range and moves no fixed point; ∇ does not act on it."""

    kind: Literal["none", "running", "learned", "draws"] = "running"
    bins: int = Field(32, ge=1)  # of the inner time, in which running means are kept
    rate: float = Field(0.01, gt=0, le=1)  # of their averages
    draws: int = Field(4, ge=1)  # draws: independent ones, whose log-mean of e^r is c
    width: int = Field(64, ge=1)  # learned: a perceptron fitted to V
    lr: float = Field(3e-3, gt=0)


class MetersConfig(Config):
    """What is watched while training, on samples of the averaged student."""

    every: int = Field(500, ge=0)  # steps; 0: never
    samples: int = Field(512, ge=8)
    steps: int = Field(32, ge=1)  # ODE steps a sample


class FinetuneConfig(RunConfig):
    """A fine-tuning run: a base map, a reward, and how the tilt gets into the weights."""

    recipe: str = "finetune"
    checkpoint: str
    checkpoint_sha256: str
    reward: str
    reward_sha256: str | None = None
    strength: float = Field(1.0, gt=0)
    law: Mixture | None = None  # the exact tilted law, where it is known
    data: Annotated[DataSource, Pick(DataSource)] | None = None
    data_moved: str | None = None  # where the images are now

    method: Method = "mfm-ft"
    form: Form = "auto"  # auto: blend where the reward has a gradient, else gradient-free
    num_draws: int = Field(4, ge=1)
    map: Literal["distil", "direct", "none"] = "distil"
    guidance: float = Field(1.0, ge=0)
    null_share: float = Field(0.2, ge=0, le=1)  # of labels, where the base knows classes
    low_rank: int = Field(0, ge=0)  # 0: all weights; else factors of this rank beside frozen ones
    sigma_squared: float | None = Field(None, gt=0)  # a constant σ² instead of σ_t²: the release's; it moves the answer
    states: StatesConfig = StatesConfig()
    baseline: BaselineConfig = BaselineConfig()
    last: float = Field(0.9936, gt=0, lt=1)  # inner times of the states stay below
    chunk: int = Field(2048, ge=1)  # rows differentiated at a time
    adjoint_steps: int = Field(32, ge=2)  # adjoint matching: steps of a trajectory
    draft_at_zero: float = Field(0.5, ge=0, le=1)  # draft: share of rows that are generated from noise alone

    distil_steps: int = Field(4000, ge=1)
    distil_batch_size: int = Field(512, ge=1, le=2**24)
    distil_pool: int = Field(16_384, ge=64)
    distil_pool_steps: int = Field(50, ge=1)
    loss: LossConfig | None = None  # of the map; None: taught by the tuned drift, or (direct) from data targets
    times: TimesConfig = TimesConfig()
    meters: MetersConfig = MetersConfig()
    stop: str = "none"  # "reward>3", "distance<2", "reward stalls 4": see Rule
    # clipping a batch with a heavy weight is a bias: it is for accidents alone
    optimizer: OptimizerConfig = OptimizerConfig(clip=1000.0)

    @model_validator(mode="after")
    def _possible(self) -> "FinetuneConfig":
        if self.method == "draft" and self.map != "none":
            raise ValueError("draft tunes the one-step map itself: set map=none, there is no drift to distil")
        if self.map == "direct" and self.method != "mfm-ft":
            raise ValueError("map=direct learns the tilted posterior itself: it takes method=mfm-ft")
        if self.map == "direct" and self.form in ("gradient", "blend"):
            raise ValueError("map=direct learns from draws and their weights alone: leave form out")
        if self.sigma_squared is not None and self.form != "gradient":
            raise ValueError("sigma_squared belongs to form=gradient, the only one in which σ² stands")
        taught = self.map_loss.taught
        if self.map == "direct" and taught:
            raise ValueError("map=direct has no teacher: its loss takes diagonal=data, and no velocity of a teacher's")
        if self.map == "distil" and self.map_loss.diagonal == "data":
            raise ValueError("map=distil is taught by the tuned drift: its loss takes diagonal=teacher")
        if self.distil_batch_size % self.micro_batches:
            raise ValueError("distil_batch_size must be a multiple of micro_batches")
        if Rule.of(self.stop) is not None and not self.meters.every:
            raise ValueError("a stop rule looks at the meters: set meters.every above 0")
        return self

    @property
    def map_loss(self) -> LossConfig:
        """The loss of the map's stage."""
        if self.loss is not None:
            return self.loss
        if self.map == "direct":
            return LossConfig(diagonal="data", consistency=MeanFlow(), diagonal_share=0.5)
        return LossConfig(diagonal_share=0.25)


# images have larger networks, which go along at a gentler pace
FOR_IMAGES = (
    "optimizer.lr=1e-3", "steps=1500", "batch_size=256", "num_draws=2", "distil_steps=2500", "distil_batch_size=256",
    "states.base=0.5", "states.tilted=0.25", "states.replay=0.25", "meters.samples=256", "log_every=50",
)  # fmt: skip
FOR_VECTORS = ("steps=3000", "distil_steps=4000", "keep_best=false")


def usual(event_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The settings that suit samples of this shape, as --set writes them."""
    return FOR_VECTORS if len(event_shape) == 1 else FOR_IMAGES


class Rule:
    """When to stop early: ``NAME>NUMBER``, ``NAME<NUMBER``, ``NAME stalls K`` (K measurements without a new best)."""

    NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    FORM = re.compile(rf"\s*([\w.:-]+?)(?:\s*([<>])\s*({NUMBER})|\s+stalls\s+([1-9]\d*))\s*")

    def __init__(self, name: str, sign: str, number: float) -> None:
        self.name, self.sign, self.number = name, sign, number

    @classmethod
    def of(cls, text: str) -> "Rule | None":
        """The rule that a text says; None for "none"."""
        if text == "none":
            return None
        found = cls.FORM.fullmatch(text)
        if found is None:
            raise ValueError("a stop rule is NAME>NUMBER, NAME<NUMBER or NAME stalls K, such as distance<2")
        name, sign, number, stalls = found.groups()
        return cls(name, sign or "stalls", float(number if sign else stalls))

    def fires(self, records: list[dict[str, float]]) -> bool:
        """Do the measurements so far say stop?"""
        values = [record[self.name] for record in records if record.get(self.name) is not None]
        if not values:
            return False
        if self.sign == "stalls":
            return len(values) - 1 - max(range(len(values)), key=values.__getitem__) >= self.number
        return values[-1] > self.number if self.sign == ">" else values[-1] < self.number
