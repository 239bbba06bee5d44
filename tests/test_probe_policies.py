"""Orders of keys, what they lose and how many keys that takes: known answers, properties, and the law of drawn keys."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.test_probe_context import synthetic
from tokcx_lib import runtime
from tokcx_lib.probe import policies, predictions
from tokcx_lib.probe.policies import POLICIES, jackknife, lengths_up_to, whole
from tokcx_lib.probe.queries import notes
from tokcx_lib.theory import drawn_keys, softmax_law


@pytest.fixture(autouse=True)
def one_thread():
    with runtime.one_thread():
        yield


def normal(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=runtime.stream(91, seed))


def noted(q, k, v, rows, lengths, seed=0, **options):
    """`notes` of the last rows of a made attention that sees everything."""
    size = k.shape[1]
    draws = torch.rand(rows, size, generator=runtime.stream(92, seed))
    return notes(synthetic(q, k, v, **options), torch.arange(size - rows, size), draws, lengths)


def keys_needed(lengths, squares, error) -> float:
    return whole(policies.keys_needed(lengths, squares, error))


def budgets(found, lengths, error) -> dict[str, list[float]]:
    return {policy: [keys_needed(lengths, each, error) for each in found[f"squares_{policy}"]] for policy in POLICIES}


# ------------------------------------------------------------ numbers of keys


def test_lengths_are_powers_of_the_root_of_two_and_all():
    assert [lengths_up_to(n) for n in (1, 2, 3, 5)] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert lengths_up_to(100) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 100]
    for most in (1000, 1024, 4096, 5000):
        found = np.array(lengths_up_to(most))
        assert found[-1] == most and {2**k for k in range(most.bit_length()) if 2**k <= most} <= set(found.tolist())
        assert (found[9:] / found[8:-1] < 1.45).all() and (np.diff(found) > 0).all()


CURVES = st.integers(2, 3000).flatmap(
    lambda total: st.tuples(
        st.just(lengths_up_to(total)),
        st.lists(st.sampled_from([0.0, 1e-9]) | st.floats(1e-6, 10), min_size=24, max_size=24),
    )
)


def squares_of(curve) -> tuple[list[int], np.ndarray]:
    lengths, numbers = curve
    return lengths, np.array([*numbers[: len(lengths) - 1], 0.0])


@given(CURVES, st.floats(1e-3, 2), st.floats(1e-3, 2))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_a_whole_number_of_keys_beyond_the_last_error_that_is_too_large(curve, error, other):
    lengths, squares = squares_of(curve)
    assume((np.abs(squares - error**2) > 1e-9 * error**2).all())  # else rounding decides
    found = keys_needed(lengths, squares, error)
    assert found == int(found) and lengths[0] <= found <= lengths[-1]
    assert all(square <= error**2 for n, square in zip(lengths, squares) if n >= found)
    too_large = [n for n, square in zip(lengths, squares) if square > error**2 * (1 + 1e-9)]
    if too_large:  # and no later than at the next length, where it is small enough
        assert too_large[-1] < found <= lengths[lengths.index(too_large[-1]) + 1]
    elif not (squares > error**2).any():
        assert found == 1
    smaller, larger = sorted([error, other])
    assert keys_needed(lengths, squares, smaller) >= keys_needed(lengths, squares, larger)


@given(st.integers(40, 5000), st.floats(0.3, 3), st.floats(0.01, 50), st.floats(0, 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_power_laws_are_answered_exactly(total, power, factor, share):
    """The smallest n with c (1/n - 1/N)^p <= error^2; in the last gap for the first power only."""
    lengths = lengths_up_to(total)
    left = 1 / np.array(lengths) - 1 / total
    assume(factor * left[-2] ** power > 1e-9)  # smaller ones count as rounding
    last = total if power == 1 else lengths[-2]
    for exponent, most in ((power, last), (1.0, total)):
        answer = 2 + round(share * (most - 2))
        error = math.sqrt(factor * (1 / (answer - 0.5) - 1 / total) ** exponent)
        assert keys_needed(lengths, factor * left**exponent, error) == answer


def test_from_there_on_it_stays():
    lengths = [1, 2, 4, 8, 16]
    assert 4 < keys_needed(lengths, np.array([0.5, 0.001, 0.5, 0.001, 0]), 0.1) <= 8
    assert keys_needed(lengths, np.array([0.5, 0.001, 0.002, 0.001, 0]), 0.1) == 2
    assert keys_needed(lengths, np.array([0.001, 0.5, 0.5, 0.5, 0]), 0.1) > 8
    assert keys_needed(lengths, np.zeros(5), 0.1) == 1
    assert keys_needed([1], np.zeros(1), 0.1) == 1


def test_where_an_error_ends_it_takes_all_keys_before():
    """A query that sees 1000 keys of equal weight: what is left of rounding beyond is no point of a power law."""
    lengths = [256, 512, 1024, 2048, 3000]
    exact = np.maximum(1 / np.array(lengths) - 1 / 1000, 0)
    for rest in (0.0, 1e-15, 1e-12):
        for error in (0.01, 0.02, 0.025):
            needed = 1 / (error**2 + 1 / 1000)
            found = keys_needed(lengths, np.maximum(exact, rest * (exact == 0)), error)
            assert 0.97 * needed <= found <= 1.03 * needed


# ------------------------------------------------------------ intervals over windows


def test_the_jackknife_is_that_of_the_book_on_the_scale_of_logarithms():
    windows = np.array([[1.0, 2.0], [3.0, 1.0], [0.5, 0.1], [2.0, 7.0]])
    measure = lambda some: float(some[:, 0].mean() * some[:, 1].max())  # noqa: E731
    found = jackknife(measure, windows)
    logs = [math.log(measure(windows[[j for j in range(4) if j != i]])) for i in range(4)]
    error = math.sqrt(3 / 4 * sum((each - sum(logs) / 4) ** 2 for each in logs))
    reach = stats.t(3).ppf(0.975) * error
    assert found.value == measure(windows) == pytest.approx(1.625 * 7)
    assert found.low == pytest.approx(found.value * math.exp(-reach), rel=1e-12)
    assert found.high == pytest.approx(found.value * math.exp(reach), rel=1e-12)


def test_one_window_says_nothing_of_others():
    found = jackknife(lambda some: float(some.mean()), np.array([[2.0]]))
    assert found.value == 2 and math.isnan(found.low) and math.isnan(found.high)
    wild = jackknife(lambda some: float(np.prod(some)), np.array([1e-300, 1e300]))
    assert wild.low == 0 or wild.low > 0 and math.isfinite(wild.high) or wild.high == math.inf  # and no exception


@pytest.mark.parametrize("count", [4, 12])
@pytest.mark.parametrize("size", [0.02, 4.0])
def test_nineteen_of_twenty_intervals_hold_the_truth(count, size):
    """The number of keys that lognormal errors take: c (1/n - 1/N), c lognormal over windows, 600 probes of them.

    About 3 keys or 400 are needed: whole numbers of few keys are rounded from smooth ones, and only then.
    """
    rng = np.random.default_rng(8)
    lengths, deviation = lengths_up_to(4096), 0.5
    left = 1 / np.array(lengths) - 1 / 4096
    measure = lambda some: policies.keys_needed(lengths, some.mean(0), 0.1)  # noqa: E731
    truth = whole(measure(left[None] * math.exp(deviation**2 / 2) * size))
    assert 2 < truth < 5 or 300 < truth < 500
    held = 0
    for _ in range(600):
        windows = size * np.exp(deviation * rng.standard_normal((count, 1))) * left
        found = [whole(number) for number in jackknife(measure, windows)]
        held += found[1] <= truth <= found[2]
    # Of 600, 95% is 570 +- 5.3. The mean of few skewed numbers costs some of it; rounding up the ends gives some.
    assert 0.90 <= held / 600 <= (0.98 if size > 1 else 1.0)


# ------------------------------------------------------------ known answers


def test_one_heavy_key_is_all_that_is_needed():
    """Key 70 of 256 has nearly all the weight: by weight it comes first; by position it is the 186th of the last."""
    k, v = torch.zeros(1, 256, 2), normal(1, 256, 5)
    k[0, 70, 0] = 40
    q = torch.tensor([1.0, 0]).expand(1, 256, 2)
    lengths = lengths_up_to(256)
    found = noted(q, k, v, 1, lengths)
    needed = budgets(found, lengths, 0.05)
    assert needed["heaviest"] == [1] and found["effective"][0, 0] == pytest.approx(1)
    assert 128 < needed["latest"][0] and 128 < needed["first_latest"][0]
    exact = list(range(1, 257))
    needed = budgets(noted(q, k, v, 1, exact), exact, 0.05)
    assert needed["latest"] == [256 - 70] and needed["first_latest"] == [256 - 70 + 1]


def test_keys_of_equal_weight_drawn_without_replacement_take_what_the_textbook_says():
    """E|mean of n - mean|^2 = S^2 (1/n - 1/N), S^2 with divisor N - 1 (Cochran 1977): here 4 x 64 draws, 8 values."""
    size, error = 512, 0.1
    v = normal(4, size, 8)
    lengths = lengths_up_to(size)
    found = noted(torch.zeros(4, size, 2), normal(4, size, 2, seed=1), v, 64, lengths)
    assert (found["load"] == 0).all() and np.allclose(found["effective"], size)
    unit = v.double().var(1, correction=1).sum(-1) / v[:, 1:].double().var(1, correction=0).sum(-1)
    expected = unit.numpy()[:, None] * (1 / np.array(lengths) - 1 / size)
    ratio = found["squares_drawn"][:, :-1].mean(0) / expected[:, :-1].mean(0)
    assert np.abs(ratio - 1).max() < 5 * math.sqrt(2 / (8 * 4 * 64))  # 5 standard errors, at most 16%
    assert (found["squares_drawn"][:, -1] == 0).all()
    needed = np.mean(budgets(found, lengths, error)["drawn"])
    assert needed == pytest.approx(1 / (error**2 + 1 / size), rel=0.1)


def test_a_sink_without_value_on_the_first_position():
    """It takes 90% of the weight. What is read with it in place shrinks as it should; without it, it is ten times that.

    Others weigh the same, so every output is a mean of values times what the sink leaves.
    """
    size = 200
    k, v = torch.zeros(1, size, 1), normal(1, size, 3)
    k[0, 0, 0], v[0, 0] = math.log(9 * (size - 1)), 0
    lengths = [1, 2, 50, 100, size - 1, size]
    found = noted(torch.ones(1, size, 1), k, v, 1, lengths)
    assert found["share_first"].item() == pytest.approx(0.9) and found["share_own"].item() == pytest.approx(0.1 / 199)
    assert found["share_near"].item() == pytest.approx(6.4 / 199)
    assert found["load"].item() == 0 and found["load_with_first"].item() > 0.5
    values = v[0, 1:].double().numpy()
    spread = values.var(0).sum()
    full = 0.1 * values.mean(0)

    def squares(gap):
        return gap @ gap / spread

    for i, n in enumerate(lengths[:4]):
        with_sink = values[size - n :].sum(0) / (9 * (size - 1) + n - 1) if n > 1 else 0 * full
        assert found["squares_first_latest"][0, i] == pytest.approx(squares(with_sink - full), rel=1e-4)
        assert found["squares_latest"][0, i] == pytest.approx(squares(values[-n:].mean(0) - full), rel=1e-4)
    assert found["squares_latest"][0, 4] == pytest.approx(squares(values.mean(0) - full), rel=1e-4)
    # Its own sink, a logit in the denominator, does the same and is always read: the first position is like others.
    apart = noted(torch.ones(1, size, 1), torch.zeros(1, size, 1), v, 1, lengths,
                  sinks=torch.tensor([math.log(9 * size)]))  # fmt: skip
    assert apart["share_first"].item() == pytest.approx(0.1 / size) and apart["effective"].item() == pytest.approx(size)
    own = v[0].double().numpy()
    for i, n in enumerate(lengths[:4]):
        gap = own[size - n :].sum(0) / (9 * size + n) - 0.1 * own.mean(0)
        assert apart["squares_latest"][0, i] == pytest.approx(squares(gap), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1000.1])
def test_keys_of_one_value_are_needed_once(value):
    v = torch.full((2, 101, 16), value) * (1 + torch.arange(16) / 7)
    lengths = lengths_up_to(101)
    found = noted(2 * normal(2, 101, 8), normal(2, 101, 8, seed=1), v, 4, lengths)
    assert all(np.isfinite(array).all() for array in found.values())
    assert all(needed == [1, 1] for needed in budgets(found, lengths, 1e-3).values())


def test_ties_and_orders_of_what_is_not_seen():
    """In the middle of a window both sides are near; keys that are hidden never count among the n."""
    v = normal(1, 9, 4)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[..., [0, 5]] = False
    attention = synthetic(torch.zeros(1, 9, 2), torch.zeros(1, 9, 2), v, mask=mask)
    draws = torch.linspace(0, 0.9, 9)[None].flip(1)
    found = notes(attention, torch.tensor([6]), draws, [1, 2, 3, 7, 9])
    values, seen = v[0].double().numpy(), [1, 2, 3, 4, 6, 7, 8]
    spread, full = values[seen].var(0).sum(), values[seen].mean(0)
    near = [[6], [6, 7], [4, 6, 7], [6, 7, 8]]
    gaps = [((values[some].mean(0) - full) ** 2).sum() / spread for some in near]
    assert found["keys"].item() == 7
    assert found["squares_latest"][0, :2] == pytest.approx(gaps[:2], rel=1e-4)
    assert min(abs(found["squares_latest"][0, 2] - gap) / gap for gap in gaps[2:]) < 1e-4
    last = [[8], [7, 8], [6, 7, 8]]  # the draws run backwards
    gaps = [((values[some].mean(0) - full) ** 2).sum() / spread for some in last]
    assert found["squares_drawn"][0, :3] == pytest.approx(gaps, rel=1e-4)
    assert (found["squares_drawn"][0, 3:] < 1e-12).all()


# ------------------------------------------------------------ the law of drawn keys

LOADS, ALONG, SIZES = np.array([1.0, 2.0, 3.0, 1.0]), np.array([0.0, 0.5, 0.2, 1.0]), [16, 64, 256]


def endless(count=3000) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares |output over n keys - limit|^2 of four queries, and their standard errors, in units of the spread.

    A value is sqrt(along) y + sqrt(1 - along) r in two coordinates, with y the standardised logit: the limit is
    sqrt(along) load and 0.
    """
    rng = np.random.default_rng(17)
    found = np.empty((len(SIZES), len(LOADS), count))
    for i, n in enumerate(SIZES):
        for j, (load, along) in enumerate(zip(LOADS, ALONG)):
            y, r = rng.standard_normal((2, count, n))
            w = np.exp(load * y)
            w /= w.sum(1, keepdims=True)
            found[i, j] = along * ((w * y).sum(1) - load) ** 2 + (1 - along) * (w * r).sum(1) ** 2
    return found.mean(2), found.std(2) / math.sqrt(count)


