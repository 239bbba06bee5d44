"""Argument checks, so that every bad input gets the same kind of message: name, what came, what is accepted.

This is the one place where arguments become tensors, arrays and numbers. Public functions call these checks at their
doors; what they call inside trusts its caller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
MOST = 10**9  # things that are done or held one by one
MOST_DIM = 2**15  # a matrix of so many rows and columns takes 8 GiB

Kind = TypeVar("Kind")


def shown(value) -> str:
    """What an argument is, in a few words."""
    if hasattr(value, "shape") and not isinstance(value, type):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, list, tuple)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return value.__name__ if isinstance(value, type) else type(value).__name__


@contextmanager
def naming(names: str) -> Iterator[None]:
    """What checks inside find wrong is the doing of these arguments."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from error


# ------------------------------------------------------------ tensors


def as_tensor(name: str, value, ndim: int | None = None, finite: bool = True) -> Tensor:
    """A floating-point tensor made from numbers, lists, numpy arrays, pandas tables or tensors: finite, unless that is
    not asked for, with `ndim` axes if given.

    Floating-point tensors and arrays keep their precision, and tensors their graph; everything else becomes float64.
    """
    try:
        tensor = value if isinstance(value, Tensor) else _tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers, got {shown(value)} ({error})") from error
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "without memory" if tensor.is_meta else f"of layout {tensor.layout}"
        raise ValueError(f"{name}: expected a dense tensor with numbers in it, got one {kind}, {shown(tensor)}")
    if tensor.is_complex():
        raise ValueError(f"{name}: expected real numbers, got {tensor.dtype}")
    if tensor.dtype not in FLOATS:
        tensor = tensor.to(torch.float64)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, got shape {tuple(tensor.shape)}")
    if finite:
        require_finite(name, tensor)
    return tensor


def _tensor(value) -> Tensor:
    """A tensor from anything but a tensor. Raises errors of several kinds."""
    if isinstance(value, (str, bytes, dict)):
        raise TypeError("no numbers")
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) and part.ndim for part in value):
        return torch.stack(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], np.ndarray):
        value = np.asarray(value, dtype=np.float64)
    if not hasattr(value, "__array__"):
        return torch.as_tensor(value, dtype=torch.float64)
    array = np.asarray(value.filled(np.nan) if isinstance(value, np.ma.MaskedArray) else value)
    if array.dtype.kind not in "fiubcO":
        raise TypeError(f"entries of {array.dtype}")
    if array.dtype.kind != "c":
        keeps = array.dtype.kind == "f" and array.dtype.itemsize <= 8
        array = array.astype(array.dtype.newbyteorder("=") if keeps else np.float64, copy=False)
    # PyTorch has no negative strides, and wants memory that it may write to.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity."""
    # The sum is finite unless an entry is not, or it overflows; looking at every entry takes many times longer.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def finite_answer(name: str, answer: Tensor) -> Tensor:
    """The answer, if it is finite; else ValueError: the argument `name` is so large that it overflows."""
    if not torch.isfinite(answer.sum()) and not torch.isfinite(answer).all():
        raise ValueError(f"{name}: expected numbers for which the answer is finite in {answer.dtype}, got larger ones")
    return answer


def as_wide(name: str, value, ndim: int | None = None) -> Tensor:
    """`as_tensor` for decompositions, which PyTorch has in no half precision: that becomes float32."""
    tensor = as_tensor(name, value, ndim)
    return tensor.float() if tensor.dtype in HALF else tensor


def as_array(name: str, value, least: float = -math.inf, most: float = math.inf, finite: bool = True) -> np.ndarray:
    """A float64 array for numpy and scipy, of whatever `as_tensor` takes: not empty, entries from `least` to `most`."""
    array = as_tensor(name, value, finite=finite).detach().cpu().double().numpy()
    if array.size == 0 or not ((array >= least) & (array <= most)).all():
        raise ValueError(f"{name}: expected numbers{_within(least, most)}, got {_few(array)}")
    return array


