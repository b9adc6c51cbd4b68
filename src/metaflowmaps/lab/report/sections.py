"""What a command's results look like in words and tables: one Section a command, in SECTIONS.

A new evaluation writes its Section in a file of its own and adds one line to SECTIONS. Or it needs none of this:
metrics may describe themselves, by ``metrics["tables"]`` = {title: {"head": […], "rows": [[…]]}} (numbers are formatted
here), ``metrics["captions"]`` = {picture's file name: caption} and ``metrics["summary"]`` = one sentence. What the
metrics say of themselves goes before what the Section would say.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from metaflowmaps.errors import InputError
from metaflowmaps.steering import Exact

Results = dict[str, Any]
Tables = dict[str, tuple[list[str], list[list[str]]]]


def _no_summary(results: Results) -> str:
    return ""


class Section(NamedTuple):
    """A command in the report: its title, captions by picture, and functions of metrics and of results."""

    title: str
    captions: dict[str, str] = {}  # noqa: RUF012 (never written to)
    tables: Callable[[dict[str, Any]], Tables] | None = None
    summary: Callable[[Results], str] = _no_summary


def number(value: Any) -> str:
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


def figure(value: float | None) -> float:
    """A figure of results, which hold nothing where it was not finite."""
    return math.nan if value is None else float(value)


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def tables_of(results: Results) -> Tables:
    """The tables of any results: those the metrics carry, those of the command's Section, or every quantity by name."""
    metrics = results["metrics"]
    if "tables" in metrics:
        return {title: _carried(title, table) for title, table in metrics["tables"].items()}
    section = SECTIONS.get(results["command"])
    if section is not None and section.tables is not None:
        return section.tables(metrics)
    rows = [[name, number(value)] for name, value in leaves({**metrics, **results["cost"]})]
    return {"Measured": (["quantity", "value"], rows)} if rows else {}


def _carried(title: str, table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head, rows = [str(name) for name in table["head"]], [[number(cell) for cell in row] for row in table["rows"]]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"the rows of table {title!r} differ in length from its head")
    return head, rows


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of nested results, by dotted name; lists, captions and summaries are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            if prefix or name != "captions":
                yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) or (isinstance(value, str) and (prefix or name != "summary")):
            yield prefix + name, value


def _training_summary(results: Results) -> str:
    metrics, cost = results["metrics"], results["cost"]
    return (
        f"A map of {metrics['parameters']:,} parameters, trained for {cost['steps']:,} steps in "
        f"{duration(cost['seconds'])}; loss at the end {number(metrics['loss'])}."
    )


def _sample_summary(results: Results) -> str:
    config = results["config"]
    return f"{config['num']:,} samples by {config['method']}, {config['steps']} network calls each."


def _draws_summary(results: Results) -> str:
    config = results["config"]
    return f"{config['num_draws']:,} draws of clean data given one noisy state at t = {config['t']:g}."


def _steer_summary(results: Results) -> str:
    metrics, config = results["metrics"], results["config"]
    return (
        f"{metrics['num']:,} samples by {config['method']}: mean reward {number(metrics['reward_mean'])}, "
        f"{number(float(results['cost']['nfe']))} NFE each."
    )


def posterior_tables(metrics: dict[str, Any]) -> Tables:
    """The tables of ``mfm eval posterior``: one map step against its floor, and every sampler."""
    times = list(metrics["relative_sw2"])
    head = ["t", *(f"{float(t):g}" for t in times)]
    rows = {
        "one map step": metrics["relative_sw2"],
        "floor (two exact samples)": metrics["floor"],
        "ratio to floor": metrics["ratio"],
        "± of a ratio (standard error)": metrics["spread"],
    }
    first = [[name, *(number(values[t]) for t in times)] for name, values in rows.items()]
    second = [
        [f"{name}, calls a draw: {metrics['network_calls_per_draw'][name]:g}", *(number(values[t]) for t in times)]
        for name, values in metrics["by_sampler"].items()
    ]
    second.append(["floor", *(number(metrics["floor_of_others"][t]) for t in times)])
    matched = metrics["glass_calls_to_match_one_map_step"]
    second.append(["GLASS calls to match one map step", *(str(matched[t] or "more") for t in times)])
    return {
        "Relative sliced W2 of one map step": (head, first),
        "By sampler, on the first of the contexts": (head, second),
    }


def _posterior_summary(results: Results) -> str:
    error, ratio = results["metrics"]["relative_sw2"], results["metrics"]["ratio"]
    worst = max(ratio, key=lambda t: (math.isnan(figure(ratio[t])), figure(ratio[t])))
    return (
        f"One network call a draw is at most {figure(ratio[worst]):.2f} times as far from the exact posterior as a "
        f"second exact sample is (t = {float(worst):g}: sliced W2 of {number(error[worst])} posterior standard "
        "deviations)."
    )


