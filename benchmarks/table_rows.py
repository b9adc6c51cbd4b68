"""What the tables of README and docs show: for each its result file, and how its rows are made of that."""

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Rows = list[list[str]]
"""The head and the rows below it."""
DIVERGED, OFF_SCALE = 10.0, 1000.0
METHODS = ["method", "N", "SW2 / floor", "mode L1 (floor)", "MMD", "reward", "NFE", "reward calls", "ms", "samples"]


@dataclass(frozen=True)
class Table:
    """A result file and what of it a table shows."""

    file: str
    rows: Callable[[dict[str, Any]], Rows]


def number(value: Any, places: int = 2) -> str:
    """A cell: figures with a true minus sign, nothing for nothing, words as they are."""
    if not isinstance(value, int | float):
        return value or ""
    return f"{value:,.{places}f}".replace("-", "−")


def numbers(values: Iterable[Any], places: int = 2) -> list[str]:
    """Cells of one precision."""
    return [number(value, places) for value in values]


def times(names: Iterable[str]) -> list[str]:
    """The heads of columns by inner time."""
    return [f"t = {name}" for name in names]


# -- posteriors and losses ---------------------------------------------------------------------------------------------


def one_step(result: dict[str, Any]) -> Rows:
    """The default recipe alone."""
    ratio = result["default, 65536 samples"]["ratio"]
    return [["t", *ratio], ["one step of the map", *numbers(ratio.values())]]


def fidelity(result: dict[str, Any]) -> Rows:
    """Every recipe, against the floor."""
    cells = {name: cell for name, cell in result.items() if name.endswith(" samples")}
    rows = [
        [*re.sub(r"(\d+) samples", lambda n: f"{int(n[1]):,}", name).split(", "), number(cell["train_seconds"], 0),
         *numbers(cell["ratio"].values())]
        for name, cell in cells.items()
    ]  # fmt: skip
    return [["recipe", "samples", "training, s", *times(next(iter(cells.values()))["ratio"])], *rows]


def losses(result: dict[str, Any]) -> Rows:
    """Means over seeds."""

    def shown(value: float, after: str = "") -> str:
        return "diverged" if value > DIVERGED else number(value, 3) + after

    rows = [
        [name, shown(cell["mean"], f" ± {cell['spread']:.3f}"),
         *(shown(statistics.fmean(by_seed)) for by_seed in cell["relative_sw2"].values())]
        for name, cell in result["losses"].items()
    ]  # fmt: skip
    floor = list(result["floor"].values())
    head = ["parameterisation: loss", "mean over t", *times(result["floor"])]
    return [head, *rows, ["floor", *numbers([statistics.fmean(floor), *floor], 3)]]


def glass(result: dict[str, Any]) -> Rows:
    """Errors of GLASS by calls, and the calls that it needs to match the map."""
    first = result["euler, uniform"]
    rows = [
        ["map, 1 call", *numbers(first["by_sampler"]["map-1"].values(), 3)],
        ["floor", *numbers(first["floor_of_others"].values(), 3)],
    ]
    for name, calls_a_step in (("euler, uniform", 1), ("euler, angle", 1), ("midpoint, angle", 2)):
        by_calls = {
            calls_a_step * int(sampler.split("-")[1]): values.values()
            for sampler, values in result[name]["by_sampler"].items() if sampler.startswith("glass")
        }  # fmt: skip
        rows += [
            [f"GLASS {name}, {calls} calls", *numbers(values, 3)]
            for calls, values in by_calls.items() if calls in (4, 16, 32, 64, 128)
        ]  # fmt: skip
        matched = result[name]["glass_calls_to_match_one_map_step"].values()
        shown = [str(calls_a_step * steps) if steps else f"> {max(by_calls)}" for steps in matched]
        rows.append([f"**calls to match, {name}**", *shown])
    return [["error of", *times(first["by_sampler"]["map-1"])], *rows]


def step_cost(result: dict[str, Any], places: int = 1) -> Rows:
    """Milliseconds, and ratios to flow matching."""
    rows = [
        [name, number(cell["milliseconds"], places), number(cell["ratio"]),
         "{:.2f} to {:.2f}".format(*cell["ratio_quartiles"])]
        for name, cell in result["steps"].items()
    ]  # fmt: skip
    return [["step", "ms", "× flow matching", "quartiles"], *rows]