def as_broadcast(names: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Arrays of one shape."""
    try:
        return np.broadcast_arrays(*arrays)
    except ValueError as error:
        raise ValueError(f"{names}: expected shapes that broadcast, got {[a.shape for a in arrays]}") from error


def _few(array: np.ndarray) -> str:
    """What an array holds, if it is small."""
    if array.size == 0:
        return "none"
    return f"{array}" if array.ndim == 0 else f"shape {array.shape}, from {array.min():g} to {array.max():g}"


def _within(least: float, most: float) -> str:
    if most == math.inf:
        return "" if least == -math.inf else f" >= {least:g}"
    return f" from {least:g} to {most:g}"


def as_covariance(name: str, value) -> Tensor:
    """A symmetric positive semi-definite matrix (d, d), up to rounding.

    The tolerance is 1e-6 of the largest entry for float32 input and 1e-10 for float64: a covariance estimated in
    either precision passes, a wrong matrix does not. Half precision becomes float32.
    """
    cov = as_wide(name, value, ndim=2)
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
    """A matrix with `columns` columns, and at least one row."""
    matrix = as_tensor(name, value, ndim=2)
    if matrix.shape[1] != columns or len(matrix) == 0:
        raise ValueError(f"{name}: expected a matrix with {columns} columns, got shape {tuple(matrix.shape)}")
    return matrix


def as_square(name: str, value, dim: int | None = None) -> Tensor:
    """A square matrix (dim, dim); of any size if `dim` is None. Half precision becomes float32."""
    matrix = as_wide(name, value, ndim=2)
    if dim is None and (matrix.shape[0] != matrix.shape[1] or len(matrix) == 0):
        raise ValueError(f"{name}: expected a square matrix (d, d), got shape {tuple(matrix.shape)}")
    if dim is not None and matrix.shape != (dim, dim):
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


def as_vector(name: str, value, dim: int) -> Tensor:
    """One vector (dim,); a bare number counts as one where dim is 1."""
    vector = as_vectors(name, value, dim)
    if vector.ndim != 1:
        raise ValueError(f"{name}: expected shape {(dim,)}, got {tuple(vector.shape)}")
    return vector


def as_tokens(name: str, value, dim: int | None = None) -> Tensor:
    """Tokens (n, d) with n >= 1 and d >= 1, finite."""
    tokens = as_tensor(name, value)
    if tokens.ndim != 2:
        column = "; scalar tokens make a column, x[:, None]" if tokens.ndim == 1 else ""
        raise ValueError(f"{name}: expected 2 axes, (n, d), got shape {tuple(tokens.shape)}{column}")
    if 0 in tokens.shape:
        raise ValueError(f"{name}: expected shape (n, d) with n >= 1 and d >= 1, got {tuple(tokens.shape)}")
    if dim is not None and tokens.shape[1] != dim:
        raise ValueError(f"{name}: expected shape (n, {dim}), got {tuple(tokens.shape)}")
    return tokens


def as_indices(name: str, value, most: int, ndim: int = 1) -> Tensor:
    """Integers from 0 to `most`, int64, with `ndim` axes, none empty."""
    found = as_tensor(name, value) if not isinstance(value, Tensor) or value.is_floating_point() else value
    if found.is_complex() or found.is_meta or found.layout != torch.strided or found.ndim != ndim or 0 in found.shape:
        raise ValueError(f"{name}: expected integers with {ndim} axes, none empty, got {shown(value)}")
    whole = found.long()
    if (whole != found).any() or whole.min() < 0 or whole.max() > most:
        least, largest = found.min().item(), found.max().item()
        raise ValueError(f"{name}: expected integers from 0 to {most}, got {least} to {largest}")
    return whole


def as_mask(name: str, value) -> Tensor:
    """Which tokens of contexts, bool (b, width), none empty."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name}: expected a tensor of True and False, shape (b, width), got {shown(value)}")
    return value


