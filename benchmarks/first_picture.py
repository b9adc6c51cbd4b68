"""The first picture of the README: noisy pictures, what they may be, and pictures steered to a reward beside unsteered.

``python -m benchmarks.first_picture`` after ``mfm train mnist --fast`` and ``mnist-guide``, in runs/. MNIST's digits
are steered from noise. The map of emoji draws well from t = .4 on and only sketches from noise (docs/images.md): its
half is smaller, and steers on from six noisy emoji at t = .4. Pictures are the first of their seed, not chosen.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup
from metaflowmaps.lab.evaluate.images.steered import quiet_steer
from metaflowmaps.lab.figures import picture_layout as layout
from metaflowmaps.lab.figures import plots
from metaflowmaps.lab.figures.picture_layout import RIM_INCHES, STEP, Words
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards import Ink
from metaflowmaps.steering import MFMG, ODE, Unsteered

OUT = Path("docs/images/first.png")
SHOWN, STEPS = 6, 25
LARGE_INCHES, SMALL_INCHES, BETWEEN_INCHES = 0.8, 0.56, 1.0
DRAWS_AT, HEAD = 1.75, 0.6  # in pictures: where draws begin, the room of the second heading


class Block(NamedTuple):
    """What is shown of one map: by time a noisy picture and its draws; by name steered samples."""

    noisy: dict[str, tuple[Tensor, Tensor]]
    steered: dict[str, Tensor]

    def height(self) -> float:
        """In pictures."""
        return (len(self.noisy) + len(self.steered)) * STEP + HEAD


class From(MetaFlowMap):
    """A map whose samples begin at noisy pictures (n, C, H, W), not at noise."""

    def __init__(self, model: MetaFlowMap, x_t: Tensor) -> None:
        super().__init__(model.network, model.path, model.parameterization, model.data_mean, float(model.data_std))
        self.x_t = x_t

    def start(self, t: float, noise: Tensor, seeds: Tensor) -> Tensor:
        """The noisy pictures, whatever the noise."""
        return self.x_t.clone()


def main() -> None:
    """Write docs/images/first.png."""
    torch.set_num_threads(1)
    digits, emoji = _opened("runs/mnist"), _opened("emoji")
    times = (0.2, 0.3)
    mnist = Block(
        {f"t = {t}": _noised(digits, i, t) for i, t in enumerate(times)},
        {
            "unsteered": _steered(digits, digits.model, None, 0.0),
            "“be a three”": _steered(digits, digits.model, "margin:3", 0.0),
            "“be a seven”": _steered(digits, digits.model, "margin:7", 0.0),
        },
    )
    noisy = {f"t = {t}": _noised(emoji, i, t) for i, t in enumerate((0.4, 0.5, 0.6))}
    images = emoji.images(SHOWN, "first picture, steered", 0)[0]
    noise = randn(tuple(images.shape), stream(0, "first picture, begun"))
    begun = From(emoji.model, emoji.model.path.interpolate(noise, images, 0.4))
    coloured = {
        "unsteered": _steered(emoji, begun, None, 0.4),
        "“be blue”": _steered(emoji, begun, "colour:blue", 0.4),
        "“be red”": _steered(emoji, begun, "colour:red", 0.4),
    }
    plots.save(_drawn(mnist, Block(noisy, coloured)), OUT)


def _opened(name: str) -> ImageSetup:
    return open_setup(OpenedModel.open(name, "cpu"), ImageEvalConfig(drift="none"))[0]


@torch.no_grad()
def _noised(setup: ImageSetup, index: int, t: float) -> tuple[Tensor, Tensor]:
    """A held-out picture with noise, and draws of what it may be."""
    g = stream(0, "first picture", index)
    image = setup.images(index + 1, "first picture", 0)[0][index:]
    x_t = setup.model.path.interpolate(randn(tuple(image.shape), g), image, t)
    return x_t, setup.model.draw(t, x_t, SHOWN, generator=g)[:, 0]


def _steered(setup: ImageSetup, model: Any, reward: str | None, start: float) -> Tensor:
    """Samples from noise, the steering term as long as the drift; or from where the model begins, the term .4 of it."""
    grid = [*(start + (1 - start) * i / STEPS for i in range(STEPS)), 1.0]
    seed = stream(0, "first picture", "steered")
    if reward is None:
        return quiet_steer(model, Ink(), SHOWN, Unsteered(), ODE(steps=STEPS, grid=grid), seed=seed).samples
    process = ODE(steps=STEPS, grid=grid, renormalize="rescale", renormalize_to=0.4 if start else 1.0)
    method = MFMG(num_draws=1, blend=False)
    return quiet_steer(model, image_reward(setup, reward), SHOWN, method, process, seed=seed).samples


def _drawn(large: Block, small: Block) -> Any:
    """Both, side by side."""
    width = DRAWS_AT + SHOWN * STEP
    right = BETWEEN_INCHES + width * SMALL_INCHES
    words = Words("", heading="x", right=right, left=0.6)
    figure, axis = layout.canvas((width, large.height()), words, LARGE_INCHES)
    _block(axis, large, width)
    whole, high = figure.get_size_inches()
    box = axis.get_position()
    side = figure.add_axes(
        (1 - (RIM_INCHES + width * SMALL_INCHES) / whole, box.y1 - small.height() * SMALL_INCHES / high,
         width * SMALL_INCHES / whole, small.height() * SMALL_INCHES / high)
    )  # fmt: skip
    side.set_axis_off()
    side.set(xlim=(0, width), ylim=(small.height(), 0))
    side.set_autoscale_on(False)
    _block(side, small, width)
    return figure


def _block(axis: Any, block: Block, width: float) -> None:
    places = [DRAWS_AT + j * STEP for j in range(SHOWN)]
    for i, (name, (x_t, draws)) in enumerate(block.noisy.items()):
        layout.row(axis, layout.shown(torch.cat([x_t, draws]), name), [0.0, *places], i * STEP, name)
        layout.arrow(axis, 1.1, DRAWS_AT - 0.1, i * STEP + 0.5)
    below = len(block.noisy) * STEP + HEAD
    for i, (name, samples) in enumerate(block.steered.items()):
        layout.row(axis, layout.shown(samples, name), places, below + i * STEP, name)
    layout.heading(axis, 0.0, 1.0, "noisy")
    layout.heading(axis, DRAWS_AT, width, "what it may be, one call each")
    layout.heading(axis, DRAWS_AT, width, "steered by a reward", below)


if __name__ == "__main__":
    main()