ENDLESS = 1e9  # keys of which 256 are read


def disagreement(law) -> float:
    """By how many standard errors a law is off, where it is off most: of each query, and of all four together."""
    measured, error = endless()
    each = [
        np.abs(law(SIZES, ENDLESS, LOADS[j : j + 1], ALONG[j : j + 1]) ** 2 - measured[:, j]) / error[:, j]
        for j in range(4)
    ]
    together = np.abs(law(SIZES, ENDLESS, LOADS, ALONG) ** 2 - measured.mean(1)) / (np.sqrt((error**2).sum(1)) / 4)
    assert (error / measured).max() < 0.05
    return max(np.max(each), together.max())


def test_drawn_errors_of_an_endless_past_are_those_from_the_limit():
    """Fifteen comparisons at 5% or better: the largest of so many normal numbers is below 4."""
    assert disagreement(predictions.drawn_errors) < 4
    for load in (0.0, 1.0, 3.0):
        found = drawn_keys.drawn_error(SIZES, ENDLESS, load)
        assert found.along == pytest.approx(softmax_law.map_error(SIZES, load), rel=1e-4)
        assert found.rest == pytest.approx(softmax_law.softmax_moments(SIZES, load).participation, rel=1e-4)


def moments(n, total, loads):
    """Errors along and of the rest, of each query: (len(n), queries)."""
    found = [drawn_keys.drawn_error(n, total, load) for load in loads]
    return np.stack([each.along for each in found], 1), np.stack([each.rest for each in found], 1)


