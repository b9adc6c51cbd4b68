r"""SOAP (arXiv 2409.11321, Algorithm 3) against closed forms and a reference in plain float64.

The reference below is written from the paper: both factors ``L ← β₂ L + (1 − β₂) G Gᵀ``, ``R ← β₂ R + (1 − β₂) Gᵀ G``
move at every step, their eigenbases every ``refresh`` steps by one power iteration, made orthonormal column by column
from the largest eigenvalue down, and the second moment is carried along with the columns. Everything is float64, so
what differs is rounding: 1e-14 of gradients near 100, over eps = 1e-3 where the turned gradient vanishes, times the
rate 1e-2 is 1e-13 a step. Thirty steps, and bases that turn by it, stay below 1e-9; a wrong rule moves weights by 1e-2.
"""

import pytest
import torch
from torch import Tensor

from metaflowmaps.training.soap import SOAP

ROUNDING = 1e-9
STEPS = 30
LR, BETAS, EPS, DECAY, REFRESH = 0.01, (0.9, 0.97), 1e-3, 0.3, 4


def gram_schmidt(columns: Tensor) -> Tensor:
    """Orthonormal columns with the same leading spans."""
    done: list[Tensor] = []
    for column in columns.T:
        rest = column.clone()
        for _ in range(2):  # twice is enough for full precision
            for unit in done:
                rest = rest - unit * (unit @ rest)
        done.append(rest / rest.norm())
    return torch.stack(done, 1)


class Reference:
    """The algorithm for one matrix, step by step."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.t = weight.clone(), 0
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)

    def step(self, g: Tensor) -> None:
        if self.t == 0:
            self.left, self.right = g @ g.T, g.T @ g
            self.q_left, self.q_right = (torch.linalg.eigh(f)[1] for f in (self.left, self.right))
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        turned = self.q_left.T @ g @ self.q_right
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * turned**2
        first, second = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        direction = (self.q_left.T @ first @ self.q_right) / (second.sqrt() + EPS)
        self.weight = self.weight - LR * DECAY * self.weight - LR * self.q_left @ direction @ self.q_right.T
        self.left = BETAS[1] * self.left + (1 - BETAS[1]) * g @ g.T
        self.right = BETAS[1] * self.right + (1 - BETAS[1]) * g.T @ g
        if self.t % REFRESH == 0:
            self.q_left, order = self._refreshed(self.left, self.q_left)
            self.v = self.v[order]
            self.q_right, order = self._refreshed(self.right, self.q_right)
            self.v = self.v[:, order]

    @staticmethod
    def _refreshed(factor: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        eigenvalues = torch.stack([column @ factor @ column for column in q.T])
        order = torch.argsort(eigenvalues, descending=True)
        return gram_schmidt(factor @ q[:, order]), order


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Noisy gradients whose rows and columns differ in size, so that the factors have eigenvalues far apart."""
    g = torch.Generator().manual_seed(0)
    scale = torch.ones(shape, dtype=torch.float64)
    for axis, n in enumerate(shape):
        scale = scale * (2.0 ** torch.arange(n)).view([-1 if i == axis else 1 for i in range(len(shape))])
    return [scale * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(STEPS)]


def run(weight: Tensor, given: list[Tensor], eps: float = EPS) -> tuple[Tensor, SOAP]:
    """The weight after SOAP has seen these gradients."""
    p = torch.nn.Parameter(weight.clone())
    optimizer = SOAP([p], lr=LR, betas=BETAS, eps=eps, weight_decay=DECAY, refresh=REFRESH)
    for g in given:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


# square matrices of full rank: where a factor is singular, its null space has no basis of its own to compare
@pytest.mark.parametrize("shape", [(4, 4), (3, 3)])
@pytest.mark.parametrize("steps", [1, REFRESH, REFRESH + 1, STEPS])
def test_matrices_follow_the_algorithm(shape: tuple[int, int], steps: int) -> None:
    """Among these steps: the first, the one that turns the basis, the first in the new basis, many."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = gradients(shape)[:steps]
    reference = Reference(weight)
    for g in given:
        reference.step(g)
    found, _ = run(weight, given)
    assert (found - reference.weight).abs().max() < ROUNDING


def test_a_convolution_is_the_matrix_of_its_filters() -> None:
    weight = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = gradients((4, 4))
    found, _ = run(weight, [g.view(4, 1, 2, 2) for g in given])
    flat, _ = run(weight.flatten(1), given)
    assert torch.equal(found.flatten(1), flat)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_vectors_and_scalars_get_adam_with_decoupled_decay(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, m, v = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    given = gradients(shape)
    for t, g in enumerate(given, 1):
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        first, second = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
        expected = expected - LR * DECAY * expected - LR * first / (second.sqrt() + EPS)
    found, _ = run(weight, given)
    assert (found - expected).abs().max() < ROUNDING


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
def test_the_first_step_is_the_polar_factor(shape: tuple[int, int]) -> None:
    """In the eigenbases G is diagonal, Adam's first step is its sign: from 0 the weight goes to −lr · U Vᵀ."""
    g = gradients(shape)[0]
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    found, _ = run(torch.zeros(shape, dtype=torch.float64), [g], eps=1e-9)
    # what should be 0 off the diagonal is a rounding of g, 1e-14, over eps
    assert (found + LR * u @ v).abs().max() < LR * 1e-4


@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)])
def test_bases_become_eigenvectors_and_stay_orthonormal(shape: tuple[int, int]) -> None:
    """Of a factor at rest, orthogonal iterations find the eigenvectors, the largest first."""
    one, other = gradients(shape)[:2]
    _, optimizer = run(torch.zeros(shape, dtype=torch.float64), [one, other] * 200)
    (state,) = optimizer.state.values()
    for side in ("left", "right"):
        q, factor = state[f"q_{side}"], state[side]
        rank = min(shape)  # of the factor; beyond it there are no directions to find
        turned = (q.T @ factor @ q)[:rank, :rank]
        eigenvalues = torch.linalg.eigvalsh(factor).flip(0)[:rank]
        assert (q.T @ q - torch.eye(len(q), dtype=torch.float64)).abs().max() < 1e-12
        assert torch.allclose(turned.diagonal(), eigenvalues, rtol=0.02)  # the factor itself swings by 1 − β₂ = 0.03
        assert (turned - turned.diagonal().diag()).abs().max() < 0.1 * eigenvalues[0]


def test_a_state_of_version_0_1_goes_on() -> None:
    """It keeps the first moment in the coordinates of the weight."""
    shape = (4, 3)
    given, weight = gradients(shape), torch.ones(shape, dtype=torch.float64)
    stop = REFRESH + 2  # the basis has turned and is on its way
    whole, _ = run(weight, given)
    half, old = run(weight, given[:stop])
    stored = old.state_dict()
    state = stored["state"][0]
    state["m"] = state["q_left"] @ state.pop("m_rotated") @ state["q_right"].T
    p = torch.nn.Parameter(half.clone())
    resumed = SOAP([p])
    resumed.load_state_dict(stored)
    for g in given[stop:]:
        p.grad = g.clone()
        resumed.step()
    assert (p.detach() - whole).abs().max() < ROUNDING
