"""The attention map of a law or of a sample, and its hardmax limit.

Gamma_mu(x) = V grad K(A x) = V E[Y] under the Esscher tilt of mu by A x (chapter 1). For the empirical measure of n
tokens this *is* softmax attention over n keys. These functions are for small work, in the precision given; millions of
keys belong to `streaming`.
"""

from __future__ import annotations

from torch import Tensor

from tokcx_lib.theory.laws import Empirical, Law
from tokcx_lib.validation import as_law, as_matrix, as_square, as_tokens, as_vectors, finite_answer


def _tilt(x, A, dim: int) -> Tensor:
    """t = A x for queries x (..., dim)."""
    x = as_vectors("x", x, dim)
    return x if A is None else finite_answer("x, A", x @ as_square("A", A, dim).to(x).mT)


def _value(y: Tensor, V) -> Tensor:
    return y if V is None else finite_answer("V", y @ as_matrix("V", V, columns=y.shape[-1]).to(y).mT)


def attention_map(law: Law | Tensor, x, A, V=None) -> Tensor:
    """Attention map Gamma(x) = V grad K(A x) of a law, or of the empirical measure of tokens.

    Parameters
    ----------
    law : a law of `laws`, or tokens (n, d): softmax attention with these tokens as keys and values.
    x : (..., d), queries; for d = 1 a number is accepted.
    A : (d, d), bilinear form with logit <A x, y>; None for the identity.
    V : (d_v, d), value matrix; None for the identity.

    Returns
    -------
    Tensor of shape (..., d_v), in the precision of x

    Raises
    ------
    ValueError
        If shapes do not match, or anything is NaN or infinite.
    """
    tokens = not hasattr(law, "tilted_mean")
    law = Empirical(as_tokens("tokens: as the law", law)) if tokens else as_law("law", law, "tilted_mean")
    return _value(law.tilted_mean(_tilt(x, A, law.dim)), V)


def hardmax_map(tokens, x, A, V=None) -> Tensor:
    """Hardmax limit of attention: V times the token with the largest logit <A x, y>, the mean of them if tied.

    This is the limit of softmax attention as A is scaled up without bound (A = None is the identity).

    Parameters
    ----------
    tokens : (n, d); x : (..., d); A : (d, d); V : (d_v, d) or None.

    Returns
    -------
    Tensor of shape (..., d_v)

    Raises
    ------
    ValueError
        If shapes do not match, there is no token, or anything is NaN or infinite.
    """
    tokens = as_tokens("tokens", tokens)
    t = _tilt(x, A, tokens.shape[1])
    logits = t @ tokens.to(t).mT
    top = (logits == logits.amax(-1, keepdim=True)).to(t)
    return _value(top / top.sum(-1, keepdim=True) @ tokens.to(t), V)
