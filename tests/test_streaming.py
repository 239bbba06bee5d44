"""Streaming attention against full softmax in float64, over random shapes, lengths, splits and sizes of logits."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcx_lib.sampling import streaming
from tokcx_lib.sampling.streaming import Partial, merge, partial_attention, prefix_attention
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.validation import as_tensor

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])


def reference_attention(q, k, v) -> Partial:
    """Full softmax attention in float64 with the whole matrix of logits."""
    q, k, v = (x.double() for x in (q, k, v))
    logits = q @ k.mT
    return Partial(torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1))


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


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "every other row": lambda x: torch.stack([x, -x], -2).flatten(-3, -2)[..., ::2, :],
    "inside a larger one": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4), value=9.0)[..., 3:-4, 1:-2],
    "one column expanded": lambda x: x[..., :1].expand(x.shape),
    "one row expanded": lambda x: x[..., :1, :].expand(x.shape),
    "rows that overlap": lambda x: x.flatten()[: x.shape[-2] + x.shape[-1] - 1].unfold(0, x.shape[-1], 1),
    "backwards, from numpy": lambda x: np.ascontiguousarray(x.numpy()[::-1, ::-1])[::-1, ::-1],
}


@given(problem=problems(), which=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=3, max_size=3))
@settings(max_examples=150, deadline=None)
def test_any_layout_in_memory_gives_the_same_numbers(problem, which):
    *tensors, lengths = problem
    laid = [x if name is None else LAYOUTS[name](x) for x, name in zip(tensors, which)]
    plain = [as_tensor("x", x).clone(memory_format=torch.contiguous_format) for x in laid]
    exact = reference_attention(*plain)
    found = partial_attention(*laid)
    logits = 1 + (plain[0].double() @ plain[1].double().mT).abs().max().item()
    # Sums of equal numbers (rows expanded) are rounded in one direction: their errors do not cancel.
    eps = torch.finfo(plain[0].dtype).eps
    rounding, largest = len(plain[1]) * eps, plain[2].abs().max().item()
    assert (found.output.double() - exact.output).abs().max().item() <= tolerance(*plain) + rounding * largest
    assert (found.lse.double() - exact.lse).abs().max().item() <= 32 * eps * logits + rounding
    exact = reference_attention(plain[0], plain[1][: lengths[0]], plain[2][: lengths[0]]).output
    first = prefix_attention(*laid, lengths)[0].double()
    assert (first - exact).abs().max().item() <= tolerance(*plain) + rounding * largest


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e19), (torch.bfloat16, 1e30), (torch.float64, 1e160)])
def test_logits_that_overflow_are_refused(dtype, size, sign):
    q, k, v = (
        torch.full((2, 4), size, dtype=dtype),
        torch.full((3, 4), sign * size, dtype=dtype),
        torch.ones(3, 4, dtype=dtype),
    )
    with pytest.raises(ValueError, match="q, k: expected logits"):
        partial_attention(q, k, v)


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
    code = """
import torch
from tokcx_lib.bench.suite import peak_memory
from tokcx_lib.sampling.streaming import prefix_attention
q, k = torch.randn(2048, 16), torch.randn(262_144, 16)
prefix_attention(q, k[:1024], k[:1024], [1024])
before = peak_memory()
prefix_attention(q, k, k, [1000, 100_000, 262_144])
print(peak_memory() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < grown < 100e6  # the outputs alone are some megabytes


def test_effective_tokens_against_the_weights():
    rng = np.random.default_rng(0)
    q, k = torch.tensor(rng.normal(size=(20, 3))), torch.tensor(rng.normal(size=(400, 3)))
    for counted, n in zip(streaming.effective_tokens(q, k, [1, 50, 400]), [1, 50, 400]):
        weights = torch.softmax(q @ k[:n].mT, -1)
        assert torch.allclose(counted, 1 / (weights**2).sum(-1), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 37, 70])
@pytest.mark.parametrize("causal, grouped", [(True, False), (False, True), (True, True)])
def test_causal_and_grouped_queries_against_the_weights(causal, grouped, m, dtype, monkeypatch):
    """The queries of the last m of 70 tokens; some blocks end with a length, others at their size."""
    monkeypatch.setattr(streaming, "CAUSAL_BLOCK", 16)
    monkeypatch.setattr(streaming, "LOGITS", 500)  # some rows of a block at a time
    rng, lengths = torch.Generator().manual_seed(2), [1, 16, 40, 41, 70]
    q, k, v = (torch.randn(2, h, n, 5, generator=rng).to(dtype) for h, n in ((6, m), (3, 70), (3, 70)))
    shared = [x.double().repeat_interleave(2, -3) for x in (k, v)]
    if not grouped:
        k, v = (x.repeat_interleave(2, -3) for x in (k, v))
    outputs = prefix_attention(q, k, v, lengths, causal, grouped)
    effective = streaming.effective_tokens(q, k, lengths, causal, grouped)
    precise = 1e-12 if dtype == torch.float64 else 0.02
    assert outputs.dtype == torch.float64 if dtype == torch.float64 else outputs.dtype == torch.float32
    for output, found, n in zip(outputs, effective, lengths):
        logits = q.double() @ shared[0][..., :n, :].mT
        if causal:
            unseen = torch.arange(n) > torch.arange(70 - m, 70)[:, None]
            logits = logits.masked_fill(unseen, -torch.inf)
        weights = torch.softmax(logits, -1)
        assert (output - weights @ shared[1][..., :n, :]).abs().max() < precise
        assert (found * (weights**2).sum(-1) - 1).abs().max() < precise


