"""What the meter counts, against formulas it never computes: forwards, backwards, rewards, decodes, memory."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import metaflowmaps as mfm
from calls import steer
from conftest import F64, PATHS, normal
from metaflowmaps import cost
from metaflowmaps.cost import Meter
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import stream

K, N, M = 5, 3, 4
LATE = torch.linspace(0.01, 1, K + 1, dtype=F64)  # the release's start: gradients look where the step begins
EARLY = torch.tensor([0.0, 0.005, 0.2, 0.5, 0.8, 1.0], dtype=F64)  # two steps begin before t = .01


class Witness(nn.Module):
    """A network that keeps books of its own: rows forward, and rows of every gradient that came back through it."""

    def __init__(self, **options):
        super().__init__()
        self.inner = MLPConfig(width=16, depth=2, **options).network((2,))
        nn.init.normal_(self.inner.output.weight, std=0.2)
        self.event_shape = (2,)
        self.rows, self.back = 0, 0

    def forward(self, z, *args, **cond):
        out = self.inner(z, *args, **cond)
        self.rows += len(out)
        if out.requires_grad:
            out.register_hook(lambda g: setattr(self, "back", self.back + len(g)))
        return out


class WitnessReward:
    """Mild: every draw carries weight."""

    def __init__(self):
        self.rows, self.back = 0, 0

    def __call__(self, x):
        r = -0.05 * (x - 0.5).square().sum(1)
        self.rows += len(x)
        if r.requires_grad:
            r.register_hook(lambda g: setattr(self, "back", self.back + len(g)))
        return r


def run(method, n=6, model=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Witness()
    reward = WitnessReward()
    model = mfm.MetaFlowMap(net, PATHS["linear"]) if model is None else model(net)
    got = steer(model, reward, n, method, generator=stream(0), **{"steps": K, "num_draws": N, "grid": LATE, **options})
    # the meter and the witnesses agree, the final scoring (one call a sample) is not part of the cost
    cost = got.cost
    assert cost["forwards"] == net.rows
    assert cost["backwards"] == net.back
    assert cost["reward_calls"] == reward.rows - n
    assert cost["reward_backwards"] == reward.back
    total = cost["forwards"] + cost["backwards"] + cost["reward_calls"] + cost["reward_backwards"]
    assert cost["nfe"] == total / n
    assert cost["seconds"] > 0
    return got


# the paper's convention (method.md §7), a sample: (forwards, backwards, rewards, reward backwards)
FORMULAS = {
    "none": ("none", {}, (K, 0, 0, 0)),
    "none, midpoint": ("none", {"integrator": "midpoint"}, (2 * K, 0, 0, 0)),
    "none, heun": ("none", {"integrator": "heun"}, (2 * K, 0, 0, 0)),
    "none, rk4": ("none", {"integrator": "rk4"}, (4 * (K - 1) + 2, 0, 0, 0)),  # the last step is a midpoint step
    "none, heun sde": ("none", {"process": "sde", "integrator": "heun"}, (2 * K - 1, 0, 0, 0)),
    "mfm-gf": ("mfm-gf", {}, (K + N * K, 0, N * K, 0)),
    "mfm-gf, chunks": ("mfm-gf", {"chunk": 2, "batch_size": 4}, (K + N * K, 0, N * K, 0)),
    "mfm-gf, two map steps": ("mfm-gf", {"map_steps": 2}, (K + 2 * N * K, 0, N * K, 0)),
    "mfm-gf, centred on D": ("mfm-gf", {"centre": "denoise"}, (K + N * K, 0, N * K, 0)),
    "mfm-gf, filled": ("mfm-gf", {"fill": True, "recycle": 4}, (K + N * (K + 3), 0, N * (K + 3), 0)),
    "mfm-g": ("mfm-g", {}, (K + N * K, N * K, N * K, N * K)),
    "mfm-g, plain": ("mfm-g", {"blend": False, "chunk": 1}, (K + N * K, N * K, N * K, N * K)),
    "mfm-g, two passes": ("mfm-g", {"passes": 2}, (K + 2 * N * K, N * K, 2 * N * K, N * K)),
    "mfm-g, sde": ("mfm-g", {"process": "sde"}, (K + N * K, N * K, N * K, N * K)),
    "mfm-search": ("mfm-search", {"particles": M}, (M * N * K, 0, M * N * K, 0)),
    "mfm-smc": ("mfm-smc", {"particles": 2}, (K + N * K, 0, N * K, 0)),
    "mfm-smc, one of M": ("mfm-smc", {"particles": M, "returns": "one"}, (M * (K + N * K), 0, M * N * K, 0)),
    "mfm-smc, by gradients": ("mfm-smc", {"guide": "mfm-g"}, (K + N * K, N * K, N * K, N * K)),
    "dps": ("dps", {}, (K, K, K, K)),
    "tds": ("tds", {}, (K, K, K, K)),
    "tds, one of M": ("tds", {"particles": M, "returns": "one"}, (M * K, M * K, M * K, M * K)),
    "best-of-n": ("best-of-n", {}, (N * K, 0, N, 0)),
    "glass": ("glass", {"glass_steps": 4}, (K + 4 * N * K, 0, N * K, 0)),
    "glass, rk4": ("glass", {"glass_steps": 2, "glass_integrator": "rk4"}, (K + 8 * N * K, 0, N * K, 0)),
    "glass, g": ("glass", {"glass_steps": 4, "estimator": "mfm-g"}, (K + 4 * N * K, 4 * N * K, N * K, N * K)),
    # before t = .01 the gradient looks at .01, and the drift is still that of the state's own time: one more call
    "dps, from 0": ("dps", {"grid": EARLY}, (K + 2, K, K, K)),
    "tds, from 0": ("tds", {"grid": EARLY}, (K + 2, K, K, K)),
    "mfm-g, from 0": ("mfm-g", {"grid": EARLY}, (K + N * K, N * K, N * K, N * K)),
}
NFE = {  # in one number, as the paper gives it
    "mfm-gf": K + 2 * N * K,
    "mfm-g": K + 4 * N * K,
    "mfm-g, two passes": K + 6 * N * K,
    "mfm-search": 2 * M * N * K,
    "dps": 4 * K,
    "tds, one of M": 4 * K * M,
    "best-of-n": K * N + N,
    "glass": K + 4 * N * K + N * K,
    "none": K,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_cost_of_every_method(name):
    method, options, (forwards, backwards, rewards, reward_backwards) = FORMULAS[name]
    got = run(method, **options)
    assert got.cost["forwards"] == 6 * forwards
    assert got.cost["backwards"] == 6 * backwards
    assert got.cost["reward_calls"] == 6 * rewards
    assert got.cost["reward_backwards"] == 6 * reward_backwards
    if name in NFE:
        assert got.cost["nfe"] == NFE[name]


def test_two_passes_differentiate_only_draws_that_matter():
    """A reward that forbids a half-space: forbidden draws have weight zero and no second pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Witness()
    seen = []

    def reward(x):
        r = torch.where(x[:, 0] > 0, -0.05 * x[:, 1].square(), -torch.inf)
        if not torch.is_grad_enabled():
            seen.append(r.reshape(-1, 6))
        return r

    got = steer(
        mfm.MetaFlowMap(net, PATHS["linear"]), reward, 6, "mfm-g", num_draws=8, grid=LATE, passes=2,
        chunk=8, generator=stream(0),
    )  # fmt: skip
    draws = torch.stack(seen[:-1])  # (K, 8, 6); the last is the final scoring
    allowed = draws.isfinite()
    # where nothing is allowed nothing can be said, and all weights stay equal
    kept = int(torch.where(allowed.any(1, keepdim=True), allowed, True).sum())
    assert 0 < kept < draws.numel()
    assert got.cost["backwards"] == net.back == kept