def diffusers_families(result: dict[str, Any]) -> Rows:
    """Differences from the pipelines' own samples; what methods gain and cost."""
    rows = []
    for name, family in result["families"].items():
        errors = [f"{family[key]:.0e}".replace("e-", "e−") for key in ("own", "pictures", "gradient")]
        errors = ["0" if error == "0e+00" else error.replace("−0", "−") for error in errors]
        gained = [f"{cell['gain']:+.2f} ({cell['calls']:.0f})" for cell in family["methods"].values()]
        rows.append([name, *errors, *(cell.replace("-", "−") for cell in gained)])
    methods = next(iter(result["families"].values()))["methods"]
    return [["family", "latents − own", "pictures − own", "decoder's gradient", *methods], *rows]


def diffusers_memory(result: dict[str, Any]) -> Rows:
    """Kilobytes of live tensors by number of draws, of methods by values and by gradients."""
    families, first = result["families"], next(iter(result["families"].values()))
    head = ["family", *(f"{n} draws, {title}" for title, cells in first.items() for n in cells)]
    rows = [
        [name, *(number(peak / 1000, 0) for by in found.values() for peak in by.values())]
        for name, found in families.items()
    ]
    return [head, *rows]


def quick_decoder(result: dict[str, Any]) -> Rows:
    """Seconds and memory of a picture's reward and of its gradient by two decoders, and their ratios."""
    cells = {
        found["kind"]: [
            found["weights"],
            *(found[by][of] for by in ("values", "gradients") for of in ("seconds", "bytes")),
        ]
        for found in result["decoders"].values()
    }
    rows = [
        [
            kind,
            number(weights / 1e6, 1),
            number(value, 1),
            number(held / 1e6, 0),
            number(slope, 1),
            number(most / 1e6, 0),
        ]
        for kind, (weights, value, held, slope, most) in cells.items()
    ]
    ratios = [number(full / quick, 1) for full, quick in zip(*cells.values(), strict=True)]
    head = ["decoder", "M weights", "reward, s", "its memory, MB", "gradient, s", "its memory, MB"]
    return [head, *rows, ["ratio", *ratios]]


def processes(result: dict[str, Any]) -> Rows:
    """Maps of a process with exact posteriors, by number of observations."""
    cells = result["processes"]
    head = ["map of the mixture", "training, s", "steps", *next(iter(cells.values()))["floor"]]
    rows = [
        [name, number(cell["train_seconds"], 0), sampler.removeprefix("map-"), *numbers(ratio.values())]
        for name, cell in cells.items()
        for sampler, ratio in cell["ratio"].items()
    ]
    return [head, *rows]


def forecasts(result: dict[str, Any]) -> Rows:
    """Forecasts of what was held out, by forecaster."""
    head = ["forecaster", "calls", "CRPS", "±", "energy", "in 50 %", "in 90 %", "seconds"]
    rows = []
    for name, cell in result["sunspots"]["forecasts"].items():
        inside = [number(100 * share, 0) for share in cell.get("coverage", {}).values()] or ["", ""]
        scores = numbers([cell["crps"], cell["crps_std_err"], cell["energy"]])
        rows.append([name, number(cell["calls"], 0), *scores, *inside, number(cell["seconds"])])
    return [head, *rows]


def simulators(result: dict[str, Any]) -> Rows:
    """C2ST of posteriors of simulators' parameters, with calls a draw."""
    cells = result["simulators"]
    head = ["simulator", "training, s", *next(iter(cells.values()))["samplers"]]
    rows = [
        [task, number(cell["train_seconds"], 0), *numbers(one["c2st"] for one in cell["samplers"].values())]
        for task, cell in cells.items()
    ]
    return [head, *rows]


def next_frames(result: dict[str, Any]) -> Rows:
    """Forecasts of frames, by forecaster."""
    head = ["forecaster", "calls", "energy", "CRPS"]
    cells = sorted(result["forecasts"].items(), key=lambda item: item[1]["energy"])
    return [head, *([name, number(c["calls"], 0), number(c["energy"]), number(c["crps"], 4)] for name, c in cells)]


