"""Batches that are made where the model is: functions of (seed, step, row), and of the laws that the host's are of."""

import math

import pytest
import torch
from test_resume import fingerprint, small

from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.path import LinearPath
from metaflowmaps.random import RowNoise, rand, randn
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.plan import Noise
from metaflowmaps.training.train_config import ConditionConfig, LossConfig, TimesConfig
from metaflowmaps.training.training_run import run_training, stream_of

N = 4096
SCALES = (1.0, 1.5, 4.0)
TIMES = TimesConfig(context_at_zero=0.1, focus=(0.8, 0.9), focus_share=0.2, from_noise=0.3, late_share=0.25, last=0.99)


def objective(n=N, on_device=True, seed=3):
    condition = ConditionConfig(dropout=0.2, guidance=SCALES)
    made = Objective(Noise((1, 4, 4), 5), LossConfig(), TIMES, None, n, seed, condition)
    made.on_device = on_device
    return made


@pytest.fixture(scope="module")
def model():
    network = MLPConfig(width=8, depth=1, num_classes=5, guidance=True).network((1, 4, 4))
    return MetaFlowMap(network, LinearPath(), "plain")


def tensors(batch):
    return {**{name: v for name, v in vars(batch).items() if isinstance(v, torch.Tensor)}, **batch.cond}


def test_a_batch_is_a_function_of_seed_and_step(model):
    one, again = (tensors(objective(32).batch(model, 7)) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    for other in (tensors(objective(32).batch(model, 8)), tensors(objective(32, seed=4).batch(model, 7))):
        for name in ("x_1", "x_t", "eps", "gamma"):
            assert not torch.equal(one[name], other[name])


def test_noise_times_and_conditions_of_a_row_do_not_depend_on_the_others(model):
    """The data aside: those are drawn where they are, for the batch."""
    few, more = (tensors(objective(n).batch(model, 7)) for n in (16, 64))
    own = 4  # rows that train the diagonal in both
    for name in ("t", "eps", "gamma", "a", "guidance"):
        assert torch.equal(few[name][:own], more[name][:own]), name


def test_the_laws_are_those_of_the_host(model):
    """Means of the same functions: two samples of N differ by 5 standard deviations of a difference at most."""
    here, there = (tensors(objective(on_device=on).batch(model, 0)) for on in (True, False))
    assert here.keys() == there.keys()
    for name in here:
        for power in (1, 2):
            one, other = (side[name].double().pow(power).flatten() for side in (here, there))
            spread = math.sqrt(float(one.var() + other.var()) / one.numel())
            assert abs(float(one.mean() - other.mean())) <= 5 * spread, (name, power)
    diagonal = here["a"] == here["b"]
    assert int(diagonal.sum()) == round(LossConfig().diagonal_share * N)
    assert bool((here["a"] <= here["b"]).all())
    share = float((here["t"] == 0).double().mean())
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / N)
    null = here["label"] == 5
    assert bool((here["guidance"][null] == 1).all())
    counts = torch.stack([(here["guidance"][~null] == w).double().mean() for w in SCALES])
    assert float((counts - 1 / 3).abs().max()) < 5 * math.sqrt(2 / 9 / float((~null).sum()))


def test_whole_numbers_are_as_likely_as_each_other():
    made = RowNoise(torch.arange(60_000), "whole").integers(6)
    counts = torch.bincount(made, minlength=6).double()
    assert len(counts) == 6
    # chi-squared with 5 degrees of freedom: beyond 30 once in 70,000 seeds
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 30
    big = RowNoise(torch.arange(1000), "whole").integers(2**31 - 1)
    assert int(big.min()) >= 0
    assert 2**30 < int(big.max()) < 2**31 - 1


def test_what_is_drawn_stays_where_it_is_drawn():
    """On a device that has no numbers: whatever moved to the processor would fail."""
    with torch.device("meta"):
        rows = RowNoise(torch.arange(4, device="meta"), "meta")
        assert randn((4, 3), rows).device.type == rand((4,), rows).device.type == "meta"
    assert rand((4,), None).device.type == "cpu"


@pytest.mark.parametrize("learned", [False, True])
def test_a_run_on_the_device_resumes_to_the_byte(learned, tmp_path):
    torch.set_num_threads(1)
    more = {"teacher": "learned", "drift_steps": 9, "drift_batch_size": 16} if learned else {}
    config = small(steps=20, stream="device", **more)
    run_training(config, tmp_path / "whole")
    run_training(config, tmp_path / "cut")
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run_training(config, tmp_path / "cut")
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "cut")
    host = run_training(config.model_copy(update={"stream": "host"}), tmp_path / "host")
    assert host.loss != run_training(config, tmp_path / "whole").loss


def test_a_run_goes_on_with_the_stream_that_it_has_begun_with(tmp_path):
    config = small(steps=8)
    assert config.stream == "auto"
    assert [stream_of(config, device, None) for device in ("cpu", "cuda:0")] == ["host", "device"]
    begun = config.model_copy(update={"stream": "device", "steps": 7})
    run_training(begun, tmp_path)
    start, _ = CheckpointStore(tmp_path / "checkpoints").latest_valid()
    assert start.config["training"]["stream"] == "device"
    assert stream_of(config, "cpu", start) == "device"
    assert stream_of(config.model_copy(update={"stream": "host"}), "cpu", start) == "host"
    del start.config["training"]["stream"]  # as versions before wrote it
    assert stream_of(config, "cuda", start) == "host"
