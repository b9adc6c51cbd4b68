"""Recipes that need a map, at ImageNet scale: each is the configuration of a fine-tuning or of an experiment.

    mfm run imagenet-fid runs/imagenet-xl2 --set statistics=VIRTUAL_imagenet256_labeled.npz

The settings are the paper's; nothing here was run at its full length by this project.
"""

from collections.abc import Callable

from metaflowmaps.errors import unknown
from metaflowmaps.finetuning.mfm_ft import MFMFT
from metaflowmaps.finetuning.state_laws import StateMixture
from metaflowmaps.finetuning.tuning_config import DistilConfig, FinetuneConfig, MetersConfig
from metaflowmaps.lab.evaluate.images.generation import GenerationConfig
from metaflowmaps.lab.evaluate.images.race import RaceConfig
from metaflowmaps.lab.evaluate.images.recovery import RecoveryConfig
from metaflowmaps.lab.evaluate.images.rollout_value import ImageValueConfig
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.training.train_config import OptimizerConfig

REWARDS = ("pickscore", "hpsv2", "imagereward")
PROMPT = "A high-quality, high-resolution photograph of a {label}."
GUIDANCE = 2.5
TaskConfig = FinetuneConfig | ImageEvalConfig


def imagenet_xl2_finetune(fast: bool = False) -> FinetuneConfig:
    """MFM-FT of MFM-XL/2 to ImageReward: 10,000 steps, one draw a state; the paper's λ are 10, 25 and 50."""
    steps = 1_000 if fast else 10_000
    return FinetuneConfig(
        checkpoint="MFM-XL/2",
        checkpoint_sha256="",
        reward=f"imagereward:{PROMPT}",
        strength=10.0,
        guidance=GUIDANCE,
        method=MFMFT(num_draws=1),
        states=StateMixture(base=0.5, tilted=0.25, replay=0.0, pool=4096),
        distil=DistilConfig(steps=steps, batch_size=64, pool=4096),
        meters=MetersConfig(samples=256),
        optimizer=OptimizerConfig(
            name="radam", lr=1e-4, betas=(0.9, 0.999), warmup_steps=250, schedule="constant", clip=1000.0, ema=0.999
        ),
        steps=steps,
        batch_size=64,
        precision="bf16",
        checkpoint_every=500,
        log_every=50,
    )


def imagenet_steer(fast: bool = False) -> RaceConfig:
    """The reward race: best-of-N against steering, for PickScore, HPSv2.1 and ImageReward; diversity beside reward."""
    return RaceConfig(
        rewards=tuple(f"{name}:{PROMPT}" for name in REWARDS),
        methods=("mfm-g-rescale-1", "mfm-gf-4", "mfm-gf-16", "mfm-search-4", "dps-rescale"),
        rescales=(0.5, 1.0),
        strengths=(4.0, 16.0),
        steps=250,
        samples=64 if fast else 256,
        pool=2_000 if fast else 16_000,
        guidance=GUIDANCE,
        precision="bf16",
    )


def imagenet_posterior(fast: bool = False) -> RecoveryConfig:
    """Posterior FID: held-out pictures noised to t and drawn again, one map step against GLASS by calls."""
    return RecoveryConfig(
        samples=2_000 if fast else 10_000,
        times=(0.0, 0.1, 0.2, 0.5, 0.8),
        glass_steps=(1, 4, 8, 30),
        guidance=GUIDANCE,
        precision="bf16",
    )


def imagenet_value(fast: bool = False) -> ImageValueConfig:
    """The value by one-step draws against 200 rollouts of 200 steps at each state, for PickScore."""
    return ImageValueConfig(
        reward=f"pickscore:{PROMPT}",
        strength=10.0,
        states=8 if fast else 32,
        glass_steps=(1, 4, 8, 30),
        num_draws=(1, 4, 16, 64),
        guidance=GUIDANCE,
        precision="bf16",
    )


def imagenet_fid(fast: bool = False) -> GenerationConfig:
    """FID of 50,000 samples in 1, 2 and 4 network calls, to ADM's statistics: --set statistics=FILE.npz."""
    return GenerationConfig(
        samples=5_000 if fast else 50_000,
        refine_steps=(1, 2, 4),
        compose_steps=(),
        ode_steps=(),
        labels="uniform",
        guidance=GUIDANCE,
        precision="bf16",
    )


TASKS: dict[str, Callable[..., TaskConfig]] = {  # on a map: mfm run NAME CHECKPOINT
    "imagenet-xl2-finetune": imagenet_xl2_finetune,
    "imagenet-steer": imagenet_steer,
    "imagenet-posterior": imagenet_posterior,
    "imagenet-value": imagenet_value,
    "imagenet-fid": imagenet_fid,
}


def task(name: str, fast: bool = False) -> TaskConfig:
    """The configuration of that name."""
    if name not in TASKS:
        raise unknown("recipe to run on a map", name, TASKS)
    return TASKS[name](fast=fast)
