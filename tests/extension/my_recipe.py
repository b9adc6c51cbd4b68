"""Recipes of one's own, built from objects: of the package and of the files beside this one."""

from pathlib import Path

from metaflowmaps.losses import Semigroup
from metaflowmaps.networks import MLPConfig
from metaflowmaps.training.train_config import LossConfig, ModelConfig, OptimizerConfig, TrainConfig
from metaflowmaps.work.choices import outside

HERE = Path(__file__).parent
Ring = outside(f"{HERE / 'my_data.py'}:Ring")
Spiral = outside(f"{HERE / 'my_points.py'}:Spiral")
WavesConfig = outside(f"{HERE / 'my_network.py'}:WavesConfig")
Halfway = outside(f"{HERE / 'my_loss.py'}:Halfway")
SHORT = {"batch_size": 32, "threads": 1, "log_every": 5, "optimizer": OptimizerConfig(name="adam", lr=1e-3)}

ring = TrainConfig(
    recipe="ring",
    data=Ring(),
    model=ModelConfig(data_std=1.5, network=WavesConfig(waves=16)),
    loss=LossConfig(consistency=Halfway(share=0.25)),
    steps=8,
    **SHORT,
)


def spiral(fast: bool = False) -> TrainConfig:
    """The map of the spiral, from its points and classes alone."""
    return TrainConfig(
        recipe="spiral",
        data=Spiral(labelled=True),
        model=ModelConfig(data_std=None, network=MLPConfig(width=16, depth=2, num_classes=2)),
        loss=LossConfig(diagonal="data", consistency=Semigroup()),
        teacher="none",
        steps=4 if fast else 8,
        **SHORT,
    )
