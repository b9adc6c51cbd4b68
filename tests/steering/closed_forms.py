"""Answers that the steering tests compare with, written out here and not taken from the package."""

import itertools
import math

import torch
from torch import Tensor

import metaflowmaps as mfm
from conftest import F64, Case, bayes, coefficients
from metaflowmaps.networks.mlp import MLPConfig


def random_map(path, dtype=torch.float32, num_classes=0, width=16, depth=2, dim=2, **options):
    """A map with random weights: nothing about it is right, everything about it is a function."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MLPConfig(width=width, depth=depth, num_classes=num_classes).network((dim,))
        torch.nn.init.normal_(net.output.weight, std=0.5 / math.sqrt(width))
        if num_classes:
            torch.nn.init.normal_(net.labels.weight)
    return mfm.MetaFlowMap(net, path, **options).to(dtype)


def gaussian_map(path, mean, std):
    """A MetaFlowMap that is exact for N(mean, std² Id): the gaussian parameterisation with a network that says 0."""
    mean = torch.as_tensor(mean, dtype=F64)
    net = MLPConfig(width=4, depth=1).network((len(mean),)).double()
    return mfm.MetaFlowMap(net, path, data_mean=mean, data_std=std).double()


def tilted(case: Case, A: Tensor, y: Tensor, noise_std: float, strength: float = 1.0) -> Case:
    """p_1 e^r for r = −λ‖y − Ax‖²/(2σ²), by completing the square in information form; its law is left out."""
    pi = strength / noise_std**2
    prior = torch.linalg.inv(case.covariances)
    covariances = torch.linalg.inv(prior + pi * A.T @ A)
    information = (prior @ case.means[..., None])[..., 0] + pi * y @ A
    means = (covariances @ information[..., None])[..., 0]
    exponent = (information * means).sum(1) - (case.means[:, None] @ prior @ case.means[..., None])[:, 0, 0]
    log_mass = 0.5 * (torch.logdet(covariances) - torch.logdet(case.covariances) + exponent)
    weights = torch.softmax(case.weights.log() + log_mass, 0)
    return Case(None, means, covariances, weights)


def draw(case: Case, n: int, generator: torch.Generator) -> Tensor:
    """n samples of a law given by its parameters."""
    k = torch.multinomial(case.weights, n, replacement=True, generator=generator)
    noise = torch.randn(n, case.means.shape[1], generator=generator, dtype=F64)
    factors = torch.linalg.cholesky(case.covariances)
    return case.means[k] + torch.einsum("nde,ne->nd", factors[k], noise)


def drift_of(case: Case, path: mfm.Path, t: float, x: Tensor) -> Tensor:
    """b_t(x) = α̇ E[I_0|x] + β̇ E[I_1|x], the posterior by Bayes."""
    alpha, beta, alpha_dot, beta_dot = (c.expand(len(x)) for c in coefficients(path, torch.tensor(t, dtype=F64)))
    if t == 0:  # nothing is known: I_0 = x, I_1 at its mean
        mean = (case.weights[:, None] * case.means).sum(0)
        return alpha_dot[:, None] * x + beta_dot[:, None] * mean
    means, _, weights = bayes(case, (x, alpha, beta))
    mean = (weights[..., None] * means).sum(1)
    return (alpha_dot / alpha)[:, None] * (x - beta[:, None] * mean) + beta_dot[:, None] * mean


def gaussian_moment(mean: Tensor, cov: Tensor, A: Tensor, y: Tensor, noise_std: float) -> tuple[float, Tensor]:
    """log E[e^r] & the mean under the tilt, of N(mean, cov), r = −‖y − Ax‖²/(2σ²): y's evidence and Kalman's update."""
    p = len(y)
    seen = noise_std**2 * torch.eye(p, dtype=F64) + A @ cov @ A.T
    residual = y - A @ mean
    log_density = torch.distributions.MultivariateNormal(torch.zeros(p, dtype=F64), seen).log_prob(residual)
    log_normaliser = -0.5 * p * math.log(2 * math.pi * noise_std**2)
    return float(log_density - log_normaliser), mean + cov @ A.T @ torch.linalg.solve(seen, residual)


def base_chain(path: mfm.Path, mean: Tensor, cov: Tensor, times: list[float], last: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_1 after x_0 ~ N(0, Id) and bridge steps with D_t(x) in the place of x_1.

    x_u | x_t, x_1 ~ N(keep x_t + data x_1, std²), ρ = β_t/β_u: keep = ρ α_u²/α_t², data = β_u (1 − ρ² α_u²/α_t²),
    std² = α_u² (1 − ρ² α_u²/α_t²). The last move goes to D_t(x) ("mean") or to a draw of the posterior ("draw").
    """
    eye = torch.eye(len(mean), dtype=F64)
    m, c = torch.zeros_like(mean), eye.clone()
    for t, u in itertools.pairwise(times):
        (a_t, b_t, *_), (a_u, b_u, *_) = (coefficients(path, torch.tensor(v, dtype=F64)) for v in (t, u))
        marginal = a_t**2 * eye + b_t**2 * cov
        gain = b_t * cov @ torch.linalg.inv(marginal)  # D_t(x) = mean + gain (x − β_t mean)
        if u < 1:
            kept = (b_t / b_u) ** 2 * a_u**2 / a_t**2
            keep, data = kept * b_u / b_t if t > 0 else 0 * b_u, b_u * (1 - kept)
            noise = a_u**2 * (1 - kept) * eye
        else:
            keep, data = 0 * b_u, torch.ones_like(b_u)
            noise = a_t**2 * cov @ torch.linalg.inv(marginal) if last == "draw" else 0 * eye
        step = keep * eye + data * gain
        m = step @ m + data * (mean - b_t * gain @ mean)
        c = step @ c @ step.T + noise
    return m, c
