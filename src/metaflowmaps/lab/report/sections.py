"""What a command's results look like in words and tables: one Section a command, in SECTIONS.

A new evaluation needs no Section: its metrics may describe themselves, by ``metrics["tables"]`` = {title: {"head": […],
"rows": [[…]]}} (numbers are formatted here), ``metrics["captions"]`` = {picture's file name: caption} and
``metrics["summary"]`` = one sentence. What the metrics say of themselves goes before what the Section would say.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from metaflowmaps.errors import InputError
from metaflowmaps.lab.results import (
    Metrics,
    Number,
    PosteriorErrors,
    Results,
    ResultView,
    Spoken,
    Steering,
    ValueErrors,
)
from metaflowmaps.steering import Exact

Tables = dict[str, tuple[list[str], list[list[str]]]]  # by title: the head, and rows as long as it


@dataclass(frozen=True)
class Section:
    """A command in the report: its title, captions by picture, and what makes its tables and its summary."""

    title: str
    captions: Mapping[str, str] = field(default_factory=dict)
    tables: Callable[[Metrics], Tables] | None = None
    summary: Callable[[Results], str] = lambda results: ""
    brief: Callable[[Metrics], Tables] = lambda metrics: {}  # few columns: what a page shows of tables that are wide


@dataclass(frozen=True)
class Description:
    """What the report says of a run."""

    title: str
    captions: Mapping[str, str]
    summary: str
    tables: Tables
    brief: Tables


def described(document: Results | Mapping[str, object]) -> Description:
    """Title, captions, summary ("" if none) and tables of a command's results.

    Metrics with tables of their own speak for themselves: the command's usual tables and summary do not describe them.
    """
    results = Results.of(document)
    known = SECTIONS.get(results.command, Section(f"mfm {results.command}"))
    try:
        spoken, tables = Spoken.of(results.metrics), tables_of(results)
        usual = spoken.tables is None
        summary = spoken.summary or (known.summary(results) if usual else "")
        brief = known.brief(results.metrics) if usual else {}
    except (InputError, ValueError, LookupError, StopIteration) as error:
        raise InputError(f"metrics of {results.command!r} do not fit ({error})") from None
    captions = {**spoken.captions, **_missing(known.captions, spoken.captions)}
    return Description(known.title, captions, summary, tables, brief)


def _missing(usual: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    return {picture: caption for picture, caption in usual.items() if picture not in own}


def tables_of(document: Results | Mapping[str, object]) -> Tables:
    """The tables of any results: those the metrics carry, those of the command's Section, or every quantity by name."""
    results = Results.of(document)
    carried, section = Spoken.of(results.metrics).tables, SECTIONS.get(results.command)
    if carried is not None:
        if any(len(row) != len(table.head) for table in carried.values() for row in table.rows):
            raise InputError("a row of a table differs in length from its head")
        return {
            title: (table.head, [[number(cell) for cell in row] for row in table.rows])
            for title, table in carried.items()
        }
    if section is not None and section.tables is not None:
        return section.tables(results.metrics)
    rows = [[name, number(value)] for name, value in leaves({**results.metrics, **results.cost})]
    return {"Measured": (["quantity", "value"], rows)} if rows else {}


def leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Numbers and words of nested results, by dotted name; lists, captions, summaries and stories are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            if prefix or name not in ("captions", "story"):
                yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) or (isinstance(value, str) and (prefix or name != "summary")):
            yield prefix + name, value


