"""Every scheme against a brute-force version, one query at a time, with explicit weights; and its random draws."""

import math

import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.studies.sparse import schemes
from tokcx_lib.theory import laws

D, DV, N, M = 4, 3, 40, 6


@pytest.fixture(scope="module")
def small():
    stream = runtime.stream(11)
    k, v = (torch.randn(N, size, generator=stream, dtype=torch.float64) for size in (D, DV))
    q = torch.randn(2, M, D, generator=stream, dtype=torch.float64)  # two heads
    return q, k + 0.5, v + 2.0, torch.tensor([0, 1, 17, 20, 38, 39])


def brute(q, k, v, keys, weight=lambda j: 1.0):
    """Output and log of the sum of weights of one query over some keys."""
    w = [weight(j) * math.exp(float(q @ k[j])) for j in keys]
    return sum(a * v[j] for a, j in zip(w, keys)) / sum(w), math.log(sum(w))


def same(state, expected, tolerance=1e-10):
    for h in range(2):
        for i in range(M):
            output, lse = expected(h, i)
            torch.testing.assert_close(state.output[h, i], output, rtol=tolerance, atol=tolerance)
            assert state.lse[h, i].item() == pytest.approx(lse, abs=1e-9)


def sets_read(scheme, small, budget, seed, **options):
    """Which keys each query reads, found from the outside: values are one-hot, and logits zero."""
    q, k, _, positions = small
    state = scheme(0 * q[:1], k, torch.eye(N, dtype=torch.float64), positions, budget, runtime.stream(seed), **options)
    return [set(row.nonzero()[:, 0].tolist()) for row in state.output[0]]