def frames_observed(result: dict[str, Any]) -> Rows:
    """One-step forecasts of frames, by how many were given."""
    head = ["frames given", "energy", "last frame", "linear", "spread of the centre, px", "error of its mean, px",
            "in the middle half, %", "outermost, %"]  # fmt: skip
    rows = []
    for count, cell in result["observed"].items():
        shown = ("energy", "energy_last", "energy_linear", "centre_spread", "centre_error")
        scores = numbers(cell[key] for key in shown)
        rows.append([count, *scores, *(number(100 * cell[key], 0) for key in ("inside_half", "outermost"))])
    return [head, *rows]


def precision(result: dict[str, Any]) -> Rows:
    """Errors of derivatives; in bold the default step of each precision."""
    rows = [
        [kind, form, *(f"**{e:.1e}**" if {"float32": "0.005", "bf16": "0.05"}.get(kind) == h else f"{e:.1e}"
                       for h, e in cell.items())]
        for kind, forms in result["relative_errors"].items() for form, cell in forms.items()
    ]  # fmt: skip
    steps = result["relative_errors"]["float32"]["Eulerian"]
    return [["precision", "derivative", *(h if h == "JVP" else f"h = {h}" for h in steps)], *rows]


def world_size(result: dict[str, Any]) -> Rows:
    """Ranks against one rank."""
    rows = []
    for case in result["cases"]:
        sharded = {0: "1 over all", 1: "each its own"}.get(case["shard"], f"1 over {case['shard']}")
        copies = f"1 in {case['micro_batches']}" if case["ranks"] == 1 else sharded
        speed, difference, loss = number(case["steps_per_second"], 1), case["weight_difference"], case["loss"]
        rows.append([str(case["ranks"]), copies, speed, f"{difference:.1e}", f"{loss:.7f}"])
    return [["ranks", "copies of the weights", "steps/s", "largest difference of a weight", "last loss"], *rows]


def memory(result: dict[str, Any]) -> Rows:
    """MFM-G on a small network."""
    rows = [
        [name, *(number(cell[n] / 2**20, 0) for n in ("4", "64")), number(cell["ratio"])]
        for name, cell in result.items() if name in ("plain", "blended")
    ]  # fmt: skip
    return [["MFM-G", "4 draws, MiB", "64 draws, MiB", "ratio"], *rows]


def memory_pipeline(result: dict[str, Any]) -> Rows:
    """By draws, then by steps."""
    head = [*(f"{n} draws, 3 steps" for n in result["by_draws"]), *(f"{n} steps, 4 draws" for n in result["by_steps"])]
    values = [*result["by_draws"].values(), *result["by_steps"].values()]
    return [["", *head], ["MiB", *(number(value / 2**20, 0) for value in values)]]


# -- steering ----------------------------------------------------------------------------------------------------------


def methods(*parts: str) -> Callable[[dict[str, Any]], Rows]:
    """The rows of these parts, but for draws in between."""
    draws = ("0", "1", "4", "16", "64")
    return lambda result: [METHODS, *(row for p in parts for row in method_rows(result["parts"][p]["metrics"], draws))]


def method_rows(metrics: dict[str, Any], draws: tuple[str, ...] | None = None) -> Rows:
    """One row for each method and number of draws."""
    cells = [(name, key, cell) for name, by in metrics["methods"].items() for key, cell in by.items()]
    return [_method(*cell) for cell in cells if draws is None or cell[1] in draws]


def _method(name: str, draws: str, cell: dict[str, Any]) -> list[str]:
    total, cost = cell["samples"] * cell["seeds"], cell["cost"]
    return [
        name, "–" if draws == "0" else draws, _ratio(cell), f"{cell['mode_l1']:.3f} ({cell['floor_mode_l1']:.3f})",
        number(cell["mmd"], 3), "< −10⁴" if cell["reward"] < -1e4 else number(cell["reward"]), number(cost["nfe"], 0),
        number(cost["reward_calls"] / total, 0), number(1000 * cost["seconds"] / total),
        f"{cell['seeds']} × {cell['samples']:,}",
    ]  # fmt: skip


def _ratio(cell: dict[str, Any]) -> str:
    return _off(cell["sw2"] / cell["floor_sw2"])


