"""Attention layers on top of each other: Gaussian tokens through several of them, their limit, and first-order errors.

A layer moves every token, x <- gain (x + V Gamma(x)), where Gamma is attention over the tokens themselves, which moved
in all layers before. Over infinitely many Gaussian tokens N(0, Sigma) a layer is a linear map, M = gain (I +
V Sigma A), so tokens stay Gaussian and the whole stack is known: Sigma <- M Sigma M' (`gaussian_stack`). Over n tokens
every layer errs anew, on tokens that are already off (`stack_errors`). Chapter 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from tokcx_lib.sampling import binned, forms
from tokcx_lib.sampling.streaming import partial_attention
from tokcx_lib.theory import geometry
from tokcx_lib.theory.limits import Moments
from tokcx_lib.validation import (
    MOST_DIM,
    as_count,
    as_covariance,
    as_flag,
    as_kind,
    as_lengths,
    as_list,
    as_number,
    as_positive,
    as_square,
    as_tensor,
    as_tokens,
    as_vectors,
    finite_answer,
    naming,
)

MOST_DEPTH = 10**4  # layers
ROWS = 2**24  # softmax weights held at once in `moved_keys`
MESH = 0.8  # step of the tables of scalar maps: errors of some 1e-6 of those of 10^10 tokens, against 2e-3 by 2500 bins


class Layer(NamedTuple):
    """One attention layer with a residual, x <- gain (x + V Gamma(x)): A (d, d), logit <A x, y>; V (d, d)."""

    A: Tensor
    V: Tensor
    gain: float = 1.0


class Stack(NamedTuple):
    """Layers and their limit on Gaussian tokens.

    `covs`: covariances (d, d) of the tokens before the first layer and after each, one more than there are layers;
    `maps`: the linear map (d, d) that each layer is in the limit. float64.
    """

    layers: list[Layer]
    covs: list[Tensor]
    maps: list[Tensor]

    def table(self) -> pd.DataFrame:
        """One row a layer: what it reads (trace of the covariance, horizon, coupling, root mean square load), and the
        coupling that decides about the moments after it (`effective_couplings`).
        """
        rows, effective = [], effective_couplings(self)
        for number, (layer, cov) in enumerate(zip(self.layers, self.covs), 1):
            horizon = geometry.horizon(layer.A, cov)
            half = geometry.root(cov)
            load = torch.linalg.matrix_norm(half @ layer.A @ half).item()
            rows.append((number, cov.trace().item(), horizon, horizon**2, load, effective[number - 1]))
        return pd.DataFrame(rows, columns=["layer", "trace", "horizon", "coupling", "load", "effective_coupling"])


def gaussian_stack(cov, layers: Sequence[Layer], keep_trace: bool = False) -> Stack:
    """The limit of a stack of layers on tokens N(0, cov).

    Parameters
    ----------
    cov : (d, d), covariance of the tokens that enter.
    layers : of forms and values (d, d).
    keep_trace : choose each gain so that the trace of the covariance stays as it is, in the limit: what a layer
        normalisation does for the scale of tokens, made linear. Otherwise the layers' own gains hold.

    Raises
    ------
    ValueError
        If `cov` is not a covariance, there is no layer, or a matrix does not match.
    """
    cov, keep_trace = as_covariance("cov", cov).detach().double(), as_flag("keep_trace", keep_trace)
    dim, scale = len(cov), cov.trace().item()
    if keep_trace and not scale > 0:
        raise ValueError("cov: expected a covariance that is not zero, whose trace can be kept")
    layers = [as_kind("layers", layer, Layer) for layer in as_list("layers", layers, "layers")]
    done, covs, maps = [], [cov], []
    one = torch.eye(dim, dtype=torch.float64)
    for layer in layers:
        named = (("layers: A", layer.A), ("layers: V", layer.V))
        A, V = (as_square(name, matrix, dim).detach().double() for name, matrix in named)
        plain = one + V @ covs[-1] @ A
        if keep_trace:
            trace = (plain @ covs[-1] @ plain.mT).trace().item()
            gain = math.sqrt(scale / as_positive("trace of cov after layers", trace))
        else:
            gain = as_positive("layers: gain", layer.gain)
        done.append(Layer(A, V, gain))
        maps.append(gain * plain)
        after = maps[-1] @ covs[-1] @ maps[-1].mT
        covs.append(finite_answer("cov, layers", (after + after.mT) / 2))
    return Stack(done, covs, maps)


def steady_stack(dim: int, depth: int, horizon: float, value: float, seed: int) -> Stack:
    """Layers that keep the scale of their tokens: each has its own form and values, and a gain that keeps the trace.

    Tokens N(0, I) enter. Forms are `horizon` times `forms.power_law_form`, values `value` times a random rotation.
    """
    layers, dim, seed = [], as_count("dim", dim, most=MOST_DIM), as_count("seed", seed, least=0, most=2**62)
    for number in range(as_count("depth", depth, most=MOST_DEPTH)):
        form = as_positive("horizon", horizon) * forms.power_law_form(dim, seed + number)
        rotation = forms.power_law_form(dim, seed + 1000 + number, decay=0.0)
        layers.append(Layer(form, as_positive("value", value) * rotation))
    with naming("horizon, value, depth"):
        return gaussian_stack(torch.eye(dim, dtype=torch.float64), layers, keep_trace=True)


def drifting_stack(dim: int, depth: int, horizon: float, value: float, seed: int) -> Stack:
    """One layer applied again and again, whose values feed what its queries look for, so that loads grow with depth.

    With the form A = horizon L D R' of `forms.power_law_form`, the values are V = value R L': every layer stretches
    the tokens along the directions R by which queries are read, and no gain takes that back.
    """
    form = as_positive("horizon", horizon) * forms.power_law_form(dim, seed)
    left, _, right = torch.linalg.svd(form)
    layer = Layer(form, as_positive("value", value) * right.mT @ left.mT)
    depth = as_count("depth", depth, most=MOST_DEPTH)
    with naming("horizon, value, depth"):
        return gaussian_stack(torch.eye(dim, dtype=torch.float64), [layer] * depth)


def effective_couplings(stack: Stack) -> list[float]:
    """What stands in place of Psi in the exponent of the moments after each layer, to first order (chapter 12).

    In whitened tokens z, which all layers share up to a rotation, let the query z_i send the key z_j to the logit
    z_j' B_l z_i in layer l. One token's pull on a query of layer k travels on through the layers above, where a query z
    reads keys N(B z, I). With C = I, and C <- I + B C B' down the layers from l, the pull of layer k has the tail of
    e^{z'Pz/2}, P = G (I + G)^-1, G = B_k C B_k'. On the residual a pull may also pass a layer by, which leaves C as it
    is: up to 2^(l-1) ways. The result, for each l, is the largest ||G|| over k <= l and all ways; in one dimension
    the largest Psi_i (1 + Psi_j (1 + ...)) over layers i < j < ... <= l. Moments after l layers then converge like
    n^-beta, and so does every fixed query in layer l + 1, beta = min(1/2, 1 / (1 + result)).
    """
    half, forms = geometry.root(as_kind("stack", stack, Stack).covs[0]), []
    for layer, M in zip(stack.layers, stack.maps):
        forms.append(half.mT @ layer.A @ half)
        half = M @ half
    found, one = [], torch.eye(len(half), dtype=torch.float64)
    for layers in range(1, len(forms) + 1):
        C, best = one[None], 0.0  # one C for every way up
        for B in reversed(forms[:layers]):
            G = B @ C @ B.mT
            best = max(best, torch.linalg.matrix_norm(G, 2).max().item())
            C = torch.cat([C, one + G])
            if len(one) == 1:
                C = C.amax(0, keepdim=True)  # the largest gives the largest
        found.append(best)
    return found


def _dim(layer: Layer) -> int:
    return len(as_square("layer: A", as_kind("layer", layer, Layer).A))


def _as_tokens(name: str, x, layer: Layer) -> Tensor:
    """Tokens (n, d) that a layer moves."""
    return as_tokens(name, x, _dim(layer)).detach()


def step(layer: Layer, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Tokens (..., m, d) after a layer, attending to `keys` (..., n, d), by default to each other."""
    x = as_vectors("x", x, _dim(layer)).detach()
    keys = x if keys is None else as_vectors("keys", keys, _dim(layer)).detach().to(x)
    V, A = layer.V.to(x), layer.A.to(x)
    with naming("x, keys"):
        output = partial_attention(x @ A.mT, keys, keys).output
    return layer.gain * (x + output.to(V) @ V.mT)


def moved_keys(layer: Layer, x: Tensor, shifts: Tensor, queries: Tensor | None = None) -> Tensor:
    """Derivative of a layer's output when its keys move by `shifts`, and its queries do not.

    With softmax weights w_ij and Gamma_i = sum_j w_ij x_j, that is gain V sum_j w_ij (d_j + (x_j - Gamma_i) <A x_i,
    d_j>): a key that moves takes its share of the output with it, and its share changes with its logit.

    Parameters
    ----------
    x : (n, d), keys; shifts : (n, d), d_j above.
    queries : (m, d), by default the keys.

    Returns
    -------
    Tensor (m, d)
    """
    x, shifts = _as_tokens("x", x, layer), _as_tokens("shifts", shifts, layer).to(as_tensor("x", x))
    if shifts.shape != x.shape:
        raise ValueError(f"shifts: expected shape {tuple(x.shape)} as x, got {tuple(shifts.shape)}")
    queries = x if queries is None else _as_tokens("queries", queries, layer).to(x)
    found = []
    for part in queries.split(max(1, ROWS // len(x))):
        tilts = part @ layer.A.to(x).mT
        weights = torch.softmax(tilts @ x.mT, -1)
        change = weights * (tilts @ shifts.mT)  # of the weights, but for what keeps their sum
        output = weights @ torch.cat([x, shifts], 1)
        gamma, carried = output.split(x.shape[1], 1)
        found.append(carried + change @ x - change.sum(1, keepdim=True) * gamma)
    return finite_answer("x, shifts, queries", layer.gain * torch.cat(found) @ layer.V.to(x).mT)


def _size(errors: Tensor) -> float:
    """Root mean square over tokens of the norm."""
    return errors.double().square().sum(-1).mean().sqrt().item()


STACK_COLUMNS = [
    "n", "layer", "error", "fresh", "linear", "own", "keys", "remainder",
    "mean_error", "cov_error", "sample_mean", "sample_cov",
]  # fmt: skip


def stack_errors(stack: Stack, tokens: Tensor, lengths: Sequence[int], split_most: int = 0) -> pd.DataFrame:
    """Errors of n tokens on their way through a stack, for each n in `lengths`: the first n tokens, and no others.

    What token i should be after l layers is x_i = M_l ... M_1 (token i). It is z_i, its error z_i - x_i.

    Parameters
    ----------
    tokens : (n, d), a sample of N(0, stack.covs[0]); attention runs in its precision.
    lengths : increasing integers.
    split_most : the longest length at which the error is also split into its sources.

    Returns
    -------
    DataFrame, one row a length and layer. Root mean squares over tokens, in units of sqrt(tr Sigma_l), the size of a
    token there:
        error : of z.
        fresh : made in this layer alone, from tokens that are where they should be; linear : first-order prediction,
        d <- M d + moved_keys(d) + fresh error; own, keys : the first two terms of it; remainder : its distance from
        z - x. NaN beyond `split_most`.
    And of the moments: mean_error, norm of the mean of z in the same units; cov_error, Frobenius norm of the error of
    their covariance, relative to that of Sigma_l; sample_mean and sample_cov, the same of x: the error of the draw.
    """
    tokens = as_tokens("tokens", tokens, len(as_kind("stack", stack, Stack).covs[0])).detach()
    lengths = as_lengths("lengths", lengths, most=len(tokens))
    split_most = as_number("split_most", split_most, finite=False)
    rows = []
    for n in lengths:
        exact = moved = tokens[:n]
        first = torch.zeros_like(exact)
        for number, (layer, M, cov) in enumerate(zip(stack.layers, stack.maps, stack.covs[1:]), 1):
            should = exact @ M.to(exact).mT
            with naming("tokens"):
                moved = step(layer, moved)
            parts = [math.nan] * 5
            unit = cov.trace().sqrt().item()
            if n <= split_most:
                fresh = step(layer, exact) - should
                own, keys = first @ M.to(first).mT, moved_keys(layer, exact, first)
                first = own + keys + fresh
                parts = [_size(e) / unit for e in (fresh, first, own, keys, moved - should - first)]
            exact = should
            of_moved, of_sample = (_moment_errors(x, cov) for x in (moved, exact))
            rows.append((n, number, _size(moved - exact) / unit, *parts, *of_moved, *of_sample))
    return pd.DataFrame(rows, columns=STACK_COLUMNS)


def _moment_errors(x: Tensor, cov: Tensor) -> tuple[float, float]:
    """Errors of the mean and the covariance of tokens (n, d) whose law is N(0, cov), in units of its spread."""
    x = x.double().cpu()
    found = Moments(x.mean(0), torch.cov(x.mT, correction=0))
    mean, spread = found.errors(Moments(cov.new_zeros(len(cov)), cov))
    return (mean / cov.trace().sqrt()).item(), (spread / torch.linalg.matrix_norm(cov)).item()


def scalar_stack(horizons: Sequence[float], value: float = 1.0) -> Stack:
    """Layers in one dimension whose tokens stay N(0, 1): horizon of each, V = value, gain 1 / (1 + value horizon)."""
    one = torch.eye(1, dtype=torch.float64)
    horizons = as_list("horizons", horizons, "positive numbers")
    layers = [Layer(as_positive("horizons", h) * one, as_positive("value", value) * one) for h in horizons]
    with naming("horizons, value"):
        return gaussian_stack(one, layers, keep_trace=True)


def scalar_errors(stack: Stack, draws: Sequence[binned.BinnedTokens], probes) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of a stack in one dimension over up to 10^15 tokens, from counts in bins (`binned`).

    A layer moves all tokens of a bin alike, so counts stay what they are, and bins move.

    Parameters
    ----------
    stack : of `scalar_stack`; draws : tokens N(0, 1), on the same points.
    probes : (p,), queries that go through the layers along with the tokens without being one of them.

    Returns
    -------
    (probes, rms, mean), float64
        probes (layers, draws, p): errors of the probes; rms (layers, draws): root mean square error of the tokens;
        mean (layers, draws): mean error of the tokens.
    """
    probes = as_tensor("probes", probes, ndim=1).detach().double()
    if len(as_kind("stack", stack, Stack).covs[0]) != 1 or not len(probes):
        raise ValueError(f"stack, probes: expected a `scalar_stack` and at least one query, got {len(probes)} queries")
    draws = [as_kind("draws", tokens, binned.BinnedTokens) for tokens in as_list("draws", draws, "sets of tokens")]
    shape = len(stack.layers), len(draws)
    at_probes = torch.zeros(*shape, len(probes), dtype=torch.float64)
    rms, mean = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for d, tokens in enumerate(draws):
        start = torch.cat([tokens.points, tokens.outer])
        counts = torch.cat([tokens.counts, torch.ones_like(tokens.outer)])
        share = counts / counts.sum()
        x, here, factor = start, probes, 1.0
        for number, (layer, M) in enumerate(zip(stack.layers, stack.maps)):
            a, v = layer.A.item(), layer.V.item()
            output, at_here = (binned.weighted_attention(a * q, x, counts, MESH) for q in (x, here))
            x, here = layer.gain * (x + v * output), layer.gain * (here + v * at_here)
            factor *= M.item()
            gap = x - factor * start
            at_probes[number, d] = here - factor * probes
            rms[number, d], mean[number, d] = (share @ gap.square()).sqrt(), share @ gap
    return at_probes, rms, mean