@pytest.mark.parametrize("budget", [1, 2, 7, N])  # gathered and masked
def test_window(small, budget):
    q, k, v, positions = small
    starts = [min(max(p - budget // 2, 0), N - budget) for p in positions.tolist()]
    state = schemes.window(*small, budget)
    same(state, lambda h, i: brute(q[h, i], k, v, range(starts[i], starts[i] + budget)))
    assert all(s <= p < s + budget for s, p in zip(starts, positions.tolist()))


@pytest.mark.parametrize("budget", [1, 3, 7, N])
def test_strided(small, budget):
    q, k, v, positions = small
    keys = [sorted({(p + math.floor(i * N / budget)) % N for i in range(budget)}) for p in positions.tolist()]
    assert all(len(row) == budget and p in row for row, p in zip(keys, positions.tolist()))
    gaps = [b - a for row in keys for a, b in zip(row, [*row[1:], row[0] + N])]
    assert max(gaps) - min(gaps) <= 1
    same(schemes.strided(*small, budget), lambda h, i: brute(q[h, i], k, v, keys[i]))


@pytest.mark.parametrize("budget", [1, 2, 11, N])
def test_top_k(small, budget):
    q, k, v, _ = small

    def expected(h, i):
        order = sorted(range(N), key=lambda j: -float(q[h, i] @ k[j]))
        return brute(q[h, i], k, v, order[:budget])

    same(schemes.top_k(*small, budget), expected)


@pytest.mark.parametrize("budget", [2, 10, N])
def test_random_keys(small, budget):
    q, k, v, positions = small
    keys = sets_read(schemes.random_keys, small, budget, 3)
    assert all(len(row) == budget for row in keys)
    same(schemes.random_keys(*small, budget, runtime.stream(3)), lambda h, i: brute(q[h, i], k, v, keys[i]))
    shared = sets_read(schemes.shared_keys, small, budget, 4)
    assert all(row == shared[0] and len(row) == budget for row in shared)
    same(schemes.shared_keys(*small, budget, runtime.stream(4)), lambda h, i: brute(q[h, i], k, v, shared[0]))


@pytest.mark.parametrize("budget, extra", [(2, None), (8, 3), (13, None), (N, 5)])
def test_window_and_random(small, budget, extra):
    q, k, v, positions = small
    keys = sets_read(schemes.window_random, small, budget, 5, extra=extra)
    count = budget // 2 if extra is None else extra
    near = [set(row.tolist()) for row in schemes.window_keys(positions, N, budget - count)]
    assert all(len(row) == budget and row > inside for row, inside in zip(keys, near))
    state = schemes.window_random(*small, budget, runtime.stream(5), extra=extra)
    same(state, lambda h, i: brute(q[h, i], k, v, sorted(keys[i])))
    stands_for = (N - budget + count) / count
    state = schemes.window_weighted(*small, budget, runtime.stream(5), extra=extra)
    same(state, lambda h, i: brute(q[h, i], k, v, sorted(keys[i]), lambda j: 1 if j in near[i] else stands_for))


def test_low_rank(small):
    q, k, v, positions = small
    mix = torch.randn(5, N, generator=runtime.stream(6)).double() / math.sqrt(N)
    keys, values = mix @ (k - k.mean(0)), mix @ (v - v.mean(0))
    state = schemes.low_rank(*small, 5, runtime.stream(6))

    def expected(h, i):
        output, lse = brute(q[h, i], keys, values, range(5))
        return output + v.mean(0), lse + math.log(N / 5) + float(q[h, i] @ k.mean(0))

    same(state, expected)


def test_features(small):
    q, k, v, positions = small
    w = torch.randn(D, 9, generator=runtime.stream(7)).double()
    y = k - k.mean(0)
    state = schemes.features(*small, 9, runtime.stream(7))

    def expected(h, i):
        scale = math.sqrt(math.sqrt(float((y**2).sum(1).mean() / (q[h] ** 2).sum(1).mean())))
        a = q[h, i] * scale

        def estimate(j):
            b = y[j] / scale
            return sum(math.exp(float(w[:, f] @ (a + b) - (a @ a + b @ b) / 2)) for f in range(9)) / 9

        weights = [estimate(j) for j in range(N)]
        output = sum(x * v[j] for j, x in enumerate(weights)) / sum(weights)
        return output, math.log(sum(weights)) + float(q[h, i] @ k.mean(0))

    same(state, expected)


def test_features_estimate_the_sum_of_weights_without_bias(small):
    q, k, v, positions = small
    whole = schemes.full(q / 4, k, v)
    ratios = torch.stack(
        [
            torch.exp(schemes.features(q / 4, k, v, positions, 400, runtime.stream(8, r)).lse - whole.lse)
            for r in range(60)
        ]
    )
    assert ((ratios.mean(0) - 1).abs() < 4.5 * ratios.std(0) / 60**0.5 + 1e-3).all()
    assert ratios.std(0).median() < 0.3


@pytest.mark.parametrize("name", [name for name in schemes.SCHEMES if name not in ("low rank", "features")])
def test_all_keys_make_full_attention(small, name):
    state, whole = schemes.SCHEMES[name](*small, N, runtime.stream(9)), schemes.full(*small[:3])
    torch.testing.assert_close(state.output, whole.output)
    torch.testing.assert_close(state.lse, whole.lse)


@pytest.mark.parametrize("name", schemes.KEEPING)
def test_the_error_is_the_missing_mass_times_a_distance(small, name):
    q, k, v, positions = small
    keys = sets_read(schemes.SCHEMES[name], (0 * q, k, v, positions), 9, 10) if name != "top-k" else None
    state, whole = schemes.SCHEMES[name](*small, 9, runtime.stream(10)), schemes.full(q, k, v)
    mass = schemes.kept_mass(state, whole)
    for h in range(2):
        for i in range(M):
            kept = keys[i] if keys else set((k @ q[h, i]).topk(9).indices.tolist())
            others = brute(q[h, i], k, v, sorted(set(range(N)) - kept))[0]
            gap = (1 - mass[h, i]) * (state.output[h, i] - others)
            torch.testing.assert_close(gap, state.output[h, i] - whole.output[h, i])


def test_every_key_is_drawn_equally_often(small):
    counts = torch.zeros(N)
    for seed in range(300):
        for row in sets_read(schemes.random_keys, small, 8, 100 + seed)[:2]:
            counts[list(row)] += 1
    share, n = counts / 600, 600
    assert ((share - 0.2).abs() < 4.5 * (0.2 * 0.8 / n) ** 0.5).all()


def test_weighted_keys_make_the_sum_of_weights_right(small):
    whole = schemes.full(*small[:3])
    ratios = torch.stack(
        [schemes.kept_mass(schemes.window_weighted(*small, 12, runtime.stream(12, r)), whole) for r in range(400)]
    )
    assert ((ratios.mean(0) - 1).abs() < 4.5 * ratios.std(0) / 400**0.5).all()
    plain = torch.stack(
        [schemes.kept_mass(schemes.window_random(*small, 12, runtime.stream(12, r)), whole) for r in range(100)]
    )
    assert (plain <= 1 + 1e-9).all() and plain.mean() < 0.8


def test_projected_keys_are_gaussian_tokens_of_the_same_covariance(small):
    """The rows that a query of `low rank` reads, found by a query that looks at nothing."""
    q, k, v, positions = small
    rows = torch.cat(
        [schemes.low_rank(0 * q[:1, :1], k, k, positions[:1], 1, runtime.stream(13, r)).output[0] for r in range(1500)]
    )
    cov = (k - k.mean(0)).mT @ (k - k.mean(0)) / N
    found = (rows - k.mean(0)).mT @ (rows - k.mean(0)) / len(rows)
    spread = torch.sqrt((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / len(rows))
    assert ((found - cov).abs() < 4.5 * spread).all()
    fourth = ((rows - k.mean(0)) ** 4).mean(0) / found.diagonal() ** 2
    assert ((fourth - 3).abs() < 4.5 * (96 / len(rows)) ** 0.5).all()


def test_gathered_and_masked_agree(small, monkeypatch):
    q, k, v, positions = small
    keys = torch.stack([torch.randperm(N, generator=runtime.stream(14, i))[:5] for i in range(M)])
    added = torch.randn(M, 5, generator=runtime.stream(15), dtype=torch.float64)
    states = []
    for dense in (1e-9, 1e9):
        monkeypatch.setattr(schemes, "DENSE", dense)
        states += [schemes.attend(q, k, v, keys, added), schemes.attend(q[0], k, v, keys, added)]
    monkeypatch.setattr(schemes, "LOGITS", 1)  # one query at a time
    states.append(schemes.attend(q, k, v, keys, added))
    torch.testing.assert_close(states[0], states[2])
    torch.testing.assert_close(states[0], states[4])
    torch.testing.assert_close(states[1].output, states[0].output[0])
    torch.testing.assert_close(states[1].output, states[3].output)


def test_large_logits_do_not_overflow(small):
    q, k, v, positions = small
    for name, scheme in schemes.SCHEMES.items():
        state = scheme(100 * q, k, v, positions, 8, runtime.stream(16))
        assert torch.isfinite(state.output).all() and torch.isfinite(state.lse).all(), name


def test_what_bad_input_gets(small):
    q, k, v, positions = small
    for scheme in schemes.SCHEMES.values():
        with pytest.raises(ValueError, match="budget"):
            scheme(*small, 0, runtime.stream(1))
    with pytest.raises(ValueError, match="budget: expected at most the number of keys, 40, got 41"):
        schemes.window(*small, 41)
    with pytest.raises(ValueError, match="extra: expected 1 to 3"):
        schemes.window_random(*small, 4, runtime.stream(1), extra=4)
    with pytest.raises(ValueError, match="keys: expected shape"):
        schemes.attend(q, k, v, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="keys: expected integers from 0 to 39"):
        schemes.attend(q, k, v, torch.full((M, 1), N))
    with pytest.raises(ValueError, match="q, k, v"):
        schemes.attend(q, k[:-1], v, torch.zeros(M, 1, dtype=torch.int64))


def test_errors_are_in_units_of_the_spread_of_values(small):
    q, k, v, _ = small
    spread = schemes.value_spread(v)
    assert spread**2 == pytest.approx(float(((v - v.mean(0)) ** 2).sum() / N))
    whole = schemes.full(q, k, v)
    off = whole._replace(output=whole.output + torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    assert schemes.output_error(off, whole, spread).tolist() == pytest.approx([2 / spread] * 2)


# ------------------------------------------------------------ serial tokens


def test_serial_tokens_have_the_covariances_of_an_autoregression():
    cov = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    law = laws.SerialGaussian(cov, 0.8)
    y = torch.stack([law.sample(12, runtime.stream(20, r)) for r in range(4000)])
    root = torch.sqrt((cov.diagonal()[:, None] * cov.diagonal() + cov**2) / len(y))
    for i, j in ((0, 0), (11, 11), (0, 1), (3, 9), (0, 11)):
        found = y[:, i].mT @ y[:, j] / len(y)
        assert ((found - 0.8 ** abs(i - j) * cov).abs() < 4.5 * root).all(), (i, j)
    t = torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert torch.equal(law.tilted_mean(t), laws.Gaussian(cov).tilted_mean(t))
    assert torch.equal(law.sample(9, 5), law.sample(9, 5)) and law.sample(1, 5).shape == (1, 2)


def test_a_serial_sequence_is_its_recursion():
    law = laws.SerialGaussian(1.0, -0.5)
    z = laws.Gaussian(1.0).sample(50, 21)
    y = [z[0].item()]
    for step in z[1:, 0].tolist():
        y.append(-0.5 * y[-1] + math.sqrt(0.75) * step)
    assert law.sample(50, 21)[:, 0].tolist() == pytest.approx(y)
    with pytest.raises(ValueError, match="correlation: expected a number strictly between -1 and 1, got 1"):
        laws.SerialGaussian(1.0, 1)
