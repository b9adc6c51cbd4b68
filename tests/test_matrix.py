"""``make matrix``: what is asked for on which line, and what is said of one that cannot be run."""

import matrix
from matrix import LINES, Line


def test_the_oldest_line_installs_the_lower_bounds():
    """So that no bound of pyproject.toml is one that nothing was run with."""
    oldest = next(line for line in LINES if line.name == "oldest")
    bounds = [bound.replace(">=", "==") for bound in matrix.dependencies()]
    asked = oldest.requirements()
    assert f"torch=={oldest.torch.removesuffix('.0')}" in bounds
    assert set(bounds[1:]) <= set(asked)
    assert sum(name.startswith("torch") for name in asked) == 1


def test_what_is_run_exists():
    assert all((matrix.ROOT / "tests" / name).exists() for name in matrix.PART)


def test_a_python_that_is_not_here_is_named():
    result = matrix.run(Line("future", "9.9", "2.13.0"), [], "0")
    assert result == {"not run": "no Python 9.9 here"}
    name = LINES[0].name
    ran = {"tests": 3, "failed": ["tests.test_x::test_y"], "skipped": 1, "seconds": 2}
    told = matrix.table({name: {**ran, "installed": {"torch": "2.13.0", "numpy": "1.26.0"}}, LINES[-1].name: result})
    assert f"| {name} | 2.13.0 | 1.26.0 | 3 | 1 | 1 | 2 |" in told
    assert f"| {LINES[-1].name} | not run: no Python 9.9 here |" in told
    assert told.endswith(f"{name}: tests.test_x::test_y")
