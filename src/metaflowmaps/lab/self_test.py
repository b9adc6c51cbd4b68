"""A few seconds that show whether this installation computes what it should, against closed forms."""

import torch

from metaflowmaps.checkpoint.shipped import shipped
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel, ExactPosterior
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.value import GradientFree, value_gradient

DRAWS = 2**18
MOST_ERRORS = 5.0  # standard errors that a value, or a gradient, may be off: once in a million for a right one
DEVICE_TOLERANCE = 1e-2  # between devices, of samples of size 1: TF32 keeps three digits through a dozen layers


def value_error() -> float:
    """How far the value and its gradient are from their closed forms, in standard errors: the worse of the two.

    A mixture, a linear observation of it, exact draws: ``V = log E[e^r | x_t]`` is known, and so is its gradient.
    """
    path = LinearPath()
    law = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.5, 0.0]]).double(), torch.tensor([0.2, 0.4]).double())
    reward = LinearGaussian(torch.tensor([1.0, -0.5]), 0.3, 0.8)
    x = torch.tensor([[0.3, -0.2]]).double()
    generator = torch.Generator().manual_seed(0)
    estimator = GradientFree(chunk=DRAWS)
    estimate = value_gradient(ExactPosterior(path, law), reward, 0.5, x, DRAWS, estimator, generator)
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        value = ExactModel(path, law).value(0.5, moved, reward)
        (gradient,) = torch.autograd.grad(value.sum(), moved)
    off = float((estimate.value - value.detach()).abs() / estimate.std_err)
    turned = float((estimate.gradient - gradient).norm() / estimate.gradient_std_err)
    return max(off, turned)


@torch.no_grad()
def device_error(device: torch.device) -> float:
    """How far samples of the shipped map on a device are from those on the processor: the largest difference."""
    model = MetaFlowMap.from_pretrained(shipped("digits") or "digits")  # whatever directory is called digits here
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, *model.event_shape, generator=generator)
    here = model.push(noise, 0.0, torch.zeros_like(noise))
    there = model.to(device).push(noise.to(device), 0.0, torch.zeros_like(noise).to(device)).cpu()
    return float((there - here).abs().max())