def as_attention(q, k, v) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (..., m, d), keys (..., n, d) and values (..., n, d_v) that fit, without graph, with finite logits.

    They are of one precision, on one device; keys and values have the batch axes of the queries, or the last of them.
    """
    q, k, v = as_tensor("q", q).detach(), as_tensor("k", k).detach(), as_tensor("v", v).detach()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim < 2 or 0 in tensor.shape:
            raise ValueError(f"{name}: expected shape (..., tokens, dimension), none zero, got {tuple(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on {tensor.device}")
    if k.ndim > q.ndim or k.shape[:-2] != q.shape[q.ndim - k.ndim : -2]:
        batch = tuple(q.shape[:-2])
        raise ValueError(f"k: expected batch {batch} as in q, or its end, got shape {tuple(k.shape)}{_grouped(q, k)}")
    if v.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"v: expected batch {tuple(k.shape[:-2])} as in k, got shape {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected dimension {q.shape[-1]} as in q, got shape {tuple(k.shape)}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: expected {k.shape[-2]} tokens as in k, got shape {tuple(v.shape)}")
    _require_logits(q, k)
    return q, k, v


def _grouped(q: Tensor, k: Tensor) -> str:
    """How to give queries of which several heads share one of keys."""
    if q.ndim < 3 or k.ndim < 3 or q.shape[-3] == k.shape[-3] or q.shape[-3] % k.shape[-3]:
        return ""
    group, (heads, m, d) = q.shape[-3] // k.shape[-3], (k.shape[-3], *q.shape[-2:])
    return (
        f"; where {group} heads of queries share one of keys, give grouped=True to a function that has it, else "
        f"k.repeat_interleave({group}, -3) and v alike, or, without a copy, queries (..., {heads}, {group * m}, {d}): "
        f"q.unflatten(-3, ({heads}, {group})).flatten(-3, -2)"
    )


def _require_logits(q: Tensor, k: Tensor) -> None:
    """Raise ValueError if a logit q.k may overflow, in which case the kernels return NaN, or zeros."""
    largest = [max(-low.item(), high.item()) for low, high in (q.aminmax(), k.aminmax())]
    # Half precision is multiplied in float32.
    most = torch.finfo(q.dtype if q.dtype == torch.float64 else torch.float32).max
    if not largest[0] * largest[1] * q.shape[-1] < most:
        raise ValueError(
            f"q, k: expected logits q.k within {q.dtype}, got entries up to {largest[0]:.3g} in q and "
            f"{largest[1]:.3g} in k; scale them, or use float64"
        )


# ------------------------------------------------------------ numbers


def as_number(name: str, value, least: float = -math.inf, most: float = math.inf, finite: bool = True) -> float:
    """A number from `least` to `most`; finite, unless that is not asked for."""
    number = _number(value)
    if not least <= number <= most or finite and math.isinf(number):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name}: expected {kind}{_within(least, most)}, got {shown(value)}")
    return number


def _number(value) -> float:
    """As a float; NaN of what is no number. A number in an array without axes is one, a text is not."""
    if isinstance(value, (str, bytes, bytearray)) or getattr(value, "ndim", 0):
        return math.nan
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError):
        return math.nan


def as_positive(name: str, value, most: float = math.inf) -> float:
    """A positive finite number, at most `most`."""
    number = _number(value)
    if not (0 < number < math.inf and number <= most):
        within = "" if most == math.inf else f" up to {most:g}"
        raise ValueError(f"{name}: expected a positive finite number{within}, got {shown(value)}")
    return number


def as_count(name: str, value, least: int = 1, most: int | float = MOST) -> int:
    """An integer from `least` to `most`; by default as many as can be done or held one by one."""
    number = value if isinstance(value, Integral) else _number(value)
    if isinstance(value, (bool, np.bool_)) or not (math.inf > number >= least and int(number) == number <= most):
        within = f"from {least} to {most}" if _number(value) > most else f">= {least}"
        raise ValueError(f"{name}: expected an integer {within}, got {shown(value)}")
    return int(number)


def rows_that_fit(width: int) -> int:
    """How many rows of `width` numbers in float64 the memory of this machine holds."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (8 * max(width, 1))


def as_flag(name: str, value) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


# ------------------------------------------------------------ lists and things


def as_list(name: str, value, what: str = "things", least: int = 1) -> list:
    """A list made from any iterable but a text, of at least so many items."""
    try:
        items = value.tolist() if hasattr(value, "tolist") else list(value)
    except (TypeError, NotImplementedError, RuntimeError):  # not iterable, or a tensor without numbers
        items = None
    if isinstance(value, (str, bytes, dict)):
        items = None
    if not isinstance(items, list):
        raise ValueError(f"{name}: expected a list of {what}, got {shown(value)}")
    if len(items) < least:
        raise ValueError(f"{name}: expected a list of at least {least} {what}, got {shown(items)}")
    return items


def as_lengths(name: str, value: Sequence[int], most: int) -> list[int]:
    """Prefix lengths: increasing integers from 1 to `most`."""
    given = as_list(name, value, f"increasing integers, such as [{min(512, most)}]")
    try:
        lengths = [as_count(name, n, most=math.inf) for n in given]
    except ValueError as error:
        raise ValueError(f"{name}: expected a list of integers from 1, got {shown(given)}") from error
    if any(a >= b for a, b in zip(lengths, lengths[1:])):
        raise ValueError(f"{name}: expected increasing integers, got {shown(given)}")
    if lengths[-1] > most:
        raise ValueError(f"{name}: expected integers from 1 to the number of tokens, {most}, got {shown(given)}")
    return lengths


def as_replicates(replicates: int | Iterable[int]) -> list[int]:
    """Numbers of the replicates to run: so many, or those given."""
    if isinstance(replicates, Iterable) and getattr(replicates, "ndim", 1):
        given = as_list("replicates", replicates, "numbers of replicates")
        numbers = [as_count("replicates", r, least=0, most=2**62) for r in given]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"replicates: expected different numbers, at least one, got {numbers}")
        return numbers
    return list(range(as_count("replicates", replicates)))


def as_kind(name: str, value: Kind, *kinds: type[Kind]) -> Kind:
    """An object of one of these classes."""
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name}: expected a {wanted}, got {shown(value)}")
    return value


def as_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    return value


def as_law(name: str, value, *methods: str):
    """A law of tokens (`laws`), or anything with its ``dim`` and these methods."""
    if isinstance(value, type) or not all(hasattr(value, part) for part in ("dim", *methods)):
        what = "a law made from it, such as" if isinstance(value, type) else "a law, such as"
        raise ValueError(f"{name}: expected {what} laws.Gaussian(cov) or laws.Empirical(tokens), got {shown(value)}")
    return value


def as_dtype(name: str, value) -> torch.dtype:
    """A precision of PyTorch."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, FLOATS))}, got {shown(value)}")
    return value
