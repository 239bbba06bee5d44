"""Token laws: sampling, log moment generating function, and the Esscher tilt, in closed form.

For a law mu on R^d with log-MGF K(t) = log E e^{<t, Y>}, the Esscher tilt mu^t has density e^{<t, y> - K(t)} with
respect to mu. Its mean is grad K(t) and its covariance is the Hessian of K at t; attention is a tilted mean, so these
three functions are all that the book needs to know of a law.

Every law has ``dim``, ``mean`` (dim,), ``cov`` (dim, dim), ``sample(n, generator)`` -> (n, dim), and, for t of shape
(..., dim): ``log_mgf(t)`` -> (...), ``tilted_mean(t)`` -> (..., dim), ``tilted_cov(t)`` -> (..., dim, dim). Results
have the precision and device of t; samples are float64. ``generator`` is a ``torch.Generator``, an integer seed, or
None for a fresh stream; no global random state is read.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from scipy.signal import lfilter
from scipy.special import hyp0f1
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.validation import (
    MOST_DIM,
    as_count,
    as_covariance,
    as_number,
    as_positive,
    as_tensor,
    as_tokens,
    as_vector,
    as_vectors,
    finite_answer,
    rows_that_fit,
)


class Law(Protocol):
    """What every token law offers; see the module's docstring for shapes."""

    dim: int
    mean: Tensor
    cov: Tensor

    def sample(self, n: int, generator: torch.Generator | int | None = None) -> Tensor: ...

    def log_mgf(self, t) -> Tensor: ...

    def tilted_mean(self, t) -> Tensor: ...

    def tilted_cov(self, t) -> Tensor: ...


def _normal(n: int, dim: int, generator) -> Tensor:
    stream, n = runtime.generator(generator), as_count("n", n, most=rows_that_fit(dim))
    return torch.randn(n, dim, generator=stream, dtype=torch.float64, device=stream.device)


def _uniform(n: int, dim: int, generator) -> Tensor:
    stream, n = runtime.generator(generator), as_count("n", n, most=rows_that_fit(dim))
    return torch.rand(n, dim, generator=stream, dtype=torch.float64, device=stream.device)


class _Tilted:
    """The public functions of a tilt t: the checks around a law's own `_log_mgf`, `_tilted_mean` and `_tilted_cov`."""

    dim: int

    def log_mgf(self, t) -> Tensor:
        return finite_answer("t", self._log_mgf(as_vectors("t", t, self.dim)))

    def tilted_mean(self, t) -> Tensor:
        return finite_answer("t", self._tilted_mean(as_vectors("t", t, self.dim)))

    def tilted_cov(self, t) -> Tensor:
        return finite_answer("t", self._tilted_cov(as_vectors("t", t, self.dim)))


class Gaussian(_Tilted):
    """N(mean, cov): K(t) = <t, mean> + t'cov t / 2; the tilt only shifts the mean, by cov t (chapter 1).

    Parameters
    ----------
    cov : (d, d) symmetric positive semi-definite; a positive number means d = 1.
    mean : (d,), default zero.

    Raises
    ------
    ValueError
        If `cov` is not a covariance or `mean` does not match it.
    """

    def __init__(self, cov, mean=None):
        cov = as_tensor("cov", cov)
        self.cov = as_covariance("cov", cov.reshape(1, 1) if cov.ndim == 0 else cov)
        self.dim = self.cov.shape[0]
        self.mean = self.cov.new_zeros(self.dim) if mean is None else as_vector("mean", mean, self.dim).to(self.cov)
        values, vectors = torch.linalg.eigh(self.cov.double())
        self._root = vectors * values.clamp(min=0).sqrt()  # cov = root root'

    def sample(self, n: int, generator=None) -> Tensor:
        z = _normal(n, self.dim, generator)
        return self.mean.to(z) + z @ self._root.to(z).mT

    def _log_mgf(self, t: Tensor) -> Tensor:
        return t @ self.mean.to(t) + ((t @ self.cov.to(t)) * t).sum(-1) / 2

    def _tilted_mean(self, t: Tensor) -> Tensor:
        return self.mean.to(t) + t @ self.cov.to(t)

    def _tilted_cov(self, t: Tensor) -> Tensor:
        return self.cov.to(t).expand(*t.shape[:-1], self.dim, self.dim)


