r"""Gaussian mixtures, for which everything in this package has an exact answer.

``p_1 = Σ_k w_k N(μ_k, Σ_k)`` with ``Σ_k = U_k diag(λ_k) U_kᵀ``. Given ``I_t = α I_0 + β I_1 = x``, write
``y = U_kᵀ (x − β μ_k)`` and ``v = α² + β² λ_k`` (per eigen-coordinate). Then, per component,

    evidence     log N(y; 0, v)                     the component's log-weight gains this
    E[I_0 | x]   U (α y / v)
    E[I_1 | x]   m_k = μ_k + U (β λ / v · y)
    cov[I_1 | x] U diag(λ α² / v) Uᵀ
    drift        α̇ E[I_0|x] + β̇ E[I_1|x] = β̇ μ_k + U ((α̇ α + β̇ β λ) / v · y)

Nothing divides by α or β, so all of it holds at the ends. The posterior is again a mixture with the same
eigenvectors (one mixture a batch row), and the auxiliary drift is simply the drift *of that posterior* on a fresh
path: no GLASS identity enters, which is what makes this module an independent check of it.

For ``r(x) = −λ‖y − A x‖²/(2σ²)`` and a component N(m, C), with ``π = λ/σ²`` and ``M = Id + π A C Aᵀ``,

    log E[e^r]   = −½ log|M| − ½ π (y − A m)ᵀ M⁻¹ (y − A m)
    tilted mean  = m + π C Aᵀ M⁻¹ (y − A m)             tilted cov = C − π C Aᵀ M⁻¹ A C
"""

import math
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Time, as_numbers, check_count, check_same, check_state, check_time, expand_time
from metaflowmaps.errors import InputError
from metaflowmaps.path import Path
from metaflowmaps.rewards.analytic import LinearGaussian