def rivals(result: dict[str, Any]) -> Rows:
    """SW2 as a ratio to its floor, mode L1 and NFE on every problem; rivals that were tuned elsewhere say how."""
    problems = result["problems"]
    names = list(dict.fromkeys(name for found in problems.values() for name in found["metrics"]["methods"]))
    head = ["method"]
    for name in problems:
        head += [f"{name}: SW2 / floor", "mode L1", "NFE"]
    rows = []
    for name in names:
        row = [f"`{name}`"]
        for found in problems.values():
            cell = next(iter(found["metrics"]["methods"].get(name, {}).values()), None)
            row += ["–"] * 3 if cell is None else [
                _ratio(cell), number(cell["mode_l1"], 3), number(cell["cost"]["nfe"], 0)
            ]  # fmt: skip
        rows.append(row)
    return [head, *rows]


def defaults(result: dict[str, Any]) -> Rows:
    """Every default on the judged problems: cost, median and worst SW2 in floors, and who was far without a word."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for found in result["problems"].values():
        for label, run in found["runs"].items() if found["set"] == "judged" else ():
            by_label.setdefault(label, []).append(run)
    rows = []
    for label, runs in by_label.items():
        ratios = [run["ratio"] for run in runs]
        far = [run for run in runs if run["ratio"] > 2]
        silent = sum(not run["notes"] for run in far)
        said = sum(bool(run["notes"]) for run in runs) - len(far) + silent
        nfe = statistics.median(run["nfe"] for run in runs)
        rows.append(
            [label, number(nfe, 0), number(statistics.median(ratios)), _off(max(ratios)), str(len(far)), str(silent),
             str(said)]
        )  # fmt: skip
    problems = len(next(iter(by_label.values())))
    head = ["default", "NFE", "median", "worst", f"over 2, of {problems}", "silent among them", "warned at 2 and below"]
    return [head, *rows]


def advised(result: dict[str, Any]) -> Rows:
    """Of each problem: how many intervals hold, what is recommended for each budget, and the best that was measured."""
    head, rows = ["problem", "log E[e^r]", "intervals that hold", 'of them "below" alone'], []
    for name, found in result["problems"].items():
        pilots = found["pilots"]
        row = [name, number(found["log_evidence"], 1), f"{pilots['held']} of {pilots['pilots']}", str(pilots["below"])]
        for budget, cell in found["advised"].items():
            if len(rows) == 0:
                head += [f"advised for {int(budget):,}", "NFE", "SW2 / floor", "best measured"]
            best = cell["best"]
            shown = "–"
            if best is not None:
                shown = f"{best['method'].replace('`', '')}, {number(best['nfe'], 0)}: {_off(best['sw2'])}"
            row += [f"`{cell['method']}`", number(cell["nfe"], 0), _off(cell["sw2"]), shown]
        rows.append(row)
    return [head, *rows]


def defaults_glass(result: dict[str, Any]) -> Rows:
    """Errors of GLASS' draws in floors, the worst over the laws."""
    laws = list(result["glass"].values())
    rows = [
        [label, *(number(max(law[label][t] for law in laws)) for t in laws[0][label])] for label in laws[0]
    ]  # fmt: skip
    return [["GLASS, 30 calls", *times(next(iter(laws[0].values())))], *rows]


def _off(ratio: float) -> str:
    return "> 1,000" if ratio > OFF_SCALE else number(ratio)


def low_dimensional(result: dict[str, Any]) -> Rows:
    """SW2 in floors and, in brackets, thickness over the law's own, of every method and schedule as s shrinks."""
    shown = [found for found in result["problems"].values() if found["s"] in (1.0, 1e-2, 1e-4)]
    head = [f"{found['kind']}, s = {number(found['s'], 4).rstrip('0').rstrip('.')}" for found in shown]
    rows = []
    for kind, title in (("methods", "`{}`"), ("schedules", "exact ∇V, {}")):
        for name in shown[0][kind]:
            cells = [found[kind][name] for found in shown]
            rows.append(
                [title.format(name), *(f"{_off(cell['ratio'])} ({_thickness(cell['thickness'])})" for cell in cells)]
            )
    return [["40 steps: SW2 / floor (thickness)", *head], *rows]


def _thickness(share: float) -> str:
    return "> 100" if share > DIVERGED**2 else number(share)


