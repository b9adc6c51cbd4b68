"""Bases whose every answer is known, and the statistics by which targets are held against those answers.

For Gaussian data the gaussian parameterisation with a network that says 0 is the exact map. For a mixture on a line the
exact map is the quantile function of its posterior; its diagonal is the mixture's own drift in whitened coordinates.
"""

import math

import pytest
import torch
from torch import Tensor, nn

import metaflowmaps as mfm
from conftest import F64, PATHS, coefficients
from metaflowmaps.draws import DrawOptions, make_draws
from metaflowmaps.finetuning import MFMFT, SelfNormalised, TargetBatch, TuningSetup
from metaflowmaps.finetuning.baseline import RunningLevel
from metaflowmaps.finetuning.mfm_ft import WeightedRegression
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.networks.mlp import MLPConfig

# each path, and one draw and several: a fault of the one or the other shows without their product
ONE_AND_FOUR = pytest.mark.parametrize(
    ("num_draws", "path"), [(1, PATHS["linear"]), (4, PATHS["trigonometric"])], ids=["1-linear", "4-trigonometric"]
)
LEVEL = 4.5  # of |z|: two-sided probability 7e-6 a statistic; the suite looks at about a thousand of them, seeds fixed
LOUD = 10.0  # of |z|, where a difference must show: no chance fluctuation


def gaussian_map(path, mean, std, dtype=F64, width=4):
    """The exact map of N(mean, std² Id): any network with output 0."""
    mean = torch.as_tensor(mean, dtype=F64)
    return mfm.MetaFlowMap(
        MLPConfig(width=width, depth=1).network((len(mean),)).to(dtype), path, data_mean=mean, data_std=std
    )


def random_map(path, mean, std, seed=0, dtype=F64, parameterization="gaussian", width=8):
    """A map with random weights in the same chart: right about nothing, a function of everything."""
    mean = torch.as_tensor(mean, dtype=F64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = MLPConfig(width=width, depth=2).network((len(mean),))
        nn.init.normal_(network.output.weight, std=0.5 / math.sqrt(width))
    return mfm.MetaFlowMap(network.to(dtype), path, parameterization, mean, std)


def whitened(path, mean, std, t, x, velocity):
    """(a, z, dz/da) of a velocity at (t, x) in the chart of N(mean, std² Id) at context time 0.

    g² = α² + β²δ², z = (x − βμ)/g, a = (2/π) arctan(βδ/α); dz/da = ż/ȧ by the quotient rule.
    """
    alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(path, t))
    g = (alpha**2 + (beta * std) ** 2).sqrt()
    g_dot = (alpha * alpha_dot + beta * beta_dot * std**2) / g
    a_dot = 2 / math.pi * std * (beta_dot * alpha - alpha_dot * beta) / g**2
    z = (x - beta * mean) / g
    z_dot = (velocity - beta_dot * mean) / g - z * g_dot / g
    return 2 / math.pi * torch.atan2(beta * std, alpha)[:, 0], z, z_dot / a_dot


def unwhitened(path, mean, std, a, z):
    """(t, x) of (a, z): the inverse."""
    sine, cosine = std * torch.cos(math.pi / 2 * a), torch.sin(math.pi / 2 * a)  # β/α = tan(πa/2)/δ
    t = cosine / (cosine + sine) if path.name == "linear" else 2 / math.pi * torch.atan2(cosine, sine)
    alpha, beta = (c[:, None] for c in coefficients(path, t)[:2])
    return t, beta * mean + (alpha**2 + (beta * std) ** 2).sqrt() * z


class Diagonal(nn.Module):
    """A network that knows nothing but the drift of a law: the diagonal at context time 0, in the chart's units."""

    def __init__(self, law, path, mean, std):
        super().__init__()
        self.law, self.path, self.mean, self.std = law, path, mean, std
        self.event_shape = (len(mean),)
        self.unused = nn.Parameter(torch.zeros((), dtype=F64))  # tells the map its dtype

    def forward(self, z, a, b, context, context_time):
        assert torch.equal(a, b)
        assert not context_time.any()
        t, x = unwhitened(self.path, self.mean, self.std, a, z)
        return 2 / math.pi * whitened(self.path, self.mean, self.std, t, x, self.law.drift(self.path, t, x))[2]


