"""Samples and their rewards on matplotlib's axes: what ``plot()`` of a result and of a value estimate share."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 64  # pictures


def show_samples(axis: "Axes", x: Tensor, rewards: Tensor) -> None:
    """Points of the plane in the colour of their rewards, the first pictures as a grid, or a histogram of coordinates.

    Args:
        axis: where.
        x: (n, *event).
        rewards: (n,).
    """
    x, shape = x.detach().cpu().float(), x.shape[1:]
    if tuple(shape) == (2,):
        points = axis.scatter(x[:, 0].numpy(), x[:, 1].numpy(), c=rewards.detach().cpu().float().numpy(), s=6)
        axis.get_figure().colorbar(points, ax=axis, label="reward")  # type: ignore[union-attr]
        axis.set_aspect("equal")
    elif len(shape) == 3 and shape[0] in (1, 3):
        axis.imshow(_grid(x[:SHOWN]).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
    else:
        axis.hist(x.flatten().numpy(), bins=60, density=True, color="0.5")
        axis.set_xlabel("coordinates")


def show_rewards(axis: "Axes", rewards: Tensor) -> None:
    """A histogram of rewards (n,), those that are finite."""
    rewards = rewards.detach().cpu().float()
    axis.hist(rewards[rewards.isfinite()].numpy(), bins=min(40, 5 + len(rewards) // 8), color="0.5")
    axis.set_xlabel("reward")


def _grid(x: Tensor) -> Tensor:
    """Pictures (n, C, H, W) in [−1, 1] as one, with a white line between them: (height, width, C) in [0, 1]."""
    x = torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0)
    columns = max(1, round(len(x) ** 0.5))
    missing = -len(x) % columns
    x = torch.cat([x, x.new_full((missing, *x.shape[1:]), 1.0)])
    n, channels, height, width = x.shape
    tiles = x.reshape(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return ((tiles.reshape(n // columns * height, columns * width, channels) + 1) / 2).clamp(0, 1)
