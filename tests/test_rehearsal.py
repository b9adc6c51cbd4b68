"""The whole way, small: pictures, latents, a map on two ranks, killed, resumed on one, steered, judged, reported."""

import json
import shlex
import time

import pytest
from benchmarks.rehearsal import CLASSES, SIZES, Rehearsal
from PIL import Image

from conftest import mfm_in_process
from metaflowmaps.checkpoint import resolve_checkpoint


class InOneProcess(Rehearsal):
    """Commands in this process: what they import is imported once. Ranks are still processes of their own."""

    def mfm(self, *arguments):
        began = time.perf_counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.out)
            assert mfm_in_process(*arguments) == 0
        self.note(shlex.join(["mfm", *map(str, arguments)]), began)


pytestmark = pytest.mark.attack


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal")
    told = []
    log = InOneProcess(out, SIZES["small"], told.append).run()
    assert told == log
    return out, log


def test_every_step_was_taken_in_order(rehearsed):
    _, log = rehearsed
    steps = ["props", "mfm encode-latents", "mfm convert sit", "torchrun", "mfm train", "mfm convert run",
             "mfm.Pipeline", "mfm steer", "mfm eval", "mfm report"]  # fmt: skip
    assert [next(step for step in steps if step in line) for line in log] == steps


def test_one_rank_went_on_where_two_were_killed(rehearsed):
    out, log = rehearsed
    (killed,) = (int(line.rpartition("step-")[2]) for line in log if "killed after" in line)
    size = SIZES["small"]
    assert 0 < killed < size.steps
    steps = [json.loads(line)["step"] for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    every = max(size.steps // 8, 1)
    assert steps == list(range(every, size.steps + 1, every))  # none lost, none twice
    assert resolve_checkpoint(out / "run").document("position.json")["step"] == size.steps
    assert json.loads((out / "run/results.json").read_text())["cost"]["steps"] == size.steps


def test_the_exported_map_knows_its_autoencoder_and_its_classes(rehearsed):
    out, _ = rehearsed
    document = json.loads((out / "map/pipeline.json").read_text())
    assert len(document["class_names"]) == CLASSES
    assert document["guidance"] == 2.5
    assert (out / "map/README.md").exists()


def test_pictures_came_out(rehearsed):
    out, _ = rehearsed
    side = SIZES["small"].side
    found = [out / "picture.png", out / "drawn.png", *(out / "steered/images").glob("*.png")]
    assert len(found) == 2 + SIZES["small"].samples // 4
    for file in found:
        with Image.open(file) as picture:
            assert picture.size == (side, side)
            assert len(set(picture.convert("L").getdata())) > 10  # not one colour


def test_what_was_measured_is_there(rehearsed):
    out, _ = rehearsed
    steered = json.loads((out / "steered/results.json").read_text())
    assert steered["cost"]["decodes"] == steered["cost"]["reward_calls"] > 0
    judged = json.loads((out / "evaluated/results.json").read_text())["metrics"]["by_sampler"]
    assert {"refine-1", "refine-4", "ode-4"} <= set(judged)
    for cell in judged.values():
        assert cell["frechet"] > 0
        assert cell["distance"] > 0
    page = (out / "report.html").read_text()
    assert "data:image/png" in page
    for name in ("run", "steered", "evaluated"):
        assert name in page
