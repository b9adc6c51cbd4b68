"""The shared data folder, and what the proofs stand on: laws with their parameters spelled out."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor

import metaflowmaps as mfm
from metaflowmaps.random import randn, stream
from other_device import other_device

pytest_plugins = ["suite"]
# the same examples on every machine: a suite must not be green by luck
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

F64 = torch.float64
TINY = ["--set", "model.network.width=16", "--set", "model.network.depth=2", "--set", "batch_size=32"]
TINY += ["--set", "checkpoint_every=20", "--set", "log_every=5", "--set", "threads=1"]
TINY_RUN = [*TINY, "--max-steps", "40"]
PATHS = {"linear": mfm.LinearPath(), "trigonometric": mfm.TrigonometricPath()}


@pytest.fixture(scope="session", autouse=True)
def remembered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the suite types is remembered in a folder of its own, not in the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of specifications and shared data (MFM_SHARED, or ../shared)."""
    folder = Path(os.environ.get("MFM_SHARED", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder}; set MFM_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def interop_files() -> Path:
    """Tiny files in the layouts of published weights: ``FAMILY_weights.safetensors`` and ``FAMILY_io.safetensors``."""
    return Path(__file__).parent / "interop" / "fixtures"


@pytest.fixture(scope="module")
def quick_judgement() -> Iterator[None]:
    """The last word on a tuned model takes seconds: here it takes few. And fsync guards against power cuts alone."""
    from metaflowmaps.lab.evaluate.steering_error import ExactJudge
    from metaflowmaps.lab.evaluate.tuning_error import TunedEvalConfig
    from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject

    with pytest.MonkeyPatch.context() as patched:
        few = TunedEvalConfig(samples=64, seeds=1, ode_steps=3)
        patched.setattr(TuningSubject, "usual_judgement", lambda subject: few)
        patched.setattr(ExactJudge, "REFERENCE", 2**12)
        patched.setattr(ExactJudge, "EXACT_SETS", 2)
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


def mfm_in_process(*arguments: object) -> int:
    """``mfm`` in this process: its exit code."""
    from metaflowmaps import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


def mfm_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """``mfm`` in this process: exit code, stdout, stderr."""
    code = mfm_in_process(*arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished training run in the plane, made once a worker: leave it as it is."""
    out = tmp_path_factory.mktemp("gmm") / "run"
    assert mfm_in_process("train", "gmm", *TINY_RUN, "--out", out) == 0
    return out


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``command("sample", "digits", …)``: exit code, stdout, stderr."""
    return lambda *arguments: mfm_command(capsys, *arguments)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that refuses tensors of the processor, as a GPU does: what commands take for ``--device auto``."""
    with other_device() as device:
        monkeypatch.setattr("metaflowmaps.lab.opened.pick_device", lambda _name: device)
        yield device


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> mfm.Path:
    return PATHS[request.param]


def coefficients(path: mfm.Path, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """α, β, α̇, β̇ written out from the glossary (method.md §1), not through the package."""
    if path.name == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    w = math.pi / 2
    return torch.cos(w * t), torch.sin(w * t), -w * torch.sin(w * t), w * torch.cos(w * t)


class Case(NamedTuple):
    """A law and, independently of it, the parameters it should have: (K, d), (K, d, d), (K,)."""

    law: mfm.GaussianMixture
    means: Tensor
    covariances: Tensor
    weights: Tensor


def _case(covariances: object, weights: list[float] | None = None) -> Case:
    means = torch.tensor([[-1.5, -1.0], [0.5, 1.2], [1.5, -0.7]], dtype=F64)
    given = torch.as_tensor(covariances, dtype=F64)
    full = given if given.ndim >= 2 else given.reshape(-1, 1, 1) * torch.eye(2, dtype=F64)
    w = torch.full((3,), 1 / 3, dtype=F64) if weights is None else torch.tensor(weights, dtype=F64)
    law = mfm.GaussianMixture(means, given, None if weights is None else w)
    return Case(law, means, full.expand(3, 2, 2), w)


CASES = {
    "isotropic": _case(0.4),
    "per-component": _case([0.3, 0.6, 0.15], [0.5, 0.3, 0.2]),
    "shared-full": _case([[0.5, 0.2], [0.2, 0.3]], [0.2, 0.2, 0.6]),
    "per-component-full": _case(
        [[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.6]], [[0.9, 0.0], [0.0, 0.1]]], [0.5, 0.3, 0.2]
    ),
}


# in two dimensions eigenvector matrices may come out symmetric (reflections): a transpose shows in three only
_BASE = torch.tensor(
    [[[1.0, 0.4, -0.3], [0.2, 0.5, 0.6], [0.7, -0.5, 0.3]], [[0.3, 0.8, 0.1], [-0.4, 0.6, 0.9], [0.5, 0.2, -0.7]]]
)
_CUBE = (_BASE @ _BASE.mT + 0.1 * torch.eye(3)).double(), torch.tensor([[1.0, -0.5, 0.2], [-0.8, 0.6, 0.4]], dtype=F64)
CUBE = Case(
    mfm.GaussianMixture(_CUBE[1], _CUBE[0], torch.tensor([0.25, 0.75])),
    _CUBE[1],
    _CUBE[0],
    torch.tensor([0.25, 0.75], dtype=F64),
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def paper_law() -> mfm.GaussianMixture:
    """The mixture of the paper's inverse problem (method.md §7)."""
    return mfm.GaussianMixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]], dtype=F64), 0.5)