def error_propagation(result: dict[str, Any]) -> Rows:
    """SW2 in floors of every method as δ grows, mode weights at δ = .1, and the slope of what δ adds."""
    found = [cell for cell in result["problems"].values() if "delta" in cell]
    rows = []
    for name in found[0]["methods"]:
        cells = {cell["delta"]: cell["methods"][name] for cell in found}
        ratios = [_off(cell["sw2"] / cell["floor"]) for cell in cells.values()]
        rows.append(
            [f"`{name}`", *ratios, number(cells[0.1]["mode_l1"], 3), number(result["slopes"][name].get("slope"))]
        )
    heads = [f"δ = {cell['delta']:g}" for cell in found]
    return [["SW2 / floor", *heads, "mode L1 at .1", "slope"], *rows]


def error_propagation_value(result: dict[str, Any]) -> Rows:
    """What δ does to V, in nats, and to D* − D, relative."""
    found = [cell for cell in result["problems"].values() if cell.get("delta")]
    rows = [
        [f"{title}, t = {t}", *numbers((cell["values"][t][what] for cell in found), 3)]
        for what, title in (("value", "V, nats"), ("shift", "D* − D, relative")) for t in found[0]["values"]
    ]  # fmt: skip
    return [["error of", *(f"δ = {cell['delta']:g}" for cell in found)], *rows]


def error_propagation_maps(result: dict[str, Any]) -> Rows:
    """Trained maps: their δ, and SW2 in floors."""
    found = {name: cell for name, cell in result["problems"].items() if "map_delta" in cell}
    methods = next(iter(found.values()))["methods"]
    rows = [
        [name, number(cell["map_delta"], 4), *(_off(c["sw2"] / c["floor"]) for c in cell["methods"].values())]
        for name, cell in found.items()
    ]  # fmt: skip
    return [["map", "its δ", *(f"`{name}`" for name in methods)], *rows]


def diversity_stress(result: dict[str, Any]) -> Rows:
    """Effective modes, the smallest mode's share in per cent, and mean distance over that of exact samples."""
    found = list(result["problems"].values())
    names = list(dict.fromkeys(name for cell in found for name in cell["methods"]))
    rows = []
    for name in names:
        row = [name if name in PLAIN or name.startswith("MFM-FT") else f"`{name}`"]
        for cell in found:
            mine, exact = cell["methods"].get(name), cell["methods"]["exact samples"]
            smallest = cell["weights"].index(min(cell["weights"]))
            apart = mine and mine["distance"] / exact["distance"]
            far = "> 100" if mine and apart > DIVERGED**2 else number(apart)
            shown = mine and f"{number(mine['modes'])}, {number(100 * mine['frequencies'][smallest], 1)} %, {far}"
            row.append(shown or "–")
        rows.append(row)
    return [["modes, smallest, distance", *(f"λ = {cell['strength']}" for cell in found)], *rows]


PLAIN = ("exact samples", "adjoint matching", "DRaFT, one step")


def reward_generalisation(result: dict[str, Any]) -> Rows:
    """Guide's and judge's reward, and the share that the judge names as wanted."""
    problems = result["problems"]
    names = list(dict.fromkeys(name for found in problems.values() for name in found["methods"]))
    rows = []
    for name in names:
        cells = [found["methods"].get(name) for found in problems.values()]
        shown = [
            f"{number(cell['guide'])}, {number(cell['judge'])} ({number(cell['named'])})" if cell else "–"
            for cell in cells
        ]
        rows.append([name, *shown])
    return [["guide, judge (named)", *problems], *rows]


def tuning_variance(result: dict[str, Any]) -> Rows:
    """Noise over signal of a batch's gradient."""
    found = list(result["problems"].values())
    rows = [
        [name, number(found[0]["methods"][name]["rows"], 0), *(_noise(cell["methods"][name]) for cell in found)]
        for name in found[0]["methods"]
    ]
    return [["loss", "rows of a batch", *(f"λ = {cell['strength']}" for cell in found)], *rows]


def _noise(cell: dict[str, Any]) -> str:
    ratio = cell["ratio"]
    return "no signal" if ratio != ratio else number(ratio, 4)


