"""What a fine-tuning run is made of."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, computed_field, model_validator

from metaflowmaps.data import DataSource, Mixture
from metaflowmaps.finetuning.direct import Direct
from metaflowmaps.finetuning.mfm_ft import MFMFT
from metaflowmaps.finetuning.state_laws import StateLaw, StateMixture
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tuning_objective import TuningObjective
from metaflowmaps.training.train_config import LossConfig, OptimizerConfig, RunConfig, TimesConfig
from metaflowmaps.work.choices import Pick, built, choose, options_of
from metaflowmaps.work.config import Config, merged, validated


class MetersConfig(Config):
    """What is watched while training, on samples of the averaged student."""

    every: int = Field(500, ge=0)  # steps; 0: never
    samples: int = Field(512, ge=8)
    steps: int = Field(32, ge=1)  # ODE steps a sample


class DistilConfig(Config):
    """The stage that makes a map of the tuned drift."""

    steps: int = Field(4000, ge=1)
    batch_size: int = Field(512, ge=1, le=2**24)
    pool: int = Field(16_384, ge=64)  # samples of the tuned drift
    pool_steps: int = Field(50, ge=1)  # ODE steps each


class FinetuneConfig(RunConfig):
    """A fine-tuning run: a base map, a reward, and how the tilt gets into the weights."""

    renamed: ClassVar[Mapping[str, str]] = {  # the settings of version 0.1
        "num_draws": "method.num_draws",
        "form": "method.form",
        "sigma_squared": "method.sigma_squared",
        "baseline.kind": "method.baseline.name",
        "baseline.draws": "method.baseline.num_draws",
        "baseline": "method.baseline",
        "adjoint_steps": "method.steps",
        "draft_at_zero": "method.at_zero",
        "distil_steps": "distil.steps",
        "distil_batch_size": "distil.batch_size",
        "distil_pool": "distil.pool",
        "distil_pool_steps": "distil.pool_steps",
    }

    recipe: str = "finetune"
    checkpoint: str
    checkpoint_sha256: str
    reward: str
    reward_sha256: str | None = None
    strength: float = Field(1.0, gt=0)
    law: Mixture | None = None  # the exact tilted law, where it is known
    data: Annotated[DataSource, Pick(DataSource)] | None = None
    data_moved: str | None = None  # where the images are now

    method: Annotated[TuningObjective, Pick(TuningObjective)] = MFMFT()
    map: Literal["distil", "none"] = "distil"  # another stage makes a map of the tuned drift; by default if needed
    guidance: float = Field(1.0, ge=0)
    null_share: float = Field(0.2, ge=0, le=1)  # of labels, where the base knows classes
    low_rank: int = Field(0, ge=0)  # 0: all weights; else factors of this rank beside frozen ones
    states: Annotated[StateLaw, Pick(StateLaw)] = StateMixture()
    last: float = Field(0.9936, gt=0, lt=1)  # inner times of the states stay below
    chunk: int = Field(2048, ge=1)  # rows differentiated at a time

    distil: DistilConfig = DistilConfig()
    loss: LossConfig | None = None  # of the map; None: taught by the tuned drift, or (direct) from data targets
    times: TimesConfig = TimesConfig()
    meters: MetersConfig = MetersConfig()
    stop: str = "none"  # "reward>3", "distance<2", "reward stalls 4": see StopRule
    # clipping a batch with a heavy weight is a bias: it is for accidents alone
    optimizer: OptimizerConfig = OptimizerConfig(clip=1000.0)

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, given: Any) -> Any:
        """Without ``map``: distil where the method tunes a drift alone. ``map=direct``, as in 0.1, is a method."""
        if not isinstance(given, Mapping):
            return given
        data = {key: value for key, value in given.items() if key != "tuned"}
        method = built(TuningObjective, data.get("method", MFMFT()))
        if data.get("map") == "direct":
            method = data["method"] = _direct(method)
            data["map"] = "none"
        if data.get("map") is None:
            data["map"] = "none" if method.tunes_map else "distil"
        return data

    @model_validator(mode="after")
    def _possible(self) -> "FinetuneConfig":
        if self.method.tunes_map and self.map == "distil":
            raise ValueError(f"{self.method.name} tunes the map itself: set map=none, there is no drift to distil")
        self.method.check_loss(self.map_loss)
        if self.map == "distil" and self.map_loss.diagonal == "data":
            raise ValueError("map=distil is taught by the tuned drift: its loss takes diagonal=teacher")
        if self.distil.batch_size % self.micro_batches:
            raise ValueError("distil.batch_size must be a multiple of micro_batches")
        if StopRule.of(self.stop) is not None and not self.meters.every:
            raise ValueError("a stop rule looks at the meters: set meters.every above 0")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def tuned(self) -> dict[str, bool]:
        """What of a checkpoint of this run samples p_1 e^r: it is stored with it."""
        return {"drift": self.method.tunes_drift, "map": self.method.tunes_map or self.map == "distil"}

    @property
    def map_loss(self) -> LossConfig:
        """The loss of the map's stage."""
        return self.loss or self.method.map_loss


def tuned_parts(training: Mapping[str, Any]) -> dict[str, bool]:
    """What of a tuned checkpoint samples p_1 e^r, by the configuration it was trained by: its drift, its map.

    Args:
        training: ``config.json``'s; those of version 0.1 say it by their method and map.
    """
    kept: dict[str, bool] | None = training.get("tuned")
    draft = training.get("method") == "draft"
    return kept or {"drift": not draft, "map": draft or training.get("map") != "none"}


# images have larger networks, which go along at a gentler pace
FOR_IMAGES = {
    "optimizer": {"lr": 1e-3},
    "steps": 1500,
    "batch_size": 256,
    "distil": {"steps": 2500, "batch_size": 256},
    "states": {"base": 0.5, "tilted": 0.25, "replay": 0.25},
    "meters": {"samples": 256},
    "log_every": 50,
}
METHOD_FOR_IMAGES = {"num_draws": 2, "pool": 4096}  # where a method has them
FOR_VECTORS = {"steps": 3000, "distil": {"steps": 4000}, "keep_best": False}


def resolved(start: Mapping[str, Any], event_shape: tuple[int, ...], given: Mapping[str, Any]) -> FinetuneConfig:
    """The defaults that suit samples of a shape, and on top of them what is given.

    Args:
        start: what the run is about: checkpoint, reward, and so on.
        event_shape: of a sample.
        given: settings by name; groups and choices may be given in part.
    """
    images, method = len(event_shape) > 1, given.get("method", MFMFT.name)
    if images and isinstance(method, str):
        known = options_of(choose(TuningObjective, method))
        method = {"name": method, **{k: v for k, v in METHOD_FOR_IMAGES.items() if k in known}}
    config = merged(validated(FinetuneConfig, {**start, "method": method}), FOR_IMAGES if images else FOR_VECTORS)
    return merged(config, {key: value for key, value in given.items() if key != "method"})


def _direct(method: TuningObjective) -> Direct:
    """The method that 0.1 spelled ``map=direct``, with the draws and the baseline that were given."""
    if isinstance(method, Direct):
        return method
    if type(method) is not MFMFT:
        raise ValueError(f"map=direct learns the tilted posterior itself: it takes method=mfm-ft, not {method.name}")
    if method.form in ("gradient", "blend"):
        raise ValueError("map=direct learns from draws and their weights alone: leave form out")
    return Direct(method.num_draws, method.baseline)