class GaussianMixture:
    """A mixture over (d,) vectors, or, as ``posterior`` returns it, one such mixture for each row of a batch.

    Args:
        means: (K, d).
        covariances: a variance, a number or (K,); or a matrix, (d, d) or (K, d, d).
        weights: (K,), summing to one; None for uniform ones.

    Examples:
        >>> law = mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
        >>> law.sample(5).shape
        torch.Size([5, 2])
        >>> reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0.0]), 2.0, 1.0)
        >>> law.tilt(reward).weights.tolist()[1] > 0.99  # p_1 e^r, exactly
        True
    """

    def __init__(self, means: Any, covariances: Any, weights: Any = None) -> None:
        mu = as_numbers(means, "means")
        typed = isinstance(means, Tensor) and means.is_floating_point()
        self.dtype = means.dtype if typed else torch.get_default_dtype()
        if mu.ndim != 2 or 0 in mu.shape:
            raise InputError(f"means must have shape (K, d), got {tuple(mu.shape)}")
        if not bool(torch.isfinite(mu).all()):
            raise InputError("means must be finite")
        eigenvalues, basis = _eigen(as_numbers(covariances, "covariances"), *mu.shape)
        held = eigenvalues.to(self.dtype)
        if not bool((torch.isfinite(held) & (held > 0) & torch.isfinite(mu.to(self.dtype)).all()).all()):
            raise InputError(f"means and variances must be positive and finite in the law's dtype, {self.dtype}")
        self._means = mu
        self._eigenvalues = eigenvalues
        self._basis = basis
        self._log_weights = _log_weights(weights, mu.shape[0])
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor | None, Tensor]] = {}

    @classmethod
    def _of(
        cls,
        means: Tensor,
        eigenvalues: Tensor,
        basis: Tensor | None,
        log_weights: Tensor,
        dtype: torch.dtype,
    ) -> "GaussianMixture":
        self = cls.__new__(cls)
        self.dtype = dtype
        self._means, self._eigenvalues, self._basis = means, eigenvalues, basis
        self._log_weights, self._cast = log_weights, {}
        return self

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def dim(self) -> int:
        """d."""
        return self._means.shape[-1]

    @property
    def means(self) -> Tensor:
        """Component means: (K, d), or (B, K, d)."""
        return self._means

    @property
    def weights(self) -> Tensor:
        """Component weights: (K,), or (B, K)."""
        return self._log_weights.exp()

    @property
    def covariances(self) -> Tensor:
        """Component covariances: (K, d, d), or (B, K, d, d)."""
        if self._basis is None:
            return torch.diag_embed(self._eigenvalues)
        return self._basis @ torch.diag_embed(self._eigenvalues) @ self._basis.mT

    @property
    def mean(self) -> Tensor:
        """The mixture's mean: (d,), or (B, d)."""
        return (self.weights[..., None] * self._means).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Per-coordinate variance: (d,), or (B, d)."""
        within = self.covariances.diagonal(dim1=-2, dim2=-1)
        spread = (self._means - self.mean[..., None, :]).square()
        return (self.weights[..., None] * (within + spread)).sum(-2)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x): (B, d) -> (B,)."""
        means, eigenvalues, basis, log_weights = self._parts(x)
        y = _rotate(x[..., None, :] - means, basis)
        return torch.logsumexp(log_weights + _log_normal(y, eigenvalues), -1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact draws: (n, d)."""
        if self._means.ndim != 2:
            raise InputError("sample() belongs to a single law; a posterior of a batch has draw(num_draws)")
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")
        means, eigenvalues, basis, log_weights = self._parts(None)
        edges = log_weights.exp().cumsum(-1)[:-1].contiguous()
        uniform = torch.rand(n, generator=generator, dtype=edges.dtype)
        k = torch.searchsorted(edges, uniform, right=True)
        noise = torch.randn(n, self.dim, generator=generator, dtype=means.dtype) * eigenvalues[k].sqrt()
        return means[k] + (noise if basis is None else _turned(noise, k, basis))

    def draw(self, num_draws: int, generator: torch.Generator | None = None) -> Tensor:
        """num_draws exact draws from the mixture of each row: (num_draws, B, d)."""
        if self._means.ndim != 3:
            raise InputError("draw() belongs to the posterior of a batch; a single law has sample(n)")
        check_count(num_draws, "num_draws")
        means, eigenvalues, basis, log_weights = self._parts(None)
        batch, components, _ = means.shape
        # the law's own generator order: uniforms for the components, then normals
        edges = log_weights.exp().cumsum(-1)[:, : components - 1].contiguous()
        uniform = torch.rand(batch, num_draws, generator=generator, dtype=means.dtype)
        k = torch.searchsorted(edges, uniform, right=True)  # (B, N)
        rows = torch.arange(batch)[:, None]
        noise = torch.randn(batch, num_draws, self.dim, generator=generator, dtype=means.dtype)
        noise = noise * eigenvalues[rows, k].sqrt()
        if basis is not None:
            noise = _turned(noise, k, basis)
        return (means[rows, k] + noise).transpose(0, 1).contiguous()

    # -- on a path ---------------------------------------------------------------------------------------------------

    def drift(self, path: Path, t: Time, x: Tensor) -> Tensor:
        """b_t(x) = E[İ_t | I_t = x]."""
        responsibilities, y, v, c = self._observe(path, t, x)
        gain = (c.alpha_dot * c.alpha + c.beta_dot * c.beta * c.eigenvalues) / v
        per_component = c.beta_dot * c.means + _rotate_back(gain * y, c.basis)
        return (responsibilities.exp()[..., None] * per_component).sum(-2)

    def denoise(self, path: Path, t: Time, x: Tensor) -> Tensor:
        """D_t(x) = E[I_1 | I_t = x]."""
        responsibilities, y, v, c = self._observe(path, t, x)
        per_component = c.means + _rotate_back(c.beta * c.eigenvalues / v * y, c.basis)
        return (responsibilities.exp()[..., None] * per_component).sum(-2)

    def score(self, path: Path, t: Time, x: Tensor) -> Tensor:
        """∇ log p_t(x)."""
        responsibilities, y, v, c = self._observe(path, t, x)
        return -(responsibilities.exp()[..., None] * _rotate_back(y / v, c.basis)).sum(-2)

    def marginal(self, path: Path, t: float) -> "GaussianMixture":
        """The law of I_t, for one time."""
        check_time(t)
        alpha, beta = (float(f(t)) for f in (path.alpha, path.beta))
        variance = alpha**2 + beta**2 * self._eigenvalues
        return self._of(beta * self._means, variance, self._basis, self._log_weights, self.dtype)

    def posterior(self, path: Path, t: Time, x_t: Tensor) -> "GaussianMixture":
        """p_{1|t}(· | x_t): one mixture a row, differentiable in x_t."""
        responsibilities, y, v, c = self._observe(path, t, x_t)
        means = c.means + _rotate_back(c.beta * c.eigenvalues / v * y, c.basis)
        eigenvalues = (c.eigenvalues * c.alpha**2 / v).expand_as(means)
        return self._of(means, eigenvalues, c.basis, responsibilities, x_t.dtype)

    def auxiliary_drift(self, path: Path, s: Time, x_s: Tensor, t: Time, x_t: Tensor) -> Tensor:
        """b̄_s(x_s; t, x_t): the drift, on a fresh path, of the posterior given x_t."""
        check_same(x_s, x_t, "x_s and x_t")
        return self.posterior(path, t, x_t).drift(path, s, x_s)

    def rescaled(self, shift: Tensor, scale: Tensor) -> "GaussianMixture":
        """The law of (X − shift)/scale, for one shift (B, d) and scale (B, 1) > 0 a row."""
        means = (self._means - shift[..., None, :]) / scale[..., None, :]
        eigenvalues = (self._eigenvalues / scale[..., None, :].square()).expand_as(means)
        return self._of(means, eigenvalues, self._basis, self._log_weights, self.dtype)

    # -- under a reward ----------------------------------------------------------------------------------------------

    def value(self, path: Path, t: Time, x: Tensor, reward: LinearGaussian) -> Tensor:
        """V_t(x) = log E[e^{r(I_1)} | I_t = x]: (B,), differentiable in x."""
        posterior = self.posterior(path, t, x)
        log_moments = posterior._moments(reward)[0]
        return torch.logsumexp(posterior._log_weights + log_moments, -1)

    def log_evidence(self, reward: LinearGaussian) -> Tensor:
        """log E[e^{r(I_1)}]."""
        return torch.logsumexp(self._log_weights + self._moments(reward)[0], -1)

    def tilt(self, reward: LinearGaussian) -> "GaussianMixture":
        """p ∝ p_1 e^r, again a mixture."""
        log_moments, gain, residual = self._moments(reward)
        projection = reward.A.to(self._means)
        means = self._means + torch.einsum("...dp,...p->...d", gain, residual)
        covariances = self.covariances - gain @ projection @ self.covariances
        eigenvalues, basis = torch.linalg.eigh((covariances + covariances.mT) / 2)
        log_weights = torch.log_softmax(self._log_weights + log_moments, -1)
        return self._of(means, eigenvalues.clamp_min(0), basis, log_weights, self.dtype)

    def _moments(self, reward: LinearGaussian) -> tuple[Tensor, Tensor, Tensor]:
        """log E[e^r] per component (…, K), the gain π C Aᵀ M⁻¹ (…, K, d, p) and y − A m (…, K, p)."""
        if not isinstance(reward, LinearGaussian):
            raise InputError(f"exact values and tilts need mfm.rewards.LinearGaussian, got {type(reward).__name__}")
        if reward.A.shape[1] != self.dim:
            raise InputError(f"the reward observes {reward.A.shape[1]} coordinates, the mixture has {self.dim}")
        projection, pi = reward.A.to(self._means), reward.precision
        residual = reward.y.to(self._means) - self._means @ projection.mT
        spread = self.covariances @ projection.mT  # C Aᵀ
        eye = torch.eye(projection.shape[0], dtype=projection.dtype, device=projection.device)
        factor = torch.linalg.cholesky(eye + pi * projection @ spread)
        solved = torch.cholesky_solve(residual[..., None], factor)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_moments = -0.5 * log_det - 0.5 * pi * (residual * solved).sum(-1)
        gain = pi * torch.cholesky_solve(spread.mT, factor).mT
        return log_moments, gain, residual

    # -- internals ---------------------------------------------------------------------------------------------------

    def _parts(self, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Means, eigenvalues, basis, log-weights in the dtype and on the device of x."""
        if x is not None:
            check_state(x)
            if x.shape[-1] != self.dim or x.ndim != 2:
                raise InputError(f"the mixture lives in {self.dim} dimensions, got a state of shape {tuple(x.shape)}")
            if self._means.ndim == 3 and len(self._means) not in (
                1,
                len(x),
            ):  # one posterior serves any number of states
                raise InputError(f"a posterior of {len(self._means)} contexts takes as many states, got {len(x)}")
        dtype, device = (self.dtype, self._means.device) if x is None else (x.dtype, x.device)
        if self._means.requires_grad:  # a cached cast made under no_grad would cut the gradient of later calls
            self._cast.clear()
        key = (dtype, device)
        if key not in self._cast:
            basis = None if self._basis is None else self._basis.to(device, dtype)
            self._cast[key] = (
                self._means.to(device, dtype),
                self._eigenvalues.to(device, dtype),
                basis,
                self._log_weights.to(device, dtype),
            )
        return self._cast[key]

    def _observe(self, path: Path, t: Time, x: Tensor) -> "tuple[Tensor, Tensor, Tensor, _Observed]":
        """Log-responsibilities (B, K), y and v (B, K, d), and the coefficients they came from."""
        check_time(t)
        means, eigenvalues, basis, log_weights = self._parts(x)
        t = expand_time(t, x)
        t = t[..., None] if t.ndim else t  # (B, 1, 1) against (B, K, d)
        observed = _Observed(path, t, x.dtype, means, eigenvalues, basis)
        y = _rotate(x[:, None, :] - observed.beta * means, basis)
        v = observed.alpha**2 + observed.beta**2 * eigenvalues
        v = v.expand_as(y)
        return torch.log_softmax(log_weights + _log_normal(y, v), -1), y, v, observed

    def __repr__(self) -> str:
        batch = f", batch={self._means.shape[0]}" if self._means.ndim == 3 else ""
        return f"GaussianMixture(components={self._means.shape[-2]}, dim={self.dim}{batch})"


class _Observed:
    """Path coefficients and component parameters at one time, ready to broadcast against (B, K, d)."""

    def __init__(
        self,
        path: Path,
        t: Tensor,
        dtype: torch.dtype,
        means: Tensor,
        eigenvalues: Tensor,
        basis: Tensor | None,
    ) -> None:
        self.alpha, self.beta = path.alpha(t).to(dtype), path.beta(t).to(dtype)
        self.alpha_dot, self.beta_dot = path.alpha_dot(t).to(dtype), path.beta_dot(t).to(dtype)
        self.means, self.eigenvalues, self.basis = means, eigenvalues, basis


def _rotate(x: Tensor, basis: Tensor | None) -> Tensor:
    """Uᵀ x, per component."""
    return x if basis is None else torch.einsum("...kde,...kd->...ke", basis, x)


def _rotate_back(y: Tensor, basis: Tensor | None) -> Tensor:
    """U y, per component."""
    return y if basis is None else torch.einsum("...kde,...ke->...kd", basis, y)


def _turned(y: Tensor, k: Tensor, basis: Tensor) -> Tensor:
    """U_k y, every y (..., d) by the component k (...) that it fell to: no matrix a row where rows share theirs."""
    if basis.ndim == 4:  # a posterior that was tilted: (B, K, d, d)
        rows = torch.arange(len(basis))[:, None]
        return torch.einsum("bnde,bne->bnd", basis[rows, k], y)
    turned = torch.empty_like(y)
    for component, vectors in enumerate(basis):
        fell = k == component
        turned[fell] = y[fell] @ vectors.mT
    return turned


def _log_normal(y: Tensor, v: Tensor) -> Tensor:
    """log N(y; 0, diag v), summed over the last dimension."""
    return -0.5 * (y.square() / v + v.log() + math.log(2 * math.pi)).sum(-1)


def _log_weights(weights: Any, components: int) -> Tensor:
    if weights is None:
        return torch.full((components,), -math.log(components), dtype=torch.float64)
    given = as_numbers(weights, "weights")
    if given.shape != (components,):
        raise InputError(f"weights must have shape ({components},), got {tuple(given.shape)}")
    if not bool((torch.isfinite(given) & (given >= 0)).all()):
        raise InputError(f"weights must be finite and >= 0, got {given.tolist()}")
    if abs(float(given.sum()) - 1) > 1e-4:  # room for weights typed with four digits
        raise InputError(f"weights must sum to 1, got a sum of {float(given.sum()):g}; divide by it")
    return (given / given.sum()).log()


def _eigen(covariances: Tensor, components: int, dim: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (K, d) and eigenvectors (K, d, d), or None where every covariance is a multiple of Id."""
    shape = tuple(covariances.shape)
    if not bool(torch.isfinite(covariances).all()):
        raise InputError("covariances must be finite")
    if shape in ((), (components,)):
        if not bool((covariances > 0).all()):
            raise InputError(f"variances must be positive, got {covariances.tolist()}")
        return covariances.reshape(-1, 1).expand(components, dim).clone(), None
    if shape not in ((dim, dim), (components, dim, dim)):
        raise InputError(
            f"covariances must be a number, ({components},), ({dim}, {dim}) or ({components}, {dim}, {dim}); "
            f"got {shape}"
        )
    matrices = covariances.expand(components, dim, dim)
    scale = matrices.abs().amax()
    if bool(((matrices - matrices.mT).abs() > 1e-6 * scale).any()):
        raise InputError("covariance matrices must be symmetric; use (C + C.T) / 2")
    eigenvalues, basis = torch.linalg.eigh((matrices + matrices.mT) / 2)
    if not bool((eigenvalues > 0).all()):
        raise InputError(
            f"covariance matrices must be positive definite; the smallest eigenvalue is {float(eigenvalues.min()):g}"
        )
    return eigenvalues, basis