def normal(*shape: int, seed: str = "x", dtype: torch.dtype = F64) -> Tensor:
    """Standard normals that depend on their label only."""
    return randn(shape, stream(0, seed, *shape), dtype)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0, seed: str = "t") -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=stream(0, seed, *shape), dtype=F64)


def bayes(case: Case, *observations: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of I_1 given observations (x, α, β) of x = α ε + β I_1, (B, d) and (B,), in information form.

    Precision Σ⁻¹ + Σ β²/α² Id; weights from the evidence of the stacked observations. -> (B,K,d), (B,K,d,d), (B,K).
    """
    d = case.means.shape[1]
    eye = torch.eye(d, dtype=F64)
    prior = torch.linalg.inv(case.covariances)
    precision, information = prior[None], (prior @ case.means[..., None])[..., 0][None]
    for x, alpha, beta in observations:
        precision = precision + (beta**2 / alpha**2)[:, None, None, None] * eye
        information = information + (beta / alpha**2)[:, None, None] * x[:, None]
    covariances = torch.linalg.inv(precision)
    means = (covariances @ information[..., None])[..., 0]
    # evidence of the stacked vector: mean β_i μ, covariance α_i² δ_ij Id + β_i β_j Σ
    x = torch.cat([o[0] for o in observations], 1)
    betas = torch.stack([o[2] for o in observations], 1)
    alphas = torch.stack([o[1] for o in observations], 1)
    b, n = betas.shape
    k = len(case.means)
    loc = (betas[:, None, :, None] * case.means[None, :, None]).reshape(b, k, d * n)
    outer = betas[:, :, None] * betas[:, None, :]
    cov = torch.einsum("bij,kde->bkidje", outer, case.covariances).reshape(b, k, d * n, d * n)
    cov = cov + torch.diag_embed(alphas.repeat_interleave(d, 1) ** 2)[:, None]
    log_evidence = torch.distributions.MultivariateNormal(loc, cov).log_prob(x[:, None])
    return means, covariances, torch.softmax(case.weights.log() + log_evidence, -1)


def ks_distance(samples: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> float:
    """Kolmogorov–Smirnov distance of (n,) samples to a 1-d mixture with (K,) parameters."""
    x = samples.detach().sort().values
    cdf = (weights * torch.special.ndtr((x[:, None] - means) / variances.sqrt())).sum(1)
    steps = torch.arange(len(x) + 1, dtype=F64) / len(x)
    return float(torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max())


def ks_bound(n: int, level: float = 1e-4) -> float:
    """P(distance > bound) <= level for n independent draws: Massart's form of the DKW inequality, any n."""
    return math.sqrt(math.log(2 / level) / (2 * n))


def worst_ks(draws: Tensor, means: Tensor, covariances: Tensor, weights: Tensor) -> float:
    """Largest KS distance of (n, d) draws along eight directions (which together see the correlation too)."""
    distances = []
    for e in torch.nn.functional.normalize(normal(8, draws.shape[1], seed="directions"), dim=1):
        distances.append(ks_distance(draws.double() @ e, means @ e, e @ covariances @ e, weights))
    return max(distances)
