"""mfm steer, mfm eval steering, mfm eval value."""

import re
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._files import write_tensors
from metaflowmaps.commands import pictures
from metaflowmaps.commands.rewards import chosen_reward, file_hash, image_reward_of
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.scene import Scene, Wish
from metaflowmaps.commands.shards import draw_in_shards, usual_size
from metaflowmaps.commands.shared import (
    Results,
    Say,
    begun,
    beside,
    digest,
    judging_law,
    law_of,
    open_model,
)
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, evaluate_steering
from metaflowmaps.lab.evaluate.value_error import ValueEvalConfig, evaluate_value
from metaflowmaps.lab.evaluate.variants import variant
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures import steering_figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.recipes.tasks import SteeringTask, steering_task
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.steering import Method, Process, SteeringFailed, SteerResult, log_normaliser
from metaflowmaps.steering import steer as run_steering
from metaflowmaps.work.choices import choose, options_of, with_options
from metaflowmaps.work.config import override, parse_settings, validated
from metaflowmaps.work.devices import pick_device
from metaflowmaps.work.shards import Shard, ShardInterrupted, Share

DECODED = 8  # samples at a time, and a shard, where a gradient may go through a decoder
PICTURED = 4  # of num_draws, the panels show the one nearest to this


def steer(
    checkpoint: str,
    reward: str | None,
    strength: float,
    num: int,
    method: str,
    num_draws: int,
    steps: int,
    process: str,
    renormalize: str,
    settings: Iterable[str],
    out: Path | None,
    seed: int,
    device: str,
    invocation: str,
    progress: bool,
    only: Sequence[int] = (),
    share: Share = Share(),
    say: Say = lambda line: None,
    wish: Wish = Wish(),
) -> Results:
    """Steered samples of a checkpoint, with their rewards and costs.

    ``only``: the samples with these seeds, num of them; where particle systems are returned whole, these systems.
    """
    options = parse_settings(settings)
    if "progress" in options:
        raise InputError("progress shows itself on a terminal: leave --set progress out")
    moved = options.pop("data", None)  # where the images are now: some of their rewards are made of them
    method_object, moves = _resolved(method, num_draws, steps, process, renormalize, options)
    if only:
        num = len(only) * _samples_of_a_seed(method_object)
    model, found, target = open_model(checkpoint, device, needs_map=method_object.draws)
    given, known, reward = chosen_reward(reward, strength, found)
    if moved is not None and given is not None:
        raise InputError(f"--set data=FOLDER is for rewards that are made of images, not for {reward}: leave it out")
    r = image_reward_of(reward, strength, checkpoint, found, model, moved) if given is None else given
    scene = Scene(model, found, wish, num)
    if scene.latent:
        r = scene.on_samples(r.to(target) if isinstance(r, torch.nn.Module) else r)
    law = law_of(found)
    if method_object.exact and law is None:
        raise InputError(
            "--method exact needs a checkpoint of a known mixture (recipes gmm, mixture-16d); use --method mfm-gf"
        )
    config: dict[str, Any] = {
        "checkpoint": digest(found), "reward": reward, "strength": strength, "num": num, "method": method,
        "num_draws": num_draws, "steps": steps, "process": process, "renormalize": renormalize,
        "seed": seed, **({"only": list(only)} if only else {}), **file_hash(reward), **options,
        **({} if moved is None else {"data": moved}), "label": None, **scene.settings,
    }  # fmt: skip
    place = out or beside(checkpoint, found, f"steer-{method}")
    one_piece = rows_of(r, torch.zeros(1, *model.event_shape, dtype=model.dtype, device=target)) is not None
    unit, size = _cut(method_object, num, one_piece, share)
    if scene.latent and unit == 1 and share.size is None:
        size = min(size, DECODED)
    base: Any = model if not method_object.exact or law is None else ExactModel(model.path, law)
    seeds = torch.tensor(only) if only else None
    if seeds is None and unit:
        seeds = fresh_seeds(num // unit, stream(seed, "steer"))
    told = _Once()

    def make(part: slice) -> Shard:
        n = part.stop - part.start
        own = seeds[part.start // unit : part.stop // unit] if seeds is not None and unit else seeds

        given_seeds = own if own is not None else stream(seed, "steer")
        try:
            with told, scene.autocast():
                result = run_steering(
                    base,
                    r,
                    n,
                    method_object,
                    moves,
                    cond=scene.part(part),
                    seed=given_seeds,
                    batch_size=options.get("batch_size") or (DECODED * method_object.copies if scene.latent else None),
                    progress=progress and n == num,
                )
        except SteeringFailed as failed:
            raise ShardInterrupted(_as_shard(failed.result), failed) from None
        if result.interrupted:
            raise ShardInterrupted(_as_shard(result), KeyboardInterrupt())
        return _as_shard(result)

    def keep(drawn: dict[str, Tensor]) -> None:
        write_tensors(place / "samples.safetensors", {name: drawn[name] for name in ("samples", "rewards", "seeds")})

    def finish(drawn: Shard) -> Results:
        keep(drawn.tensors)
        result = _as_result(drawn)
        tilted = law.tilt(known) if law is not None and known is not None else None
        if model.event_shape == (2,):
            title = f"{method}, {num} samples, {result.cost['nfe']:,.0f} evaluations each"
            figures.save(figures.scatter(result.samples, title, tilted), place / "samples.png")
        elif len(model.event_shape) == 3:
            title = f"{method} for the reward {reward}, {result.cost['nfe']:,.0f} evaluations each"
            pictures.samples_grid(scene.shown(result.samples[: pictures.GRID], say), title, place / "samples.png")
            scene.write(result.samples, place)
        if len(result.info["time"]) > 1 and "ess" in result.info:
            figures.save(steering_figures.trajectory({method: _curves(result)}), place / "trajectory.png")
        rewards = result.rewards.double()
        metrics: dict[str, Any] = {
            **({"captions": pictures.CAPTIONS["steer"]} if len(model.event_shape) == 3 else {}),
            "num": num,
            "reward_mean": float(rewards.mean()),
            "reward_std": float(rewards.std()) if num > 1 else 0.0,
            "reward_max": float(rewards.max()),
            **({"log_evidence": log_normaliser(result)} if "log_evidence" in result.info else {}),
            **{name: float(result.info[name].double().mean()) for name in ("ess", "base_ess") if name in result.info},
        }
        results = write_results(
            place, "steer", config, metrics, result.cost, seed=seed, device=target, invocation=invocation
        )
        return {**results, "out": str(place / "results.json")}

    return draw_in_shards(place, "steer", config, num, share, say, size, make, finish, keep)


def eval_steering(
    checkpoint: str,
    task: str,
    samples: int | None,
    out: Path | None,
    settings: Iterable[str],
    seed: int,
    device: str,
    invocation: str,
    say: Say,
) -> Results:
    """Every method on a task whose answer is known. ``checkpoint`` may be "exact": the mixture itself."""
    known = steering_task(task)
    given = {"seed": seed, **({} if samples is None else {"samples": samples})}
    config = override(validated(SteeringEvalConfig, given), settings)
    reward = known.reward(config.reward)
    model, law, identity, out, target = _judged_model(checkpoint, known, device, out, f"eval-steering-{task}")
    data_std = getattr(model, "data_std", None)
    if isinstance(model, ExactModel):
        config = _without_gradients(config, say)
    full = {"checkpoint": identity, "task": task, **config.model_dump()}
    done = begun(out, "eval steering", full)
    if done is not None:
        return done
    began = time.perf_counter()
    metrics, pictures = evaluate_steering(
        model, law, reward, config, lambda line: say(f"eval steering: {line}"), data_std
    )
    cost = {"seconds": time.perf_counter() - began}
    shown = _pictured(pictures)
    if law.dim == 2:
        figures.save(steering_figures.panels(law.tilt(reward), metrics, shown), out / "steered.png")
    figures.save(steering_figures.error_against_cost(metrics), out / "error-against-cost.png")
    curves = {
        name: cell["trajectory"]
        for name, by_draws in metrics["methods"].items()
        for key, cell in by_draws.items()
        if f"{name}.{key}" in shown
    }
    figures.save(steering_figures.trajectory(curves), out / "trajectory.png")
    results = write_results(out, "eval steering", full, metrics, cost, seed=seed, device=target, invocation=invocation)
    return {**results, "out": str(out / "results.json")}


def eval_value(
    checkpoint: str,
    task: str,
    out: Path | None,
    settings: Iterable[str],
    seed: int,
    device: str,
    invocation: str,
    say: Say,
) -> Results:
    """V̂ of map and GLASS against the exact value."""
    known = steering_task(task)
    config = override(validated(ValueEvalConfig, {"seed": seed}), settings)
    reward = known.reward(config.reward)
    model, law, identity, out, target = _judged_model(checkpoint, known, device, out, f"eval-value-{task}")
    if isinstance(model, ExactModel):
        raise InputError("mfm eval value judges a checkpoint; the exact value is what it compares with")
    full = {"checkpoint": identity, "task": task, **config.model_dump()}
    done = begun(out, "eval value", full)
    if done is not None:
        return done
    began = time.perf_counter()
    metrics = evaluate_value(model, law, reward, config, lambda line: say(f"eval value: {line}"))
    cost = {"seconds": time.perf_counter() - began}
    figures.save(steering_figures.value_error(metrics), out / "value-against-calls.png")
    results = write_results(out, "eval value", full, metrics, cost, seed=seed, device=target, invocation=invocation)
    return {**results, "out": str(out / "results.json")}


# -- internals -----------------------------------------------------------------------------------------


def _resolved(
    method: str, num_draws: int, steps: int, process: str, renormalize: str, options: dict[str, Any]
) -> tuple[Method, Process]:
    """Method and process of the options; each option belongs to one of them."""
    kind, moves = choose(Method, method), choose(Process, process)
    own = {k: v for k, v in options.items() if k in options_of(kind)}
    control = {k: v for k, v in options.items() if k in options_of(moves) and k not in own}
    for name in options:
        if name not in (*own, *control, "batch_size"):
            raise unknown(f"option of {method}", name, [*options_of(kind), *options_of(moves), "batch_size"])
    made = with_options(kind, own)
    made = made.with_draws(num_draws) if made.draws else made
    on = with_options(moves, {"steps": steps, "renormalize": renormalize, **control})
    made.check(on)
    return made, on


def _samples_of_a_seed(method: Method) -> int:
    """How many samples ``--only SEED`` makes: one, or a system of particles."""
    if method.system is None:
        raise InputError(
            f"--only makes a whole particle system of {method.name} again: say how many samples had its seed, as "
            "--set particles=64"
        )
    return method.system


def _judged_model(
    checkpoint: str, task: SteeringTask, device: str, out: Path | None, name: str
) -> tuple[Any, GaussianMixture, str, Path, torch.device]:
    """What is judged and by which law: a model tuned to a reward has that law tilted already."""
    if checkpoint == "exact":
        place = out or Path("runs") / f"exact-{name}"
        return ExactModel(LinearPath(), task.law), task.law, "exact", place, pick_device("cpu")
    model, found, target = open_model(checkpoint, device)
    law = judging_law(checkpoint, found, task.source, f"--task {task.name}")
    return model, law, digest(found), out or beside(checkpoint, found, name), target


def _without_gradients(config: SteeringEvalConfig, say: Say) -> SteeringEvalConfig:
    """An exact mixture's draws have no pathwise gradient: what needs one is left out, and said so."""
    kept = tuple(name for name in config.methods if not (variant(name).method.draws and variant(name).method.gradients))
    if kept != config.methods:
        say("eval steering: exact draws have no gradient in the state; leaving mfm-g out")
    return validated(SteeringEvalConfig, {**config.model_dump(), "methods": kept})


def _cut(method: Method, num: int, one_piece: bool, share: Share) -> tuple[int, int]:
    """Samples of a seed (0: not to be cut) and samples a shard, unless told otherwise; what cannot be, is refused."""
    shared = share.size is not None or (share.worker is not None and share.worker.count > 1)
    if one_piece:
        if shared:
            raise InputError(
                "the reward holds one observation a sample, so it cannot be cut into shards: leave --worker and "
                "--shard-size out"
            )
        return 0, num
    system = method.system
    if system == 1:
        return 1, usual_size(share, copies=method.copies)
    if system is None:
        if shared:
            raise InputError(
                f"all samples of {method.name} are one system of particles, which cannot be cut into shards: say how "
                "large a system is, as --set particles=64"
            )
        return 0, num
    if num % system:
        raise InputError(f"--num must be a multiple of particles ({system}), got {num}: whole systems are returned")
    if share.size is not None and share.size % system:
        raise InputError(
            f"--shard-size must be a multiple of particles ({system}), got {share.size}: a shard is a whole "
            "number of systems"
        )
    return system, usual_size(share, system)


class _Once:
    """``with told: …`` for each shard: what one of them has warned of, the others do not repeat."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings(record=True)
        self._list: Any = self._caught.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._caught.__exit__(*error)
        for warning in self._list:
            kind = re.sub(r"\d+", "", str(warning.message))  # whatever their numbers
            if kind not in self._seen:
                self._seen.add(kind)
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _as_shard(result: SteerResult) -> Shard:
    """A shard of steered samples: rows, means over rows, and what there is one of for each system."""
    rows = len(result.samples)
    tensors = {"samples": result.samples, "rewards": result.rewards, "seeds": result.seeds}
    for name, value in result.info.items():
        if name != "nonfinite":
            tensors[f"each.{name}" if name == "log_evidence" else f"mean.{name}"] = value
    return Shard(tensors, {"cost": {k: v for k, v in result.cost.items() if k != "nfe"}, "rows": rows})


def _as_result(made: Shard) -> SteerResult:
    """The run that the shards are of."""
    rows = made.tensors
    info = {name.partition(".")[2]: value for name, value in rows.items() if "." in name}
    cost, calls = dict(made.facts["cost"]), ("forwards", "backwards", "reward_calls", "reward_backwards")
    nfe = sum(cost[name] for name in calls) / max(1, len(rows["samples"]))
    return SteerResult(rows["samples"], rows["rewards"], rows["seeds"], {**cost, "nfe": nfe}, info)


def _curves(result: SteerResult) -> dict[str, list[float]]:
    return {k: result.info[k].tolist() for k in ("time", "ess", "gradient_norm") if k in result.info}


def _pictured(pictures: dict[str, Tensor]) -> dict[str, Tensor]:
    """One cell a method: the number of draws nearest to PICTURED."""
    best: dict[str, str] = {}
    for cell in pictures:
        name, key = cell.rsplit(".", 1)
        if name not in best or abs(int(key) - PICTURED) < abs(int(best[name]) - PICTURED):
            best[name] = key
    return {f"{name}.{key}": pictures[f"{name}.{key}"] for name, key in best.items()}