def one_setting(result: dict[str, Any]) -> Rows:
    """Mean reward, and in brackets mean pairwise distance, of every method on every reward."""
    rewards = result["rewards"]
    titles = list(next(iter(rewards.values())))
    cost = {title: statistics.mean(cells[title]["nfe"] for cells in rewards.values()) for title in titles}
    rows = [
        [reward, *(f"{number(cells[title]['reward'])} ({number(cells[title]['distance'], 1)})" for title in titles)]
        for reward, cells in rewards.items()
    ]
    return [["reward", *(f"{title}, {number(cost[title], 0)} NFE" for title in titles)], *rows]


def by_draws(result: dict[str, Any]) -> Rows:
    """How plain methods and defaults depend on the number of draws."""
    parts = ("ode, 50 steps", "ode, 50 steps, variants")
    cells = {name: by for part in parts for name, by in result["parts"][part]["metrics"]["methods"].items()}
    names = {
        "mfm-g-plain": "`mfm-g`, plain", "mfm-g-plain-clip": "`mfm-g`, plain, clipped", "mfm-g": "`mfm-g` (blend)",
        "mfm-gf-plain": "`mfm-gf`, no recycling", "mfm-gf": "`mfm-gf`",
    }  # fmt: skip
    draws = ("1", "4", "16", "64")
    rows = [[title, *(_ratio(cells[name][n]) for n in draws)] for name, title in names.items()]
    return [["method", *(f"N = {n}" for n in draws)], *rows]


def recycling(result: dict[str, Any]) -> Rows:
    """Errors as ratios to those without recycling, and effective draws."""
    lengths, rows = ("2", "4", "8", "16"), []
    for name, cell in result["dimension, steps -> L -> error and effective draws"].items():
        shown = (f"{cell[n]['error'] / cell['1']['error']:.2f} ({cell[n]['draws']:.1f})" for n in lengths)
        rows.append([*name.split(", "), *shown])
    return [["dimensions", "steps", *(f"L = {n}" for n in lengths)], *rows]


def value(result: dict[str, Any]) -> Rows:
    """Map and GLASS against the exact value."""
    rows = []
    for label in ("euler", "midpoint, angle"):
        part = result[label]
        for name, at in part["by_sampler"].items():
            if label == "euler" or name.startswith("glass"):
                calls = number(part["network_calls_per_draw"][name], 0)
                shown = (f"{cell['rmse']:.3f} / {cell['pearson']:.4f}" for cell in at.values())
                title = f"{name}, {label}" if name.startswith("glass") else name
                rows.append([title, calls, number(part["seconds_by_sampler"][name]), *shown])
    heads = (f"t = {t}: RMSE / r" for t in result["euler"]["value_std"])
    return [["sampler", "calls a draw", "seconds", *heads], *rows]


# -- tables that their benchmark keeps ---------------------------------------------------------------------------------


def kept(title: str, columns: tuple[int, ...], places: tuple[int, ...]) -> Callable[[dict[str, Any]], Rows]:
    """Columns of a table that the result file holds as such, each with its number of decimals."""

    def rows(result: dict[str, Any]) -> Rows:
        table = result["metrics"]["tables"][title]
        below = [[number(row[c], p) for c, p in zip(columns, places, strict=True)] for row in table["rows"]]
        return [[table["head"][c] for c in columns], *below]

    return rows


def inverse(result: dict[str, Any]) -> Rows:
    """Accuracy, spread ratio and p of the rank test for every problem."""
    problems = result["metrics"]["tables"]
    rows: dict[str, list[str]] = {}
    for table in problems.values():
        for row in table["rows"]:
            shown = f"{row[3]:.2f}, {row[5]:.2f}, {row[6]:.3f}"
            rows.setdefault(row[0], [row[0]]).append(f"{shown}; {row[1]:.1f} dB")
    return [["accuracy, spread, p; PSNR of the mean", *problems], *rows.values()]


def map_samples(result: dict[str, Any]) -> Rows:
    """Samples of a map that were told no class, and what the images trained on have."""
    (table,) = result["generation"]["tables"].values()
    places = (0, 0, 1, 1, 1, 2, 0)
    rows = [[number(cell, p) for cell, p in zip(row, places, strict=True)] for row in table["rows"]]
    return [[str(head) for head in table["head"]], *rows]


def map_draws(result: dict[str, Any]) -> Rows:
    """Fréchet distances of draws at noised held-out images."""
    posterior = result["posterior"]
    rows = [
        [name, *(number(at[name], 1) for at in posterior["frechet"].values())] for name in posterior["cost_per_draw"]
    ]
    floor = ["images trained on (floor)", *(number(posterior["floor"], 1) for _ in posterior["frechet"])]
    return [["draws", *times(posterior["frechet"])], *rows, floor]