def number(value: object) -> str:
    """A cell: four digits of a number, yes and no, text as it is, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def numbers(values: Mapping[str, object]) -> list[str]:
    """Cells of the values, in their order."""
    return [number(value) for value in values.values()]


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def at(time: str) -> str:
    """A time, as it is read."""
    return f"{float(time):g}"


def worst(values: Mapping[str, float], sign: int = 1) -> str:
    """The key of the largest value (sign -1: the smallest); one that is not known is worse than any."""
    return max(values, key=lambda key: (math.isnan(values[key]), sign * values[key]))


# -- training and samples ----------------------------------------------------------------------------------------------


class Trained(ResultView):
    """What a training says of itself."""

    parameters: int
    loss: Number
    steps: int
    seconds: float


class Asked(ResultView):
    """What samples were asked for."""

    method: str = ""
    num: int = 0
    num_draws: int = 0
    steps: int = 0
    t: float = 0.0


class Named(ResultView):
    """A choice with its options, of which its name is told."""

    name: str


class SteeredSummary(ResultView):
    """What steered samples were asked for, and what they got."""

    method: Named
    method_title: str = ""
    num: int
    reward_mean: Number = math.nan
    nfe: Number = math.nan


def _training_summary(results: Results) -> str:
    run = Trained.of({**results.metrics, **results.cost})
    took = f"trained for {run.steps:,} steps in {duration(run.seconds)}"
    return f"A map of {run.parameters:,} parameters, {took}; loss at the end {number(run.loss)}."


def _sample_summary(results: Results) -> str:
    asked = Asked.of(results.config)
    return f"{asked.num:,} samples by {asked.method}, {asked.steps} network calls each."


def _draws_summary(results: Results) -> str:
    asked = Asked.of(results.config)
    return f"{asked.num_draws:,} draws of clean data given one noisy state at t = {asked.t:g}."


def _steer_summary(results: Results) -> str:
    steered = SteeredSummary.of({**results.config, **results.metrics, **results.cost})
    reached = f"mean reward {number(steered.reward_mean)}, {number(steered.nfe)} NFE each"
    return f"{steered.num:,} samples by {steered.method_title or steered.method.name}: {reached}."


# -- evaluations on mixtures -------------------------------------------------------------------------------------------


def _posterior_tables(metrics: Metrics) -> Tables:
    """One map step against its floor, and every sampler."""
    errors = PosteriorErrors.of(metrics)
    leading = "one map step" if "map-1" in errors.by_sampler else _most_calls(errors)
    head = ["t", *map(at, errors.relative_sw2)]
    one = [
        [leading, *numbers(errors.relative_sw2)],
        ["floor (two exact samples)", *numbers(errors.floor)],
        ["ratio to floor", *numbers(errors.ratio)],
        ["± of a ratio (standard error)", *numbers(errors.spread)],
    ]
    matched = errors.glass_calls_to_match_one_map_step.values()
    every = [
        *([_called(name, errors), *numbers(by_time)] for name, by_time in errors.by_sampler.items()),
        ["floor", *numbers(errors.floor_of_others)],
        ["GLASS calls to match one map step", *(str(calls or "more") for calls in matched)],
    ]
    return {
        f"Relative sliced W2 of {leading}": (head, one),
        "By sampler, on the first of the contexts": (head, every),
    }


def _most_calls(errors: PosteriorErrors | ValueErrors) -> str:
    """What leads where there is no map: GLASS in the most calls."""
    calls = errors.network_calls_per_draw
    return max(calls, key=lambda name: calls[name])


def _called(name: str, errors: PosteriorErrors | ValueErrors) -> str:
    return f"{name}, calls a draw: {errors.network_calls_per_draw[name]:g}"


def _posterior_summary(results: Results) -> str:
    errors = PosteriorErrors.of(results.metrics)
    t = worst(errors.ratio)
    return (
        f"One network call a draw is at most {errors.ratio[t]:.2f} times as far from the exact posterior as a second "
        f"exact sample is (t = {at(t)}: sliced W2 of {number(errors.relative_sw2[t])} posterior standard deviations)."
    )


COSTS = ("NFE", "ms", "network", "backward", "reward calls")
STEERING_HEAD = ["method", "N", "SW2 / floor", "MMD", "mode L1", "reward", *COSTS, "samples"]


def _steering_tables(metrics: Metrics) -> Tables:
    """One row a method and number of draws."""
    steering, rows = Steering.of(metrics), []
    for name, key, cell in steering.cells():
        errors = map(number, (cell.ratio, cell.mmd, cell.mode_l1, cell.reward))
        cost, counts = cell.cost, (cell.cost.forwards, cell.cost.backwards, cell.cost.reward_calls)
        each = [f"{cost.nfe:,.0f}", number(cell.milliseconds), *(f"{count / cell.total:,.0f}" for count in counts)]
        rows.append([cell.title or name, key, *errors, *each, f"{cell.seeds} × {cell.samples:,}"])
    exact = ["1", "–", number(steering.floor.mode_l1), number(steering.exact_reward)]
    rows.append(["exact samples", "–", *exact, *["–"] * 6])
    return {"Steering, costs per returned sample": (STEERING_HEAD, rows)}


def _steering_brief(metrics: Metrics) -> Tables:
    """What each method reaches and costs, in few columns."""
    rows = []
    for name, key, cell in Steering.of(metrics).cells():
        called = (cell.title or name) + (f", N = {key}" if key != "0" else "")
        cost = (f"{cell.cost.nfe:,.0f}", f"{cell.milliseconds / 1000:.2g}")
        rows.append([called, f"{cell.ratio:.3g}", f"{cell.reward:.3g}", *cost])
    return {"Error and cost of a sample": (["method", "SW2 / floor", "reward", "evaluations", "seconds"], rows)}


def _steering_summary(results: Results) -> str:
    steering = Steering.of(results.metrics)
    # the exact method knows the law: it is what the others are held against
    cells = [cell for cell in steering.cells() if cell[0] != Exact.name and math.isfinite(cell[2].ratio)]
    if not cells:
        return f"{len(steering.methods)} methods, none with samples that can be compared with the exact tilted law."
    name, key, best = min(cells, key=lambda cell: cell[2].ratio)
    draws = "" if key == "0" else f" with {key} draws a step"
    return (
        f"{len(steering.methods)} methods; the nearest to the exact tilted law is {best.title or name}{draws}, at "
        f"{best.ratio:.2f} times the distance between two exact sample sets for {best.cost.nfe:,.0f} NFE a sample."
    )


def _value_tables(metrics: Metrics) -> Tables:
    """RMSE and correlation by sampler and time."""
    errors = ValueErrors.of(metrics)
    head = ["sampler, calls a draw", *(f"t = {at(t)}" for t in errors.times), "seconds"]
    rmse, pearson = (
        [
            [
                f"{name}, {errors.network_calls_per_draw[name]:g}",
                *(number(getattr(by_time[t], what)) for t in errors.times),
                number(errors.seconds_by_sampler[name]),
            ]
            for name, by_time in errors.by_sampler.items()
        ]
        for what in ("rmse", "pearson")
    )
    rmse.append(["spread of the exact value", *numbers(errors.value_std), "–"])
    return {"RMSE of the value": (head, rmse), "Pearson r with the exact value": (head, pearson)}


def _value_summary(results: Results) -> str:
    errors = ValueErrors.of(results.metrics)
    leading = "map-1" if "map-1" in errors.by_sampler else _most_calls(errors)
    one = {t: fit.pearson for t, fit in errors.by_sampler[leading].items()}
    t, calls = worst(one, -1), errors.network_calls_per_draw[leading]
    each = "one network call" if calls == 1 else f"{calls:g} network calls"
    return (
        f"The value from {errors.num_draws} draws of {each} each correlates with the exact one at "
        f"r ≥ {one[t]:.3f} (t = {at(t)})."
    )


POSTERIORS = (
    "Draws of the map in one network call (dots) over the exact posterior (contours of 50, 90 and "
    "99 % of its mass), for one noisy state at each time, the most ambiguous of eight. At t = 0 the state says nothing "
    "and the posterior is the data law; as t → 1 it closes in on the state."
)
TRAJECTORY = (
    "Effective number of draws behind each estimate, and the size of the estimated gradient of the value, along the "
    "trajectory."
)

SECTIONS = {
    "demo": Section("What a meta flow map does"),
    "train": Section(
        "Training",
        {"posteriors.png": POSTERIORS, "training.png": "Training loss, mean over each logging window."},
        summary=_training_summary,
    ),
    "finetune": Section(
        "Fine-tuning",
        {
            "samples.png": "Samples of the tuned model; for mixtures over the exact tilted law, for images below two "
            "rows of its base.",
            "meters.png": "What was watched while the drift (or, in one stage, the map) was tuned, on samples of the "
            "averaged weights. Dashed: the base. Reward minus divergence is at most log E[e^r] (dotted) and reaches it "
            "at the tilted law alone.",
            "posteriors.png": POSTERIORS,
            "training.png": "Training loss of the last stage, mean over each logging window.",
        },
    ),
    "sample": Section("Samples", {"samples.png": "Samples of the data law."}, summary=_sample_summary),
    "posterior": Section(
        "Posterior draws",
        {"posteriors.png": "Draws (dots) given one noisy state (cross), over the exact posterior where it is known."},
        summary=_draws_summary,
    ),
    "advise": Section("Which method"),
    "steer": Section(
        "Steered samples",
        {"samples.png": "Steered samples, over the exact tilted law where it is known.", "trajectory.png": TRAJECTORY},
        summary=_steer_summary,
    ),
    "eval posterior": Section(
        "Posterior fidelity",
        {
            "posteriors.png": POSTERIORS,
            "error-against-calls.png": "Sliced W2 distance to the exact posterior, in units of its standard deviation, "
            "against network calls a draw. Dashed: the same figure between two exact samples; nothing can be seen "
            "below it.",
        },
        _posterior_tables,
        _posterior_summary,
    ),
    "eval steering": Section(
        "Steering",
        {
            "steered.png": "Samples of each method (dots) over the exact tilted law (contours of 50, 90 and 99 % of "
            "its mass). SW2 as a ratio to the distance between two exact sample sets of that size; NFE by the paper's "
            "convention.",
            "error-against-cost.png": "Error against the cost of one returned sample, in network and reward "
            "evaluations (left) and in time on this machine (right). Dashed: exact samples.",
            "trajectory.png": TRAJECTORY,
        },
        _steering_tables,
        _steering_summary,
        _steering_brief,
    ),
    "eval value": Section(
        "Value estimation",
        {
            "value-against-calls.png": "Error and correlation of the estimated value against network calls a draw. "
            "Dashed: the same number of exact draws."
        },
        _value_tables,
        _value_summary,
    ),
}