def test_queries_that_are_no_tokens_or_form_no_groups_are_refused():
    q, k = torch.ones(6, 5, 2), torch.ones(4, 5, 2)
    with pytest.raises(ValueError, match=r"^q: expected at most 4 tokens, the last of those in k"):
        streaming.effective_tokens(torch.ones(5, 2), torch.ones(4, 2), [4], causal=True)
    for keys in (k, torch.ones(5, 2)):
        with pytest.raises(ValueError, match=r"^k: expected shape \(..., groups, n, d\).*got .* and \(6, 5, 2\)"):
            prefix_attention(q, keys, keys, [4], grouped=True)


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


@given(problem=problems(), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_stream_cut_anywhere_is_the_whole(problem, seed):
    q, k, v, lengths = problem
    rng = np.random.default_rng(seed)
    cuts = sorted(rng.integers(0, len(k) + 1, size=rng.integers(0, 5)))  # empty blocks too
    pairs = zip(torch.tensor_split(k, cuts), torch.tensor_split(v, cuts))
    outputs = streaming.stream_attention(q, ((a, b) for a, b in pairs if len(a)), lengths)
    assert outputs.shape == (len(lengths), len(q), v.shape[1])
    for output, n in zip(outputs, lengths):
        assert (output - reference_attention(q, k[:n], v[:n]).output).abs().max().item() <= tolerance(q, k, v)


def test_a_stream_is_read_no_further_than_needed():
    read = []

    def blocks():
        for i in range(10):
            read.append(i)
            yield torch.ones(8, 2), torch.ones(8, 2)

    assert len(list(streaming.stream_states(torch.ones(1, 2), blocks(), [3, 20]))) == 2
    assert read == [0, 1, 2]


@pytest.mark.parametrize("batch, keys", [((3,), ()), ((2, 3), ()), ((2, 3), (3,)), ((2, 3, 4), (3, 4))])
def test_queries_share_keys(batch, keys):
    rng = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((*batch, 7, 4), (*keys, 9, 4), (*keys, 9, 3))
    )
    lengths = [2, 9]
    expanded = k.expand(*batch, 9, 4), v.expand(*batch, 9, 3)
    shared = list(streaming.prefix_states(q, k, v, lengths))
    for state, n in zip(shared, lengths):
        exact = reference_attention(q, expanded[0][..., :n, :], expanded[1][..., :n, :])
        assert torch.allclose(state.output, exact.output, atol=1e-13)
        assert torch.allclose(state.lse, exact.lse, atol=1e-13)
    q = torch.cat([q, q[..., :2, :]], -2)
    one, each = (streaming.prefix_moments(q, *kv, lengths) for kv in ((k, v), expanded))
    assert one.mean.shape == (2, *batch, 3) and one.cov.shape == (2, *batch, 3, 3)
    assert torch.allclose(one.mean, each.mean, atol=1e-13) and torch.allclose(one.cov, each.cov, atol=1e-13)


def test_a_stack_of_forms_over_replicates_is_each_of_them():
    rng = torch.Generator().manual_seed(3)
    x, A, shift, V = (
        torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((2, 30, 4), (3, 4, 4), (3, 4), (2, 4))
    )
    moments = streaming.self_attention_moments(x, A, V, [5, 30], shift=shift)
    assert moments.mean.shape == (2, 3, 2, 2)
    for i in range(3):
        for r in range(2):
            alone = streaming.self_attention_moments(x[r], A[i], V, [5, 30], shift=shift[i])
            assert torch.allclose(moments.mean[:, i, r], alone.mean, atol=1e-13)
            assert torch.allclose(moments.cov[:, i, r], alone.cov, atol=1e-13)
    outputs = torch.softmax(x[0] @ A[0].mT @ x[0].mT, -1) @ x[0]
    moments = streaming.self_attention_moments(x[0], A[0], None, [30])
    assert torch.allclose(moments.second_moment[0], outputs.mT @ outputs / 30, atol=1e-13)


