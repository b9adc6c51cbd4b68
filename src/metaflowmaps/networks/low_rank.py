r"""Low-rank tuning: every weight matrix W becomes ``W + B A`` with W frozen, A (r, in) random and B (out, r) zero.

The network computes what it did until B moves, and few numbers are trained. Convolutions count as matrices of their
unfolded patches. :func:`fold` puts the sum back into ordinary weights.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metaflowmaps.errors import InputError


class LowRank(nn.Module):
    """W -> W + B A."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).reshape(weight.shape)


def add_low_rank(network: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
    """Freeze the network and put factors of this rank beside each matrix that is larger than they."""
    if rank < 1:
        raise InputError(f"low_rank must be at least 1, got {rank}")
    network.requires_grad_(False)
    chosen = [m for m in network.modules() if _is_matrix(m) and _worth(m.weight, rank)]  # type: ignore[arg-type]
    if not chosen:
        raise InputError(f"low_rank={rank} is no smaller than the network's matrices: lower it, or tune all (0)")
    for module in chosen:
        factors = LowRank(module.weight, rank, generator)  # type: ignore[arg-type]
        parametrize.register_parametrization(module, "weight", factors)


def adapt(network: nn.Module, rank: int, generator: torch.Generator | None = None) -> None:
    """Factors beside frozen weights, as :func:`add_low_rank`, and whole what a flow model without context has not.

    Args:
        network: one that names these parts in ``own_parts``, as the transformer does.
        rank: of the factors.
        generator: of their first values.
    """
    add_low_rank(network, rank, generator)
    for name, weight in network.named_parameters():
        weight.requires_grad_(weight.requires_grad or name.startswith(getattr(network, "own_parts", ())))


def fold(network: nn.Module) -> None:
    """Ordinary weights again: W ← W + B A."""
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def rank_of(network: nn.Module) -> int:
    """The rank of its factors; 0 where it has none."""
    return next((len(m.a) for m in network.modules() if isinstance(m, LowRank)), 0)


def _is_matrix(module: nn.Module) -> bool:
    """Does it multiply its input by a weight? A table of vectors does not."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim > 1 and not isinstance(module, nn.Embedding)


def _worth(weight: Tensor, rank: int) -> bool:
    rows, columns = weight.shape[0], weight[0].numel()
    return rank * (rows + columns) < rows * columns
