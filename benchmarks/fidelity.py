"""Benchmark 1: posterior fidelity of the recipes, as ratios to the sampling floor; and 4: map against GLASS."""

from benchmarks.common import judged, keep, say, table, trained
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig
from metaflowmaps.recipes.gmm import gmm, gmm_from_data

# a context: 256 sets in all at 8,192 samples, 128 at 65,536
ONE_STEP = {"map_steps": (1,), "glass_steps": ()}
SETS = {8192: 8, 65536: 4}


def main() -> None:
    """Train the three recipes, judge each, print and keep the table."""
    figures, rows = {}, []
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
            ratios = metrics["ratio"]
            worst = max(spread or 0.0 for spread in metrics["spread"].values())
            rows.append([name, f"{samples:,}", f"{run.seconds:.0f}", *ratios.values(), f"{worst:.3f}"])
    head = ["recipe", "samples", "seconds", *(f"t = {t}" for t in ratios), "± (largest)"]
    print(table(head, rows))
    keep("fidelity", "python -m benchmarks fidelity", figures)


def glass() -> None:
    """How many calls GLASS needs to match one map step, with the default map's own drift, by integrator."""
    run = trained(gmm(), "fidelity-default")
    figures, rows = {}, []
    for method, spacing, steps, calls in (
        ("euler", "uniform", (1, 2, 4, 8, 16, 32, 64, 128), 1),
        ("euler", "angle", (1, 2, 4, 8, 16, 32, 64, 128), 1),
        ("midpoint", "angle", (1, 2, 4, 8, 16, 32), 2),
    ):
        say(f"glass: {method}, {spacing}")
        config = PosteriorEvalConfig(
            glass_steps=steps, glass_method=method, glass_spacing=spacing, sets=8, map_steps=(1, 2, 4)
        )
        metrics = judged(run, config).metrics()
        figures[f"{method}, {spacing}"] = metrics
        matched = metrics["glass_calls_to_match_one_map_step"]
        limit = f"> {calls * steps[-1]}"
        rows.append([f"{method}, {spacing} steps", *(calls * n if n else limit for n in matched.values())])
        for name, values in metrics["by_sampler"].items():
            if spacing == "uniform" or name.startswith("glass"):
                rows.append([f"  {name} error", *(f"{v:.4f}" for v in values.values())])
    print(table(["GLASS calls to match one map step", *(f"t = {t}" for t in matched)], rows))
    keep("glass", "python -m benchmarks glass", figures)
