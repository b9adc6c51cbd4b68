"""Meta flow maps on one screen, with torch alone: train one, draw, differentiate the value, steer, compare with truth.

Data x_1 lie in three Gaussians on a diagonal, and x_t = (1 − t) noise + t x_1. One network draws from *every* posterior
p(x_1 | x_t) in one step from noise. A reward r tilts the data to p(x_1) e^r(x_1): here r is the log-likelihood of an
observation y = A·x_1 + σ noise. On one core in a minute: python examples/mfm_in_100_lines.py [steps]"""

import sys

import torch
from torch import nn

MEANS, VARIANCE, SPREAD = torch.tensor([[-3.0, -3], [0, 0], [3, 3]]), 0.5, 6.5**0.5  # of the data
A, Y, SIGMA = torch.tensor([1.2, -0.8]), -1.0, 0.2  # the observation
QUARTER, STEPS, BATCH, H = torch.pi / 2, int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 512, 8e-3


def posterior(t, x):
    """Exact p(x_1 | x_t = x): weights (B, 3), means (B, 3, 2) and one variance (B, 1) of a mixture."""
    total, away = (1 - t) ** 2 + t**2 * VARIANCE, x[:, None] - t[:, None] * MEANS
    weights = (-away.square().sum(2) / (2 * total)).softmax(1)
    return weights, MEANS + (t * VARIANCE / total)[:, None] * away, VARIANCE * (1 - t) ** 2 / total


def whiten(t, x):
    """Mean and standard deviation of p(x_1 | x_t = x), were the data one Gaussian; and x at unit size."""
    total = (1 - t) ** 2 + (t * SPREAD) ** 2
    return t * SPREAD**2 / total * x, SPREAD * (1 - t) / total.sqrt(), x / total.sqrt()


network = nn.Sequential(*(f for n in (25, 128, 128, 128) for f in (nn.Linear(n, 128), nn.SiLU())), nn.Linear(128, 2))


def flow(a, b, z, t, x):
    """F: z + (b − a) F_{a,b}(z; t, x) carries z_a = cos(a) ε + sin(a) (x_1 − mean)/std from angle a to b."""
    angles = torch.cat([a, b, torch.atan2(t * SPREAD, 1 - t)], 1)
    waves = [wave(k * angles) for k in (1, 2, 4) for wave in (torch.sin, torch.cos)]
    return network(torch.cat([z, whiten(t, x)[2], angles, *waves], 1))


def velocity(a, z, t, x):
    """E[dz_a/da | z_a, x_t] by GLASS: x and z are Gaussian views of one x_1, together one view at a cleaner time."""
    mean, std, _ = whiten(t, x)
    view, signal, noise = std * z + a.sin() * mean, a.sin(), std * a.cos()  # view = signal x_1 + noise ε
    precision = (t / (1 - t)) ** 2 + (signal / noise) ** 2 + 1e-12
    x_1, time = (t * x / (1 - t) ** 2 + signal * view / noise**2) / precision, 1 / (1 + precision**-0.5)
    weights, means, _ = posterior(time, time * x_1)
    denoised = (weights[..., None] * means).sum(1)  # of other data: a flow model, all that the map is taught by
    return ((denoised - mean) / std - a.sin() * z) / a.cos()


def draw(t, x, n):
    """n one-step draws from p(x_1 | x_t = x): (n, B, 2), differentiable in x."""
    (mean, std, _), t, z = whiten(t, x), t.repeat(n, 1), torch.randn(n * len(x), 2)
    return mean + std * (z + QUARTER * flow(0 * t, 0 * t + QUARTER, z, t, x.repeat(n, 1))).unflatten(0, (n, -1))


def reward(x_1):
    return -((Y - x_1 @ A) ** 2) / (2 * SIGMA**2)


def exact_terms(t, x):
    """log E[e^r; component | x_t = x] less a constant: their log-sum is the value, their softmax the weights."""
    weights, means, variance = posterior(t, x)
    total = SIGMA**2 + variance * A.square().sum()
    return weights.log() - total.log() / 2 - (Y - means @ A) ** 2 / (2 * total)


torch.manual_seed(0)
optimizer = torch.optim.Adam(network.parameters(), 3e-3, betas=(0.9, 0.99))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):  # regress ∂_b of the map, by a central difference, on the velocity where the map arrives
    x_1 = MEANS[torch.randint(3, (BATCH,))] + VARIANCE**0.5 * torch.randn(BATCH, 2)
    t = 0.995 * torch.rand(BATCH, 1) * (torch.rand(BATCH, 1) < 0.9)  # one in ten contexts is pure noise
    x = (1 - t) * torch.randn(BATCH, 2) + t * x_1
    (mean, std, _), (a, b) = whiten(t, x), ((QUARTER - 0.02) * torch.rand(2, BATCH, 1)).sort(0).values
    a, b = a * (torch.rand(BATCH, 1) < 0.5), b + H  # half of the jumps begin at pure noise
    z = a.cos() * torch.randn(BATCH, 2) + a.sin() * (x_1 - mean) / std
    both = (torch.cat(pair) for pair in ((a, a), (b + H, b - H), (z, z), (t, t), (x, x)))
    ahead, behind = flow(*both).chunk(2)
    middle, slope = (ahead + behind) / 2, (ahead - behind) / (2 * H)
    loss = (middle + (b - a) * slope - velocity(b, (z + (b - a) * middle).detach(), t, x)).square().sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

x = torch.randn(2000, 2)
with torch.no_grad():  # steer from noise: dx/dt = (D* − x)/(1 − t), D* the mean of 16 draws weighted by e^r
    for i in range(100):
        t = torch.full((2000, 1), i / 100)
        x_1 = draw(t, x, 16)
        x = x + ((reward(x_1).softmax(0)[..., None] * x_1).sum(0) - x) / (1 - t) / 100

t, x_t = torch.tensor([[0.3]]), torch.tensor([[0.6, 0.4]], requires_grad=True)
draws, tilted = draw(t, x_t, 8192), exact_terms(torch.zeros(1, 1), x_t).softmax(1)
for name, points, exact in (("posterior", draws[:, 0], posterior(t, x_t)[0]), ("steered", x, tilted)):
    shares = torch.cdist(points, MEANS).argmin(1).bincount(minlength=3) / len(points)
    print(f"{name} weights", *shares.numpy().round(3), "exact", *exact.detach()[0].numpy().round(3))
for name, value in (("by draws", reward(draws).logsumexp(0)), ("exact", exact_terms(t, x_t).logsumexp(1))):
    print("gradient of the value", name, *torch.autograd.grad(value, x_t)[0][0].numpy().round(3))
