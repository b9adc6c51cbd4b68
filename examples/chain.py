"""Chains of unlike lengths under a physical energy: any event shape, padding by a mask, a black-box reward.

An ideal polymer in the plane is a random walk of n beads, a Gaussian law whose denoiser is a formula: it stands here
for a network of yours, ``network(x, time, mask)``. Beads that overlap repel each other, an energy in NumPy, in units
of kT: steered chains approach the Boltzmann law of both, and swell. Held to random walks weighted by e^(−energy).
Seconds on one core: python examples/chain.py [chains of each length]"""

import sys

import numpy as np
import torch

import metaflowmaps as mfm

BEADS, LENGTHS, CHAINS = 8, (4, 6, 8), int(sys.argv[1]) if len(sys.argv) > 1 else 64
COVARIANCE = torch.minimum(*torch.meshgrid(*2 * [torch.arange(1.0, BEADS + 1)], indexing="ij"))  # of a walk's beads


def network(x, time, mask):
    """E[x_1 | x_t] of a walk of as many beads as the mask has, x_t = (1 − t) noise + t x_1: (B, beads, 2)."""
    own = COVARIANCE * mask[:, :, None] * mask[:, None, :]  # a padded bead is always 0
    t = time[:, None, None]
    return t * own @ torch.linalg.solve((1 - t) ** 2 * torch.eye(BEADS) + t**2 * own + 1e-6 * torch.eye(BEADS), x)


def energy(x, mask):
    """Of overlapping beads in kT, (B,): 2 (1 − r²)² for each pair of a chain that is nearer than 1."""
    square = np.square(x[:, :, None] - x[:, None, :]).sum(-1)
    pairs = np.triu(mask[:, :, None] * mask[:, None, :], 1)
    return (pairs * 2 * np.clip(1 - square, 0, None) ** 2).sum((1, 2))


def extent(x, n):
    """The squared distance of the n-th bead from the first, (B,)."""
    return (x[:, n - 1] - x[:, 0]).square().sum(1)


model = mfm.wrap(network, "data", schedule="linear", event_shape=(BEADS, 2))
lengths = torch.tensor(LENGTHS).repeat_interleave(CHAINS)
mask = (torch.arange(BEADS) < lengths[:, None]).float()
walks = (torch.randn(len(mask), BEADS, 2, generator=torch.Generator().manual_seed(0)).cumsum(1)) * mask[..., None]
print("check:", model.check(walks[-CHAINS:], {"mask": mask[-CHAINS:]}))
# by whatever program computes it; the mask comes with the conditions
reward = mfm.rewards.BlackBox(lambda x, cond: -energy(x.numpy(), cond["mask"].numpy()))
result = mfm.steer(model, reward, len(mask), mfm.MFMGF(num_draws=8), mfm.ODE(steps=20), cond={"mask": mask}, seed=0)
assert bool((result.samples[mask == 0] == 0).all())  # padded beads: exactly 0
for n in LENGTHS:
    free = torch.randn(5_000, BEADS, 2, generator=torch.Generator().manual_seed(n)).cumsum(1)
    kept = (torch.arange(BEADS) < n).float().expand(len(free), -1)
    overlap = torch.from_numpy(energy(free.numpy(), kept.numpy()))
    weight = (-overlap).softmax(0)
    rows = lengths == n
    found, spent = float(extent(result.samples[rows], n).mean()), float(-result.rewards[rows].mean())
    exact, least = float((weight * extent(free, n)).sum()), float((weight * overlap).sum())
    print(f"{n} beads: <R^2> free {2 * (n - 1)}, repelling {exact:.2f}, steered {found:.2f}")
    print(f"    energy in kT free {float(overlap.mean()):.2f}, repelling {least:.2f}, steered {spent:.2f}")