def foreign(net, **methods):
    """The same network as a model of another kind: a drift, and draws that are pushed by a map."""
    own = mfm.MetaFlowMap(net, PATHS["linear"])

    class Foreign:
        path, event_shape = own.path, own.event_shape

        def drift(self, t, x, cond=None):
            return own.drift(t, x, cond)

        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            return own.draw(t, x_t, num_draws, generator=generator, cond=cond)

    return Foreign()


@pytest.mark.parametrize(
    "name", ["none", "mfm-gf", "mfm-g", "mfm-search", "dps", "tds", "best-of-n", "glass", "glass, g"]
)
def test_rows_of_a_foreign_model_are_counted(name):
    """Nothing to hook: results are counted as they pass. Here every row is one evaluation, so the formulas hold."""
    method, options, (forwards, backwards, rewards, reward_backwards) = FORMULAS[name]
    got = run(method, model=foreign, **options)
    assert [got.cost[k] / 6 for k in ("forwards", "backwards", "reward_calls", "reward_backwards")] == [
        forwards, backwards, rewards, reward_backwards
    ]  # fmt: skip


def test_decodes_are_counted_through_the_models_decoder():
    """A reward on pictures: the map's samples are latents, and the decoder is the model's own module."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mfm.MetaFlowMap(Witness(), PATHS["linear"])
        model.decoder = nn.Linear(2, 7)

    def reward(x):
        return -0.05 * model.decoder(x).square().sum(1)

    n = 6
    got = steer(model, reward, n, "mfm-g", num_draws=N, grid=LATE, generator=stream(0))
    assert got.cost["decodes"] == got.cost["reward_calls"] == n * N * K
    assert got.cost["nfe"] == K + 4 * N * K  # a decode is not a network evaluation
    assert steer(model, reward, n, "none", grid=LATE, generator=stream(0)).cost["decodes"] == 0


# -- the meter by itself ---------------------------------------------------------------------------------------------


def test_hooks_count_rows_and_backward_passes_while_the_meter_runs():
    net = nn.Linear(3, 3)
    meter = Meter(net)
    net(normal(5, 3).float())
    with meter:
        net(normal(5, 3).float())
        x = normal(4, 3).float().requires_grad_()
        net(net(x)).sum().backward()
        with torch.no_grad():
            net(x)
    net(normal(5, 3).float())
    assert (meter.forwards, meter.backwards) == (5 + 4 + 4 + 4, 8)
    with meter:  # and on
        net(normal(2, 3).float())
    assert meter.forwards == 19
    assert not net._forward_hooks
    assert meter.evaluations == 27
    cost = meter.cost()
    assert set(cost) == {
        "forwards", "backwards", "reward_calls", "reward_backwards", "decodes", "seconds", "peak_memory_bytes"
    }  # fmt: skip


def test_hooks_come_off_after_an_error():
    net = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="on the way"), Meter(net):
        raise RuntimeError("on the way")
    assert not net._forward_hooks


def test_a_wrapped_callable_counts_rows():
    meter = Meter()
    square = meter.counted(lambda x: x.square(), "reward_calls", "reward_backwards")
    with meter:
        square(normal(7, 2))
        x = normal(3, 2).requires_grad_()
        (g,) = torch.autograd.grad(square(x).sum(), x)
        square(x)  # differentiable, never differentiated
    assert (meter.reward_calls, meter.reward_backwards) == (13, 3)
    torch.testing.assert_close(g, 2 * x.detach())


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_meter_that_runs_twice_adds_seconds_and_keeps_the_higher_peak(monkeypatch):
    clock, peaks, meter = iter([0.0, 1.0, 10.0, 13.0]), iter([170, 120]), Meter()
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(cost, "_mark_resident", lambda: 100)
    monkeypatch.setattr(cost, "_peak_resident", lambda: next(peaks))
    for _ in range(2):
        with meter:
            pass
    assert (meter.cost()["seconds"], meter.cost()["peak_memory_bytes"]) == (4.0, 70)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no getrusage")
@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peaks_are_in_bytes_where_the_system_has_no_proc(tmp_path, monkeypatch, platform, unit):
    """getrusage tells kibibytes on Linux and bytes on macOS."""
    monkeypatch.setattr(cost, "Path", lambda name: tmp_path / "missing" / "file")
    monkeypatch.setattr(cost.sys, "platform", platform)
    monkeypatch.setattr(pytest.importorskip("resource"), "getrusage", lambda who: SimpleNamespace(ru_maxrss=70_000))
    assert cost._peak_resident() == cost._mark_resident() == 70_000 * unit


MEMORY = """
    import sys, torch
    import metaflowmaps as mfm
    from metaflowmaps.networks.mlp import MLPConfig
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = MLPConfig(width=512, depth=4).network((2,))
    torch.nn.init.normal_(net.output.weight, std=0.01)
    model = mfm.MetaFlowMap(net, mfm.LinearPath())
    def peak(num_draws, chunk, **options):
        method = mfm.MFMG(num_draws, chunk=chunk, **options)
        reward = lambda x: -0.1 * x.square().sum(1)
        return mfm.steer(model, reward, 128, method, mfm.ODE(steps=2), seed=0).cost["peak_memory_bytes"]
    peak(4, 4)  # libraries, thread pools and caches are there now
    print(peak(4, 4), peak(64, 4), peak(32, 4, passes=2), peak(32, 32))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of a process cannot be reset")
@pytest.mark.attack
def test_memory_of_mfm_g_is_flat_in_the_number_of_draws():
    """64 draws in chunks of 4 need what 4 draws need (within 15 %); 32 at once need many times that.

    In a process of its own, with large blocks returned to the system as they are freed, so that its growth is that of
    living tensors: a chunk's activations are 4 · 128 · 512 · 4 B = 1 MB a layer. (Two steps: log-kernels of recycled
    draws, L · LN numbers a sample, are no activations; at L = 8, N = 64 & 128 samples they are 2 MB and a few copies.)
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], env=environment, capture_output=True, text=True, check=True
    )
    few, many, two_passes, at_once = (int(v) for v in done.stdout.split())
    assert few > 5e6, "too small to measure"
    assert many <= 1.15 * few
    assert two_passes <= 1.15 * few
    assert at_once > 3 * few
