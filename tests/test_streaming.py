"""Streaming attention against full softmax in float64, over random shapes, lengths, splits and sizes of logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcx_lib import streaming
from tokcx_lib.streaming import Partial, merge, partial_attention, prefix_attention, reference_attention

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def problems(draw):
    """q, k, v of random shapes with logits up to a chosen size, and increasing lengths."""
    m, n = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    d, d_v = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(draw(SEEDS))
    dtype, largest = draw(DTYPES), draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    q, k, v = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((m, d), (n, d), (n, d_v)))
    q = q * largest / (q @ k.mT).abs().max()
    cuts = draw(st.sets(st.integers(1, n), min_size=1, max_size=6))
    return q.to(dtype), k.to(dtype), v.to(dtype), sorted(cuts)


def tolerance(q, k, v) -> float:
    logits = (q.double() @ k.double().mT).abs().max().item()
    return 32 * torch.finfo(q.dtype).eps * (1 + logits) * v.abs().max().item()


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_full_softmax_attention(problem):
    q, k, v, lengths = problem
    outputs = prefix_attention(q, k, v, lengths)
    assert outputs.shape == (len(lengths), len(q), v.shape[1])
    for output, n in zip(outputs, lengths):
        exact = reference_attention(q, k[:n], v[:n]).output
        assert (output.double() - exact).abs().max().item() <= tolerance(q, k, v)


@given(problem=problems(), seed=SEEDS)
@settings(max_examples=80, deadline=None)
def test_merging_parts_in_any_order_is_attention_over_all(problem, seed):
    q, k, v, cuts = problem
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in torch.tensor_split(order, cuts) if len(part)]
    state = partial_attention(q, k[parts[0]], v[parts[0]])
    for part in parts[1:]:
        state = merge(partial_attention(q, k[part], v[part]), state)
    exact = reference_attention(q, k, v)
    assert (state.output.double() - exact.output).abs().max().item() <= tolerance(q, k, v)
    logits = 1 + exact.lse.abs().max().item() + (q.double() @ k.double().mT).abs().max().item()
    assert (state.lse.double() - exact.lse).abs().max().item() <= 32 * torch.finfo(q.dtype).eps * logits


@pytest.mark.parametrize("dtype, relative", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_precision_at_moderate_logits(dtype, relative):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 32, generator=rng, dtype=torch.float64).to(dtype) for n in (200, 20_000, 20_000))
    lengths = [1, 7, 100, 4096, 12_345, 20_000]
    for output, n in zip(prefix_attention(q / 32**0.5, k, v, lengths), lengths):
        exact = reference_attention(q / 32**0.5, k[:n], v[:n]).output
        error = (output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max().item() <= relative


@given(n=st.integers(1, 120), d=st.integers(1, 9), d_v=st.integers(1, 6), seed=SEEDS, offset=st.sampled_from([0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_self_attention_moments_against_the_definition(n, d, d_v, seed, offset):
    rng = torch.Generator().manual_seed(seed)
    x, A, shift = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((n, d), (d, d), (d,)))
    V = torch.randn(d_v, d, generator=rng, dtype=torch.float64)
    lengths = sorted({1, max(1, n // 3), n})
    moments = streaming.self_attention_moments(x, A, V, lengths, shift=shift)
    assert moments.mean.shape == (len(lengths), d_v) and moments.cov.shape == (len(lengths), d_v, d_v)
    for i, size in enumerate(lengths):
        y = x[:size]
        outputs = torch.softmax((y @ A.mT + shift) @ y.mT, -1) @ y @ V.mT
        assert torch.allclose(moments.mean[i], outputs.mean(0), atol=1e-10)
        assert torch.allclose(moments.cov[i], torch.cov(outputs.mT, correction=0).reshape(d_v, d_v), atol=1e-10)
    moved = streaming.prefix_moments(x @ A.mT + shift, x, x @ V.mT + offset, lengths)
    assert torch.allclose(moved.cov, moments.cov, atol=1e-10)


def test_blocks_of_queries_and_keys_do_not_change_the_moments(monkeypatch):
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(500, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    whole = streaming.prefix_moments(q, k, v, [3, 250, 251, 500])
    monkeypatch.setattr(streaming, "KEY_BLOCK", 37)
    monkeypatch.setattr(streaming, "QUERY_BLOCK", 41)
    blocks = streaming.prefix_moments(q, k, v, [3, 250, 251, 500])
    assert torch.allclose(whole.mean, blocks.mean, atol=1e-12) and torch.allclose(whole.cov, blocks.cov, atol=1e-12)


def count_reads(monkeypatch, call):
    """(queries, keys) of every call of the kernel."""
    reads = []
    kernel = streaming._kernel

    def counting(q, k, v):
        reads.append((q.shape[-2], k.shape[-2]))
        return kernel(q, k, v)

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "_kernel", counting)
        call()
    return reads


@pytest.mark.parametrize("lengths", [[1000], [10, 1000], list(range(50, 1001, 50))])
def test_each_key_is_read_once_per_query_whatever_the_number_of_lengths(monkeypatch, lengths):
    q, k = torch.randn(64, 8), torch.randn(1000, 8)
    reads = count_reads(monkeypatch, lambda: prefix_attention(q, k, k, lengths))
    assert sum(keys for _, keys in reads) == 1000
    # Self-attention: a block of queries that joins at length i reads all keys up to the longest length, once each.
    monkeypatch.setattr(streaming, "QUERY_BLOCK", 100)
    reads = count_reads(monkeypatch, lambda: streaming.prefix_moments(k, k, k, lengths))
    assert sum(queries * keys for queries, keys in reads) == 1000 * 1000


def test_memory_does_not_hold_the_weights():
    """The peak of a child process stays far below the m x n matrix of weights (2 GB here)."""
    import resource
    import subprocess
    import sys

    code = """
