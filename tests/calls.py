"""Steering and values from names and plain options, as the command line has them: tests are parametrised over names."""

from typing import Any

import metaflowmaps as mfm
from metaflowmaps.steering import Method, Process
from metaflowmaps.value import Estimator
from metaflowmaps.work.choices import choose, options_of, with_options

CALL = ("cond", "batch_size", "callback", "progress")


def steer(
    model: Any,
    reward: Any,
    n: int,
    method: str = "mfm-g",
    num_draws: int = 4,
    steps: int = 250,
    process: str = "ode",
    generator: Any = None,
    seeds: Any = None,
    **options: Any,
) -> mfm.SteerResult:
    """``mfm.steer`` with each option given to the object that has it."""
    kind, moves = choose(Method, method), choose(Process, process)
    call = {name: options.pop(name) for name in CALL if name in options}
    control = {name: options.pop(name) for name in options_of(moves) if name in options}
    if kind is mfm.Glass:  # the estimator's options are its own
        estimator = choose(Method, options.pop("estimator", "mfm-gf"))
        own = {
            name: options.pop(name)
            for name in options_of(estimator)
            if name in options and name not in options_of(kind)
        }
        options["estimator"] = with_options(estimator, own)
    made = with_options(kind, options)
    made = made.with_draws(num_draws) if made.draws else made
    on = moves(**{"steps": steps, **control})
    return mfm.steer(model, reward, n, made, on, seed=generator if seeds is None else seeds, **call)


def value_gradient(
    posterior: Any,
    reward: Any,
    t: Any,
    x_t: Any,
    num_draws: int,
    method: str = "gradient",
    generator: Any = None,
    cond: Any = None,
    **options: Any,
) -> mfm.ValueEstimate:
    """``mfm.value_gradient`` with an estimator of these options."""
    estimator = with_options(choose(Estimator, method), options)
    return mfm.value_gradient(posterior, reward, t, x_t, num_draws, estimator, generator, cond)
