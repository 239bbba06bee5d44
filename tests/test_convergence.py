"""Convergence of real heads: limits, draws, leave-one-out references and Gaussian twins, against the definitions."""

import numpy as np
import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.models.heads import Head
from tokcx_lib.models.tokens import token_moments
from tokcx_lib.studies.real_heads import convergence
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.theory.limits import Moments


def random_head(dim=6, d_k=3, d_v=4, seed=0, scale=1.0, layer=0, number=0):
    stream = runtime.stream(seed)
    W_Q, W_K, W_V = (torch.randn(rows, dim, generator=stream) for rows in (d_k, d_k, d_v))
    b_Q = torch.randn(d_k, generator=stream)
    return Head(layer, number, W_Q, W_K, W_V, b_Q, scale * d_k**-0.5)


def tokens(n, dim=6, seed=1):
    mix = torch.randn(dim, dim, generator=runtime.stream(seed, 1)) / 2
    return torch.randn(n, dim, generator=runtime.stream(seed)) @ mix + 1.0


def plain_outputs(head, queries, keys):
    """Outputs (m, d_v) from A, V and the shift, in float64: the whole matrix of weights."""
    x, y = queries.double(), keys.double()
    return torch.softmax((x @ head.A.mT + head.shift) @ y.mT, -1) @ (y @ head.V.mT)


