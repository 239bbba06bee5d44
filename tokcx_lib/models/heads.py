"""Attention heads of Hugging Face models: their bilinear forms, values and geometry.

One head sends a query token x and a key token y to the logit <A x + shift, y> (plus a term that softmax cancels), with
A = W_K' W_Q / sqrt(d_k) and shift = W_K' b_Q / sqrt(d_k) (chapter 1). What its tokens are, and where they come from, is
in `tokens`.

Rotary positions turn queries and keys by angles that grow with their position, so the bilinear form depends on the
distance between the two: `Head.at`. Causal heads (those of decoders) show a query only the keys up to its own position:
there n is that position. The law that n tokens are drawn from is, for every head, that of keys pooled over all
positions and windows; the keys that one causal query sees are its own past, and not such a sample.

Supported: BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral and Qwen2 (`architectures`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokcx_lib.models import architectures
from tokcx_lib.theory import geometry
from tokcx_lib.validation import as_count


@dataclass(frozen=True)
class Head:
    """One attention head: its projections (d_k, d) or (d_v, d), query bias (d_k,) or None, and logit scale.

    Where heads share keys and values, each holds those of its group. `causal` heads see a query's own token and
    earlier ones. `b_K` (d_k,) or None matters with rotary positions alone. `rotary`: the angles (d_k / 2,), in radians
    a position, by which positions turn queries and keys; None for absolute positions, which are part of the tokens.
    `window`: how many keys a query sees at most, its own token and those just before it; None for all of them.

    A, shift and `project` of a rotary head are those at distance 0; see `at`.
    """

    layer: int
    head: int
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor | None
    scale: float
    causal: bool = False
    b_K: Tensor | None = None
    rotary: Tensor | None = None
    window: int | None = None

    @property
    def A(self) -> Tensor:
        """Bilinear form (d, d), float64: logit <A x + shift, y>."""
        return self.scale * self.W_K.double().mT @ self.W_Q.double()

    @property
    def shift(self) -> Tensor:
        """What the query bias adds to A x, (d,), float64."""
        if self.b_Q is None:
            return self.W_K.new_zeros(self.W_K.shape[1], dtype=torch.float64)
        return self.scale * self.W_K.double().mT @ self.b_Q.double()

    @property
    def V(self) -> Tensor:
        """Value matrix (d_v, d), float64; the value bias only shifts every output and is left out."""
        return self.W_V.double()

    def at(self, distance: int) -> Head:
        """The head between a query and a key `distance` positions before it; with absolute positions, the head itself.

        With rotary positions the logit of a query q at position i and a key k at position j is (R_i q).(R_j k), where
        R_i turns the coordinates m and m + d_k / 2 of a vector by i times the m-th angle. That is (R_{i-j} q).k: a
        head whose query projection is R_{i-j} W_Q, in float64, and which has no positions of its own.

        The bias of the keys then adds (R_{i-j} q).b_K, which differs from one distance to the next: it cancels in
        softmax over keys at one distance, and not over keys at several. `key_bias_term` of the head returned gives it.

        Raises
        ------
        ValueError
            If the distance is negative or not an integer.
        """
        distance = as_count("distance", distance, least=0)
        if self.rotary is None:
            return self
        angles = distance * self.rotary.double()
        b_Q = None if self.b_Q is None else _turn(self.b_Q.double(), angles)
        return replace(self, W_Q=_turn(self.W_Q.double().mT, angles).mT, b_Q=b_Q, rotary=None)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (n, d_k), keys (n, d_k) and values (n, d_v) of tokens (n, d), with logits q.k, in x's precision.

        The bias of the keys cancels in softmax and is left out (with rotary positions see `at`).
        """
        q = x @ self.W_Q.to(x).mT
        if self.b_Q is not None:
            q = q + self.b_Q.to(x)
        return self.scale * q, x @ self.W_K.to(x).mT, x @ self.W_V.to(x).mT

    def key_bias_term(self, x: Tensor) -> Tensor:
        """What the bias of the keys adds to every logit of the queries of tokens (n, d): (n,), in x's precision.

        It does not depend on the key. Logits <A x + shift, y> need it only to compare keys at different distances.
        """
        q, _, _ = self.project(x)
        return q.new_zeros(len(q)) if self.b_K is None else q @ self.b_K.to(q)


