r"""Interpolant paths and the one hub of conversions.

``I_t = α_t I_0 + β_t I_1`` with noise ``I_0 ~ N(0, Id)`` at t = 0 and data ``I_1 ~ p_1`` at t = 1, independent.
Everything a network may predict at (t, x) is a known linear map of the posterior mean ``D_t(x) = E[I_1 | I_t = x]``:

    noise  E[I_0 | x] = (x − β D) / α
    drift  b          = α̇ E[I_0 | x] + β̇ D = (α̇/α) x + (β̇ − β α̇/α) D
    score  ∇ log p_t  = −E[I_0 | x] / α    = (β D − x) / α²

so D is the hub: a conversion goes into D and out of it. The way in from the drift,
``D = (α b − α̇ x) / (α β̇ − β α̇)``, is regular at both ends; the ways out divide by α and are not, at t = 1.

Two Gaussian observations of one x_1, at (t, x) and at (s, x̄), have the information of a single one (GLASS, Eq. 32):
precision ``Λ = β_t²/α_t² + β_s²/α_s²`` is that of the time t* with ``β_*/α_* = √Λ``, at the state ``x* = β_* m``,
``m = (β_t x/α_t² + β_s x̄/α_s²)/Λ``. Written as

    b̄_s(x̄; t, x) = k_x x + k_x̄ x̄ + k_b b_{t*}(x*),      x* = c_x x + c_x̄ x̄

the coefficients are functions of (s, t) alone; each path gives them in a form with no division by 1−s or 1−t.

GLASS (Eq. 32). For a context (t, x) the auxiliary process ``Ī_s = α_s Ī_0 + β_s I_1`` has ``I_1 ~ p_{1|t}(·|x)`` and
fresh noise. Its drift b̄ needs ``E[I_1 | Ī_s = x̄, I_t = x]``, and so any drift ``b`` yields it. Limits, on every path:

    t = 0: b_s(x̄)         s → 1: b_1(x̄)         t → 1: (α̇_s/α_s) x̄ + (β̇_s − β_s α̇_s/α_s) x
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Time, batch_time, check_same, check_state, check_time, expand_time
from metaflowmaps.errors import InputError, unknown


class GlassCoefficients(NamedTuple):
    """What turns a drift into an auxiliary drift at (s, t); see the module's derivation."""

    t_star: Tensor
    c_context: Tensor
    c_inner: Tensor
    k_context: Tensor
    k_inner: Tensor
    k_drift: Tensor


def _tensor(t: Time) -> Tensor:
    # a float becomes 0-d float64: exact, and it never promotes the tensors it meets
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


class Bridge(NamedTuple):
    """x_u given x_t and x_1 is ``N(keep · x_t + data · x_1, std²)``; see :meth:`Path.bridge`."""

    keep: Tensor
    data: Tensor
    std: Tensor


