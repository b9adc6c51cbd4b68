"""Rules for stopping early: what they say, when they fire, and what is refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.stop_rule import StopRule
from metaflowmaps.finetuning.tuning_config import FinetuneConfig
from metaflowmaps.work.config import validated

BASE = {"checkpoint": "base", "checkpoint_sha256": "", "reward": "r"}
FORM = "a stop rule is NAME>NUMBER, NAME<NUMBER or NAME stalls K"

NAMES = st.from_regex(r"[a-z_]{1,12}([.:-][a-z0-9]{1,4})?", fullmatch=True)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


def measured(*values, name="reward"):
    """Records as the meters write them, the base's first."""
    return [{"step": 100 * i, name: value, "other": 7.0} for i, value in enumerate(values)]


def fired(text, values):
    """Whether a rule says stop, measurement after measurement."""
    rule, records = StopRule.of(text), measured(*values)
    return [rule.fires(records[: i + 1]) for i in range(len(records))]


def test_no_rule_is_no_rule():
    assert StopRule.of("none") is None
    assert validated(FinetuneConfig, BASE).stop == "none"


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(NAMES, st.sampled_from("<>"), NUMBERS, st.sampled_from(["{}{}{}", "{} {} {}", " {}{} {} "]))
def test_a_rule_is_read_back_as_it_was_written(name, sign, number, layout):
    """However Python writes the number: 1e-07 and 1e+16 too."""
    rule = StopRule.of(layout.format(name, sign, number))
    assert (rule.name, rule.sign, rule.number) == (name, sign, number)
    held = validated(FinetuneConfig, {**BASE, "stop": layout.format(name, sign, number)}).stop
    assert StopRule.of(held).number == number


@pytest.mark.parametrize("text", ["reward stalls 4", "reward  stalls  4", " reward stalls 4 "])
def test_spaces_do_not_matter_to_patience(text):
    rule = StopRule.of(text)
    assert (rule.name, rule.sign, rule.number) == ("reward", "stalls", 4)


MALFORMED = (
    "", " ", "reward", "reward>", ">3", "reward=3", "reward==3", "reward>=3", "reward<=3", "reward>3>4", "reward>three",
    "reward>nan", "reward>inf", "reward>1.2.3", "reward>.", "reward>-", "reward>1e", "reward>--1", "reward stalls",
    "reward stalls -1", "reward stalls 0", "reward stalls 2.5", "reward stalls many", "reward stall 3", "stalls 3",
    "two words>3", "reward>3 and distance<2", "None", "reward>3\ndistance<2",
)  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_rule_is_refused_in_one_line_that_says_what_is(text):
    with pytest.raises(InputError) as error:
        validated(FinetuneConfig, {**BASE, "stop": text})
    assert FORM in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bound_is_judged_by_the_newest_measurement_alone():
    assert fired("reward>2", [0, 3, 1, 2, 2.5]) == [False, True, False, False, True]
    assert fired("reward<2", [3, 1, 2, -4]) == [False, True, False, True]
    assert fired("reward>-1.5", [-2, -1.5, -1]) == [False, False, True]
    assert fired("reward<1e-3", [0.01, 0.0011, 0.0009]) == [False, False, True]


def test_patience_ends_after_so_many_measurements_without_a_new_best():
    assert fired("reward stalls 2", [1, 0, 0.5]) == [False, False, True]
    assert fired("reward stalls 2", [1, 0, 2, 1.9, 1.8]) == [False, False, False, False, True]
    assert fired("reward stalls 1", [1, 2, 3, 3]) == [False, False, False, True]  # as good is not better
    assert fired("reward stalls 3", [3, 2, 1]) == [False, False, False]
    # the best may be the base's own, before a step was made
    assert fired("reward stalls 3", [9, 1, 2, 3]) == [False, False, False, True]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_patience_against_counting_by_hand(values, patience):
    best, since, expected = -math.inf, 0, []
    for value in values:
        since = 0 if value > best else since + 1
        best = max(best, value)
        expected.append(since >= patience)
    assert fired(f"reward stalls {patience}", values) == expected


def test_measurements_that_are_missing_do_not_count():
    """Where no finite sample was left there is no record of a reward."""
    rule = StopRule.of("reward>2")
    assert not rule.fires([])
    assert not rule.fires([{"step": 0, "lost": 512.0}])
    assert rule.fires([*measured(3.0), {"step": 100, "lost": 512.0}])
    assert not StopRule.of("reward stalls 1").fires([*measured(3.0), {"step": 100, "lost": 512.0}])
    assert StopRule.of("reward>2").fires(measured(-math.inf, 3.0))


def test_a_rule_needs_meters():
    with pytest.raises(InputError, match=r"set meters\.every above 0"):
        validated(FinetuneConfig, {**BASE, "stop": "reward>3", "meters": {"every": 0}})
    assert validated(FinetuneConfig, {**BASE, "meters": {"every": 0}}).stop == "none"
