"""Benchmark 1: posterior fidelity of the recipes, as ratios to the sampling floor; and 4: map against GLASS."""

from benchmarks.common import judged, keep, say, trained
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig
from metaflowmaps.recipes.gmm import gmm, gmm_from_data

# a context: 256 sets in all at 8,192 samples, 128 at 65,536
ONE_STEP = {"map_steps": (1,), "glass_steps": ()}
SETS = {8192: 8, 65536: 4}


def main() -> None:
    """Train the three recipes, judge each, keep and print the table."""
    figures = {}
    for name, config, judgements in (
        ("default", gmm(), {8192: ONE_STEP, 65536: ONE_STEP}),
        ("fast", gmm(fast=True), {8192: ONE_STEP}),
        ("from data", gmm_from_data(), {8192: ONE_STEP}),
    ):
        say(f"fidelity: training {name}")
        run = trained(config, f"fidelity-{name.replace(' ', '-')}")
        for samples, samplers in judgements.items():
            say(f"fidelity: judging {name} with {samples} samples")
            metrics = judged(run, PosteriorEvalConfig(samples=samples, sets=SETS[samples], **samplers)).metrics()
            figures[f"{name}, {samples} samples"] = {"train_seconds": run.seconds, "steps": run.step, **metrics}
    keep("fidelity", "python -m benchmarks fidelity", figures)


def glass() -> None:
    """How many calls GLASS needs to match one map step, with the default map's own drift, by integrator."""
    run = trained(gmm(), "fidelity-default")
    figures = {}
    for method, spacing, steps in (
        ("euler", "uniform", (1, 2, 4, 8, 16, 32, 64, 128)),
        ("euler", "angle", (1, 2, 4, 8, 16, 32, 64, 128)),
        ("midpoint", "angle", (1, 2, 4, 8, 16, 32)),
    ):
        say(f"glass: {method}, {spacing}")
        config = PosteriorEvalConfig(
            glass_steps=steps, glass_method=method, glass_spacing=spacing, sets=8, map_steps=(1, 2, 4)
        )
        figures[f"{method}, {spacing}"] = judged(run, config).metrics()
    keep("glass", "python -m benchmarks glass", figures)
