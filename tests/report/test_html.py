"""The report says what the runs hold, figures first, and refuses what it cannot read without writing anything."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
import torch
from made_runs import LONG, carrying, everything, fidelity, picture, steering, telling, training, unknown, write
from safetensors.torch import load_file, save_file

from metaflowmaps import cli
from metaflowmaps.cli.telling import print_tables
from metaflowmaps.errors import InputError
from metaflowmaps.lab.report.html import read_results, tables_of, write_report
from metaflowmaps.lab.report.page import asset
from metaflowmaps.lab.report.sections import duration, number
from metaflowmaps.steering import MFMGF


class Outline(HTMLParser):
    """Tags in order with their attributes, and whether all that was opened was closed."""

    VOID = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(tmp_path, *runs):
    text = write_report(list(runs), tmp_path / "report.html").read_text()
    return text, Outline(text)


def mfm(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["mfm", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


def test_every_run_becomes_a_section_with_contents_summary_command_and_folded_details(tmp_path):
    text, outline = page_of(tmp_path, *everything(tmp_path))
    titles = [
        "Training: gmm", "Posterior fidelity: gmm", "Steering: gmm-inverse", "mfm eval generation: class-mixture",
        "mfm dream",
    ]  # fmt: skip
    assert re.findall(r"<h2>(.*?)</h2>", text) == [*titles, "The words on this page"]
    assert titles == re.findall(r"<li><a href=#section-\d>(.*?)</a>", text)
    assert [section["id"] for section in outline.all("section")] == [f"section-{i}" for i in range(1, 6)]
    for said in (
        "A map of 53,122 parameters, trained for 14,000 steps in 1 min 7 s; loss at the end 0.1235.",
        "at most 1.25 times as far from the exact posterior as a second exact sample is (t = 0.4",
        "3 methods; the nearest to the exact tilted law is mfm-g with 16 draws a step, at 1.50 times",
        "One step of the map is as good as 30 of GLASS.",
        "mfm train gmm",
        "<code>mfm dream</code>",  # nothing was typed: the command's name
        "Took 1 h 1 min, on cpu",
        "Reward against diversity.",
    ):
        assert said in text
    assert text.count("<summary>Command, cost, environment and settings") == 5
    assert all("open" not in details for details in outline.all("details"))
    assert outline.all("script") == []


def test_a_single_run_needs_no_contents(tmp_path):
    assert page_of(tmp_path, training(tmp_path / "a"))[1].all("nav") == []


def test_figures_come_before_tables_in_the_order_of_their_captions(tmp_path):
    text, outline = page_of(tmp_path, fidelity(tmp_path / "a"), carrying(tmp_path / "b"))
    assert [image["alt"].split(" (")[0] for image in outline.all("img")] == [
        "posteriors", "error against calls", "frontier", "a first",
    ]  # fmt: skip
    for section in text.split("<section")[1:]:
        assert section.rindex("<figure>") < section.index("<table>")
    assert "<figcaption>A first.</figcaption>" in text  # a picture without a caption gets its name
    width, height = (int(outline.all("img")[0][key]) for key in ("width", "height"))
    assert (width, height) == (1690, 260)  # 13 x 2 inches at 130 dots


def test_metrics_that_bring_tables_are_shown_by_them_and_nothing_else(tmp_path):
    text, _ = page_of(tmp_path, carrying(tmp_path / "a"))
    assert "<h3>Fréchet distances</h3>" in text
    row = re.findall(r"<td(.*?)>(.*?)</td>", text.split("<h3>Fréchet distances")[1])[:6]
    assert [cell for _, cell in row] == ["map", "one &lt;step&gt;", "3", "–", "yes", "0.1235"]
    assert [kind for kind, _ in row] == ["", "", ' class="number"', "", "", ' class="number"']
    assert "987654321" not in text
    assert "987,654,321" not in text


def test_steered_samples_are_told_by_their_methods_name(tmp_path):
    """Its options are in the configuration too."""
    config = {"method": {"name": "mfm-gf", "num_draws": 4}, "num": 8}
    run = write(tmp_path / "a", "steer", {"num": 8, "reward_mean": 0.5}, config=config)
    assert "8 samples by mfm-gf: mean reward 0.5" in page_of(tmp_path, run)[0]


def test_tables_of_a_registered_command_give_way_to_those_its_metrics_bring(tmp_path, capsys):
    table = {"head": ["method", "L2"], "rows": [["mfm-g", 0.05], ["dps", 0.5]]}
    run = write(tmp_path / "a", "eval steering", {"tables": {"Class mixture": table}}, config={"task": "race"})
    text, _ = page_of(tmp_path, run)
    assert re.findall("<h3>(.*?)</h3>", text)[0] == "Class mixture"
    assert "<h2>Steering: race</h2>" in text
    tables = tables_of(read_results(run))
    assert tables == {"Class mixture": (["method", "L2"], [["mfm-g", "0.0500"], ["dps", "0.5000"]])}
    print_tables(tables)
    assert "mfm-g   0.0500" in capsys.readouterr().out


def test_an_unknown_command_lists_its_numbers_and_words(tmp_path):
    assert tables_of(read_results(unknown(tmp_path / "a"))) == {
        "Measured": (["quantity", "value"], [["depth.mean", "2.5"], ["word", "blue"], ["seconds", "0.5000"]])
    }


def test_what_runs_hold_is_text_never_markup(tmp_path):
    text, outline = page_of(tmp_path, carrying(tmp_path / "a"))
    assert LONG not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert outline.all("script") == outline.all("b") == []
    (policy,) = (meta["content"] for meta in outline.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\""


def test_a_story_is_text_and_its_one_script_is_the_pages_own(tmp_path):
    text, outline = page_of(tmp_path, telling(tmp_path / "a", HOSTILE))
    assert HOSTILE not in text
    assert len(outline.all("script")) == 1
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    assert script == asset("page.js")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in outline.all("meta") if "content" in meta and "none" in meta["content"])
    assert policy.count("script-src") == 1
    assert f"script-src 'sha256-{digest}'" in policy
    assert all(not name.startswith("on") for _, attributes in outline.tags for name in attributes)


def test_a_story_says_of_each_picture_its_reward_and_seed_and_explains_its_words(tmp_path):
    text, outline = page_of(tmp_path, telling(tmp_path / "a"))
    titles = [image["title"] for image in outline.all("img")]
    assert titles[:3] == ["noisy picture at t = 0", "draw 1, seed 11", "draw 2, seed 12"]
    assert titles[12:] == ["reward 0.5000", "reward nan", "reward 1.5, seed 7", "reward -2, seed 9223372036854775807"]
    cells = re.findall("<td.*?>(.*?)</td>", text)
    assert cells[:10] == ["best of 4", "0.25", "3", "1,000", "0.5", "MFM-GF", "0.75", "2", "50", "0.0012"]
    assert f"<dt>MFM-GF</dt><dd>{MFMGF.in_words}</dd>" in text
    assert "<details><summary>All</summary><h3>All</h3>" in text  # tables of what the story has told are folded
    assert "<dt>DPS</dt>" not in text  # which nobody speaks of here


@pytest.mark.parametrize(
    "damage",
    [
        {"draws": torch.zeros(2, 2, 3, 1, 4, 4, dtype=torch.uint8)},  # three draws for two seeds
        {"noisy": torch.zeros(2, 1, 1, 4, 4, dtype=torch.uint8)},
        {"steered.0.1": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)},
        {"steered.0.1": torch.zeros(2, 1, 4, 4)},
        {"steered.0.0": torch.zeros(2, 1, 4, 4000, dtype=torch.uint8)},
        {"steered.0.0": None},
    ],
)
def test_pictures_that_are_not_the_storys_are_refused(tmp_path, damage):
    run = telling(tmp_path / "a")
    pictures = load_file(run / "story.safetensors") | damage
    save_file({name: x for name, x in pictures.items() if x is not None}, run / "story.safetensors")
    with pytest.raises(InputError, match=rf"{next(iter(damage))}.*run its command again|noisy and draws"):
        write_report([run], tmp_path / "report.html")


def test_a_directory_of_runs_is_opened_and_no_run_comes_twice(tmp_path):
    runs = everything(tmp_path / "all")
    (tmp_path / "all" / "begun").mkdir()
    (tmp_path / "all" / "begun" / "run.json").write_text("{}")
    text, outline = page_of(tmp_path, tmp_path / "all", runs[0], tmp_path / "all" / "unknown" / ".." / "training")
    assert len(outline.all("section")) == 5
    assert text.count("<h2>Training: gmm</h2>") == 1


def test_two_runs_of_one_command_are_told_apart_by_their_directories(tmp_path):
    text, _ = page_of(tmp_path, training(tmp_path / "a"), training(tmp_path / "b"))
    assert [title.rsplit("/", 1)[1] for title in re.findall("<a href=#section.*?>(.*?)</a>", text)] == ["a)", "b)"]


def damage_json(run):
    (run / "results.json").write_text('{"schema": 1')


def damage_bytes(run):
    (run / "results.json").write_bytes(b"\xff\xfe")


def damage_shape(run):
    (run / "results.json").write_text("[]")


def damage_type(run):
    held = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**held, "metrics": [1]}))


def damage_metrics(run):
    held = json.loads((run / "results.json").read_text())
    del held["metrics"]["ratio"]
    (run / "results.json").write_text(json.dumps(held))


def damage_tables(run):
    held = json.loads((run / "results.json").read_text())
    held["metrics"]["tables"] = {"short": {"head": ["a", "b"], "rows": [[1]]}}
    (run / "results.json").write_text(json.dumps(held))


def damage_picture(run):
    whole = (run / "posteriors.png").read_bytes()
    (run / "posteriors.png").write_bytes(whole[: len(whole) // 2])


def take_away(run):
    (run / "results.json").unlink()


DAMAGES = [
    damage_json, damage_bytes, damage_shape, damage_type, damage_metrics, damage_tables, damage_picture, take_away,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_one_line_exit_2_and_nothing_written(tmp_path, capsys, monkeypatch, damage):
    good, bad = training(tmp_path / "good"), fidelity(tmp_path / "bad")
    damage(bad)
    code, out, err = mfm(capsys, monkeypatch, "report", good, bad, "--out", tmp_path / "page" / "report.html")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(bad) in err
    assert ("run its command again" in err) != ("give the --out directory of a finished command" in err)
    assert not (tmp_path / "page").exists()


def test_another_schema_and_an_unwritable_page_name_the_fix(tmp_path, capsys, monkeypatch):
    run = training(tmp_path / "a")
    (tmp_path / "file").write_text("kept")
    code, out, err = mfm(capsys, monkeypatch, "report", run, "--out", tmp_path / "file" / "report.html")
    assert (code, out, err.count("\n"), "choose another file" in err) == (2, "", 1, True)
    assert (tmp_path / "file").read_text() == "kept"
    held = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**held, "schema": 2}))
    with pytest.raises(InputError, match="update metaflowmaps"):
        read_results(run)


def test_the_command_writes_the_page_and_says_where(tmp_path, capsys, monkeypatch):
    run = steering(tmp_path / "a")
    code, out, err = mfm(capsys, monkeypatch, "report", run, "--out", tmp_path)
    page = tmp_path / "report.html"
    assert (code, out, err) == (0, f"{page}\n", f"next: open {page} in a browser\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    picture(run / "later.png")  # the same command again: the page is replaced
    assert mfm(capsys, monkeypatch, "report", run, "--out", tmp_path)[0] == 0
    assert "Later." in (tmp_path / "report.html").read_text()
    assert "The page: a file, or a directory" in " ".join(mfm(capsys, monkeypatch, "report", "--help")[1].split())


def test_numbers_are_short_and_exact_where_they_can_be():
    given = [None, True, 12345, 12345.6, 3.14159, 0.012345, 1.2e-7, 0.0, float("nan"), float("inf"), "word", -0.5, 3e12]
    said = ["–", "yes", "12,345", "12,346", "3.142", "0.0123", "1.20e-07", "0.0000", "nan", "inf", "word", "-0.5000",
            "3.000e+12"]  # fmt: skip
    assert [number(value) for value in given] == said
    assert [duration(s) for s in (0.5, 42.0, 67.2, 7500)] == ["0.5 s", "42 s", "1 min 7 s", "2 h 5 min"]