def steering_tables(metrics: dict[str, Any]) -> Tables:
    """The tables of ``mfm eval steering``: one row a method and number of draws."""
    head = [
        "method",
        "N",
        "SW2 / floor",
        "MMD",
        "mode L1",
        "reward",
        "NFE",
        "ms",
        "network",
        "backward",
        "reward calls",
        "samples",
    ]
    rows = []
    for name, key, cell in _cells(metrics):
        cost, total = cell["cost"], cell["samples"] * cell["seeds"]
        rows.append(
            [
                name,
                key,
                number(figure(cell["sw2"]) / cell["floor_sw2"]),
                number(cell["mmd"]),
                number(cell["mode_l1"]),
                number(cell["reward"]),
                f"{cost['nfe']:,.0f}",
                number(1000 * cost["seconds"] / total),
                *(f"{cost[k] / total:,.0f}" for k in ("forwards", "backwards", "reward_calls")),
                f"{cell['seeds']} × {cell['samples']:,}",
            ]
        )
    floor = metrics["floor"]
    rows.append(["exact samples", "–", "1", "–", number(floor["mode_l1"]), number(metrics["exact_reward"])] + ["–"] * 6)
    return {"Steering, costs per returned sample": (head, rows)}


def _cells(metrics: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, by_draws in metrics["methods"].items():
        for key in sorted(by_draws, key=int):
            yield by_draws[key].get("title", name), key, by_draws[key]


def _steering_summary(results: Results) -> str:
    # the exact method knows the law: it is what the others are held against
    methods = {name: by_draws for name, by_draws in results["metrics"]["methods"].items() if name != Exact.name}
    cells = [cell for cell in _cells({"methods": methods}) if math.isfinite(figure(cell[2]["sw2"]))]
    name, key, best = min(cells, key=lambda cell: float(cell[2]["sw2"] / cell[2]["floor_sw2"]))
    draws = "" if key == "0" else f" with {key} draws a step"
    return (
        f"{len(results['metrics']['methods'])} methods; the nearest to the exact tilted law is {name}{draws}, at "
        f"{best['sw2'] / best['floor_sw2']:.2f} times the distance between two exact sample sets for "
        f"{best['cost']['nfe']:,.0f} NFE a sample."
    )


def value_tables(metrics: dict[str, Any]) -> Tables:
    """The tables of ``mfm eval value``."""
    times = list(next(iter(metrics["by_sampler"].values())))
    head = ["sampler, calls a draw", *(f"t = {float(t):g}" for t in times), "seconds"]
    tables: Tables = {}
    for what, title in (("rmse", "RMSE of the value"), ("pearson", "Pearson r with the exact value")):
        tables[title] = (
            head,
            [
                [
                    f"{name}, {metrics['network_calls_per_draw'][name]:g}",
                    *(number(at[t][what]) for t in times),
                    number(metrics["seconds_by_sampler"][name]),
                ]
                for name, at in metrics["by_sampler"].items()
            ],
        )
    tables["RMSE of the value"][1].append(
        ["spread of the exact value", *(number(v) for v in metrics["value_std"].values()), "–"]
    )
    return tables


def _value_summary(results: Results) -> str:
    metrics = results["metrics"]
    one = metrics["by_sampler"]["map-1"]
    worst = min(one, key=lambda t: (not math.isnan(figure(one[t]["pearson"])), figure(one[t]["pearson"])))
    return (
        f"The value from {metrics['num_draws']} draws of one network call each correlates with the exact one at "
        f"r ≥ {figure(one[worst]['pearson']):.3f} (t = {float(worst):g})."
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
        posterior_tables,
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
        steering_tables,
        _steering_summary,
    ),
    "eval value": Section(
        "Value estimation",
        {
            "value-against-calls.png": "Error and correlation of the estimated value against network calls a draw. "
            "Dashed: the same number of exact draws."
        },
        value_tables,
        _value_summary,
    ),
}


def described(results: Results) -> tuple[Section, str, Tables]:
    """The Section a command has or gets, one sentence of summary ("" if none), and its tables.

    Metrics with tables of their own speak for themselves: the command's usual tables and summary do not describe them.
    """
    known = SECTIONS.get(results["command"], Section(f"mfm {results['command']}"))
    metrics = results["metrics"]
    try:
        summary = str(metrics.get("summary") or ("" if "tables" in metrics else known.summary(results)))
        captions = {**{str(k): str(v) for k, v in metrics.get("captions", {}).items()}}
        captions.update({k: v for k, v in known.captions.items() if k not in captions})
        return known._replace(captions=captions), summary, tables_of(results)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        lacks = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"metrics of {results['command']!r} do not fit ({lacks})") from None