def halves(n, total, loads):
    along, _ = moments(n, total, loads)
    return along, moments(np.array(n) / 2, total, loads)[1]


def mixed(of, power=1.0):
    """A law from the errors along and of the rest, in shares of `along` to some power."""

    def law(n, total, loads, along):
        along = along**power
        first, second = of(n, total, loads)
        return np.sqrt((along * first + (1 - along) * second).mean(-1))

    return law


def from_the_limit(n, total, loads):
    n = np.reshape(n, (-1, 1))
    return softmax_law.map_error(n, loads), softmax_law.softmax_moments(n, loads).participation


right = mixed(moments)
WRONG = {
    "along is dropped": lambda n, N, s, a: right(n, N, s, 0 * a),
    "all is along": lambda n, N, s, a: right(n, N, s, 0 * a + 1),
    "half the keys": lambda n, N, s, a: right(np.array(n) / 2, N, s, a),
    "participation at n/2": mixed(halves),
    "along squared": mixed(moments, power=2),
    "mean of errors": lambda n, N, s, a: np.mean([right(n, N, x[None], y[None]) for x, y in zip(s, a)], 0),
    "the load of the mean": lambda n, N, s, a: right(n, N, np.full(len(s), s.mean()), a),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_law_does_not_pass(name):
    assert disagreement(WRONG[name]) > 4


PASTS = 120


@cache
def past(load, along, size, lengths, seed):
    """`notes` of four queries on each of 120 independent pasts of Gaussian keys; the values go with the logits."""
    q = torch.zeros(PASTS, size, 2)
    q[..., 0] = load
    k, rest = normal(PASTS, size, 2, seed=seed), normal(PASTS, size, 5, seed=seed + 1)
    v = torch.cat([math.sqrt(along) * k[..., :1], math.sqrt((1 - along) / 5) * rest], -1)
    return noted(q, k, v, 4, lengths, seed=seed)


def off(law, load, along) -> float:
    """By how many standard errors over pasts the drawn errors of a past of 1,000 keys are off a law, at most."""
    lengths = (16, 64, 256, 500, 1000)
    found = past(load, along, 1000, lengths, seed=int(20 * load))
    squares = found["squares_drawn"][:, :-1]
    error = squares.std(0, ddof=1) / math.sqrt(PASTS)
    assert (error / squares.mean(0) < 0.15).all()
    assert np.median(found["load"]) == pytest.approx(load, rel=0.01)
    assert np.median(found["along"]) == pytest.approx(along, abs=0.01)
    loads, shares = np.full(1, load), np.full(1, along)
    return (np.abs(squares.mean(0) - law(lengths[:-1], 1000, loads, shares) ** 2) / error).max()


CASES = [(1.0, 0.0), (2.0, 0.3), (3.0, 0.6), (4.5, 0.1)]


@pytest.mark.parametrize("load, along", CASES)
def test_drawn_errors_are_those_of_keys_drawn_from_a_past(load, along):
    """Up to half of the past, and in all phases: reduced loads from 0.27 to 1.2. Four comparisons at 4 to 15%."""
    assert off(predictions.drawn_errors, load, along) < 4
    found = past(load, along, 1000, (16, 64, 256, 500, 1000), seed=int(20 * load))
    law = predictions.drawn_errors([16, 64], 1000, found["load"], found["along"])  # at the loads that are measured
    assert law == pytest.approx(predictions.drawn_errors([16, 64], 1000, np.full(1, load), np.full(1, along)), rel=0.05)


@pytest.mark.parametrize("load, along", CASES)
def test_the_law_of_an_endless_past_is_another_one(load, along):
    assert off(mixed(from_the_limit), load, along) > 4


def test_the_law_of_drawn_keys_where_it_is_known():
    """Keys of equal weight; all keys; one key of few; a single key decides, and is among those read or not."""
    n = np.array([1, 2, 7.5, 30, 60, 100])
    for part in drawn_keys.drawn_error(n, 100, 0):
        assert part == pytest.approx(1 / n - 1 / 100, rel=1e-6, abs=1e-15)
    for load in (0.3, 2.0, 10.0):
        for part in drawn_keys.drawn_error([1, 40, 60], 60, load):
            assert part[0] > part[1] > part[2] == 0
    for share, part in zip((0.25, 0.5), drawn_keys.drawn_error([250, 500], 1000, 40).rest):
        assert part == pytest.approx(2 * (1 - share), rel=0.12)
    # Of two keys one: the other has the weight sigmoid(t (y' - y)), and errors are averages over y' - y ~ N(0, 2).
    gap, weight = np.polynomial.hermite_e.hermegauss(200)
    gap = gap * math.sqrt(2)
    w = 1 / (1 + np.exp(-1.5 * gap))
    found = drawn_keys.drawn_error(1, 2, 1.5)
    assert found.rest == pytest.approx((weight @ (2 * w**2)) / weight.sum(), rel=1e-5)
    assert found.along == pytest.approx((weight @ (w * gap) ** 2) / weight.sum(), rel=1e-5)
