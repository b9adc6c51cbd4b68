r"""Three checks that a review of the method asks for: diversity under stress, generalising rewards, variance of tuning.

``diversity-stress``: the paper's inverse problem, whose tilted law has modes of weight .57, .37 and .06 at every λ
while the observation's noise shrinks from .2 to .0063: what each steering method and each tuned drift leaves of the
smallest mode, of the entropy of the modes and of the distance between samples.

``reward-generalisation``: digits steered and tuned by one classifier's reward and judged by the same reward of another
classifier, of another architecture and seed. Real digits stand beside them, because the two differ in scale.

``tuning-variance``: the gradient of each fine-tuning loss at the base, over batches of one bill of evaluations: the
trace of its covariance over the square of its mean. How far runs of different seeds end from each other is measured by
``python -m benchmarks control``.

Maps and tuned drifts are those of ``python -m benchmarks finetune-mixture`` and ``finetune-digits``: what has not been
trained is left out, but for the base of the mixture.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, RUNS, keep, say, trained
from benchmarks.frontier import Judge
from benchmarks.provenance import commit_now
from metaflowmaps.finetuning import MFMFT, AdjointMatching, DRaFT, SelfNormalised, TuningObjective
from metaflowmaps.finetuning.state_laws import StateMixture
from metaflowmaps.finetuning.tune import make_objective, make_problem, make_student
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import WEIGHTS, image_reward, scored
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics import mean_pairwise_distance
from metaflowmaps.random import stream
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.recipes.tasks import steering_task
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering import IMAGES
from metaflowmaps.steering.diagnostics import without_pilot_pool

TUNED = RUNS / "finetune"


def _in_parts(name: str, part: str, asked: tuple[Any, ...], measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """results/NAME.json, a part for each of what is asked for; what is there is not measured again."""
    torch.set_num_threads(1)
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text())["problems"] if file.exists() else {}
    for value in asked:
        key = f"{part}{value}"
        if key not in found:
            say(f"{name}: {key}")
            found[key] = {**commit_now(), **measure(value)}
            keep(name, f"python -m benchmarks {name}", {"problems": found})
    return found


# -- diversity under stress --------------------------------------------------------------------------------------------

STRENGTHS = (1, 30, 1000)
SAMPLES, SEEDS = 512, 2
ODE, SDE = mfm.ODE(steps=60), mfm.SDE(steps=60)
STEERED: dict[str, tuple[Any, ...]] = {
    "mfm-gf": (mfm.MFMGF(), ODE),
    "mfm-gf, 16 draws": (mfm.MFMGF(num_draws=16), ODE),
    "mfm-g": (mfm.MFMG(), ODE),
    "mfm-smc": (mfm.SMC(), SDE),
    "mfm-anneal": (mfm.Anneal(), ODE),
    "mfm-search": (mfm.Search(), mfm.ODE(steps=20)),
    "dps-scale=.03": (mfm.DPS(scale=0.03), ODE),
    "tds": (mfm.TDS(), SDE),
    "resampling-64": (mfm.Resampling(n=64),),
    "best-of-n-map-64": (mfm.BestOfN(n=64, source="map"),),
}
TUNED_DRIFTS = {"ft": "MFM-FT", "free": "MFM-FT without reward gradients", "adjoint": "adjoint matching"}
TUNED_MAPS = {"ft": "MFM-FT, one step", "draft": "DRaFT, one step"}


def diversity() -> None:
    """Benchmark: diversity-stress."""
    base = MetaFlowMap.from_pretrained(trained(gmm(), "finetune-base").checkpoint)
    found = _in_parts("diversity-stress", "λ = ", STRENGTHS, lambda strength: _diversities(base, strength))
    figures.save(benchmark_figures.diversity(found), RESULTS / "diversity-stress.png")


def _diversities(base: MetaFlowMap, strength: float) -> dict[str, Any]:
    """Every method at one strength, and what exact samples have."""
    task = steering_task("gmm-inverse")
    plain = task.reward("")
    judge = Judge(task.law, LinearGaussian(plain.A, plain.y, plain.noise_std, strength))
    exact = [judge.tilted.sample(SAMPLES, stream(seed, "diversity", "exact")) for seed in range(SEEDS)]
    methods = {name: _diversity(judge, _steered_sets(base, judge.reward, how)) for name, how in STEERED.items()}
    for name, title in TUNED_DRIFTS.items():
        if (model := _tuned(f"gmm-gmm-inverse-{strength:g}-{name}", drift=True)) is not None:
            methods[title] = _diversity(judge, _steered_sets(model, judge.reward, (mfm.Unsteered(), ODE)))
    for name, title in TUNED_MAPS.items():
        if (model := _tuned(f"gmm-gmm-inverse-{strength:g}-{name}")) is not None:
            methods[title] = _diversity(
                judge, [model.generate(SAMPLES, 1, stream(seed, "one step")) for seed in range(SEEDS)]
            )
    return {"strength": strength, "weights": judge.probabilities.tolist(),
            "methods": {"exact samples": _diversity(judge, exact), **methods}}  # fmt: skip


def _steered_sets(model: MetaFlowMap, reward: Any, how: tuple[Any, ...]) -> list[Tensor]:
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore")
        return [mfm.steer(model, reward, SAMPLES, *how, seed=seed).samples for seed in range(SEEDS)]


def _diversity(judge: Judge, sets: list[Tensor]) -> dict[str, Any]:
    """Frequencies of the modes, their effective number e^H, mean distance, and what sliced W2 says of the same."""
    near = judge.distance(sets)
    shares = torch.tensor(near.mode_frequencies, dtype=torch.float64)
    pairs = [mean_pairwise_distance(x[x.isfinite().all(1)]) for x in sets]
    return {
        "frequencies": [round(share, 4) for share in near.mode_frequencies],
        "modes": effective_modes(shares),
        "mode_l1": near.mode_l1,
        "distance": sum(pairs) / len(pairs),
        "reward": near.reward,
        "ratio": near.sw2 / near.floor_sw2,
    }


def effective_modes(shares: Tensor) -> float:
    """e^H of frequencies: how many equally frequent modes would be as varied."""
    return float(torch.special.entr(shares / shares.sum()).sum().exp())


def _tuned(name: str, drift: bool = False) -> MetaFlowMap | None:
    """A finished run of the fine-tuning benchmarks: its map, or its drift where that is a stage of its own."""
    out = TUNED / name
    if not (out / "results.json").exists():
        return None
    return MetaFlowMap.from_pretrained(out / "drift" if drift and (out / "drift").is_dir() else out)


# -- rewards that generalise -------------------------------------------------------------------------------------------

REWARDS = ("margin:7", "margin:2", "mixture")
PICTURES, PICTURE_STEPS = 128, 50
GENERALISED: dict[str, tuple[Any, ...]] = {
    "unsteered": (mfm.Unsteered(), mfm.ODE(steps=PICTURE_STEPS)),
    "mfm-g, images' preset": tuple(IMAGES),
    "mfm-gf, 4 draws": (mfm.MFMGF(num_draws=4), mfm.ODE(steps=PICTURE_STEPS)),
    "mfm-smc, 4 draws": (mfm.SMC(num_draws=4), mfm.SDE(steps=PICTURE_STEPS)),
    "mfm-anneal": (mfm.Anneal(), mfm.ODE(steps=PICTURE_STEPS)),
    "dps, rescaled": (mfm.DPS(), mfm.ODE(steps=PICTURE_STEPS, renormalize="rescale")),
    "best of 125 in one step": (mfm.BestOfN(125, source="map"),),
    "best of 1,000 in one step": (mfm.BestOfN(1000, source="map"),),
}


def generalisation() -> None:
    """Benchmark: reward-generalisation."""
    setup, _ = open_setup(OpenedModel.open("digits", "cpu"), ImageEvalConfig(drift="none"))
    found = _in_parts("reward-generalisation", "", REWARDS, lambda reward: _generalised(setup, reward))
    figures.save(benchmark_figures.generalisation(found), RESULTS / "reward-generalisation.png")


def _generalised(setup: ImageSetup, name: str) -> dict[str, Any]:
    """Every method by the guide's reward, and what both classifiers say of its samples."""
    by_guide = image_reward(setup, name)
    by_judge = image_reward(replace(setup, guide=setup.judge.classifier), name)
    wanted = _wanted(name)
    made = {"real digits": _real(setup, wanted)}
    for title, how in GENERALISED.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made[title] = mfm.steer(setup.model, by_guide, PICTURES, *how, seed=stream(0, "review", name)).samples
    tuned = _tuned(f"digits-{name}-1-ft")
    if tuned is not None:
        made["tuned, one step"] = tuned.generate(PICTURES, 1, stream(0, "review", name))
    cells = {}
    for title, x in made.items():
        cells[title] = {
            "guide": float(scored(by_guide, x).mean()),
            "judge": float(scored(by_judge, x).mean()),
            "named": float(torch.isin(setup.judge.classes(x), wanted).double().mean()),
            "distance": mean_pairwise_distance(setup.judge.features(x)),
        }
        say(f"  {title}: guide {cells[title]['guide']:.2f}, judge {cells[title]['judge']:.2f}")
    return {"reward": name, "methods": cells}