@pytest.mark.parametrize("dtype, relative", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_half_precision_rounds_blocks_and_merges_in_float32(dtype, relative):
    rng = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(n, 16, generator=rng).to(dtype) for n in (100, 3000, 3000))
    states = list(streaming.prefix_states(q / 4, k, v, [1000, 3000]))
    for state, n in zip(states, [1000, 3000]):
        assert state.output.dtype == state.lse.dtype == torch.float32
        exact = reference_attention(q / 4, k[:n], v[:n]).output
        error = (state.output - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert error.max().item() < relative
        assert error.median().item() > torch.finfo(dtype).eps / 20  # the rounding is there: this is no float32


def test_without_a_fused_kernel_memory_is_bounded_and_nothing_else_changes(monkeypatch):
    q, k, v = torch.randn(2, 50, 4), torch.randn(2, 30, 4), torch.randn(2, 30, 3)
    monkeypatch.setattr(streaming, "LOGITS", 7 * 2 * 30)
    sizes = []
    plain = streaming._plain
    monkeypatch.setattr(streaming, "_plain", lambda *parts: sizes.append(parts[0].shape[-2]) or plain(*parts))
    state = streaming._unfused(q, k, v)
    assert sizes == [7] * 7 + [1]
    exact = reference_attention(q, k, v)
    assert torch.allclose(state.output.double(), exact.output, atol=1e-5)
    assert torch.allclose(state.lse.double(), exact.lse, atol=1e-5)


def test_drawn_tokens_do_not_depend_on_who_reads_them(monkeypatch):
    monkeypatch.setattr(streaming, "DRAW_BLOCK", 10)
    law = Gaussian(torch.diag(torch.tensor([1.0, 4.0])), [1.0, 0.0])

    def read(start, stop, seed=7):
        return torch.cat([k for k, _ in streaming.drawn_blocks(law, seed, start, stop)])

    whole = read(0, 35)
    assert whole.shape == (35, 2) and whole.dtype == torch.float32 and len(whole.unique()) == 70
    for start, stop in ((0, 1), (3, 30), (10, 20), (9, 11), (34, 35)):
        assert torch.equal(read(start, stop), whole[start:stop])
    assert list(streaming.drawn_blocks(law, 7, 5, 5)) == []
    assert not torch.isclose(read(0, 35, seed=8), whole).any()
    many = read(0, 20_000)
    assert torch.allclose(many.mean(0), law.mean.float(), atol=0.06)
    assert torch.allclose(torch.cov(many.mT), law.cov.float(), atol=0.15)


@pytest.mark.slow
def test_ten_million_streamed_keys_take_the_memory_of_a_block():
    """Keys and values alone would be 640 MB in float32."""
    code = """
import torch
from tokcx_lib.bench.suite import peak_memory
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.sampling.streaming import drawn_blocks, stream_attention
law, q = Gaussian(torch.eye(16)), torch.eye(8, 16) / 2
stream_attention(q, drawn_blocks(law, 0, 0, 10**5), [10**5])
before = peak_memory()
output = stream_attention(q, drawn_blocks(law, 0, 0, 10**7), [10**5, 10**7])[-1]
assert torch.allclose(output, q, atol=0.01), (output - q).abs().max()  # the limit is the query itself
print(peak_memory() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 50e6


def test_large_finite_entries_are_accepted():
    largest = torch.finfo(torch.float32).max
    v = torch.tensor([[largest, largest], [largest, -largest]])  # a sum of entries is infinite
    assert torch.equal(as_tensor("v", v), v)
    v[1, 1] = float("inf")
    with pytest.raises(ValueError, match="v: expected finite"):
        as_tensor("v", v)


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
        (lambda: partial_attention(torch.zeros(2, 4, 2), torch.zeros(3, 4, 2), torch.zeros(3, 4, 2)), "k"),
        (lambda: partial_attention(torch.zeros(2, 4, 2), good, torch.zeros(2, 4, 2)), "v"),
        (lambda: streaming.stream_attention(good, [(good, good)], [5]), "blocks"),
        (lambda: streaming.stream_attention(good, [(good, good), (good, good[:, :1])], [5]), "v"),
        (lambda: streaming.stream_attention(good, [(good[:, :1], good)], [5]), "k"),
        (lambda: streaming.stream_states(good, [(good, good)], [0]), "lengths"),
        (lambda: streaming.drawn_blocks(Gaussian(torch.eye(2)), 0, -1, 5).__next__(), "start"),
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
        (lambda: streaming.self_attention_moments(good, torch.eye(2), None, [1], shift=torch.zeros(3, 2)), "shift"),
        (lambda: merge(Partial(good, good[:, 0]), Partial(good[:2], good[:2, 0])), "b"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|got)"):
        call()
