"""How good is the shipped map of emoji? Fréchet distance, copying, and classes as the judge names them.

Fréchet distances and copying are those of ``mfm eval generation emoji``, of samples told no class, and those of draws
at noised held-out emoji those of ``mfm eval posterior emoji``. Classes: samples of each category alike, told which, and
how often the judge, who has never seen a reward, names it; beside it how often it is right on held-out emoji.
"""

from typing import Any

import torch

from benchmarks.common import keep, say
from metaflowmaps.lab.evaluate.images.assemble import equip, open_setup
from metaflowmaps.lab.evaluate.images.generation import Generation, GenerationConfig
from metaflowmaps.lab.evaluate.images.recovery import Recovery, RecoveryConfig
from metaflowmaps.lab.evaluate.images.setup import ImageSetup
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import stream

GENERATION = GenerationConfig(
    samples=512, labels="none", refine_steps=(1, 2, 4), compose_steps=(), ode_steps=(4, 16), drift="none"
)
POSTERIOR = RecoveryConfig(
    samples=338, labels="none", times=(0.0, 0.2, 0.5, 0.8), map_steps=(1, 2), glass_steps=(4, 16), images=64
)
A_CLASS = 24  # samples


def main() -> None:
    """Write results/emoji.json."""
    opened = OpenedModel.open("emoji", "cpu")
    setup, _ = open_setup(opened, GENERATION)
    equip(setup, opened, GENERATION, lambda text: None, ())
    generated = Generation(setup, GENERATION, say).run().metrics
    recovered = Recovery(setup, POSTERIOR, say).run().metrics
    figures = {"generation": generated, "posterior": recovered, "classes": classes_of(setup)}
    keep("emoji", "python -m benchmarks emoji", figures)


@torch.no_grad()
def classes_of(setup: ImageSetup) -> dict[str, Any]:
    """The share of samples that the judge takes for what they were told to be, by sampler, and of held-out emoji."""
    model, number = setup.model, setup.train.num_classes
    label = torch.arange(A_CLASS * number) % number
    cond = {"label": label}
    noise = torch.randn(len(label), *model.event_shape, generator=stream(0, "emoji-classes"))
    samples = {
        "map, refined in 4 steps": model.generate(len(label), 4, stream(1, "emoji-classes"), cond),
        "ODE, 16 steps": setup.flow(noise, 16, cond),
    }
    named = {name: float((setup.judge.classes(x) == label).float().mean()) for name, x in samples.items()}
    held_out = float((setup.judge.classes(setup.unseen) == setup.held_out.labels).float().mean())
    return {"accuracy": named, "held_out": held_out, "samples": len(label)}
