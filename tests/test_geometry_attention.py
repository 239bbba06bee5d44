"""Geometry against its definitions; the attention map against plain softmax, and its hardmax limit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcx_lib.theory import geometry, laws
from tokcx_lib.theory.attention import attention_map, hardmax_map

SEEDS = st.integers(0, 2**32 - 1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(dim=st.integers(1, 6), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_horizons_couplings_and_loads(dim, seed):
    root, A, x, shift = draw(dim, dim, seed=seed), draw(dim, dim, seed=seed + 1), draw(9, dim, seed=seed + 2), draw(dim)
    cov = root @ root.mT
    H, H1 = geometry.horizon(A, cov), geometry.horizon(A, cov, sided="one")
    # H is the largest load of a query of unit Mahalanobis length, H_1 that of one of unit Euclidean length.
    assert H == pytest.approx(torch.linalg.svdvals(root.mT @ A @ root)[0].item(), rel=1e-6, abs=1e-9)
    assert H1**2 == pytest.approx(torch.linalg.eigvalsh(A.mT @ cov @ A)[-1].item(), rel=1e-6, abs=1e-9)
    assert geometry.coupling(A, cov) == pytest.approx(H**2)
    assert geometry.coupling(A, cov, "one") == pytest.approx(geometry.reach(cov) * H1**2)
    assert geometry.coupling(A, cov) <= geometry.coupling(A, cov, "one") * (1 + 1e-9)
    direct = (((x @ A.mT + shift) @ cov) * (x @ A.mT + shift)).sum(-1).sqrt()
    assert torch.allclose(geometry.load(x, A, cov, shift), direct, rtol=1e-6, atol=1e-9)


def test_load_is_the_spread_of_the_logits():
    cov = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    A, x, shift = draw(2, 2, seed=3), draw(2, seed=4), draw(2, seed=5)
    keys = laws.Gaussian(cov).sample(200_000, 6)
    assert geometry.load(x, A, cov, shift).item() == pytest.approx((keys @ (A @ x + shift)).std().item(), rel=0.01)


@given(n=st.integers(1, 40), dim=st.integers(1, 5), value=st.integers(1, 4), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_attention_over_tokens_is_softmax(n, dim, value, seed):
    tokens, x, A, V = draw(n, dim, seed=seed), draw(6, dim, seed=seed + 1), draw(dim, dim), draw(value, dim)
    plain = torch.softmax((x @ A.mT) @ tokens.mT, -1) @ tokens @ V.mT
    assert torch.allclose(attention_map(tokens, x, A, V), plain, atol=1e-12)
    assert torch.allclose(attention_map(laws.Empirical(tokens), x, A, V), plain, atol=1e-12)


def test_gaussian_attention_is_linear():
    cov = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    A, V, x = draw(2, 2), draw(3, 2), draw(5, 2)
    assert torch.allclose(attention_map(laws.Gaussian(cov), x, A, V), x @ A.mT @ cov @ V.mT, atol=1e-12)
    assert attention_map(laws.Uniform(1), 3.0, [[2.0]]).shape == (1,)


@given(n=st.integers(1, 30), dim=st.integers(1, 4), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_softmax_tends_to_hardmax(n, dim, seed):
    tokens, x, A = draw(n, dim, seed=seed), draw(4, dim, seed=seed + 1), draw(dim, dim, seed=seed + 2)
    logits = (x @ A.mT) @ tokens.mT
    top = logits.topk(min(2, n)).values
    clear = torch.full((4,), True) if n == 1 else top[:, 0] - top[:, 1] > 1e-3
    hard, soft = hardmax_map(tokens, x, A), attention_map(tokens, x, 1e5 * A)
    assert torch.allclose(hard[clear], soft[clear], atol=1e-9)


def test_hardmax_shares_ties():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 2.0], [-1.0, 5.0]], dtype=torch.float64)
    assert hardmax_map(tokens, [3.0, 0.0], None).tolist() == [1.0, 1.0]
    assert torch.allclose(hardmax_map(tokens, [0.0, 0.0], None), tokens.mean(0))


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: geometry.horizon(torch.eye(3), torch.eye(2)), "A"),
        (lambda: geometry.horizon(torch.eye(2), torch.eye(2), sided="both"), "sided"),
        (lambda: geometry.horizon(torch.eye(2), -torch.eye(2)), "cov"),
        (lambda: geometry.reach([[1.0, 1.0], [0.0, 1.0]]), "cov"),
        (lambda: geometry.load([1.0], torch.eye(2), torch.eye(2)), "x"),
        (lambda: geometry.load([1.0, 2.0], torch.eye(2), torch.eye(2), shift=[1.0]), "shift"),
        (lambda: attention_map(torch.zeros(4, 2), [1.0, 2.0], torch.eye(3)), "A"),
        (lambda: attention_map(torch.zeros(4, 2), [1.0, 2.0], torch.eye(2), V=torch.eye(3)), "V"),
        (lambda: attention_map(torch.full((4, 2), float("nan")), [1.0, 2.0], torch.eye(2)), "tokens"),
        (lambda: hardmax_map(torch.zeros(0, 2), [1.0, 2.0], torch.eye(2)), "tokens"),
        (lambda: hardmax_map(torch.zeros(3, 2), [1.0], torch.eye(2)), "x"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=rf"^{names}: .*(expected|got)"):
        call()