import resource, torch
from tokcx_lib.streaming import prefix_attention
q, k = torch.randn(2048, 16), torch.randn(262_144, 16)
prefix_attention(q, k[:1024], k[:1024], [1024])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prefix_attention(q, k, k, [1000, 100_000, 262_144])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < 100e6, resource


def test_effective_tokens_against_the_weights():
    rng = np.random.default_rng(0)
    q, k = torch.tensor(rng.normal(size=(20, 3))), torch.tensor(rng.normal(size=(400, 3)))
    for counted, n in zip(streaming.effective_tokens(q, k, [1, 50, 400]), [1, 50, 400]):
        weights = torch.softmax(q @ k[:n].mT, -1)
        assert torch.allclose(counted, 1 / (weights**2).sum(-1), rtol=1e-10)


def test_batches_and_plain_lists_of_axes():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 2)
    outputs = prefix_attention(q, k, v, [2, 9])
    assert outputs.shape == (2, 2, 3, 5, 2)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(outputs[:, i, j], prefix_attention(q[i, j], k[i, j], v[i, j], [2, 9]), atol=1e-6)
    moments = streaming.prefix_moments(k, k, v, [4, 9])
    assert moments.mean.shape == (2, 2, 3, 2) and moments.cov.shape == (2, 2, 3, 2, 2)
    single = streaming.prefix_moments(k[1, 2], k[1, 2], v[1, 2], [4, 9])
    assert torch.allclose(moments.cov[:, 1, 2], single.cov, atol=1e-6)


good = torch.zeros(4, 2)


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: partial_attention(torch.zeros(2), good, good), "q"),
        (lambda: partial_attention(good, torch.zeros(0, 2), torch.zeros(0, 2)), "k"),
        (lambda: partial_attention(good, torch.zeros(4, 3), good), "k"),
        (lambda: partial_attention(good, good, torch.zeros(3, 2)), "v"),
        (lambda: partial_attention(good, good.double(), good), "k"),
        (lambda: partial_attention(good, good[None], good[None]), "k"),
        (lambda: partial_attention(good, torch.full((4, 2), float("nan")), good), "k"),
        (lambda: prefix_attention(good, good, good, []), "lengths"),
        (lambda: prefix_attention(good, good, good, [0, 2]), "lengths"),
        (lambda: prefix_attention(good, good, good, [2, 2]), "lengths"),
        (lambda: prefix_attention(good, good, good, [3, 2]), "lengths"),
        (lambda: prefix_attention(good, good, good, [1.5]), "lengths"),
        (lambda: prefix_attention(good, good, good, [5]), "lengths"),
        (lambda: streaming.prefix_moments(good[:3], good, good, [2]), "q"),
        (lambda: streaming.self_attention_moments(torch.zeros(0, 2), torch.eye(2), None, [1]), "x"),
        (lambda: streaming.self_attention_moments(good, torch.eye(3), None, [1]), "A"),
        (lambda: streaming.self_attention_moments(good, torch.eye(2), torch.eye(3), [1]), "V"),
        (lambda: streaming.self_attention_moments(good, torch.eye(2), None, [1], shift=[1.0]), "shift"),
        (lambda: merge(Partial(good, good[:, 0]), Partial(good[:2], good[:2, 0])), "b"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|got)"):
        call()
