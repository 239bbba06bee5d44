"""Argument checks, so that every bad input gets the same kind of message: name, what came, what is accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def as_tensor(name: str, value, ndim: int | None = None) -> Tensor:
    """A floating-point tensor made from numbers, lists, numpy arrays or tensors; finite, with `ndim` axes if given.

    Floating-point tensors and arrays keep their precision; everything else becomes float64.
    """
    array = hasattr(value, "dtype")
    if isinstance(value, np.ndarray) and any(stride < 0 for stride in value.strides):
        value = value.copy()  # PyTorch has no negative strides
    try:
        tensor = torch.as_tensor(value) if array else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected numbers, got {type(value).__name__} ({error})") from error
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {tensor.dtype}")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, got shape {tuple(tensor.shape)}")
    require_finite(name, tensor)
    return tensor


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity."""
    # The sum is finite unless an entry is not, or it overflows; looking at every entry takes many times longer.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def as_covariance(name: str, value) -> Tensor:
    """A symmetric positive semi-definite matrix (d, d), up to rounding.

    The tolerance is 1e-6 of the largest entry for float32 input and 1e-10 for float64: a covariance estimated in
    either precision passes, a wrong matrix does not.
    """
    cov = as_tensor(name, value, ndim=2)
    if cov.shape[0] != cov.shape[1] or cov.shape[0] == 0:
        raise ValueError(f"{name}: expected a square matrix (d, d), got shape {tuple(cov.shape)}")
    tolerance = (1e-10 if cov.dtype == torch.float64 else 1e-6) * max(cov.abs().max().item(), 1e-300)
    if (cov - cov.mT).abs().max() > tolerance:
        raise ValueError(f"{name}: expected a symmetric matrix, got asymmetry {(cov - cov.mT).abs().max():.3g}")
    # A Cholesky factorisation is a test many times cheaper than eigenvalues.
    lifted = cov.double() + tolerance * cov.shape[0] * torch.eye(cov.shape[0], dtype=torch.float64, device=cov.device)
    if torch.linalg.cholesky_ex(lifted).info:
        smallest = torch.linalg.eigvalsh(cov.double()).min().item()
        raise ValueError(f"{name}: expected a positive semi-definite matrix, got smallest eigenvalue {smallest:.3g}")
    return cov


def as_matrix(name: str, value, columns: int) -> Tensor:
    """A matrix with `columns` columns."""
    matrix = as_tensor(name, value, ndim=2)
    if matrix.shape[1] != columns:
        raise ValueError(f"{name}: expected a matrix with {columns} columns, got shape {tuple(matrix.shape)}")
    return matrix


def as_square(name: str, value, dim: int) -> Tensor:
    """A square matrix (dim, dim)."""
    matrix = as_tensor(name, value, ndim=2)
    if matrix.shape != (dim, dim):
        raise ValueError(f"{name}: expected shape {(dim, dim)}, got {tuple(matrix.shape)}")
    return matrix


def as_squares(name: str, value, dim: int) -> Tensor:
    """Square matrices (..., dim, dim): one, or a stack of them."""
    matrices = as_tensor(name, value)
    if matrices.shape[-2:] != (dim, dim) or 0 in matrices.shape:
        raise ValueError(f"{name}: expected shape (..., {dim}, {dim}), got {tuple(matrices.shape)}")
    return matrices


def as_vectors(name: str, value, dim: int) -> Tensor:
    """Vectors along the last axis, shape (..., dim); a bare number counts as a vector where dim is 1."""
    vectors = as_tensor(name, value)
    if vectors.ndim == 0 and dim == 1:
        vectors = vectors[None]
    if vectors.ndim == 0 or vectors.shape[-1] != dim:
        raise ValueError(f"{name}: expected shape (..., {dim}), got {tuple(vectors.shape)}")
    return vectors


def as_tokens(name: str, value, dim: int | None = None) -> Tensor:
    """Tokens (n, d) with n >= 1 and d >= 1, finite."""
    tokens = as_tensor(name, value, ndim=2)
    if 0 in tokens.shape:
        raise ValueError(f"{name}: expected shape (n, d) with n >= 1 and d >= 1, got {tuple(tokens.shape)}")
    if dim is not None and tokens.shape[1] != dim:
        raise ValueError(f"{name}: expected shape (n, {dim}), got {tuple(tokens.shape)}")
    return tokens


def as_lengths(name: str, value: Sequence[int], most: int) -> list[int]:
    """Prefix lengths: increasing integers from 1 to `most`."""
    lengths = [int(n) for n in value]
    given = list(value)
    if not lengths or any(a != b for a, b in zip(lengths, given)):
        raise ValueError(f"{name}: expected a non-empty list of integers, got {given}")
    if any(a >= b for a, b in zip(lengths, lengths[1:])):
        raise ValueError(f"{name}: expected increasing integers, got {given}")
    if lengths[0] < 1 or lengths[-1] > most:
        raise ValueError(f"{name}: expected integers from 1 to the number of tokens, {most}, got {given}")
    return lengths


def as_count(name: str, value, least: int = 1) -> int:
    """An integer, at least `least`."""
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    return int(value)


def as_positive(name: str, value) -> float:
    """A positive finite number."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return number
