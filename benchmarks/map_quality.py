"""How good is a map of labelled images? Fréchet distance, copying, and classes as the judge names them.

Fréchet distances and copying are those of ``mfm eval generation MAP``, of samples told no class, and those of draws
at noised held-out images those of ``mfm eval posterior MAP``. Classes, by the judge, who has never seen a reward: of a
map that is told one, how often it is named, by sampler; of a map that is told none, the share of each.

    python -m benchmarks emoji      the shipped map
    python -m benchmarks mnist      runs/mnist, of ``mfm train mnist --fast`` (and mnist-guide, mnist-judge beside it)
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


def emoji() -> None:
    """Write results/emoji.json."""
    _measure("emoji", "emoji")


def mnist() -> None:
    """Write results/mnist.json."""
    _measure("mnist", "runs/mnist")


def _measure(name: str, checkpoint: str) -> None:
    opened = OpenedModel.open(checkpoint, "cpu")
    setup, _ = open_setup(opened, GENERATION)
    equip(setup, opened, GENERATION, lambda text: None, ())
    generated = Generation(setup, GENERATION, say).run().metrics
    recovered = Recovery(setup, POSTERIOR, say).run().metrics
    figures = {"generation": generated, "posterior": recovered, "classes": classes_of(setup)}
    keep(name, f"python -m benchmarks {name}", figures)


@torch.no_grad()
def classes_of(setup: ImageSetup) -> dict[str, Any]:
    """What the judge takes samples for, and how often it is right on held-out images."""
    model, number = setup.model, setup.train.num_classes
    told = bool(getattr(model.network, "num_classes", 0))
    label = torch.arange(A_CLASS * number) % number
    cond = {"label": label} if told else None
    noise = torch.randn(len(label), *model.event_shape, generator=stream(0, f"{setup.train.name}-classes"))
    samples = {
        "map, refined in 4 steps": model.generate(len(label), 4, stream(1, f"{setup.train.name}-classes"), cond),
        "ODE, 16 steps": setup.flow(noise, 16, cond),
    }
    named = {name: setup.judge.classes(x) for name, x in samples.items()}
    held_out = float((setup.judge.classes(setup.unseen) == setup.held_out.labels).float().mean())
    found: dict[str, Any] = {"held_out": held_out, "samples": len(label)}
    if told:
        return found | {"accuracy": {name: float((y == label).float().mean()) for name, y in named.items()}}
    return found | {
        "shares": {name: [float((y == i).float().mean()) for i in range(number)] for name, y in named.items()}
    }