def _turn(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn the coordinates m and m + d_k / 2 of vectors (..., d_k) in their plane by angle m of (d_k / 2,)."""
    first, second = vectors.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def heads(model) -> list[Head]:
    """The heads of a model, layer by layer: a flat list of layers x query heads.

    Parameters
    ----------
    model : a `TextModel` or a Hugging Face model, with or without a task head, whatever its attention implementation.

    Raises
    ------
    ValueError
        If the architecture is not supported; the message names those that are.
    """
    model = architectures.base_model(model)
    modules = architectures.attention_modules(model)
    kind, causal = architectures.architecture(model.config), architectures.is_causal(model.config)
    angles, factor = architectures.rotary(model)
    windows = architectures.windows(model.config)
    count = model.config.num_attention_heads
    found = []
    for layer, module in enumerate(modules):
        maps = architectures.projections(kind, module)
        size, scale = len(maps[0][0]) // count, architectures.scale(module)
        (W_Q, b_Q), (W_K, b_K), (W_V, _) = [_split(weight, bias, size) for weight, bias in maps]
        shared = count // len(W_K)  # query heads to one head of keys and values
        for h in range(count):
            group = h // shared
            own = W_Q[h], W_K[group], W_V[group], b_Q[h], scale * factor
            positions = {"causal": causal, "rotary": angles, "window": windows[layer]}
            found.append(Head(layer, h, *own, b_K=b_K[group], **positions))
    return found


def output_maps(model) -> list[Tensor]:
    """W_O of every head, (d, d_v), in the order of `heads`: a layer adds W_O (output of the head) over its heads.

    The bias that a layer adds once is left out. Parameters and errors as for `heads`.
    """
    model = architectures.base_model(model)
    count = model.config.num_attention_heads
    return [part for weight in architectures.output_maps(model) for part in weight.chunk(count, 1)]


def _split(weight: Tensor, bias: Tensor | None, size: int) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Weight (heads, size, d) and bias (heads, size), or a None for each head, of a map to all heads at once."""
    weight = weight.reshape(-1, size, weight.shape[1])
    return weight, [None] * len(weight) if bias is None else bias.reshape(-1, size)


def head_geometry(head: Head, x: Tensor, cov: Tensor, reach: float | None = None) -> dict[str, float]:
    """Reach, H, H_1, Psi, Psi_1, quantiles of the load, and the scale of the values of a head.

    Tokens are (n, d), with centred covariance (d, d) and its `reach`, if that is at hand. The values V y of single
    tokens have covariance V Sigma V'; `value_spread` is the root of its trace, `value_cov` its Frobenius norm: natural
    units for errors of moments.

    A head is a law of queries q and keys k: with Cov(q) = W_Q Sigma W_Q' and Cov(k) = W_K Sigma W_K' (d_k, d_k), the
    load is (q' Cov(k) q)^{1/2} and H = ||Cov(q)^{1/2} Cov(k)^{1/2}||_2, the numbers that `geometry` defines by A.

    The load of a token that is not centred is ||Sigma^{1/2}(A x + shift)||: the mean of the keys cancels in softmax,
    that of the queries acts like a shift (chapter 1). Its quantiles over the tokens are load_05, load_25, load_median,
    load_75 and load_95.
    """
    cov = cov.to(head.W_K.device, torch.float64)
    reach = geometry.reach(cov) if reach is None else reach
    W_Q, b_Q = head.scale * head.W_Q.double(), 0 if head.b_Q is None else head.scale * head.b_Q.double()
    queries, keys, values = (W @ cov @ W.mT for W in (W_Q, head.W_K.double(), head.V))
    q = x.double() @ W_Q.mT + b_Q
    loads = ((q @ keys) * q).sum(-1).clamp(min=0).sqrt()
    half = geometry.root(keys)
    two, one = (_largest_root(half @ each @ half) for each in (queries, W_Q @ W_Q.mT))
    return {
        "reach": reach,
        "horizon": two,
        "horizon_one_sided": one,
        "coupling": two**2,
        "coupling_one_sided": reach * one**2,
        "load_median": loads.median().item(),
        **{f"load_{level:02d}": loads.quantile(level / 100).item() for level in (5, 25, 75, 95)},
        "value_spread": values.trace().sqrt().item(),
        "value_cov": torch.linalg.matrix_norm(values).item(),
    }


def _largest_root(square: Tensor) -> float:
    """The root of the largest eigenvalue of a positive semi-definite matrix."""
    return torch.linalg.eigvalsh(square).max().clamp(min=0).sqrt().item()