def plain_moments(head, x, alpha=1.0):
    y = x.double()
    out = torch.softmax(alpha * (y @ head.A.mT + head.shift) @ y.mT, -1) @ (y @ head.V.mT)
    return out.mean(0), torch.cov(out.mT, correction=0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_the_limit_is_self_attention_over_the_pool_and_over_its_half(alpha):
    head, pool = random_head(), tokens(400)
    for found, part in zip(convergence.pool_moments(head, pool, alpha), (pool[:200], pool)):
        mean, cov = plain_moments(head, part, alpha)
        assert torch.allclose(found.mean, mean, atol=1e-5) and torch.allclose(found.cov, cov, atol=1e-5)


def test_errors_are_those_of_the_tokens_drawn():
    head, pool, lengths = random_head(), tokens(60), [10, 40]
    mean, cov = plain_moments(head, pool)
    table = convergence.moment_errors(head, pool, Moments(mean, cov), lengths, 3, seed=5)
    assert table[["replicate", "n"]].to_numpy().tolist() == [[r, n] for r in range(3) for n in lengths]
    for row in table.itertuples():
        drawn = torch.randint(60, (40,), generator=runtime.stream(5, 0, 0, row.replicate))[: row.n]
        m, c = plain_moments(head, pool[drawn])
        assert row.mean_error == pytest.approx((m - mean).norm().item(), rel=1e-4)
        assert row.cov_error == pytest.approx((c - cov).norm().item(), rel=1e-4)


def test_few_replicates_are_the_first_of_many():
    head, pool = random_head(number=3), tokens(60)
    limit = convergence.pool_moments(head, pool)[1]
    few, many = (convergence.moment_errors(head, pool, limit, [10, 20], count, seed=2) for count in (2, 5))
    assert few.equals(many[: len(few)])
    other = convergence.moment_errors(random_head(number=4), pool, limit, [10, 20], 2, seed=2)
    assert not np.allclose(few.mean_error, other.mean_error)  # a stream of its own for each head


def test_windows_are_drawn_whole():
    # Tokens of a window are equal: n tokens in windows of 5 say no more than n / 5.
    head = random_head(scale=0.01)
    distinct = tokens(200, seed=3)
    pool = distinct.repeat_interleave(5, 0)
    limit = convergence.pool_moments(head, pool)[1]
    single = convergence.moment_errors(head, pool, limit, [50], 200, seed=1).mean_error
    whole = convergence.moment_errors(head, pool, limit, [50], 200, seed=1, window=5).mean_error
    assert (whole**2).mean() / (single**2).mean() == pytest.approx(5, rel=0.3)
    with pytest.raises(ValueError, match="window: expected pool and lengths in multiples of 5"):
        convergence.moment_errors(head, pool, limit, [52], 2, seed=1, window=5)


def test_errors_of_the_map_are_those_of_the_tokens_drawn():
    head, pool = random_head(), tokens(80)
    queries = pool[:7]
    table = convergence.drawn_map_errors(head, queries, pool, [10, 30], 2, seed=9)
    limit = plain_outputs(head, queries, pool)
    for row in table.itertuples():
        drawn = torch.randint(80, (30,), generator=runtime.stream(9, 0, 0, row.replicate))[: row.n]
        error = (plain_outputs(head, queries, pool[drawn]) - limit).square().sum(-1).mean().sqrt()
        assert row.map_error == pytest.approx(error.item(), rel=1e-4)


def test_segments_are_compared_to_all_the_others():
    heads = [random_head(seed=s, number=s) for s in (0, 1)]
    queries, stream = tokens(9, seed=4), tokens(160, seed=5)
    pieces = stream.split(40)
    # Blocks of uneven size, and a stream that goes on beyond the last length.
    segments = [convergence.segment_states(heads, queries, iter(piece.split(17)), [8, 30]) for piece in pieces]
    errors, floor = convergence.map_errors(segments)
    assert errors.shape == (4, 2, 2) and floor.shape == (2,)
    for h, head in enumerate(heads):
        read = [piece[:30] for piece in pieces]
        for i in range(4):
            reference = plain_outputs(head, queries, torch.cat(read[:i] + read[i + 1 :]))
            for j, n in enumerate((8, 30)):
                expected = (plain_outputs(head, queries, read[i][:n]) - reference).square().sum(-1).mean()
                assert errors[i, j, h].item() == pytest.approx(expected.item(), rel=1e-4)
        halves = [plain_outputs(head, queries, torch.cat(half)) for half in (read[:2], read[2:])]
        assert floor[h].item() == pytest.approx((halves[0] - halves[1]).square().sum(-1).mean().item() / 4, rel=1e-4)
    with pytest.raises(ValueError, match="segments: expected two or more, got 1"):
        convergence.map_errors(segments[:1])


def small_law(dim=6):
    mean, cov = token_moments(tokens(500, dim))
    return Gaussian(cov, mean)


def test_the_limit_of_a_twin_is_approached_by_its_simulation():
    head, law = random_head(scale=0.03), small_law()  # a horizon well below 1
    limit = convergence.twin_limit(head, law)
    x = law.sample(200_000, 1)
    out = (law.mean + (x @ head.A.mT + head.shift) @ law.cov) @ head.V.mT  # the map of Gaussian keys, query by query
    assert torch.allclose(limit.mean, out.mean(0), atol=0.02)
    assert torch.allclose(limit.cov, torch.cov(out.mT), atol=0.02 * limit.cov.abs().max().item() + 0.01)
    errors = (
        convergence.twin_errors(head, law, [30, 300, 3000], 20, seed=3).groupby("n")[["mean_error", "cov_error"]].mean()
    )
    assert (errors.iloc[0] > 5 * errors.iloc[2]).all()  # a factor of 10 at n^-1/2


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_the_exact_law_is_met_by_simulation_of_gaussian_keys(scale):
    head, law = random_head(scale=scale, seed=2), small_law()
    queries = law.sample(40, 7)
    predicted = convergence.twin_map_error(head, queries, law, [5, 50, 500])
    limit = (law.mean + (queries @ head.A.mT + head.shift) @ law.cov) @ head.V.mT
    square = np.zeros((200, 3))
    for r in range(200):
        keys = law.sample(500, runtime.stream(8, r))
        for j, n in enumerate((5, 50, 500)):
            out = plain_outputs(head, queries, keys[:n])
            square[r, j] = (out - limit).square().sum(-1).mean()
    stderr = square.std(0) / 200**0.5
    assert (abs(square.mean(0) - predicted) < 4 * stderr + 1e-3 * predicted).all()
