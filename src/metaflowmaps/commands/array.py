"""mfm array: a command whose work is cut into shards, as the tasks of a Slurm array, each one of its workers."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.commands.runs import read_json
from metaflowmaps.commands.shared import Results, Say
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.work.shards import FOLDERS, LOGS, Worker, missing_in

CLUSTERS = ("slurm", "local")
SHARED = ("sample", "posterior", "steer", "eval")  # the commands that know workers
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # a task is told who it is by --worker alone


class Request(NamedTuple):
    """What each task is to have; None leaves it to the cluster."""

    tasks: int
    cluster: str = "slurm"
    partition: str | None = None
    gpus: int = 0
    cpus: int | None = None
    hours: float = 24.0
    slurm: dict[str, str] = {}  # noqa: RUF012  (a NamedTuple's default is never written to)


class ArrayFailed(Exception):
    """Tasks that failed, one line with their logs."""


def submit_array(arguments: Sequence[str], request: Request, dry_run: bool, wait: bool, say: Say) -> Results:
    """Submit the workers of a command that have shards left to make; ``wait`` for them and return the results."""
    if request.cluster not in CLUSTERS:
        raise unknown("cluster", request.cluster, CLUSTERS)
    out = _place(arguments)
    done = _results(out)
    if done is not None:
        _check_settings(arguments)
        say(f"{out} is complete: nothing to submit")
        return done
    workers = missing_workers(out, request.tasks)
    lines = [command_line(arguments, worker) for worker in workers]
    if dry_run:
        return {"commands": lines}
    jobs = _submit(arguments, workers, request, out / LOGS)
    say(f"{len(jobs)} of {request.tasks} tasks submitted to {request.cluster}, logs in {out / 'array'}")
    if not wait:
        return {"jobs": [job.job_id for job in jobs], "commands": lines}
    _wait(jobs, workers)
    done = _results(out)
    if done is None:
        raise ArrayFailed(
            f"all tasks ended and {out} is not complete (were shards in the hands of tasks of another array?): run the "
            "same command again, only what is missing is submitted"
        )
    return done


def sbatch_options(given: Sequence[str]) -> dict[str, str]:
    """key=value, as --slurm takes them."""
    pairs = [part.partition("=") for part in given]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise InputError(f"--slurm takes key=value, such as account=mine, got {key!r}")
    return {key: value for key, _, value in pairs}


def command_line(arguments: Sequence[str], worker: Worker) -> str:
    """What one task runs, as one would type it."""
    return shlex.join(["mfm", *arguments, "--worker", str(worker)])


def missing_workers(out: Path, tasks: int) -> list[Worker]:
    """The workers of whom a shard is missing; one, where all are there and only have to be put together."""
    every = [Worker(i, tasks) for i in range(tasks)]
    for folder in FOLDERS:
        missing = missing_in(out / folder)
        if missing is not None:
            owners = {i % tasks for i in missing}
            return [worker for worker in every if worker.index in owners] or every[:1]
    return every


def run_task(arguments: Sequence[str], worker: str) -> None:
    """One task, on the machine that it was given."""
    command = [*_command(arguments), "--worker", worker]
    print(shlex.join(command), flush=True)
    code = subprocess.run(command, env=_environment(), check=False).returncode
    if code != 0:
        raise RuntimeError(f"exit code {code}")


# -- internals -------------------------------------------------------------------------------------------------------


def _place(arguments: Sequence[str]) -> Path:
    """--out of the command, without which tasks would not know of each other's work."""
    if not arguments or arguments[0] not in SHARED:
        given = repr(arguments[0]) if arguments else "nothing"
        raise InputError(
            f"mfm array takes one of {', '.join(SHARED)} after --, such as sample CKPT --out DIR, got {given}"
        )
    if any(part.partition("=")[0] == "--worker" for part in arguments):
        raise InputError("mfm array gives each task its --worker: leave it out")
    for i, part in enumerate(arguments):
        name, _, value = part.partition("=")
        if name == "--out" and (value or i + 1 < len(arguments)):
            return Path(value or arguments[i + 1])
    raise InputError("the tasks of an array work in one directory: name it in the command, as --out DIR")


def _check_settings(arguments: Sequence[str]) -> None:
    """Refuse results of other settings; only the command itself knows what its arguments mean."""
    asked = subprocess.run(_command(arguments), env=_environment(), capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        raise InputError(last.removeprefix("error: "))


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "metaflowmaps.cli", *arguments]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OF_RANKS}


def _results(out: Path) -> Results | None:
    """The results, where the command is complete."""
    if not (out / "results.json").exists():
        return None
    results = read_json(out / "results.json")
    # an evaluation's results are whole once its figures are drawn and the cells it stood on are gone
    complete = not any((out / folder).exists() for folder in FOLDERS)
    return {**results, "out": str(out / "results.json")} if complete else None


def _submit(arguments: Sequence[str], workers: Sequence[Worker], request: Request, logs: Path) -> list[Any]:
    """One job a worker: a Slurm array, or processes of this machine."""
    try:
        import submitit
    except ImportError:
        raise InputError("mfm array needs submitit: pip install 'metaflowmaps[slurm]'") from None
    if request.cluster == "slurm" and shutil.which("sbatch") is None:
        raise InputError("this machine cannot submit to Slurm (no sbatch): use a login node, or --cluster local")
    logs.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=logs, cluster=request.cluster)
    parameters: dict[str, Any] = {"name": f"mfm-{arguments[0]}", "timeout_min": max(1, round(60 * request.hours))}
    if request.gpus:
        parameters["gpus_per_node"] = request.gpus
    if request.cpus is not None:
        parameters["cpus_per_task"] = request.cpus
    if request.cluster == "slurm":
        parameters["slurm_array_parallelism"] = len(workers)
        if request.partition is not None:
            parameters["slurm_partition"] = request.partition
        if request.slurm:
            parameters["slurm_additional_parameters"] = request.slurm
    executor.update_parameters(**parameters)
    names = [str(worker) for worker in workers]
    return list(executor.map_array(run_task, [list(arguments)] * len(names), names))


def _wait(jobs: Sequence[Any], workers: Sequence[Worker]) -> None:
    """Until all have ended; those that failed are named with their logs."""
    failed = []
    for job, worker in zip(jobs, workers, strict=True):
        error = job.exception()
        if error is not None:
            failed.append(f"{worker} ({job.paths.stderr})")
    if failed:
        raise ArrayFailed(
            f"{len(failed)} of {len(jobs)} tasks failed: {', '.join(failed)}; run the same command again, only what is "
            "missing is submitted"
        )
