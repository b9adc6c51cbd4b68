"""What steering returns: samples, rewards, what they cost and what was seen on the way; it can be kept and shown."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 64  # pictures


@dataclass
class SteerResult:
    """Steered samples.

    Args:
        samples: (n, *event).
        rewards: (n,), strength included.
        seeds: (n,) int64; of a particle system that is returned whole, the system's, for each of its particles.
        cost: forwards, backwards, reward_calls, reward_backwards, decodes, seconds, peak_memory_bytes in total; nfe a
            returned sample.
        info: a step each (K,), averaged over samples: ess, norms …; ``time`` is where each step began.
        interrupted: not all that was asked for.
        notes: what the samples say against themselves (:mod:`metaflowmaps.steering.diagnostics`), each also a warning.
    """

    samples: Tensor
    rewards: Tensor
    seeds: Tensor
    cost: dict[str, float]
    info: dict[str, Tensor]
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {"samples": self.samples, "rewards": self.rewards, "seeds": self.seeds}
        tensors |= {f"info.{name}": value for name, value in self.info.items()}
        facts = {"cost": json.dumps(self.cost), "interrupted": json.dumps(self.interrupted)}
        facts["notes"] = json.dumps(self.notes)
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(Path(path), save(kept, metadata=facts))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "SteerResult":
        """Read what :meth:`save` wrote."""
        try:
            with safe_open(Path(path), framework="pt") as file:
                facts, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            cost, interrupted = json.loads(facts["cost"]), json.loads(facts["interrupted"])
            notes = tuple(json.loads(facts.get("notes", "[]")))
            samples, rewards, seeds = (tensors.pop(name) for name in ("samples", "rewards", "seeds"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is no saved result of steering ({type(error).__name__}): see result.save"
            ) from None
        info = {name.removeprefix("info."): value for name, value in tensors.items()}
        return cls(samples, rewards, seeds, cost, info, interrupted, notes)

    def plot(self) -> "Figure":
        """Samples (points, pictures or a histogram), and the rewards they got: a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        x, rewards = self.samples.detach().cpu().float(), self.rewards.detach().cpu().float()
        shape = x.shape[1:]
        if tuple(shape) == (2,):
            points = left.scatter(*x.T.numpy(), c=rewards.numpy(), s=6)
            figure.colorbar(points, ax=left, label="reward")
            left.set_aspect("equal")
        elif len(shape) == 3 and shape[0] in (1, 3):
            left.imshow(_grid(x[:SHOWN]).numpy(), cmap="gray", vmin=0, vmax=1)
            left.set_axis_off()
        else:
            left.hist(x.flatten().numpy(), bins=60, density=True, color="0.5")
            left.set_xlabel("coordinates")
        left.set_title(f"{len(x)} samples, {self.cost['nfe']:,.0f} evaluations each")
        right.hist(rewards[rewards.isfinite()].numpy(), bins=min(40, 5 + len(x) // 8), color="0.5")
        right.set_xlabel("reward")
        right.set_title(f"mean reward {float(rewards.mean()):.3g}")
        return figure


def _grid(x: Tensor) -> Tensor:
    """Pictures (n, C, H, W) in [−1, 1] as one, with a white line between them: (height, width, C) in [0, 1]."""
    x = torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0)
    columns = max(1, round(len(x) ** 0.5))
    missing = -len(x) % columns
    x = torch.cat([x, x.new_full((missing, *x.shape[1:]), 1.0)])
    n, channels, height, width = x.shape
    tiles = x.reshape(n // columns, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    return ((tiles.reshape(n // columns * height, columns * width, channels) + 1) / 2).clamp(0, 1)