class MixtureMap(mfm.MetaFlowMap):
    """The exact map of a mixture, where it is asked for drifts and, on a line, for one-step draws.

    X(ε; t, x) solves G(X; t, x) = Φ(ε) with G the posterior's distribution function; ∂X/∂x = −∂_x G/∂_X G.
    """

    def __init__(self, path, law, mean, std):
        mean = torch.as_tensor(mean, dtype=F64)
        super().__init__(Diagonal(law, path, mean, std), path, data_mean=mean, data_std=std)

    def push(self, noise, t, x_t, steps=1, cond=None):
        law = self.network.law
        assert law.dim == 1
        alpha, beta = (c[:, None] for c in coefficients(self.path, t)[:2])
        weights, means, variances = law.weights, law.means[:, 0], law.covariances[:, 0, 0]
        seen = alpha**2 + beta**2 * variances
        evidence = weights.log() - 0.5 * seen.log() - 0.5 * (x_t - beta * means) ** 2 / seen
        responsibilities = evidence.softmax(1)
        m, tau = means + beta * variances / seen * (x_t - beta * means), alpha * (variances / seen).sqrt()

        def distribution(x):
            return (responsibilities * torch.special.ndtr((x - m) / tau)).sum(1, keepdim=True)

        with torch.no_grad():
            wanted = torch.special.ndtr(noise)
            low, high = (m - 9 * tau).amin(1, keepdim=True), (m + 9 * tau).amax(1, keepdim=True)
            for _ in range(50):  # the bracket, of some ten units, shrinks to 1e-14
                middle = (low + high) / 2
                below = distribution(middle) < wanted
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            x = (low + high) / 2
            density = (responsibilities / tau * torch.exp(-0.5 * ((x - m) / tau) ** 2)).sum(1, keepdim=True)
            density = density / math.sqrt(2 * math.pi)
        return x - (distribution(x) - distribution(x).detach()) / density  # its value is x, its derivative as above


class DrawnExactly(TuningProblem):
    """A problem whose draws are a mixture's own: any dimension, and no gradient."""

    def draws(self, states, num_draws, differentiate, generator):
        posterior = mfm.ExactPosterior(self.path, self.base.network.law)
        options = DrawOptions(num_draws, differentiate, chunk=num_draws)
        return make_draws(posterior, self.reward, states.t, states.x, options, generator)


class Case:
    """A law, a reward, the exact base map and the exact tilted law."""

    def __init__(self, name, path, dtype=F64):
        self.name, self.path, self.dtype = name, path, dtype
        self.mixed = name.startswith("mixture")
        if name == "gaussian-1d":
            means, variances, weights, A, y, noise = [[0.4]], 0.64, None, [[1.0]], [1.2], 0.8
        elif name == "gaussian-2d":
            means, variances, weights, A, y, noise = [[0.4, -0.3]], 0.64, None, [[1.0, -0.6]], [1.0], 0.7
        elif name == "mixture-1d":
            means, variances, weights, A, y, noise = [[-1.2], [0.9]], [0.2, 0.35], [0.6, 0.4], [[1.0]], [0.8], 0.9
        else:
            means, variances, weights = [[-1.2, -0.8], [0.5, 1.0], [1.3, -0.7]], [0.2, 0.4, 0.3], [0.5, 0.3, 0.2]
            A, y, noise = [[1.0, -0.6]], [0.7], 0.8
        self.law = mfm.GaussianMixture(torch.tensor(means, dtype=F64), variances, weights)
        self.reward = mfm.rewards.LinearGaussian(torch.tensor(A), torch.tensor(y), noise)
        self.tilted = self.law.tilt(self.reward)
        self.mean, self.std = self.law.mean, float(self.law.variance.mean().sqrt())
        self.dim = self.law.dim

    def base(self):
        """The exact map."""
        if self.mixed:
            return MixtureMap(self.path, self.law, self.mean, self.std)
        return gaussian_map(self.path, self.mean, self.std, self.dtype)

    def problem(self, reward=None, **options):
        kind = DrawnExactly if self.name == "mixture-2d" else TuningProblem
        return kind(self.base(), reward or self.reward, **options)

    def student(self, seed=1):
        """A student that is far from the answer."""
        return random_map(self.path, self.mean, self.std, seed, self.dtype)

    def states(self, kind):
        """A source of x_1: samples of a law, or a box that has nothing to do with either."""

        def source(model, step, n, generator):
            if kind == "box":
                x_1 = 5 * torch.rand(n, self.dim, generator=generator, dtype=F64) - 2.5
            else:
                x_1 = (self.law if kind == "base" else self.tilted).sample(n, generator)
            return x_1.to(self.dtype), {}

        return source

    def answer(self, batch: TargetBatch, law=None) -> Tensor:
        """F of the tilted law's drift (or of another's) at the states of a batch, without the package's chart."""
        t, x = unwhitened(self.path, self.mean, self.std, batch.a.double(), batch.z.double())
        drift = (law or self.tilted).drift(self.path, t, x)
        return whitened(self.path, self.mean, self.std, t, x, drift)[2]

    def one_draw_alone(self, batch: TargetBatch) -> Tensor:
        """For a Gaussian, F of b + (σ²/2) E[j ∇r(X)], X ~ p(x_1 | x_t) and j = dm/dx: no tilt in the mean of ∇r."""
        t, x = unwhitened(self.path, self.mean, self.std, batch.a.double(), batch.z.double())
        alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(self.path, t))
        j = beta * self.std**2 / (alpha**2 + (beta * self.std) ** 2)
        A, y = self.reward.A.to(F64), self.reward.y.to(F64)
        slope = self.reward.precision * (y - (self.mean + j * (x - beta * self.mean)) @ A.T) @ A
        half = beta_dot / beta * alpha**2 - alpha_dot * alpha
        return whitened(
            self.path, self.mean, self.std, t, x, self.law.drift(self.path, t, x) + half * j * slope
        )[2]  # fmt: skip


