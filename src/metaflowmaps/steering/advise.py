r"""Which method for this reward and this budget: a pilot, a table, one recommendation.

**The rules**, in their order; each method is taken where its own condition holds and its evaluations fit the budget:

1. *Rejection*, where 2/acceptance evaluations a sample fit: what it accepts has the law, and nothing is cheaper. Its
   bound is learned from a pool of at least ten accepted samples.
2. *Resampling*, where a pool has as many effective samples as are wanted: the same for rewards without a largest value.
3. *Anneal*, for a cloud of 128 samples and more: below acceptance 1/100 one-step samples do not meet the reward, and a
   cloud that is carried there was nearest to the law of all methods that were measured. It weighs modes by how many
   particles are in them, so it takes many samples at once, and one law for all of them.
4. *MFM-GF* for fewer samples, or where each has a law of its own: it makes them one by one, with 4 draws where one of
   them in effect sees the reward in the middle of the path, or else with 16. Where 16 do not, a cloud of what there is.
5. *Resampling* of what there is, where the budget is too small for any of these; told as far from the law.

Never first: best-of-N, which has another law; MFM-SMC, whose samples were farther off at the same cost (it is for the
evidence); MFM-G, which costs twice as much as MFM-GF (it is for high dimensions and 16 draws).
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import Tensor

from metaflowmaps._files import finite
from metaflowmaps._shapes import Cond, check_count
from metaflowmaps.errors import InputError, known_keywords
from metaflowmaps.steering.anneal import Anneal
from metaflowmaps.steering.best_of_n import BestOfN
from metaflowmaps.steering.diagnostics import TELLING_ESS
from metaflowmaps.steering.method import Method
from metaflowmaps.steering.mfm_g import MFMG
from metaflowmaps.steering.mfm_gf import MFMGF
from metaflowmaps.steering.pilot import MIDDLE, Estimate, Pilot, run_pilot
from metaflowmaps.steering.pool import Resampling
from metaflowmaps.steering.process import ODE, SDE, Process
from metaflowmaps.steering.rejection import Rejection
from metaflowmaps.steering.smc import SMC
from metaflowmaps.steering.steer import ROWS

BUDGET = 2000  # evaluations a sample where nobody says: what ``steer`` without a method costs
PILOT = 1024
ACCEPTED = 10  # samples in the pool that a bound is learned from
PROPOSALS = 25  # times 1/acceptance: of a thousand samples none is refused
CLOUD = 128  # samples that a cloud is for: fewer were nearer to the law one by one
LEAST_ROUNDS, MOST_ROUNDS, MOVES = 4, 60, 2
FULL_CLOUD = 150  # evaluations from which a cloud arrives
RARE = -10.0  # log-acceptance down to which it was near the law
SEEN = 1.0  # effective draws in the middle of the path: the default of 16 was near the law from there on
MOST_STEPS, LEAST_STEPS = 60, 20


@dataclass(frozen=True)
class Option:
    """A method with settings for the budget, and what is expected of it.

    Args:
        method: with its options.
        process: that it runs on.
        nfe: evaluations a sample, of network and reward.
        seconds: for all samples, where the pilot ran.
        effective: independent samples that the answer is worth; None: not known beforehand.
        error: exact (the law), near (within twice what exact samples are off by chance), rough (farther) or other
            (not the law).
        remark: what to know of it, in a few words.
    """

    method: Method
    process: Process
    nfe: float
    seconds: float
    effective: float | None
    error: str
    remark: str

    def python(self, num_samples: int) -> str:
        """The call to type."""
        process = "" if self.process == self.method.usual() else f", {_written(self.process)}"
        return f"mfm.steer(model, reward, {num_samples}, {_written(self.method)}{process})"

    def command(self, checkpoint: str, num_samples: int, more: str = "") -> str:
        """The command to type; ``more`` are options that it shares with ``mfm advise``."""
        words = ["mfm", "steer", checkpoint, *shlex.split(more), "--num", str(num_samples)]
        words += ["--method", self.method.name]
        words += [word for k, v in _changed(self.method).items() for word in ("--set", f"method.{k}={v}")]
        process = _changed(self.process)
        if self.process != self.method.usual():
            words += ["--process", self.process.name]
            words += [word for k, v in process.items() for word in ("--set", f"process.{k}={v}")]
        return shlex.join(words)


@dataclass(frozen=True)
class Advice:
    """The options, the one that is recommended, and what they rest on.

    Args:
        options: one a method; their errors and costs are predictions.
        chosen: which of them is recommended.
        reason: of the choice.
        pilot: what was measured.
        budget: evaluations a sample, at most.
        num_samples: that are wanted.
        notes: what to know besides.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> advice = mfm.advise(model, lambda x: x[:, 0], budget=100, num_samples=64, pilot=64)
        >>> advice.method.name, advice.process is None or advice.process.steps > 0
        ('rejection', True)
    """

    options: tuple[Option, ...]
    chosen: int
    reason: str
    pilot: Pilot
    budget: int
    num_samples: int
    notes: tuple[str, ...] = ()

    @property
    def option(self) -> Option:
        """What is recommended."""
        return self.options[self.chosen]

    @property
    def method(self) -> Method:
        """For ``mfm.steer(model, reward, n, advice.method, advice.process)``."""
        return self.option.method

    @property
    def process(self) -> Process:
        """For ``mfm.steer(model, reward, n, advice.method, advice.process)``."""
        return self.option.process

    @property
    def cloud(self) -> bool:
        """Whether the samples of one batch are made together."""
        return self.method.system is None

    @property
    def python(self) -> str:
        """The line to type."""
        return self.option.python(self.num_samples)

    @property
    def sentence(self) -> str:
        """The recommendation."""
        how = _written(self.method).removeprefix("mfm.")
        return f"Use {how}, about {self.option.nfe:,.0f} evaluations a sample: {self.reason}."

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """What was measured and what is offered, as results.json holds tables."""
        return {"What the pilot says": _measured(self.pilot), "Methods within the budget": self._offered()}

    def to_json(self) -> dict[str, Any]:
        """All of it, as results.json holds it."""
        names = ("nfe", "seconds", "effective", "error", "remark")
        options = [
            {"method": o.method.name, "python": o.python(self.num_samples), **{n: getattr(o, n) for n in names}}
            for o in self.options
        ]
        pilot = asdict(self.pilot) | {"log_acceptance": asdict(self.pilot.acceptance)}
        pilot["draws_ess"] = {str(t): {str(n): v for n, v in by.items()} for t, by in self.pilot.draws_ess.items()}
        told: dict[str, Any] = finite({
            "recommended": self.method.name,
            "python": self.python,
            "budget": self.budget,
            "num_samples": self.num_samples,
            "pilot": pilot,
            "options": options,
            "notes": list(self.notes),
            "tables": self.tables(),
            "summary": self.sentence,
        })  # fmt: skip
        return told

    def __str__(self) -> str:
        lines = []
        for title, table in self.tables().items():
            rows = [[_cell(cell) for cell in row] for row in (table["head"], *table["rows"])]
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows)
            lines += [title, *("  ".join(cells).rstrip() for cells in padded), ""]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), self.sentence, self.python])

    def _offered(self) -> dict[str, list[Any]]:
        head = ["method", "settings", "evaluations a sample", "seconds", "effective samples", "error", "remark"]
        rows = [
            [
                ("→ " if i == self.chosen else "") + o.method.titled(), _settings(o), round(o.nfe), _round(o.seconds),
                None if o.effective is None else round(o.effective), o.error, o.remark,
            ]
            for i, o in enumerate(self.options)
        ]  # fmt: skip
        return {"head": head, "rows": rows}


@known_keywords
def advise(
    model: Any,
    reward: Callable[..., Tensor],
    budget: int | None = None,
    num_samples: int = 1024,
    *,
    cond: Cond = None,
    pilot: int = PILOT,
    seed: int = 0,
) -> Advice:
    """Which method to steer by, from a pilot of a few thousand evaluations, which :class:`Pilot` tells.

    Args:
        model: what ``mfm.steer`` takes, with ``draw``.
        reward: a function x (B, *event) -> (B,), or of x and cond.
        budget: evaluations a sample at most, network and reward together; None: 2,000.
        num_samples: how many are wanted in one call.
        cond: None or a mapping of tensors, one row a sample.
        pilot: one-step samples; an annealed cloud, where it is needed, has a quarter as many particles.
        seed: of the pilot.

    Returns:
        A table of methods, predictions and one recommendation; ``print`` shows it.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> advice = mfm.advise(model, lambda x: 2 * x[:, 0], budget=100, num_samples=64, pilot=64)
        >>> result = mfm.steer(model, lambda x: 2 * x[:, 0], 64, advice.method, advice.process, seed=0)
        >>> bool(result.cost["nfe"] <= 150)
        True
    """
    check_count(num_samples, "num_samples")
    check_count(pilot, "pilot")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 2):
        raise InputError(
            f"budget is evaluations a sample, network and reward together, a whole number from 2 on; got {budget!r}"
        )
    known = run_pilot(model, reward, pilot, cond, seed)
    return recommend(known, BUDGET if budget is None else budget, num_samples)


def recommend(pilot: Pilot, budget: int, num_samples: int) -> Advice:
    """The rules of this module on what a pilot has measured."""
    offers = _Offers(pilot, budget, num_samples)
    options = tuple(option for option in offers.all() if option is not None and option.nfe <= budget)
    chosen, reason = offers.chosen(options)
    return Advice(options, chosen, reason, pilot, budget, num_samples, tuple(_notes(pilot)))


@dataclass(frozen=True)
class _Offers:
    """Every method at its settings for a budget."""

    pilot: Pilot
    budget: int
    num: int

    def all(self) -> list[Option | None]:
        """In the order of the rules; None where a method cannot be had."""
        return [self.rejection(), self.resampling(), self.anneal(), self.gradient_free(), self.gradient(),
                self.smc(), self.best()]  # fmt: skip

    def chosen(self, options: tuple[Option, ...]) -> tuple[int, str]:
        """Which option, and why."""
        pilot, at = self.pilot, {type(option.method): i for i, option in enumerate(options)}
        accepted = f"one in {_count(math.exp(-pilot.acceptance.value))} one-step samples is accepted"
        if not math.isfinite(pilot.acceptance.low):
            accepted = f"fewer than one in {_count(math.exp(-pilot.acceptance.high))} one-step samples is accepted"
        if Rejection in at:
            if pilot.constant:
                return at[Rejection], "the reward is the same for all samples, which need no steering"
            return at[Rejection], f"{accepted}, and what is accepted has the law"
        if options[at[Resampling]].error == "near":
            return at[Resampling], "a pool of that size is worth as many samples of the law as are wanted"
        if Anneal in at and self.num >= CLOUD:
            return at[Anneal], f"{accepted}, and a cloud can be carried to where the reward is"
        if MFMGF in at and (options[at[MFMGF]].error == "near" or Anneal not in at):
            own = f"{self.num} samples are too few for a cloud" if pilot.one_law else "each sample has a law of its own"
            return at[MFMGF], f"{own}, and MFM-GF makes them one by one"
        if Anneal in at:
            return at[Anneal], f"draws see too little of the reward, though a cloud would rather have {CLOUD} samples"
        return at[Resampling], "the budget is too small for a method that reaches the law"

    def option(
        self, method: Method, process: Process, nfe: float, error: str, remark: str, effective: float | None = None
    ) -> Option:
        """An option at its predicted cost."""
        return Option(method, process, nfe, nfe * self.num * self.pilot.seconds_each, effective, error, remark)

    def rejection(self) -> Option | None:
        """At the predicted acceptance, with a bound that is learned from enough accepted samples."""
        if self.pilot.acceptance.value < -math.log(self.budget) or not self.accepts:
            return None
        needed = 1 / math.exp(self.pilot.acceptance.value)
        method = Rejection()
        if needed * ACCEPTED > method.pilot:
            method = replace(method, pilot=math.ceil(needed * ACCEPTED))
        if needed * PROPOSALS > method.max_proposals:
            method = replace(method, max_proposals=math.ceil(needed * PROPOSALS))
        nfe = 2 * needed + 2 * method.pilot / self.num
        return self.option(method, ODE(), nfe, "exact", "where its bound holds", float(self.num))

    @property
    def accepts(self) -> bool:
        """Whether the acceptance is known from both sides, and rows may be proposed again by themselves."""
        return self.pilot.one_law and math.isfinite(self.pilot.acceptance.low)

    def resampling(self) -> Option:
        """A pool of what the budget buys, at most as many rows as steering holds at a time."""
        n = self.budget // 2
        shared = min(self.num, max(1, ROWS // n)) if self.pilot.one_law else 1
        ess = max(1.0, n * shared * self.pilot.share)
        effective = self.num / (1 + shared / ess)
        method = Resampling(n=n) if self.pilot.one_law else Resampling(n=n, particles=1)
        enough = effective >= self.num / 2 and ess >= TELLING_ESS
        remark = "repeats samples where few carry the weight"
        return self.option(method, ODE(), 2 * n, "near" if enough else "rough", remark, effective)

    def anneal(self) -> Option | None:
        """More rounds before more particles."""
        n = max(1, round(self.budget / (8 + 2 * MOVES * MOST_ROUNDS)))
        rounds = min(MOST_ROUNDS, int((self.budget / n - 8) // (2 * MOVES)))
        if rounds < LEAST_ROUNDS or not self.pilot.one_law:
            return None
        nfe = n * (8 + 2 * MOVES * rounds)
        arrives = nfe >= FULL_CLOUD and self.pilot.acceptance.value >= RARE
        error = "near" if arrives and self.num >= CLOUD else "rough"
        remark = "a cloud: many samples at once" if self.num >= CLOUD else f"a cloud is for {CLOUD} samples and more"
        return self.option(Anneal(num_draws=MOVES, n=n), ODE(steps=rounds), nfe, error, remark)

    def gradient_free(self) -> Option | None:
        """The fewest draws that see the reward."""
        draws, steps = self.draws_and_steps(2)
        if steps < LEAST_STEPS:
            return None
        seen = self.pilot.seen(draws)
        remark = f"one by one; {seen:.1f} of {draws} draws see the reward at t = {MIDDLE:g}"
        error, nfe = "near" if seen >= SEEN else "rough", steps * (1 + 2 * draws)
        return self.option(MFMGF(num_draws=draws), ODE(steps=steps), nfe, error, remark)

    def gradient(self) -> Option | None:
        """Where the reward and the model's draws have a gradient."""
        draws, steps = self.draws_and_steps(4)
        if self.pilot.gradient != "usable" or not self.pilot.pathwise or steps < LEAST_STEPS:
            return None
        error, nfe = "near" if self.pilot.seen(draws) >= SEEN else "rough", steps * (1 + 4 * draws)
        return self.option(MFMG(num_draws=draws), ODE(steps=steps), nfe, error, "smooth rewards, high dimensions")

    def draws_and_steps(self, each: int) -> tuple[int, int]:
        """4 draws where they see the reward or more cannot be paid for, else 16; and the steps that are left."""
        affordable = self.budget >= LEAST_STEPS * (1 + each * 16)
        draws = 16 if affordable and self.pilot.seen(4) < SEEN else 4
        return draws, min(MOST_STEPS, self.budget // (1 + each * draws))

    def smc(self) -> Option | None:
        """With four draws."""
        steps = min(MOST_STEPS, self.budget // 9)
        if steps < LEAST_STEPS or not self.pilot.one_law:
            return None
        return self.option(SMC(num_draws=4), SDE(steps=steps), 9 * steps, "rough", "for the evidence")

    def best(self) -> Option:
        """Of one-step samples."""
        n = self.budget // 2
        return self.option(BestOfN(n=n, source="map"), ODE(), 2 * n, "other", "high rewards, not their law")


def _notes(pilot: Pilot) -> list[str]:
    """What limits the advice."""
    notes, acceptance = [], pilot.acceptance
    if not math.isfinite(acceptance.low) and pilot.one_law:
        notes.append(
            f"the pilot has met too little of the reward to say more than: acceptance below {_small(acceptance.high)} "
            f"(its best guess is {_small(acceptance.value)}); a larger pilot= says more"
        )
    if not pilot.one_law:
        notes.append("samples have conditions or observations of their own: figures are means over them")
    if pilot.gradient != "usable":
        notes.append(f"gradient of the reward: {pilot.gradient}; methods that need it are left out")
    return notes


def _measured(pilot: Pilot) -> dict[str, list[Any]]:
    rows = [
        ["acceptance of one-step samples, E[e^(r − bound)]", _range(pilot.acceptance)],
        ["bound (largest reward)", pilot.bound],
        ["log E[e^r]", pilot.log_evidence.value],
        [f"effective size of {pilot.samples:,} one-step samples", pilot.pool_ess],
        *([["particles of an annealed cloud", pilot.particles]] if pilot.particles else []),
        *([f"effective draws at t = {t:g}, of 4 and 16", f"{by[4]:.1f} and {by[16]:.1f}"]
          for t, by in pilot.draws_ess.items()),
        ["gradient of the reward", pilot.gradient],
        ["evaluations of the pilot, in all", pilot.evaluations],
        ["seconds of the pilot", pilot.seconds],
    ]  # fmt: skip
    return {"head": ["quantity", "value"], "rows": rows}


def _range(log: Estimate) -> str:
    if not math.isfinite(log.low):
        return f"below {_small(log.high)} (best guess {_small(log.value)})"
    return f"{_small(log.value)} ({_small(log.low)} to {_small(log.high)})"


def _small(log: float) -> str:
    """A probability from its logarithm: .25, 1.3e-3, e^−250."""
    if log == -math.inf:
        return "0"
    return f"{math.exp(log):.2g}" if log > -600 else f"e^{log:.0f}"


def _count(n: float) -> str:
    return f"{n:,.1f}" if n < 10 else f"{n:,.0f}" if n < 1e6 else f"{n:.0e}"


def _round(seconds: float) -> float:
    return float(f"{seconds:.2g}")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _settings(option: Option) -> str:
    own = _changed(option.method) | ({} if option.process == option.method.usual() else _changed(option.process))
    return ", ".join(f"{name}={value}" for name, value in own.items()) or "defaults"


def _changed(choice: Method | Process) -> dict[str, Any]:
    """The options that are not left at their defaults."""
    given = {field.name: (getattr(choice, field.name), field.default) for field in fields(choice)}  # type: ignore[arg-type]
    return {name: value for name, (value, default) in given.items() if value != default}


def _written(choice: Method | Process) -> str:
    """A choice as Python has it."""
    options = ", ".join(f"{name}={value!r}" for name, value in _changed(choice).items())
    return f"mfm.{type(choice).__name__}({options})"
