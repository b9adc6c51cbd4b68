r"""Steering methods by name, as the image experiments list them: ``method[-kind]-N``, N draws a step (or particles).

``-plain``     as published, without what this package adds by default (blend, recycled draws, tempering)
``-rescale``   the direction alone: the steering term is made γ times as long as the drift (γ = 1 in the paper)
``tds-64``     returns all 64 particles of a system, ``tds-one-64`` one of each; ``dps`` and ``none`` have no N
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.stage import Stage
from metaflowmaps.path import LinearPath
from metaflowmaps.steering import SteerResult, steer

RESCALE = {"renormalize": "rescale"}
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"mfm-g": {"blend": False}, "mfm-gf": {"recycle": 1}, "mfm-smc": {"recycle": 1, "temper": 0.0}},
    "rescale": {"mfm-g": {"blend": False, **RESCALE}, "mfm-gf": RESCALE, "dps": RESCALE},
    "one": {"tds": {"returns": "one"}},
}
WORDS = {"": "", "plain": "plain", "rescale": "rescaled", "one": "one returned"}
PARTICLES = 64  # of MFM-SMC
CHUNK = 64  # rows of state at a time on a processor: with their draws they should stay in its cache
TITLES = {"mfm-g": "MFM-G", "mfm-gf": "MFM-GF", "mfm-smc": "MFM-SMC", "mfm-search": "MFM-Search", "dps": "DPS",
          "tds": "TDS", "none": "unsteered", "glass": "GLASS", "best-of-n": "best-of-N"}  # fmt: skip


class Variant(NamedTuple):
    """A method with its number and options."""

    method: str
    number: int
    options: dict[str, Any]
    title: str


def variant(name: str) -> Variant:
    """What a name means."""
    base, _, last = name.rpartition("-")
    base, number = (base, int(last)) if last.isdecimal() else (name, 0)
    kind = next((k for k in KINDS if base.endswith(f"-{k}")), "")
    method = base.removesuffix(f"-{kind}") if kind else base
    known = method in TITLES and (not kind or method in KINDS[kind])
    if not known or (number and method in ("none", "dps")):  # neither draws
        raise InputError(
            f"unknown method {name!r}: write method-N or method-plain-N, as in mfm-gf-4, of {', '.join(TITLES)}"
        )
    options = dict(KINDS[kind][method]) if kind else {}
    if method == "tds":
        number = number or 64
        options = {"particles": number, "returns": "all", **options}
    if method == "mfm-smc":  # a system of its own size, whatever fits on a device at once
        options = {"particles": PARTICLES, "returns": "all", **options}
    title = f"{TITLES[method]} {WORDS[kind]}".rstrip()
    unit = " particles" if method == "tds" else " draw" if number == 1 else " draws"
    return Variant(method, number, options, f"{title}, {number}{unit}" if number else title)


def copies_of(v: Variant) -> int:
    """Rows of state that make one returned sample."""
    return v.number if v.options.get("returns") == "one" else 8 if v.method == "mfm-search" else 1


def told(name: str, labels: Tensor | None) -> Tensor | None:
    """The class of each returned sample: a particle system has one, that of its first."""
    v = variant(name)
    if labels is None or v.options.get("returns") != "all":
        return labels
    systems = -(-len(labels) // v.options["particles"])
    return labels[:systems].repeat_interleave(v.options["particles"])[: len(labels)]


def run(
    stage: Stage,
    name: str,
    reward: Any,
    n: int,
    steps: int,
    generator: torch.Generator,
    labels: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, SteerResult]:
    """Samples of a variant, cut to n: a particle system comes whole. ``labels``: as ``told`` gives them."""
    v = variant(name)
    whole = n
    if v.options.get("returns") == "all":
        whole = -(-n // v.options["particles"]) * v.options["particles"]
    chunk = {} if stage.model.device.type != "cpu" and not stage.latent else {"batch_size": CHUNK * copies_of(v)}
    if v.options.get("returns") == "all" and labels is not None:  # rows of several systems would lie interleaved
        chunk = {"batch_size": v.options["particles"]}
        labels = torch.cat([labels, labels[-1:].expand(whole - n)])
    with stage.autocast():
        result = quiet_steer(
            stage.model, reward, whole, v.method, max(1, v.number), steps, cond=stage.cond(labels, whole),
            generator=generator, **{**chunk, **v.options, **options},
        )  # fmt: skip
    return result.samples[:n], result


class _Toy(nn.Module):
    """A network of one number, to count a method's calls on."""

    event_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)

    def forward(self, z: Tensor, *_: Tensor) -> Tensor:
        return self.weight * z


def calls(name: str, n: int, steps: int, **options: Any) -> int:
    """Network evaluations of n samples of a method: counts grow by a constant a step and a row, told by two trials."""
    v = variant(name)
    merged = {**v.options, **options}
    rows = merged["particles"] if merged.get("returns") == "all" else 1
    three, four = (_trial(v.method, max(1, v.number), k, rows, tuple(sorted(merged.items()))) for k in (3, 4))
    return -(-n // rows) * (three + (steps - 3) * (four - three))


@cache
def _trial(method: str, number: int, steps: int, rows: int, options: tuple[tuple[str, Any], ...]) -> int:
    toy = MetaFlowMap(_Toy(), LinearPath())
    seeds = torch.Generator().manual_seed(0)
    result = quiet_steer(
        toy, lambda x: 1e-3 * x.flatten(1).sum(1), rows, method, number, steps, generator=seeds, **dict(options)
    )
    return int(result.cost["forwards"])


def quiet_steer(*args: Any, **kwargs: Any) -> SteerResult:
    """``steer`` for one cell of many: whole or interrupted, and without its warnings, which the tables answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = steer(*args, **kwargs)
    if result.interrupted:  # it returns what is finished; here a cell is whole or there is none
        raise KeyboardInterrupt
    return result
