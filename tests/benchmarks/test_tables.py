"""The tables of the docs are made of result files: what differs, is missing or has grown old is named."""

import json
import shutil
import subprocess

import pytest
from benchmarks.table_rows import TABLES

from benchmarks import BENCHMARKS, provenance, tables

MARKED = "before\n<!-- table: step-cost -->\n<!-- end -->\nafter\n"
STEP = {"milliseconds": 4.7, "ratio": 1.5, "ratio_quartiles": [1.25, 1.75]}


@pytest.fixture
def page(tmp_path):
    """A project of one page, whose one table is written."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no table\n")
    result = {"command": "python -m benchmarks step-cost", "commit": "abc", "steps": {"default": STEP}}
    (results / "step-cost.json").write_text(json.dumps(result))
    page = tmp_path / "docs" / "page.md"
    page.write_text(MARKED)
    assert tables.main([], tmp_path) == 0
    return page


def _check(page, capsys):
    code = tables.main(["--check"], page.parents[1])
    return code, capsys.readouterr().err


def test_tables_writes_between_the_marks_and_nowhere_else(page, capsys):
    head = "| step | ms | × flow matching | quartiles |\n| --- | --- | --- | --- |\n"
    rows = f"{head}| default | 4.7 | 1.50 | 1.25 to 1.75 |\n"
    assert page.read_text() == MARKED.replace("-->\n<!--", f"-->\n{rows}<!--")
    assert _check(page, capsys)[0] == 0


def test_check_names_a_table_whose_text_is_not_its_files(page, capsys):
    page.write_text(page.read_text().replace("4.7", "4.6"))
    code, said = _check(page, capsys)
    assert code == 1
    assert "docs/page.md: table step-cost: not what its file says" in said


def test_check_names_a_table_whose_file_is_missing(page, capsys):
    (page.parents[1] / "benchmarks" / "results" / "step-cost.json").unlink()
    code, said = _check(page, capsys)
    assert code == 1
    assert "docs/page.md: table step-cost: step-cost.json is missing" in said


def test_check_names_a_table_that_nothing_makes(page, capsys):
    page.write_text(MARKED.replace("step-cost", "unheard-of"))
    code, said = _check(page, capsys)
    assert code == 1
    assert "table unheard-of: nothing makes it" in said


def _forget():
    """What was looked up in another state of the checkout."""
    for function in vars(provenance).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_check_warns_of_a_result_older_than_its_code_and_does_not_fail(page, capsys, monkeypatch):
    root = page.parents[1]

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    code = root / "benchmarks" / "step_cost.py"
    code.write_text("MEASURED = 1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "measured")
    file = root / "benchmarks" / "results" / "step-cost.json"
    commit = git("rev-parse", "--short=12", "HEAD").strip()
    file.write_text(json.dumps({**json.loads(file.read_text()), "commit": commit}))
    monkeypatch.setattr(provenance, "ROOT", root)
    _forget()
    assert _check(page, capsys) == (0, "")
    _forget()
    code.write_text('"""What is measured."""\n\nMEASURED = (\n    1\n)  # no other figure comes of this\n')
    assert _check(page, capsys) == (0, "")
    _forget()
    code.write_text("MEASURED = 2\n")
    done, said = _check(page, capsys)
    _forget()
    assert done == 0
    assert f"warning: step-cost.json: older than its code: 1 files differ from {commit}" in said


def test_check_says_that_it_skips_ages_without_git(page, capsys, monkeypatch):
    monkeypatch.setattr(provenance, "git", lambda *_: None)
    code, said = _check(page, capsys)
    assert code == 0
    assert "no git checkout" in said


def test_every_table_stands_in_the_docs():
    """And agrees with its file: ``make check`` asks that of all."""
    text = "".join(
        page.read_text() for page in (provenance.ROOT / "README.md", *(provenance.ROOT / "docs").glob("*.md"))
    )
    assert {mark["name"] for mark in tables.MARK.finditer(text)} == set(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_made_of_figures_alone(name):
    """What ``keep`` writes beside the figures changes no table."""
    result = tables.read(provenance.RESULTS / TABLES[name].file)
    beside = {"command": "c", "commit": None, "uncommitted_changes": True, "machine": {"threads": 2}}
    assert TABLES[name].rows({**result, **beside}) == TABLES[name].rows(result)


def test_every_result_names_a_commit_and_a_benchmark():
    for file in provenance.RESULTS.rglob("*.json"):
        result = tables.read(file)
        assert provenance.commits_of(result), file.name
        assert provenance.benchmark_of(result) in BENCHMARKS, file.name


def test_measured_files_are_those_that_the_figures_depend_on():
    files = provenance.measured_files("steering")
    assert {"benchmarks/steering.py", "src/metaflowmaps/steering/smc.py", "src/metaflowmaps/laws/mixture.py"} <= files
    assert not any("/cli/" in file or "/figures/" in file for file in files)
    assert "src/metaflowmaps/steering/smc.py" not in provenance.measured_files("losses")
