"""mfm eval posterior on a mixture."""

import time
from collections.abc import Iterable
from pathlib import Path

from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.shared import (
    Results,
    Say,
    begun,
    beside,
    digest,
    judging_law,
    open_model,
    panels,
)
from metaflowmaps.errors import unknown
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.recipes.gmm import LAW
from metaflowmaps.sampling import INTEGRATORS
from metaflowmaps.work.config import override, validated

SHOWN = ["none", "mfm-g", "mfm-gf", "mfm-smc", "dps", "tds", "best-of-n", "exact"]
LAWS = {"gmm": LAW}


def eval_posterior(
    checkpoint: str,
    law: str,
    samples: int,
    out: Path | None,
    settings: Iterable[str],
    seed: int,
    device: str,
    invocation: str,
    say: Say,
) -> Results:
    """Relative sliced W2 at each t for the map and for GLASS with the map's own drift."""
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    config = override(validated(PosteriorEvalConfig, {"samples": samples, "seed": seed}), settings)
    model, found, target = open_model(checkpoint, device)
    mixture = judging_law(checkpoint, found, LAWS[law], f"--law {law}")
    if config.glass_method not in INTEGRATORS:
        raise unknown("glass_method", config.glass_method, INTEGRATORS)
    out = out or beside(checkpoint, found, f"eval-posterior-{config.samples}")
    full = {"checkpoint": digest(found), "law": law, **config.model_dump()}
    done = begun(out, "eval posterior", full)
    if done is not None:
        return done
    began = time.perf_counter()
    measured = evaluate_posterior(model, mixture, config, lambda line: say(f"eval posterior: {line}"))
    metrics = measured.metrics()
    cost = {"seconds": time.perf_counter() - began, "seconds_by_sampler": measured.seconds}
    figures.save(panels(model, mixture, seed), out / "posteriors.png")
    figures.save(figures.error_against_calls(metrics), out / "error-against-calls.png")
    results = write_results(out, "eval posterior", full, metrics, cost, seed=seed, device=target, invocation=invocation)
    return {**results, "out": str(out / "results.json")}