class SerialGaussian(Gaussian):
    """A stationary sequence of Gaussian tokens: y_{i+1} = r y_i + sqrt(1 - r^2) z_i with z_i ~ N(0, cov), y_0 too.

    Every token is N(0, cov), and two at a distance g have the cross-covariance r^g cov (an autoregressive process of
    order one; chapter 11). `sample` gives the tokens in the order of the sequence; log-MGF and tilts are those of one
    token.

    Parameters
    ----------
    cov : as for `Gaussian`; correlation : r, between -1 and 1, of a token with the next.

    Raises
    ------
    ValueError
        If `cov` is not a covariance or the correlation is not strictly between -1 and 1.
    """

    def __init__(self, cov, correlation: float):
        super().__init__(cov)
        if not -1 < as_number("correlation", correlation) < 1:
            raise ValueError(f"correlation: expected a number strictly between -1 and 1, got {correlation}")
        self.correlation = float(correlation)

    def sample(self, n: int, generator=None) -> Tensor:
        steps = super().sample(n, generator)
        steps[1:] *= math.sqrt(1 - self.correlation**2)
        found = lfilter([1.0], [1.0, -self.correlation], steps.cpu().numpy(), axis=0)
        return torch.as_tensor(found).to(steps)


class _Independent(_Tilted):
    """Independent coordinates, each with the same symmetric law of variance `_variance`."""

    _variance: float

    def __init__(self, dim: int):
        self.dim = as_count("dim", dim, most=MOST_DIM)
        self.mean = torch.zeros(self.dim, dtype=torch.float64)
        self.cov = self._variance * torch.eye(self.dim, dtype=torch.float64)

    @staticmethod
    def _derivatives(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K, K' and K'' of one coordinate."""
        raise NotImplementedError

    def _log_mgf(self, t: Tensor) -> Tensor:
        return self._derivatives(t)[0].sum(-1)

    def _tilted_mean(self, t: Tensor) -> Tensor:
        return self._derivatives(t)[1]

    def _tilted_cov(self, t: Tensor) -> Tensor:
        return torch.diag_embed(self._derivatives(t)[2])


class Rademacher(_Independent):
    """Independent signs, uniform on {-1, 1}^dim: K(t) = sum log cosh t_i, grad K = tanh t (chapter 1)."""

    _variance = 1.0

    def sample(self, n: int, generator=None) -> Tensor:
        return torch.where(_uniform(n, self.dim, generator) < 0.5, -1.0, 1.0).double()

    @staticmethod
    def _derivatives(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        magnitude = t.abs()
        log_cosh = magnitude + torch.log1p(torch.exp(-2 * magnitude)) - math.log(2)
        decay = torch.exp(-2 * magnitude)
        return log_cosh, torch.tanh(t), 4 * decay / (1 + decay) ** 2  # 1 - tanh^2 without cancellation


class Uniform(_Independent):
    """Uniform on the cube [-1, 1]^dim: K(t) = sum log(sinh t_i / t_i), grad K = coth t - 1/t (chapter 1)."""

    _variance = 1.0 / 3.0

    def sample(self, n: int, generator=None) -> Tensor:
        return 2 * _uniform(n, self.dim, generator) - 1

    @staticmethod
    def _derivatives(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Below 0.15 the closed forms lose digits to cancellation; seven terms of the series are exact to rounding.
        small = t.abs() < 0.15
        u = torch.where(small, t, 0.0) ** 2
        # The coefficients of K in powers of t^2 are 2^{2k} B_{2k} / (2k (2k)!), with Bernoulli numbers B.
        series = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575)
        k_small = sum(c * u**k for k, c in enumerate(series, 1))
        d_small = t * sum(2 * k * c * u ** (k - 1) for k, c in enumerate(series, 1))
        h_small = sum(2 * k * (2 * k - 1) * c * u ** (k - 1) for k, c in enumerate(series, 1))
        s = torch.where(small, 1.0, t.abs())
        decay = torch.exp(-2 * s)
        k_large = s + torch.log1p(-decay) - torch.log(2 * s)
        d_large = torch.sign(t) * ((1 + decay) / (1 - decay) - 1 / s)
        h_large = 1 / s**2 - 4 * decay / (1 - decay) ** 2
        return tuple(torch.where(small, a, b) for a, b in ((k_small, k_large), (d_small, d_large), (h_small, h_large)))


def _log_0f1(b: float, r: np.ndarray) -> np.ndarray:
    """log 0F1(; b; r^2/4) = log[Gamma(b) (2/r)^(b-1) I_{b-1}(r)], for r >= 0, without overflow.

    0F1 itself lies between 1 and e^r, so it serves to r = 600. Beyond, the uniform expansion of the modified Bessel
    function (DLMF 10.41.3) in 1/sqrt(nu^2 + r^2) does: two terms are accurate to 1e-9.
    """
    value = np.empty_like(r)
    near = r <= 600
    value[near] = np.log(hyp0f1(b, r[near] ** 2 / 4))
    nu, x = b - 1, r[~near]
    s = np.hypot(nu, x)
    p2 = (nu / s) ** 2
    correction = (3 - 5 * p2) / (24 * s) + (81 - 462 * p2 + 385 * p2**2) / (1152 * s**2)
    log_bessel = s + nu * np.log(x / (nu + s)) - 0.5 * np.log(2 * np.pi * s) + np.log1p(correction)
    value[~near] = math.lgamma(b) + nu * np.log(2 / x) + log_bessel
    return value


class _Spherical(_Tilted):
    """Rotation-invariant laws whose log-MGF is log 0F1(; nu + 1; r^2/4) with r = radius |t|.

    The sphere in dimension d has nu = d/2 - 1. The ball has nu = d/2: it is the shadow of the sphere in d + 2
    dimensions (Archimedes). Accurate to about 1e-10 of radius^2 at any |t|, in dimensions up to a few thousand.
    """

    def __init__(self, dim: int, radius: float, nu: float):
        self.dim = dim
        self.radius = as_positive("radius", radius, most=1e150)
        self._nu = nu
        self.mean = torch.zeros(self.dim, dtype=torch.float64)
        self.cov = self.radius**2 / (2 * nu + 2) * torch.eye(self.dim, dtype=torch.float64)

    def _radial(self, t: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """r, K and K'(r)/r, each of shape t.shape[:-1], in float64.

        d/dr 0F1(; b; r^2/4) = (r / 2b) 0F1(; b+1; r^2/4), so K'(r)/r needs one more value of the same function.
        """
        length = finite_answer("t", torch.linalg.vector_norm(t.detach().double().cpu(), dim=-1))
        r = self.radius * length.numpy().reshape(t.shape[:-1])
        b = self._nu + 1
        k = _log_0f1(b, np.atleast_1d(r)).reshape(r.shape)
        k_next = _log_0f1(b + 1, np.atleast_1d(r)).reshape(r.shape)
        return r, k, np.exp(k_next - k) / (2 * b)

    def _log_mgf(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self._radial(t)[1]).to(t)

    def _tilted_mean(self, t: Tensor) -> Tensor:
        return self.radius**2 * torch.as_tensor(self._radial(t)[2]).to(t)[..., None] * t

    def _tilted_cov(self, t: Tensor) -> Tensor:
        # With k1 = K'(r)/r: K'' = 1 - (r k1)^2 - (2 nu + 1) k1, the Riccati equation of the Bessel ratio.
        r, _, k1 = self._radial(t)
        k2 = 1 - (r * k1) ** 2 - (2 * self._nu + 1) * k1
        excess = torch.as_tensor(self.radius**2 * (k2 - k1)).to(t)[..., None, None]
        largest = t.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny)
        u = torch.nn.functional.normalize(t / largest, dim=-1)  # scaled first: squares of tiny t underflow
        across = torch.as_tensor(self.radius**2 * k1).to(t)[..., None, None]
        return across * torch.eye(self.dim, dtype=t.dtype, device=t.device) + excess * u[..., :, None] * u[..., None, :]


class UniformSphere(_Spherical):
    """Uniform on the sphere of a given radius in R^dim, dim >= 2.

    grad K(t) = radius I_{d/2}(r) / I_{d/2-1}(r) t/|t| with r = radius |t| (modified Bessel functions; chapter 6).
    """

    def __init__(self, dim: int, radius: float = 1.0):
        dim = as_count("dim", dim, least=2, most=MOST_DIM)
        super().__init__(dim, radius, nu=dim / 2 - 1)

    def sample(self, n: int, generator=None) -> Tensor:
        return self.radius * torch.nn.functional.normalize(_normal(n, self.dim, generator), dim=-1)


class UniformBall(_Spherical):
    """Uniform on the ball of a given radius in R^dim: the formulas of the sphere with d + 2 in place of d."""

    def __init__(self, dim: int, radius: float = 1.0):
        dim = as_count("dim", dim, most=MOST_DIM)
        super().__init__(dim, radius, nu=dim / 2)

    def sample(self, n: int, generator=None) -> Tensor:
        # The first d coordinates of a uniform point on the sphere in R^{d+2} are uniform in the ball.
        z = torch.nn.functional.normalize(_normal(n, self.dim + 2, generator), dim=-1)
        return self.radius * z[:, : self.dim].contiguous()


class _Mixture(_Tilted):
    """Means, covariances and log-MGFs of components, combined with softmax weights after tilting."""

    def _combine(self, log_weights: Tensor, means: Tensor, covs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (..., d) and covariance (..., d, d) of a mixture; `covs` None means point masses."""
        w = torch.softmax(log_weights, -1)
        mean = torch.einsum("...k,...kd->...d", w, means)
        centred = means - mean[..., None, :]
        cov = torch.einsum("...k,...ki,...kj->...ij", w, centred, centred)
        if covs is not None:
            cov = cov + torch.einsum("...k,kij->...ij", w, covs)
        return mean, cov


def _as_weights(value, count: int, like: Tensor) -> Tensor:
    if value is None:
        return torch.full((count,), 1.0 / count).to(like)
    weights = as_tensor("weights", value, ndim=1).to(like)
    if weights.shape[0] != count or (weights < 0).any() or abs(weights.sum().item() - 1) > 1e-6:
        raise ValueError(f"weights: expected {count} non-negative numbers that sum to 1, got {weights.tolist()[:8]}")
    return weights / weights.sum()


class GaussianMixture(_Mixture):
    """sum_k weights_k N(means_k, covs_k). Tilting a component shifts its mean and reweights it by its own MGF.

    Parameters
    ----------
    weights : (k,), non-negative, summing to 1.
    means : (k, d).
    covs : (k, d, d), or (d, d) shared by all components.
    """

    def __init__(self, weights, means, covs):
        self.means = as_tokens("means", means).double()
        count, self.dim = self.means.shape
        self.weights = _as_weights(weights, count, self.means)
        covs = as_tensor("covs", covs).double()
        covs = covs.expand(count, *covs.shape) if covs.ndim == 2 else covs
        if covs.shape != (count, self.dim, self.dim):
            raise ValueError(f"covs: expected shape {(count, self.dim, self.dim)}, got {tuple(covs.shape)}")
        self._components = [Gaussian(as_covariance("covs", c), m) for c, m in zip(covs, self.means)]
        self.covs = covs
        self.mean, self.cov = self._combine(self.weights.log(), self.means, covs)
        finite_answer("means, covs", self.cov)

    def sample(self, n: int, generator=None) -> Tensor:
        stream = runtime.generator(generator)
        z = _normal(n, self.dim, stream)
        which = torch.multinomial(self.weights.to(z), n, replacement=True, generator=stream)
        roots = torch.stack([c._root for c in self._components]).to(z)
        return self.means.to(z)[which] + torch.einsum("nij,nj->ni", roots[which], z)

    def _tilted(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights (..., k) and means (..., k, d) of the tilted components."""
        log_weights = self.weights.to(t).log() + torch.stack([c.log_mgf(t) for c in self._components], -1)
        return log_weights, torch.stack([c.tilted_mean(t) for c in self._components], -2)

    def _log_mgf(self, t: Tensor) -> Tensor:
        return torch.logsumexp(self._tilted(t)[0], -1)

    def _tilted_mean(self, t: Tensor) -> Tensor:
        return self._combine(*self._tilted(t), self.covs.to(t))[0]

    def _tilted_cov(self, t: Tensor) -> Tensor:
        return self._combine(*self._tilted(t), self.covs.to(t))[1]


class Empirical(_Mixture):
    """Point masses: the empirical measure of tokens (n, d), or any finite law with `weights` (n,).

    Its log-MGF is a log-sum-exp and its tilted mean is softmax attention over the tokens. Exact, in the precision of
    t, with memory of the order of queries x n: for many tokens use `streaming`.
    """

    def __init__(self, tokens, weights=None):
        self.tokens = as_tokens("tokens", tokens)
        n, self.dim = self.tokens.shape
        self.weights = _as_weights(weights, n, self.tokens)
        self.mean, self.cov = self._combine(self.weights.log(), self.tokens, None)
        finite_answer("tokens", self.cov)

    def sample(self, n: int, generator=None) -> Tensor:
        stream = runtime.generator(generator)
        cumulative = self.weights.double().cumsum(0).to(stream.device)
        u = _uniform(n, 1, stream)[:, 0] * cumulative[-1]
        which = torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
        return self.tokens.double().to(stream.device)[which]

    def _logits(self, t: Tensor) -> Tensor:
        return t @ self.tokens.to(t).mT + self.weights.to(t).log()

    def _log_mgf(self, t: Tensor) -> Tensor:
        return torch.logsumexp(self._logits(t), -1)

    def _tilted_mean(self, t: Tensor) -> Tensor:
        return torch.softmax(self._logits(t), -1) @ self.tokens.to(t)

    def _tilted_cov(self, t: Tensor) -> Tensor:
        return self._combine(self._logits(t), self.tokens.to(t), None)[1]
