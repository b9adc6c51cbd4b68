"""ImageNet at 256 pixels, on latents of ``sd-vae-ft-mse``: the paper's settings (method notes, §10).

    mfm encode-latents imagenet/train --flip --out data/imagenet-latents
    mfm convert kyungmnlee/DMF --out runs/dmf-xl2
    torchrun --nproc-per-node 8 -m metaflowmaps.cli train imagenet-xl2 --data data/imagenet-latents
    mfm run imagenet-fid runs/imagenet-xl2 --set statistics=VIRTUAL_imagenet256_labeled.npz

Teacher and starting point is the parent: SiT or DMF as ``mfm convert`` writes it, guided where a row asks for it by its
family's law, then GLASS on its drift. Nothing here was trained for its full length by this project: the settings are
the paper's, the losses those that docs/scale.md measures.
"""

from metaflowmaps.data import Latents
from metaflowmaps.networks import DiTConfig
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.training.train_config import (
    ConditionConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TimesConfig,
    TrainConfig,
)

LATENTS = (4, 32, 32)
SCALES = [1.0, 2.5]  # of guidance; a table, as the released map has


def imagenet_b2(fast: bool = False) -> TrainConfig:
    """MFM-B/2 (135 M) from a DMF-B/2 or SiT-B/2: batch 512, 100,000 steps."""
    return _imagenet("imagenet-b2", "B", "runs/dmf-b2", batch_size=512, micro_batches=2, fast=fast)


def imagenet_xl2(fast: bool = False) -> TrainConfig:
    """MFM-XL/2 (684 M) from DMF-XL/2 or SiT-XL/2: batch 360, 100,000 steps."""
    return _imagenet("imagenet-xl2", "XL", "runs/dmf-xl2", batch_size=360, micro_batches=4, fast=fast)


def latents(fast: bool = False) -> TrainConfig:
    """The map of your own latents, in the place of a flow model of yours: --data LATENTS --set parent=CHECKPOINT."""
    return imagenet_b2(fast).model_copy(
        update={
            "recipe": "latents",
            "parent": "runs/parent",
            "model": ModelConfig(network=None),
            "steps": 10_000 if fast else 50_000,
            "batch_size": 256,
            "drift_batch_size": 256,
            "micro_batches": 1,
            "precision": "float32",
        }
    )


def _imagenet(name: str, size: str, parent: str, batch_size: int, micro_batches: int, fast: bool) -> TrainConfig:
    return TrainConfig(
        recipe=name,
        data=Latents(labels=True),
        model=ModelConfig(
            parameterization="plain",
            event_shape=LATENTS,
            network=DiTConfig(**SIZES[size], num_classes=1000, guidance=SCALES),
        ),
        teacher="pretrained",
        parent=parent,
        start_from_drift=True,
        condition=ConditionConfig(dropout=0.2, guidance=tuple(SCALES)),
        times=TimesConfig(context="release", context_at_zero=0.1, from_noise=0.0),
        loss=LossConfig(
            diagonal_share=0.75,
            adaptive_power_diagonal=0.5,
            adaptive_power_consistency=1.0,
        ),
        optimizer=OptimizerConfig(
            name="radam", lr=1e-4, betas=(0.9, 0.999), warmup_steps=2_000, schedule="constant", clip=1.5, ema=0.9999
        ),
        steps=10_000 if fast else 100_000,
        batch_size=batch_size,
        micro_batches=micro_batches,
        drift_batch_size=batch_size,
        precision="bf16",
        checkpoint_every=2_500,
        log_every=50,
        sample_every=5_000,
    )
