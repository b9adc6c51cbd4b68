"""Much of everything: time and memory grow with what is asked for and no faster, and not at all with the calls."""

import gc
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import metaflowmaps as mfm
from metaflowmaps.data import DataSource
from metaflowmaps.data.sources import open_source
from metaflowmaps.lab.report.html import write_report
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.training import loop
from metaflowmaps.training.run_log import RunLog
from metaflowmaps.training.trackers import Untracked
from metaflowmaps.training.train_config import RunConfig
from metaflowmaps.work.choices import build

pytestmark = pytest.mark.filterwarnings("ignore")
FASTER = 2.0  # than linear: what begins once weighs more in the smaller of two
SLACK_BYTES = 32 * 2**20  # an allocator keeps


def resident() -> int:
    """Of this process now, in bytes."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc")
    return 4096 * int(statm.read_text().split()[1])


def seconds(act) -> float:
    """Of processor time: a busy neighbour is no fault of ours."""
    began = time.process_time()
    act()
    return time.process_time() - began


@pytest.fixture(scope="module")
def model() -> mfm.MetaFlowMap:
    return mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), mfm.LinearPath())


def steer(model, n: int, seed: int = 0, steps: int = 4) -> mfm.SteerResult:
    return mfm.steer(model, lambda x: -x.square().sum(1), n, mfm.MFMGF(num_draws=2), mfm.ODE(steps=steps), seed=seed)


@pytest.mark.attack
def test_steering_a_hundred_thousand(model):
    steer(model, 10_000)
    few = seconds(lambda: steer(model, 10_000))
    before = resident()
    many = seconds(lambda: steer(model, 100_000))
    assert many < 10 * FASTER * few
    # a sample of two numbers with reward and seed, several times over: 1 KiB each is plenty
    assert resident() - before < 100_000 * 1024 + SLACK_BYTES


@pytest.mark.attack
def test_ten_thousand_calls_leave_nothing_behind(model):
    def call(count: int) -> tuple[int, int]:
        for seed in range(count):
            steer(model, 2, seed, steps=1)  # what a call leaves, it leaves after any number of them
        gc.collect()
        return resident(), len(gc.get_objects())

    size, objects = call(300)
    later, more = call(9_700)
    assert later - size < 8 * 2**20
    assert more - objects < 500  # one a call would be 9,700


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[int, Path]:
    """Folders of 10,000 and 100,000 pictures in ten classes."""
    made = {}
    for count in (10_000, 100_000):
        root = tmp_path_factory.mktemp("pictures")
        for k in range(10):
            (root / f"class{k}").mkdir()
            Image.new("L", (4, 4), 20 * k).save(root / f"class{k}/0.png")
            data = (root / f"class{k}/0.png").read_bytes()
            for i in range(1, count // 10):
                (root / f"class{k}/{i}.png").write_bytes(data)
        made[count] = root
    yield made
    for root in made.values():
        shutil.rmtree(root)


@pytest.mark.attack
@pytest.mark.parametrize("read", ["trained on", "encoded"])
def test_a_folder_of_a_hundred_thousand(read, pictures):
    def act(count: int) -> None:
        if read == "trained on":
            source = {"path": str(pictures[count]), "labels": True, "size": 4, "channels": 1}
            assert sum(map(len, build(DataSource, "images", source).load())) == count
        else:
            assert len(open_source(str(pictures[count]))) == count

    few = seconds(lambda: act(10_000))
    before = resident()
    many = seconds(lambda: act(100_000))
    assert many < 10 * FASTER * few
    assert resident() - before < 100_000 * 2048 + SLACK_BYTES  # names, paths and 16 pixels


@pytest.mark.attack
def test_a_report_of_fifty_runs(tmp_path):
    def made(count: int) -> list[Path]:
        runs = [tmp_path / f"{count}-{k}" for k in range(count)]
        for run in runs:
            run.mkdir()
            document = {"schema": 1, "command": "sample", "config": {"seed": 1}, "metrics": {"mean": 0.5}}
            document |= {"cost": {"seconds": 1.0}, "environment": {"torch": torch.__version__}}
            (run / "results.json").write_text(json.dumps(document))
            Image.new("RGB", (300, 200), "white").save(run / "samples.png")
        return runs

    five, fifty = made(5), made(50)
    few = seconds(lambda: write_report(five, tmp_path / "five.html"))
    assert seconds(lambda: write_report(fifty, tmp_path / "fifty.html")) < 10 * FASTER * few + 0.1
    assert (tmp_path / "fifty.html").read_text().count("<section") == 50


@pytest.mark.parametrize("steps", [10**4, pytest.param(10**6, marks=pytest.mark.attack)])
def test_the_log_of_a_million_steps_is_small_and_readable(steps, tmp_path):
    """A record every ``log_every`` steps, at its default: 10⁴ lines of eight figures, and as many of seconds."""
    config = RunConfig(recipe="any", steps=steps)
    figures = {f"a_long_name_of_{i}": 1 / 3 for i in range(7)}
    state = SimpleNamespace(step=0, metrics_bytes=0, flush=lambda: figures)
    log = RunLog(tmp_path, state)
    run = SimpleNamespace(state=state, config=config, ended=False, rate=1e-3, began=0.0, log=log, watch=loop.Watch())
    run.read = lambda: None  # from the device, of the steps since the last record
    run.tracked = Untracked().begin(tmp_path, {}, 0)
    for state.step in range(1, config.steps + 1):
        loop._TrainingRun.record(run)
    sizes = {}
    for name in ("metrics.jsonl", "timings.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(100, steps + 1, 100)]
        sizes[name] = (tmp_path / name).stat().st_size
    assert sizes["metrics.jsonl"] < 4.2 * steps  # a record of 100: a figure takes its name and up to 24 characters
    assert sizes["timings.jsonl"] < 2.1 * steps
    assert seconds(lambda: RunLog(tmp_path, state)) < 2  # a run that goes on reads them once
