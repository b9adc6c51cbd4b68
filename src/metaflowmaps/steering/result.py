"""What steering returns: samples, rewards, what they cost and what was seen on the way; it can be kept and shown."""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps._sample_plots import show_rewards, show_samples
from metaflowmaps.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(repr=False)
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

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> result = mfm.steer(model, lambda x: x[:, 0], 8, mfm.Unsteered(), mfm.ODE(steps=5), seed=0)
        >>> again = mfm.steer(model, lambda x: x[:, 0], 1, mfm.Unsteered(), mfm.ODE(steps=5), seed=result.seeds[3:4])
        >>> torch.allclose(again.samples[0], result.samples[3], atol=1e-5)
        True
        >>> figure = result.plot()  # figure.savefig("samples.png")
    """

    samples: Tensor
    rewards: Tensor
    seeds: Tensor
    cost: dict[str, float]
    info: dict[str, Tensor]
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.samples.shape))
        nfe = self.cost.get("nfe", float("nan"))
        mean = float(self.rewards.float().mean())
        said = f", notes={list(self.notes)}" if self.notes else ""
        cut = ", interrupted" if self.interrupted else ""
        return f"SteerResult({shape}, mean reward {mean:.4g}, {nfe:,.0f} evaluations each{cut}{said})"

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; its folder is made."""
        tensors = {"samples": self.samples, "rewards": self.rewards, "seeds": self.seeds}
        tensors |= {f"info.{name}": value for name, value in self.info.items()}
        facts = {"cost": json.dumps(self.cost), "interrupted": json.dumps(self.interrupted)}
        facts["notes"] = json.dumps(self.notes)
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
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
                f"{path} is no saved result of steering ({type(error).__name__}): result.save writes such; "
                "mfm.load_samples reads the samples of a command"
            ) from None
        info = {name.removeprefix("info."): value for name, value in tensors.items()}
        return cls(samples, rewards, seeds, cost, info, interrupted, notes)

    def plot(self) -> "Figure":
        """Samples (points, pictures or a histogram), and the rewards they got: a matplotlib figure."""
        from metaflowmaps._figure import ShownFigure

        figure = ShownFigure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        show_samples(left, self.samples, self.rewards)
        left.set_title(f"{len(self.samples)} samples, {self.cost['nfe']:,.0f} evaluations each")
        show_rewards(right, self.rewards)
        right.set_title(f"mean reward {float(self.rewards.float().mean()):.3g}")
        return figure
