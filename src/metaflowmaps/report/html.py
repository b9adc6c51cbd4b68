"""One self-contained HTML page from any runs: figures first, tables second, light and dark, no network."""

import base64
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaflowmaps.errors import InputError

Tables = dict[str, tuple[list[str], list[list[str]]]]

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --quiet: #5d646d; --paper: #ffffff; --line: #dfe3e8; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --quiet: #a2a9b3; --paper: #14171b; --line: #2f353d; --card: #1c2026; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .5rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
code { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: .1rem .35rem;
  overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figcaption { color: var(--quiet); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--quiet); font-weight: 600; }
"""

CAPTIONS = {
    "posteriors.png": "Draws of the map in one network call (dots) over the exact posterior (contours of 50, 90 and "
    "99 % of its mass), for one noisy state at each time, the most ambiguous of eight. At t = 0 the state says nothing "
    "and the posterior is the data law; as t → 1 it closes in on the state.",
    "error-against-calls.png": "Sliced W2 distance to the exact posterior, in units of its standard deviation, "
    "against network calls a draw. Dashed: the same figure between two exact samples; nothing can be seen below it.",
    "steered.png": "Samples of each method (dots) over the exact tilted law (contours of 50, 90 and 99 % of its mass). "
    "SW2 as a ratio to the distance between two exact sample sets of that size; NFE by the paper's convention.",
    "error-against-cost.png": "Error against the cost of one returned sample, in network and reward evaluations (left) "
    "and in time on this machine (right). Dashed: exact samples.",
    "trajectory.png": "Effective number of draws behind each estimate, and the size of the estimated gradient of the "
    "value, along the trajectory.",
    "value-against-calls.png": "Error and correlation of the estimated value against network calls a draw. Dashed: the "
    "same number of exact draws.",
    "training.png": "Training loss, mean over each logging window.",
    "samples.png": "Samples.",
}


def write_report(runs: list[Path], out: Path) -> Path:
    """Join the runs' results, figures and tables into ``out``."""
    sections = [_section(run) for run in runs]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Meta Flow Maps report</title><style>{STYLE}</style></head><body>"
        "<h1>Meta Flow Maps</h1>"
        '<p class="quiet">A meta flow map draws clean data from p(x₁ | x<sub>t</sub>) in one network call, '
        "for any noisy state x<sub>t</sub> at any time t.</p>" + "".join(sections) + "</body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(out)
    return out


def _section(run: Path) -> str:
    results = read_results(run)
    title = TITLES.get(results["command"], results["command"])
    parts = [f"<h2>{html.escape(title)}</h2>"]
    if results.get("invocation"):
        parts.append(f"<p><code>{html.escape(results['invocation'])}</code></p>")
    for picture in sorted(
        run.glob("*.png"), key=lambda p: (list(CAPTIONS).index(p.name) if p.name in CAPTIONS else 99, p.name)
    ):
        data = base64.b64encode(picture.read_bytes()).decode()
        caption = CAPTIONS.get(picture.name, picture.stem)
        parts.append(
            f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    parts.append(_tables(results))
    environment = ", ".join(f"{k} {v}" for k, v in results["environment"].items() if v is not None)
    parts.append(f'<p class="quiet">{html.escape(environment)}</p>')
    return "<section>" + "".join(parts) + "</section>"


TITLES = {
    "train": "Training",
    "eval posterior": "Posterior fidelity",
    "posterior": "Posterior draws",
    "sample": "Samples",
    "steer": "Steered samples",
    "eval steering": "Steering",
    "eval value": "Value estimation",
}


def read_results(run: Path) -> dict[str, Any]:
    """results.json of a run's directory."""
    file = run / "results.json"
    if not file.is_file():
        raise InputError(f"{file} does not exist: give the --out directory of a finished command")
    try:
        results: dict[str, Any] = json.loads(file.read_text())
        if results["schema"] != 1:
            raise InputError(f"{file} has schema {results['schema']}, this version reads 1: update metaflowmaps")
        _ = results["command"], results["metrics"], results["cost"], results["environment"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged ({error}); run its command again") from None
    return results


def _tables(results: dict[str, Any]) -> str:
    metrics, cost = results["metrics"], results["cost"]
    if results["command"] in TABLES:
        return "".join(
            f"<h3>{html.escape(name)}</h3>" + _table(*table)
            for name, table in TABLES[results["command"]](metrics).items()
        )
    rows = [[k, _number(v)] for k, v in {**metrics, **cost}.items() if isinstance(v, int | float)]
    return _table(["figure", "value"], rows)


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
    first = [[name, *(_number(values[t]) for t in times)] for name, values in rows.items()]
    second = [
        [f"{name}, calls a draw: {metrics['network_calls_per_draw'][name]:g}", *(_number(values[t]) for t in times)]
        for name, values in metrics["by_sampler"].items()
    ]
    second.append(["floor", *(_number(metrics["floor_of_others"][t]) for t in times)])
    matched = metrics["glass_calls_to_match_one_map_step"]
    second.append(["GLASS calls to match one map step", *(str(matched[t] or "more") for t in times)])
    return {
        "Relative sliced W2 of one map step": (head, first),
        "By sampler, on the first of the contexts": (head, second),
    }


def steering_tables(metrics: dict[str, Any]) -> Tables:
    """The tables of ``mfm eval steering``: one row a method and number of draws."""
    head = [
        "method", "N", "SW2 / floor", "MMD", "mode L1", "reward", "NFE", "ms", "network", "backward", "reward calls",
        "samples",
    ]  # fmt: skip
    rows = []
    for name, by_draws in metrics["methods"].items():
        for key in sorted(by_draws, key=int):
            cell = by_draws[key]
            cost, total = cell["cost"], cell["samples"] * cell["seeds"]
            rows.append(
                [
                    name, key, _number(cell["sw2"] / cell["floor_sw2"]), _number(cell["mmd"]), _number(cell["mode_l1"]),
                    _number(cell["reward"]), f"{cost['nfe']:,.0f}", _number(1000 * cost["seconds"] / total),
                    *(f"{cost[k] / total:,.0f}" for k in ("forwards", "backwards", "reward_calls")),
                    f"{cell['seeds']} × {cell['samples']:,}",
                ]
            )  # fmt: skip
    floor = metrics["floor"]
    rows.append(
        ["exact samples", "–", "1", "–", _number(floor["mode_l1"]), _number(metrics["exact_reward"])] + ["–"] * 6
    )
    return {"Steering, costs per returned sample": (head, rows)}


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
                    *(_number(at[t][what]) for t in times),
                    _number(metrics["seconds_by_sampler"][name]),
                ]
                for name, at in metrics["by_sampler"].items()
            ],
        )
    tables["RMSE of the value"][1].append(
        ["spread of the exact value", *(_number(v) for v in metrics["value_std"].values()), "–"]
    )
    return tables


TABLES: dict[str, Callable[[dict[str, Any]], Tables]] = {
    "eval posterior": posterior_tables,
    "eval steering": steering_tables,
    "eval value": value_tables,
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"
