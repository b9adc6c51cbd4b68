"""Odd values that came through once: tensors without numbers, rewards that end the process, batches without rows."""

import sys
import threading

import numpy as np
import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.metrics import sliced_w2
from metaflowmaps.metrics.frechet import read_statistics
from metaflowmaps.networks.mlp import MLPConfig

PATH = mfm.LinearPath()
ODD = {
    "meta": lambda x: torch.empty_like(x, device="meta"),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(2)] * len(x)),
}
odd = pytest.mark.parametrize("make", ODD.values(), ids=ODD)


@pytest.fixture(scope="module")
def model() -> mfm.MetaFlowMap:
    return mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), PATH)


def bowl(x):
    return -x.square().sum(1)


def steered(model, reward, **more):
    return mfm.steer(model, reward, 4, mfm.MFMGF(num_draws=2), mfm.ODE(steps=3), seed=0, **more)


@odd
def test_states_and_times_without_plain_numbers_are_refused(make, model):
    x = make(torch.zeros(3, 2))
    for act in (
        lambda: model.drift(0.5, x),
        lambda: model.draw(0.5, x, 2),
        lambda: mfm.value_gradient(mfm.MapPosterior(model), bowl, 0.5, x, 2),
        lambda: sliced_w2(x, torch.zeros(3, 2)),
        lambda: mfm.GaussianMixture(x, 1.0),
        lambda: mfm.rewards.LinearGaussian(x, torch.zeros(3), 1.0),
    ):
        with pytest.raises(mfm.InputError):
            act()
    with pytest.raises(mfm.InputError):
        model.drift(make(torch.zeros(3)), torch.zeros(3, 2))


@odd
def test_rewards_without_plain_numbers_are_refused(make, model):
    with pytest.raises(mfm.InputError, match="reward"):
        steered(model, lambda x: make(bowl(x)))


def test_a_reward_that_ends_the_process_loses_no_finished_sample(model):
    calls = [0]

    def reward(x):
        calls[0] += 1
        return sys.exit(0) if calls[0] > 4 else bowl(x)

    with pytest.raises(mfm.SteeringFailed if hasattr(mfm, "SteeringFailed") else mfm.InputError) as caught:
        steered(model, reward, batch_size=2)
    assert "SystemExit" in str(caught.value)
    assert len(caught.value.result.samples) == 2


def test_a_script_that_ends_itself_is_no_success(tmp_path, command):
    (tmp_path / "mine.py").write_text("import sys; sys.exit(0)")
    code, _, err = command("steer", "digits", "--reward", f"{tmp_path}/mine.py:reward", "--num", 1, "--steps", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "SystemExit" in err


@pytest.mark.parametrize("method", ["gradient", "gradient-free"])
def test_a_batch_without_rows_has_a_result_without_rows(method, model):
    x = torch.zeros(0, 2)
    assert model.drift(0.5, x).shape == (0, 2)
    assert model.draw(0.5, x, 3).shape == (3, 0, 2)
    for posterior in (mfm.MapPosterior(model), mfm.GlassPosterior(PATH, model.drift, steps=2)):
        assert mfm.value_gradient(posterior, bowl, 0.5, x, 2, method).gradient.shape == (0, 2)


@pytest.mark.parametrize(("answer", "stops"), [(True, 1), (torch.tensor(True), 1), (np.bool_(True), 1), (1, 0),
                                               (torch.tensor(False), 0), (torch.ones(3), 0), (None, 0)])  # fmt: skip
def test_a_callback_stops_by_any_true(answer, stops, model):
    seen = []
    result = steered(model, bowl, callback=lambda step: seen.append(step) or answer)
    assert (result.interrupted, len(seen)) == ((True, 1) if stops else (False, 3))


def test_threads_that_share_a_model_count_their_own_calls(model):
    alone, counted = steered(model, bowl).cost, []
    threads = [threading.Thread(target=lambda: counted.append(steered(model, bowl).cost)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cost["forwards"] for cost in counted] == [alone["forwards"]] * 4


WRONG = {
    "negative": -np.eye(2),
    "complex": np.eye(2) * 1j,
    "indefinite": np.array([[1.0, 5.0], [5.0, 1.0]]),
    "asymmetric": np.array([[1.0, 0.5], [0.0, 1.0]]),
}


@pytest.mark.parametrize("sigma", WRONG.values(), ids=WRONG)
def test_statistics_that_are_no_covariance_are_refused(sigma, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=sigma)
    with pytest.raises(mfm.InputError, match="statistics file"):
        read_statistics(tmp_path / "s.npz")