def _wanted(name: str) -> Tensor:
    """The classes that a reward asks for."""
    label = name.partition(":")[2]
    return torch.tensor([int(label)] if label else [i for i, weight in enumerate(WEIGHTS) if weight > 0])


def _real(setup: ImageSetup, wanted: Tensor) -> Tensor:
    """Pictures of these classes, held out first."""
    parts = []
    for data in (setup.held_out, setup.train):
        assert data.labels is not None
        parts.append(data.tensor(slice(None))[torch.isin(torch.as_tensor(data.labels), wanted)])
    return torch.cat(parts)[:PICTURES]


# -- variance of tuning ------------------------------------------------------------------------------------------------

TUNING_STRENGTHS = (1, 30)
EVALUATIONS, BATCHES, WARM = 2**15, 32, 8  # of a batch; batches; batches that baselines and λ learn from before
STATES = StateMixture()
OBJECTIVES: dict[str, TuningObjective] = {
    "MFM-FT, blend, 4 draws": MFMFT(4, "blend"),
    "MFM-FT, gradient, 4 draws": MFMFT(4, "gradient"),
    "MFM-FT, gradient, 1 draw": MFMFT(1, "gradient"),
    "MFM-FT, gradient-free, 4 draws": MFMFT(4, "gradient-free"),
    "self-normalised, 4 draws": SelfNormalised(4, "gradient"),
    "adjoint matching": AdjointMatching(),
    "DRaFT": DRaFT(),
}


