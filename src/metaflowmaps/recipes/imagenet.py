"""ImageNet at 256 pixels, on latents of ``sd-vae-ft-mse``: the paper's settings (method notes, §10).

    mfm encode-latents imagenet/train --flip --out data/imagenet-latents
    mfm convert kyungmnlee/DMF --out runs/dmf-xl2
    torchrun --nproc-per-node 8 -m metaflowmaps.cli train imagenet-xl2 --data data/imagenet-latents
    mfm run imagenet-fid runs/imagenet-xl2 --set statistics=VIRTUAL_imagenet256_labeled.npz

Teacher and starting point is the parent: SiT or DMF as ``mfm convert`` writes it, guided where a row asks for it, then
GLASS on its drift. Nothing here was trained for its full length by this project: the settings are the paper's, the
losses those that docs/scale.md measures.
"""

from typing import Any, NamedTuple

from metaflowmaps.data import Latents
from metaflowmaps.networks import DiTConfig
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.training.config import (
    ConditionConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TimesConfig,
    TrainConfig,
)


class Task(NamedTuple):
    """A recipe that needs a map: a command on a checkpoint, with its settings; ``mfm run`` runs it."""

    command: str  # finetune, or an experiment of mfm eval
    settings: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed


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


REWARDS = ("pickscore", "hpsv2", "imagereward")
PROMPT = "a photo of a {label}"
JUDGED = ("guidance=2.5", "precision=bf16")


def imagenet_xl2_finetune(fast: bool = False) -> Task:
    """MFM-FT of MFM-XL/2 to ImageReward: 10,000 steps, one draw a state; the paper's λ are 10, 25 and 50."""
    return Task(
        "finetune",
        (
            "optimizer.name=radam", "optimizer.lr=1e-4", "optimizer.betas=[0.9, 0.999]", "optimizer.warmup_steps=250",
            "optimizer.schedule=constant", "optimizer.ema=0.999", f"steps={1_000 if fast else 10_000}",
            f"distil_steps={1_000 if fast else 10_000}", "batch_size=64", "distil_batch_size=64", "num_draws=1",
            "states.pool=4096", "states.replay=0", "distil_pool=4096", "precision=bf16", "checkpoint_every=500",
        ),
        {"reward": f"imagereward:{PROMPT}", "strength": 10.0, "guidance": 2.5},
    )  # fmt: skip


def imagenet_steer(fast: bool = False) -> Task:
    """The reward race: best-of-N against steering, for PickScore, HPSv2.1 and ImageReward; diversity beside reward."""
    rewards = ", ".join(f'"{name}:{PROMPT}"' for name in REWARDS)
    return Task(
        "race",
        (
            f"rewards=[{rewards}]", "steps=250", f"samples={64 if fast else 256}", f"pool={2_000 if fast else 16_000}",
            'methods=["mfm-g-rescale-1", "mfm-gf-4", "mfm-gf-16", "mfm-search-4", "dps-rescale"]',
            "rescales=[0.5, 1.0]", "strengths=[4.0, 16.0]", *JUDGED,
        ),
    )  # fmt: skip


def imagenet_posterior(fast: bool = False) -> Task:
    """Posterior FID: held-out pictures noised to t and drawn again, one map step against GLASS by calls."""
    return Task(
        "posterior",
        (
            f"samples={2_000 if fast else 10_000}",
            "times=[0.0, 0.1, 0.2, 0.5, 0.8]",
            "glass_steps=[1, 4, 8, 30]",
            *JUDGED,
        ),
    )


def imagenet_value(fast: bool = False) -> Task:
    """The value by one-step draws against 200 rollouts of 200 steps at each state, for PickScore."""
    return Task(
        "value",
        (
            f'reward="pickscore:{PROMPT}"', "strength=10", f"states={8 if fast else 32}", "glass_steps=[1, 4, 8, 30]",
            "num_draws=[1, 4, 16, 64]", *JUDGED,
        ),
    )  # fmt: skip


def imagenet_fid(fast: bool = False) -> Task:
    """FID of 50,000 samples in 1, 2 and 4 network calls, to ADM's statistics: --set statistics=FILE.npz."""
    return Task(
        "generation",
        (
            f"samples={5_000 if fast else 50_000}", "refine_steps=[1, 2, 4]", "compose_steps=[]", "ode_steps=[]",
            "labels=uniform", *JUDGED,
        ),
    )  # fmt: skip