def frontier(result: dict[str, Any]) -> Rows:
    """SW2 in floors by budget, a row a problem and method; in bold the nearest of each budget."""
    rows, budgets = [], list(next(iter(next(iter(result["problems"].values()))["methods"].values())))
    for problem, found in result["problems"].items():
        best = {b: min(by[b]["sw2"] for by in found["methods"].values()) for b in budgets}
        for name, by in found["methods"].items():
            shown = (f"**{_off(by[b]['sw2'])}**" if by[b]["sw2"] == best[b] else _off(by[b]["sw2"]) for b in budgets)
            rows.append([problem, f"`{name}`", *shown])
    return [["problem", "method", *(f"{b} NFE" for b in budgets)], *rows]


def few_evaluations(result: dict[str, Any]) -> Rows:
    """Reward and mean distance, a column a reward."""
    rewards = result["rewards"]
    first = next(iter(rewards.values()))
    titles = [("best of", name, f"{name} in one step") for name in first["best of"]]
    titles += [("annealed", name, f"MFM-Anneal, strength {name}") for name in first["annealed"]]
    rows = [
        [title, number(first[kind][name]["nfe"], 0)]
        + [f"{number(of[kind][name]['reward'])} ({number(of[kind][name]['distance'], 1)})" for of in rewards.values()]
        for kind, name, title in titles
    ]
    return [["method", "NFE", *rewards], *rows]


def tuned_digits(result: dict[str, Any]) -> Rows:
    """Fréchet distances to the target, of tuned and of steered samples; – where a method refused the reward."""
    rewards = result["metrics"]["rewards"]
    tables = {name: result["metrics"]["tables"][f"{name}: tuned and steered"] for name in rewards}
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for name, table in tables.items():
        far = table["head"].index("Fréchet to target")
        for row in table["rows"]:
            cells.setdefault((name, row[0]), {})[row[1]] = row[far]
    main = dict.fromkeys(title for (_, strength), by in cells.items() if strength != "1" for title in by)
    columns = [title for title in main if not title.startswith("what")]
    rows = [[name, strength, *numbers(map(by.get, columns))] for (name, strength), by in cells.items()]
    return [["reward", "λ", *columns], *rows]


DRIFTS = "Drifts after 15 s a run"
TUNED = "Tuned to the paper's inverse problem, against exact samples"
FRECHET = "Fréchet distance of draws to held-out images, in features of the judging classifier"
VALUES = "Value of the reward margin, 200 draws, against rollouts"
FREQUENCIES = "Class frequencies against w, 100 steps, costs a sample"
RACE = "MFM-G with one draw against best-of-N"
STEERING, SEEDS = "steering.json", "steering-seeds.json"


def weighted_posterior(result: dict[str, Any]) -> Rows:
    """Errors of means of 64 draws with the ESS, by proposal and time."""
    rows = [
        [law, name, cell["calls"],
         *(f"{number(at['errors']['64'])} ({number(100 * at['ess_share'], 0)} %)" for at in cell["times"].values())]
        for law, cells in result["laws"].items() for name, cell in cells.items()
    ]  # fmt: skip
    first = next(iter(next(iter(result["laws"].values())).values()))
    return [["law", "draws", "calls a draw", *times(first["times"])], *rows]


def weighted_by_draws(result: dict[str, Any]) -> Rows:
    """Errors of the default by draws, and of exact ones."""
    name = "mean noised to ratio 1, 2 nodes"
    rows = [
        [law, f"t = {t}", *numbers(at["errors"].values())]
        for law, cells in result["laws"].items() for t, at in cells[name]["times"].items()
    ]  # fmt: skip
    counts = next(iter(next(iter(result["laws"].values()))[name]["times"].values()))["errors"]
    exact = ["exact draws", "", *numbers(int(n) ** -0.5 for n in counts)]
    return [["law", "time", *(f"N = {n}" for n in counts)], *rows, exact]