class Path(ABC):
    """α and β, their derivatives and divided differences; everything else follows.

    Examples:
        >>> isinstance(mfm.LinearPath(), mfm.Path)
        True
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """α_t, the weight of noise: 1 at t = 0, 0 at t = 1."""

    @abstractmethod
    def beta(self, t: Time) -> Tensor:
        """β_t, the weight of data: 0 at t = 0, 1 at t = 1."""

    @abstractmethod
    def alpha_dot(self, t: Time) -> Tensor:
        """dα/dt."""

    @abstractmethod
    def beta_dot(self, t: Time) -> Tensor:
        """dβ/dt."""

    @abstractmethod
    def alpha_slope(self, s: Tensor, u: Tensor) -> Tensor:
        """(α_u − α_s)/(u − s), without 0/0 at u = s."""

    @abstractmethod
    def beta_slope(self, s: Tensor, u: Tensor) -> Tensor:
        """(β_u − β_s)/(u − s), without 0/0 at u = s."""

    @abstractmethod
    def cross_slope(self, s: Tensor, u: Tensor) -> Tensor:
        """(β_u α_s − α_u β_s)/(u − s), without 0/0 at u = s."""

    @abstractmethod
    def time_of_ratio(self, beta_part: Tensor, alpha_part: Tensor) -> Tensor:
        """The t in [0, 1] with β_t/α_t = beta_part/alpha_part (both >= 0, not both 0)."""

    @abstractmethod
    def glass_coefficients(self, s: Tensor, t: Tensor) -> GlassCoefficients:
        """GLASS coefficients, regular up to s = 1 or t = 1 (not both) and at the origin."""

    # -- interpolation -----------------------------------------------------------------------------------------------

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Time) -> Tensor:
        """I_t = α_t x_0 + β_t x_1."""
        check_time(t)
        check_same(x_0, x_1, "x_0 and x_1")
        t = expand_time(t, x_1)
        return self.alpha(t) * x_0 + self.beta(t) * x_1

    def velocity(self, x_0: Tensor, x_1: Tensor, t: Time) -> Tensor:
        """İ_t = α̇_t x_0 + β̇_t x_1, the data target of flow matching."""
        check_same(x_0, x_1, "x_0 and x_1")
        t = expand_time(t, x_1)
        return self.alpha_dot(t) * x_0 + self.beta_dot(t) * x_1

    def sigma_squared(self, t: Time) -> Tensor:
        """Memoryless diffusion, σ_t²/2 = (β̇_t/β_t) α_t² − α̇_t α_t (Eq. 14); infinite at t = 0."""
        check_time(t)
        alpha, beta = self.alpha(t), self.beta(t)
        return 2 * (self.beta_dot(t) / beta * alpha**2 - self.alpha_dot(t) * alpha)

    def tilt_gain(self, t: Time) -> Tensor:
        """c_t = β̇ − β α̇/α: by how much the drift moves when D_t moves, ``b* = b + c_t (D* − D)``."""
        alpha = self.alpha(t)
        return (alpha * self.beta_dot(t) - self.beta(t) * self.alpha_dot(t)) / alpha

    def bridge(self, t: Time, u: Time) -> Bridge:
        """The memoryless process between t < u with x_1 held fixed, exactly; regular at t = 0 and at u = 1.

        Its noising is linear, ``x_t | x_u ~ N(ρ x_u, α_t² − ρ² α_u²)`` with ρ = β_t/β_u, and Bayes' rule with
        ``x_u | x_1 ~ N(β_u x_1, α_u²)`` gives the rest.
        """
        alpha_t, alpha_u, beta_u = self.alpha(t), self.alpha(u), self.beta(u)
        rho = self.beta(t) / beta_u
        fresh = alpha_t**2 - rho**2 * alpha_u**2
        keep = rho * alpha_u**2 / alpha_t**2
        return Bridge(keep, beta_u * fresh / alpha_t**2, alpha_u * fresh.clamp_min(0).sqrt() / alpha_t)

    # -- the hub -----------------------------------------------------------------------------------------------------

    def to_denoise(self, t: Time, x: Tensor, value: Tensor, predicts: str) -> Tensor:
        """D_t(x) from a drift, noise, score or data prediction at (t, x)."""
        check_same(x, value, "a state and a prediction at it")
        t = expand_time(t, x)
        alpha, beta = self.alpha(t), self.beta(t)
        if predicts == "data":
            return value
        if predicts == "drift":
            alpha_dot, beta_dot = self.alpha_dot(t), self.beta_dot(t)
            return (alpha * value - alpha_dot * x) / (alpha * beta_dot - beta * alpha_dot)
        if predicts == "noise":
            return (x - alpha * value) / beta
        if predicts == "score":
            return (x + alpha**2 * value) / beta
        raise unknown("prediction", predicts, PREDICTIONS)

    def from_denoise(self, t: Time, x: Tensor, denoise: Tensor, predicts: str) -> Tensor:
        """The drift, noise or score at (t, x) that D_t(x) implies."""
        t = expand_time(t, x)
        alpha, beta = self.alpha(t), self.beta(t)
        if predicts == "data":
            return denoise
        if predicts == "drift":
            ratio = self.alpha_dot(t) / alpha
            return ratio * x + (self.beta_dot(t) - beta * ratio) * denoise
        if predicts == "noise":
            return (x - beta * denoise) / alpha
        if predicts == "score":
            return (beta * denoise - x) / alpha**2
        raise unknown("prediction", predicts, PREDICTIONS)

    def convert(self, t: Time, x: Tensor, value: Tensor, source: str, target: str) -> Tensor:
        """Any prediction into any other, through D."""
        return self.from_denoise(t, x, self.to_denoise(t, x, value, source), target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class LinearPath(Path):
    """α = 1 − t, β = t.

    Examples:
        >>> path = mfm.LinearPath()
        >>> path.interpolate(torch.zeros(1, 2), torch.ones(1, 2), 0.25)
        tensor([[0.2500, 0.2500]])
    """

    name = "linear"

    def alpha(self, t: Time) -> Tensor:
        return 1 - _tensor(t)

    def beta(self, t: Time) -> Tensor:
        return _tensor(t)

    def alpha_dot(self, t: Time) -> Tensor:
        return -torch.ones_like(_tensor(t))

    def beta_dot(self, t: Time) -> Tensor:
        return torch.ones_like(_tensor(t))

    def alpha_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return -torch.ones_like(u)

    def beta_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def cross_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return torch.ones_like(u)

    def time_of_ratio(self, beta_part: Tensor, alpha_part: Tensor) -> Tensor:
        return beta_part / (alpha_part + beta_part)

    def glass_coefficients(self, s: Tensor, t: Tensor) -> GlassCoefficients:
        den = t**2 * (1 - s) ** 2 + (1 - t) ** 2 * s**2
        origin = den == 0
        den = torch.where(origin, torch.ones_like(den), den)
        p = (1 - t) ** 2 / den
        q = p.sqrt()
        stretch = 1 + (1 - s) * q
        t_star = 1 / stretch
        inner = ((1 - t) ** 2 * s - t**2 * (1 - s)) / den
        return _at_origin(
            origin,
            GlassCoefficients(
                t_star=t_star,
                c_context=t_star * t * (1 - s) ** 2 / den,
                c_inner=t_star * s * p,
                k_context=t_star * (1 - s) * t / den,
                k_inner=(inner - q) / stretch,
                k_drift=t_star * q,
            ),
        )


class TrigonometricPath(Path):
    """α = cos(πt/2), β = sin(πt/2).

    Examples:
        >>> path = mfm.TrigonometricPath()
        >>> path.interpolate(torch.zeros(1, 2), torch.ones(1, 2), 0.5)
        tensor([[0.7071, 0.7071]])
    """

    name = "trigonometric"

    def alpha(self, t: Time) -> Tensor:
        # sin of the complement: cos(π/2) is not 0 in floating point, sin(0) is
        return torch.sin(math.pi / 2 * (1 - _tensor(t)))

    def beta(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * _tensor(t))

    def alpha_dot(self, t: Time) -> Tensor:
        return -math.pi / 2 * self.beta(t)

    def beta_dot(self, t: Time) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def alpha_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 4 * (u + s)) * torch.sinc((u - s) / 4)

    def beta_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 4 * (u + s)) * torch.sinc((u - s) / 4)

    def cross_slope(self, s: Tensor, u: Tensor) -> Tensor:
        return math.pi / 2 * torch.sinc((u - s) / 2)

    def time_of_ratio(self, beta_part: Tensor, alpha_part: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(beta_part, alpha_part)

    def glass_coefficients(self, s: Tensor, t: Tensor) -> GlassCoefficients:
        alpha_s, beta_s, alpha_t, beta_t = self.alpha(s), self.beta(s), self.alpha(t), self.beta(t)
        q = beta_t**2 * alpha_s**2 + beta_s**2 * alpha_t**2
        e = q + alpha_t**2 * alpha_s**2  # = 1 − β_s²β_t², without the cancellation
        origin = q == 0
        q = torch.where(origin, torch.ones_like(q), q)
        e = torch.where(origin, torch.ones_like(e), e)
        root = (e * q).sqrt()
        return _at_origin(
            origin,
            GlassCoefficients(
                t_star=self.time_of_ratio(q.sqrt(), alpha_t * alpha_s),
                c_context=beta_t * alpha_s**2 / root,
                c_inner=beta_s * alpha_t**2 / root,
                k_context=math.pi / 2 * alpha_s * beta_t / e,
                k_inner=-math.pi / 2 * alpha_s * beta_t**2 * beta_s / e,
                k_drift=alpha_t / e.sqrt(),
            ),
        )


def _at_origin(origin: Tensor, k: GlassCoefficients) -> GlassCoefficients:
    """At s = t = 0 there is no information: b̄_0(x̄; 0, ·) = b_0(x̄). (At s = t = 1 there is no limit: see glass.)"""
    zero, one = torch.zeros_like(k.t_star), torch.ones_like(k.t_star)
    fixed = GlassCoefficients(zero, zero, one, zero, zero, one)
    return GlassCoefficients(*(torch.where(origin, at, off) for at, off in zip(fixed, k, strict=True)))


PREDICTIONS = ("data", "drift", "noise", "score")
PATHS: dict[str, type[Path]] = {LinearPath.name: LinearPath, TrigonometricPath.name: TrigonometricPath}


def make_path(name: str) -> Path:
    """The path of that name."""
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    return PATHS[name]()


def as_path(path: Path) -> Path:
    """Refuse what is no path, naming what is."""
    if not isinstance(path, Path):
        raise InputError(f"path must be mfm.LinearPath() or mfm.TrigonometricPath(), got {path!r}")
    return path


# -- GLASS ------------------------------------------------------------------------------------------------------------

Drift = Callable[..., Tensor]


def call_drift(drift: Drift, t: Time, x: Tensor, cond: Mapping[str, Tensor] | None) -> Tensor:
    """drift(t, x), or drift(t, x, cond) where there is a condition: plain two-argument drifts stay welcome."""
    return drift(t, x) if cond is None else drift(t, x, cond)


def glass_drift(path: Path, drift: Drift, s: Time, x_s: Tensor, t: Time, x_t: Tensor) -> Tensor:
    """The auxiliary drift b̄_s(x̄_s; t, x_t) from any drift, Eq. 32.

    Args:
        path: of the drift.
        drift: ``drift(t, x)``, (B,) and (B, *event) -> (B, *event).
        s: inner time, a float or (B,).
        x_s: inner state, (B, *event).
        t: context time, a float or (B,).
        x_t: context state, (B, *event).

    Returns:
        (B, *event).

    Examples:
        >>> path, law = mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
        >>> x_s, x_t = torch.zeros(1, 2), torch.tensor([[0.5, 0.0]])
        >>> drift = lambda t, x: law.drift(path, t, x)
        >>> mfm.glass_drift(path, drift, 0.5, x_s, 0.3, x_t).shape
        torch.Size([1, 2])
    """
    check_time(s, "s")
    check_time(t, "t")
    check_state(x_s, "x_s")
    check_same(x_s, x_t, "x_s and x_t")
    s, t = batch_time(s, x_s), batch_time(t, x_t)
    if bool(((s == 1) & (t == 1)).any()):
        raise InputError("the auxiliary drift has no limit at s = t = 1; stop the inner flow below 1 at t = 1")
    k = path.glass_coefficients(s, t)
    c_context, c_inner, k_context, k_inner, k_drift = (expand_time(c, x_s) for c in k[1:])
    x_star = c_context * x_t + c_inner * x_s
    # rounding may carry t* past 1 by an ulp
    drift_star = drift(torch.clamp(k.t_star, 0, 1), x_star)
    return k_context * x_t + k_inner * x_s + k_drift * drift_star


def glass_drift_general(path: Path, drift: Drift, s: Time, x_s: Tensor, t: Time, x_t: Tensor) -> Tensor:
    """The same by the hub alone, on any path: Λ, m, t*, D, then b̄. Singular at the ends; it checks the regular form."""
    alpha_s, beta_s = (f(expand_time(s, x_s)) for f in (path.alpha, path.beta))
    alpha_t, beta_t = (f(expand_time(t, x_t)) for f in (path.alpha, path.beta))
    precision = beta_t**2 / alpha_t**2 + beta_s**2 / alpha_s**2
    m = (beta_t * x_t / alpha_t**2 + beta_s * x_s / alpha_s**2) / precision
    t_star = path.time_of_ratio(precision.sqrt(), torch.ones_like(precision))
    x_star = path.beta(t_star) * m
    t_star = t_star.flatten() if t_star.ndim else t_star
    denoise = path.to_denoise(t_star, x_star, drift(t_star, x_star), "drift")
    return path.from_denoise(s, x_s, denoise, "drift")
