r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., arXiv 2409.11321).

For a weight matrix with gradient G keep ``L ← EMA(G Gᵀ)``, ``R ← EMA(Gᵀ G)`` and their eigenvectors Q_L, Q_R, refreshed
every few steps by one orthogonal iteration. Adam's second moment lives in the rotated coordinates ``Q_Lᵀ G Q_R``; the
step is rotated back. Both moments are kept there: the first is turned into new coordinates where they change, not at
every step. Vectors and scalars get plain Adam.

Teacher targets carry no noise, so training a small map is function approximation, where a curvature-aware step pays:
docs/log.md has the comparison with Adam at equal time.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Slots = dict[str, Any]  # what the optimizer keeps of a weight, or the options of a group of weights


class SOAP(torch.optim.Optimizer):
    """Adam in a slowly rotating basis; ``refresh`` steps between rotations."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 10,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "refresh": refresh}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients present."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p: Tensor, grad: Tensor, state: Slots, group: Slots) -> None:
        beta_1, beta_2 = group["betas"]
        g = grad.flatten(1) if grad.ndim > 1 else grad
        matrix = g.ndim == 2
        if not state:
            _initialise(state, g)
        elif matrix and "m" in state:  # of version 0.1, in the coordinates of the weight
            state["m_rotated"] = _rotate(state.pop("m"), state)
        state["step"] += 1
        rotated = _rotate(g, state) if matrix else g
        m, v = state["m_rotated" if matrix else "m"].lerp_(rotated, 1 - beta_1), state["v"]
        v.mul_(beta_2).addcmul_(rotated, rotated, value=1 - beta_2)
        correction_1, correction_2 = 1 - beta_1 ** state["step"], 1 - beta_2 ** state["step"]
        update = m / (v / correction_2).sqrt_().add_(group["eps"])
        if matrix:
            update = _rotate_back(update, state)
            state["left"].addmm_(g, g.T, beta=beta_2, alpha=1 - beta_2)
            state["right"].addmm_(g.T, g, beta=beta_2, alpha=1 - beta_2)
            if state["step"] % group["refresh"] == 0:
                _refresh(state)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.view_as(p), alpha=-group["lr"] / correction_1)


def _initialise(state: Slots, g: Tensor) -> None:
    state["step"], state["v"] = 0, torch.zeros_like(g)
    state["m_rotated" if g.ndim == 2 else "m"] = torch.zeros_like(g)
    if g.ndim == 2:
        state["left"], state["right"] = g @ g.T, g.T @ g
        # LAPACK answers in column order; a state read back from disk is in row order, and a product rounds by it
        state["q_left"] = _eigenvectors(state["left"]).contiguous()
        state["q_right"] = _eigenvectors(state["right"]).contiguous()


def _eigenvectors(matrix: Tensor) -> Tensor:
    try:
        vectors: Tensor = torch.linalg.eigh(matrix)[1]
    except RuntimeError:  # of low rank, as small batches make them: float32 may not find its way
        vectors = torch.linalg.eigh(matrix.double())[1].to(matrix.dtype)
    return vectors


def _rotate(g: Tensor, state: Slots) -> Tensor:
    rotated: Tensor = state["q_left"].T @ g @ state["q_right"]
    return rotated


def _rotate_back(rotated: Tensor, state: Slots) -> Tensor:
    back: Tensor = state["q_left"] @ rotated @ state["q_right"].T
    return back


def _refresh(state: Slots) -> None:
    """One orthogonal iteration a side, columns kept in order of their eigenvalue estimates, v permuted along."""
    m = _rotate_back(state["m_rotated"], state)
    for side, axis in (("left", 0), ("right", 1)):
        matrix, q = state[side], state[f"q_{side}"]
        image = matrix @ q
        order = (q * image).sum(0).argsort(descending=True)
        state["v"] = state["v"].index_select(axis, order)
        # Q of linalg.qr to the bit, without its R
        state[f"q_{side}"] = torch.linalg.householder_product(*torch.geqrf(image[:, order])).contiguous()
    state["m_rotated"] = _rotate(m, state)
