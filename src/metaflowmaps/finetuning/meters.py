r"""What is watched while a model is tuned, because a reward that rises proves little.

On samples of the averaged student: reward, rewards it is not trained on, diversity (mean pairwise distance and Vendi
score, of features where a judge gives them), and the distance to the base, the divergence of the two memoryless
processes from one another,

    KL = 2 E ∫ ‖b̂ − b‖²/σ_t² dt     over states of the student (their SDE drifts differ by 2 (b̂ − b))

``bound`` is E[r] − KL: at most log E[e^r] over the base (up to the coarseness of the samples), and equal to it at
p_1 e^r alone. A reward may always be bought with more distance, the bound may not.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps._shapes import Cond, event_sum, select_cond
from metaflowmaps.finetuning.state_laws import Samples, samples_stream, student_samples
from metaflowmaps.finetuning.tuning_config import MetersConfig
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.checked import checked_reward

PICTURED = 64  # samples of a picture


@dataclass(frozen=True)
class Watched:
    """What meters look at besides the reward.

    Args:
        others: rewards by name that are not trained on.
        features: ``(n, *event) -> (n, d)``, in which samples are compared; None: the samples themselves.
        picture: draws samples into a file.
    """

    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    features: Callable[[Tensor], Tensor] | None = None
    picture: Callable[[Tensor, Path], None] | None = None


class Meters:
    """Measures a student; appends records to ``meters.jsonl`` in its run.

    Args:
        problem: the base, the reward and the bill.
        config: how many samples, and how often.
        seed: of the samples.
        out: the run's directory.
        watched: what else to look at.
        tuned: what of the model is tuned. With its ``map``, one-step samples are measured, not those of its ODE;
            without its ``drift`` (DRaFT) there is no distance to the base.
    """

    def __init__(
        self,
        problem: TuningProblem,
        config: MetersConfig,
        seed: int,
        out: Path,
        watched: Watched = Watched(),
        tuned: Mapping[str, bool] = MappingProxyType({"drift": True, "map": False}),
    ) -> None:
        self.problem, self.config, self.seed, self.tuned = problem, config, seed, tuned
        self.out, self.file = out, out / "meters.jsonl"
        self.others = {name: checked_reward(reward) for name, reward in watched.others.items()}
        self.features = watched.features or (lambda x: x.flatten(1))
        self.picture = watched.picture

    @property
    def names(self) -> list[str]:
        """What a record holds."""
        return measurements(self.others, self.tuned["drift"])

    def __call__(self, model: MetaFlowMap, step: int) -> dict[str, float]:
        """Measure, write down, and return the record."""
        with self.problem.unbilled():
            record = {"step": step, **self.measure(model)}
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record

    @torch.no_grad()
    def measure(self, model: MetaFlowMap) -> dict[str, float]:
        """The figures for a model as it is."""
        n = self.config.samples
        if self.tuned["map"]:
            g = stream(self.seed, "meters")
            cond: Cond = self.problem.conditions(n, g)
            x = model.generate(n, 1, g, cond)
        else:
            x, cond = self._samples(model, n, "meters")
        finite = x.flatten(1).isfinite().all(1)
        x, cond = x[finite], select_cond(cond, finite)
        reward = self.problem.rewards(x, cond) if len(x) else x.new_zeros(0)
        judged = reward.isfinite()
        x, cond, reward = x[judged], select_cond(cond, judged), reward[judged]
        lost = {"lost": float(n - len(x))}  # of what is not finite, samples or rewards
        if len(x) < 8:
            return lost
        figures = {
            "reward": float(reward.mean()),
            **{name: float(r(x, cond).mean()) for name, r in self.others.items()},
            **diversity(self.features(x)),
            **lost,
        }
        if self.tuned["drift"]:
            figures["distance_to_base"] = self.distance_to_base(model, x, cond)
            figures["bound"] = figures["reward"] - figures["distance_to_base"]
        return figures

    @torch.no_grad()
    def distance_to_base(self, model: MetaFlowMap, x_1: Tensor, cond: Cond) -> float:
        """KL of the path measures, at states made from the student's samples."""
        g, n = stream(self.seed, "meters-states"), len(x_1)
        a = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=g)] * self.problem.last
        noise = randn(tuple(x_1.shape), g, x_1.dtype, x_1.device)
        states = self.problem.noised(a.to(x_1), x_1, noise, cond)
        apart = event_sum((model.drift(states.t, states.x, cond) - states.drift).square())
        sigma = self.problem.path.sigma_squared(states.t.clamp_min(1e-6))
        # times are uniform in the angle a: dt = (dt/da) da
        h = 1e-3
        ahead, behind = (a + h).clamp(max=1).to(x_1), (a - h).clamp(min=0).to(x_1)
        speed = (states.chart.time_out(ahead) - states.chart.time_out(behind)) / (ahead - behind)
        return float(2 * (apart / sigma * speed).mean() * self.problem.last)

    def draw(self, model: MetaFlowMap, step: int) -> Path | None:
        """The picture of a step, where there is one to draw: its file."""
        if self.picture is None:
            return None
        with self.problem.unbilled():
            x_1, _ = self._samples(model, PICTURED, "picture")
        file = self.out / "samples" / f"step-{step:08d}.png"
        self.picture(x_1, file)
        return file

    def _samples(self, model: MetaFlowMap, n: int, name: str) -> Samples:
        """n samples of the student's ODE, the same noise at each look."""
        return student_samples(self.problem, model, n, self.config.steps, samples_stream(self.seed, name))


def measurements(others: Iterable[str], has_drift: bool = True) -> list[str]:
    """The names of what is measured."""
    return ["reward", *others, "distance", "vendi", *(["distance_to_base", "bound"] if has_drift else []), "lost"]


def diversity(features: Tensor) -> dict[str, float]:
    """Mean pairwise distance and Vendi score; none where samples coincide in a zero feature."""
    out = {"distance": mean_pairwise_distance(features)}
    if bool((features.norm(dim=1) > 0).all()):
        out["vendi"] = vendi_score(features)
    return out


def kept_records(out: Path, step: int) -> list[dict[str, float]]:
    """The measurements of a run up to a step; later ones, of a run that was killed, are taken out of the file."""
    file = out / "meters.jsonl"
    if not file.exists():
        return []
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record.get("step", step + 1) <= step:
            kept.append(record)
    write_whole(file, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept
