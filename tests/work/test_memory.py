"""Half as many rows where memory runs out, down to what must stay together, and nothing else is caught."""

import pytest

from metaflowmaps.errors import InputError
from metaflowmaps.work.memory import halving, is_out_of_memory


def making(most):
    asked = []

    def make(begin, end):
        asked.append(end - begin)
        if end - begin > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return list(range(begin, end))

    return make, asked


@pytest.mark.parametrize(("most", "unit", "expected"), [(100, 1, [10]), (5, 1, [10, 5, 5]), (4, 2, [10, 4, 6, 2, 4])])
def test_rows_are_halved_until_they_fit(most, unit, expected):
    make, asked = making(most)
    assert [row for part in halving(make, 3, 13, unit) for row in part] == list(range(3, 13))
    assert asked == expected


def test_what_must_stay_together_is_not_cut():
    make, _ = making(3)
    with pytest.raises(RuntimeError, match="out of memory"):
        halving(make, 0, 8, 4)


def test_other_errors_are_raised_as_they_are():
    def broken(begin, end):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        halving(broken, 0, 8)
    wrapped = InputError("the reward raised RuntimeError")
    wrapped.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(InputError("t must lie in [0, 1]"))