def variance() -> None:
    """Benchmark: tuning-variance."""
    checkpoint = trained(gmm(), "finetune-base").checkpoint
    _in_parts("tuning-variance", "λ = ", TUNING_STRENGTHS, lambda strength: _variances(checkpoint, strength))


def _variances(checkpoint: Path, strength: float) -> dict[str, Any]:
    """Noise over signal of every loss's gradient at the base."""
    reward, out = steering_task("gmm-inverse").reward(""), {}
    for title, method in OBJECTIVES.items():
        base = MetaFlowMap.from_pretrained(checkpoint)
        sharp = LinearGaussian(reward.A, reward.y, reward.noise_std, strength)
        _, bill = _gradients(base, sharp, method, 320, 1)
        rows = max(32, round(EVALUATIONS / (bill / 320)) // 32 * 32)
        gradients, bill = _gradients(base, sharp, method, rows, BATCHES)
        out[title] = {"rows": rows, "evaluations": bill, **noise_to_signal(gradients)}
        say(f"  {title}: noise over signal {out[title]['ratio']:.3g}")
    return {"strength": strength, "methods": out}


def _gradients(
    base: MetaFlowMap, reward: LinearGaussian, method: TuningObjective, rows: int, batches: int
) -> tuple[Tensor, float]:
    """The loss's gradient in the student's weights, the base's own, of each batch (batches, weights); a batch's bill.

    The bill is network calls, backward passes counted twice, whatever is learned from warming up left out.
    """
    config = FinetuneConfig(checkpoint="finetune-base", checkpoint_sha256="", reward="gmm-inverse", map="none",
                            steps=WARM + batches, method=method, states=STATES, batch_size=rows)  # fmt: skip
    problem = make_problem(config, base, reward)
    objective, student = make_objective(config, problem), make_student(config, base)
    weights, found = list(student.parameters()), []
    for step in range(WARM + batches):
        if step == WARM:
            before = dict(problem.calls)
        batch = objective.batch(student, step)
        if step >= WARM:
            loss = objective(student, batch).mean()
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
            found.append(torch.cat([part.flatten() for part in parts if part is not None]).double())
    calls = {name: (count - before[name]) / batches for name, count in problem.calls.items()}
    return torch.stack(found), calls["forwards"] + 2 * calls["backwards"]


def noise_to_signal(gradients: Tensor) -> dict[str, float]:
    """tr Cov g / ‖E g‖² of independent gradients (B, P), the square less what scatters into it; NaN where none is left.

    ``cosine`` is the mean one between a gradient and the mean of the others.
    """
    count, mean = len(gradients), gradients.mean(0)
    noise = float(gradients.var(0).sum())
    signal = float(mean.square().sum()) - noise / count
    others = (count * mean - gradients) / (count - 1)
    cosine = float(torch.cosine_similarity(gradients, others, dim=1).mean())
    return {"ratio": noise / signal if signal > 0 else float("nan"), "cosine": cosine}