TABLES = {
    "one-step": Table("fidelity.json", one_step),
    "fidelity": Table("fidelity.json", fidelity),
    "losses": Table("losses.json", losses),
    "step-cost": Table("step-cost.json", step_cost),
    "step-cost-transformer": Table("step-cost-transformer.json", lambda result: step_cost(result, 0)),
    "glass": Table("glass.json", glass),
    "steering-seeds": Table(SEEDS, methods("ode, 250 steps", "ode, 50 steps")),
    "steering-particles": Table(SEEDS, methods("particles, 250 steps", "particles, 50 steps")),
    "steering-variants": Table(STEERING, methods("ode, 50 steps, variants")),
    **{
        f"steering-{process}-{steps}": Table(STEERING, methods(f"{process}, {steps} steps"))
        for process in ("ode", "sde") for steps in (50, 250, 1000)
    },
    **{
        f"steering-16d-{name}": Table(f"steering-16d-{name}.json", methods("ode, 50 steps"))
        for name in ("medium", "sharp", "broad")
    },
    "rivals": Table("rivals.json", rivals),
    "defaults": Table("defaults.json", defaults),
    "advise": Table("advise.json", advised),
    "few-evaluations": Table("few-evaluations.json", few_evaluations),
    "frontier": Table("frontier.json", frontier),
    "defaults-glass": Table("defaults.json", defaults_glass),
    "low-dimensional": Table("low-dimensional.json", low_dimensional),
    "error-propagation": Table("error-propagation.json", error_propagation),
    "error-propagation-value": Table("error-propagation.json", error_propagation_value),
    "error-propagation-maps": Table("error-propagation.json", error_propagation_maps),
    "diversity-stress": Table("diversity-stress.json", diversity_stress),
    "reward-generalisation": Table("reward-generalisation.json", reward_generalisation),
    "tuning-variance": Table("tuning-variance.json", tuning_variance),
    "digits-one-setting": Table("digits-one-setting.json", one_setting),
    "steering-by-draws": Table(STEERING, by_draws),
    "recycling": Table("recycling.json", recycling),
    "value": Table("value.json", value),
    "general-contexts": Table("general-contexts.json", processes),
    "simulators": Table("simulators.json", simulators),
    "sunspots": Table("general-contexts.json", forecasts),
    "moving-digits": Table("moving-digits.json", next_frames),
    "moving-digits-observed": Table("moving-digits.json", frames_observed),
    "precision": Table("precision.json", precision),
    "world-size": Table("world-size.json", world_size),
    "diffusers-families": Table("diffusers-families.json", diffusers_families),
    "diffusers-memory": Table("diffusers-memory.json", diffusers_memory),
    "quick-decoder": Table("quick-decoder.json", quick_decoder),
    "memory": Table("memory.json", memory),
    "weighted-posterior": Table("weighted-posterior.json", weighted_posterior),
    "weighted-by-draws": Table("weighted-posterior.json", weighted_by_draws),
    "memory-pipeline": Table("memory-pipeline.json", memory_pipeline),
    "control": Table("control.json", kept(DRIFTS, (0, 1, 2, 3, 11), (0, 3, 3, 3, 1))),
    "finetune-mixture": Table("finetune-mixture.json", kept(TUNED, tuple(range(7)), (0, 2, 3, 2, 3, 0, 0))),
    "finetune-digits": Table("finetune-digits.json", tuned_digits),
    "digits-posterior": Table("digits/posterior-16k.json", kept(FRECHET, tuple(range(7)), (0, 0, 2, 2, 2, 2, 3))),
    "digits-value": Table("digits/value.json", kept(VALUES, tuple(range(10)), (0, 0, 2, 2, 2, 3, 2, 2, 2, 2))),
    "digits-race": Table("digits/race.json", kept(RACE, (0, 1, 2, 3, 6, 7, 8, 9, 10), (0, 0, 2, 2, 0, 0, 1, 1, 1))),
    "digits-mixture": Table("digits/mixture.json", kept(FREQUENCIES, (0, 7, 1, 2, 9), (0, 0, 3, 3, 0))),
    "digits-inverse": Table("digits/inverse.json", inverse),
    "emoji-samples": Table("emoji.json", map_samples),
    "emoji-draws": Table("emoji.json", map_draws),
    "mnist-samples": Table("mnist.json", map_samples),
    "mnist-draws": Table("mnist.json", map_draws),
}  # fmt: skip