MEAN, STD, WANTED, NOISE = torch.tensor([0.4, -0.3], dtype=F64), 0.8, torch.tensor([1.1, 0.5], dtype=F64), 0.9


class Round:
    """A Gaussian whose tilt is a Gaussian of one variance again: r = −‖y − x‖²/(2s²), by completing the square."""

    def __init__(self, path):
        self.path = path
        self.reward = mfm.rewards.LinearGaussian(torch.eye(2), WANTED, NOISE)
        precision = 1 / STD**2 + 1 / NOISE**2
        self.std = math.sqrt(1 / precision)
        self.mean = (MEAN / STD**2 + WANTED / NOISE**2) / precision

    def problem(self, **options):
        return TuningProblem(gaussian_map(self.path, MEAN, STD, torch.float32), self.reward, **options)

    def tuned(self, width=4):
        """The exact map of the tilted law: in its own chart, a network of zeros."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return gaussian_map(self.path, self.mean, self.std, torch.float32, width)

    def source(self, model, step, n, generator):
        return (MEAN + STD * torch.randn(n, 2, generator=generator)).float(), {}


def running():
    """A running baseline, from a start that is off by some units."""
    return RunningLevel(32, 0.01, 0.5)


def features(batch: TargetBatch) -> Tensor:
    """Functions of the state, (B, k): a residual whose conditional mean is 0 is uncorrelated with each."""
    early = torch.cos(math.pi / 2 * batch.a)[:, None]
    return torch.cat([torch.ones_like(early), early, batch.z, batch.z.square()], 1)


def z_scores(residual: Tensor, functions: Tensor) -> Tensor:
    """Mean over standard error of each function times each coordinate of the residual; rows are independent."""
    products = torch.einsum("bi,bk->bik", residual.double(), functions.double()).flatten(1)
    return products.mean(0) / (products.std(0) / math.sqrt(len(products)))


def collect(objective, model, steps):
    """The batches of the first steps as one: whatever learns on the way (baseline, λ) does."""
    parts = [objective.batch(model, step) for step in range(steps)]
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("t", "a", "z", "target", "weight")}
    return TargetBatch(**joined, cond={})


def fit(batch: TargetBatch, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares of the targets on (1, x): coefficients and their (sandwich) covariance, row by row.

    The estimating equations Σ w φ (θᵀφ − v) = 0 hold in expectation at the fixed point of the regression.
    -> (d, k) and (d, k, k).
    """
    phi = torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)
    inverse = torch.linalg.inv((batch.weight[:, None] * phi).T @ phi)
    theta = inverse @ phi.T @ (batch.weight[:, None] * batch.target)
    scores = phi[:, None] * (batch.weight[:, None] * (phi @ theta - batch.target))[..., None]  # (B, d, k)
    return theta.T, inverse @ torch.einsum("bdk,bdl->dkl", scores, scores) @ inverse


def fitted_z(batch: TargetBatch, x: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors each fitted coefficient is from that of ``expected``, an affine function's values."""
    theta, covariance = fit(batch, x)
    phi = torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)
    wanted = torch.linalg.lstsq(phi, expected).solution.T
    torch.testing.assert_close(phi @ wanted.T, expected, rtol=1e-8, atol=1e-8)  # it is affine
    return (theta - wanted) / covariance.diagonal(dim1=1, dim2=2).sqrt()


def regression(case: Case, baseline, form, num_draws, size=2000, kind="base", seed=0, **options):
    """MFM-FT on a case's own problem."""
    problem, weighted = options.pop("problem", None) or case.problem(), options.pop("weighted", True)
    chosen = (MFMFT if weighted else SelfNormalised)(num_draws, form, **options)
    return WeightedRegression(chosen, TuningSetup(problem, case.states(kind), size, seed), baseline)
