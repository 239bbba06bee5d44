"""The exact law of softmax at any n: against mpmath, enumeration, simulation, and its own identities."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcx_lib import runtime
from tokcx_lib.theory import laws, softmax_law
from tokcx_lib.theory.softmax_law import map_error, self_moments, softmax_moments

LAWS = [
    None,
    laws.Gaussian(2.5),
    laws.Rademacher(1),
    laws.Uniform(1),
    laws.UniformSphere(2),
    laws.UniformSphere(3, 2.0),
    laws.UniformSphere(50, 50**0.5),
    laws.UniformBall(3),
    laws.Empirical([[-1.0], [0.5], [2.0]], [0.2, 0.5, 0.3]),
]


def name(law):
    return "normal" if law is None else f"{type(law).__name__}{law.dim}"


@pytest.mark.parametrize(
    "n, t, values",
    [
        (10, 1, (0.8053, 0.908, 0.1947)),
        (100, 2, (1.7475, 3.2503, 0.1263)),
        (1000, 3, (2.5917, 6.896, 0.1361)),
        (1000, 5, (3.0473, 9.4636, 0.3905)),
        (1e6, 4, (3.8266, 14.738, 0.0433)),
        (1e12, 6, (5.8725, 34.544, 0.0213)),
    ],
)
def test_known_values(n, t, values):
    assert tuple(float(x) for x in softmax_moments(n, t)) == pytest.approx(values, abs=6e-5, rel=2e-5)


def by_mpmath(n, t):
    """The three integrals with averages over a token by adaptive quadrature in 20 digits."""
    with mpmath.workdps(20):
        cuts = [-10, -3, 0, 3, 6, 11]

        def average(f):
            return mpmath.quad(lambda y: f(y) * mpmath.npdf(y), cuts)

        def parts(x):
            w = lambda y: mpmath.exp(x + t * y)  # noqa: E731
            phi = average(lambda y: mpmath.exp(-w(y)))
            a1 = average(lambda y: y * w(y) * mpmath.exp(-w(y)))
            b0 = average(lambda y: w(y) ** 2 * mpmath.exp(-w(y)))
            b2 = average(lambda y: y**2 * w(y) ** 2 * mpmath.exp(-w(y)))
            power = phi ** (n - 2)
            return n * a1 * phi * power, n * b2 * phi * power + n * (n - 1) * a1**2 * power, n * b0 * phi * power

        # The trapezoidal rule again, with another step and offset; the averages over a token are what mpmath checks.
        low, high = -(t**2) / 2 - math.log(n) - 22, min(9 * t + 3, 12 - math.log(n) / 2)
        rows = [parts(low + 0.37 * k) for k in range(int((high - low) / 0.37))]
        return [float(0.37 * sum(column)) for column in zip(*rows)]


@pytest.mark.slow
@pytest.mark.parametrize("n, t", [(2, 1), (50, 2), (1e6, 1.5)])
def test_against_mpmath(n, t):
    assert [float(x) for x in softmax_moments(n, t)] == pytest.approx(by_mpmath(n, t), rel=1e-8)


@pytest.mark.parametrize("t", [0.3, 1.0, 4.0])
def test_two_signs_by_enumeration(t):
    """n Rademacher tokens, all 2^n of them."""
    for n in (1, 2, 7):
        rows = np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
        w = np.exp(t * rows)
        w /= w.sum(1, keepdims=True)
        gamma = (w * rows).sum(1)
        exact = gamma.mean(), (gamma**2).mean(), (w**2).sum(1).mean()
        assert [float(x) for x in softmax_moments(n, t, laws.Rademacher(1))] == pytest.approx(
            exact, rel=1e-11, abs=1e-14
        )


@pytest.mark.parametrize("law", LAWS, ids=name)
@pytest.mark.parametrize("n, t", [(2, 0.7), (9, 2.0), (60, -1.5), (200, 6.0)])
def test_against_simulation(law, n, t):
    if isinstance(law, laws.UniformSphere) and law.dim == 50 and abs(t) > 3:
        t = 3.0
    dim, replicates = (1, 4000) if law is None else (law.dim, 4000)
    draw = (law or laws.Gaussian(1.0)).sample(replicates * n, runtime.stream(20, n, dim))[:, 0].reshape(replicates, n)
    w = torch.softmax(t * draw, 1)
    gamma = (w * draw).sum(1)
    limit = (law or laws.Gaussian(1.0)).tilted_mean([t] + [0.0] * (dim - 1))[0]
    exact = [*softmax_moments(n, t, law), map_error(n, t, law)]
    for found, value in zip((gamma, gamma**2, (w**2).sum(1), (gamma - limit) ** 2), exact):
        assert abs(found.mean() - float(value)) < 4.5 * found.std() / replicates**0.5 + 1e-12


def test_the_identity_of_gaussian_tokens_over_the_grid():
    """E Gamma_n = t (1 - P): integration by parts, which the quadrature knows nothing of."""
    t, n = np.linspace(0, 40, 26)[:, None], np.logspace(0, 30, 16)
    found = softmax_moments(n, t)
    assert np.abs(found.mean - t * (1 - found.participation)).max() < 1e-8
    small = np.array([[1e-4], [0.02], [0.49999], [0.5], [0.7]])
    found = softmax_moments(n[1:], small)
    assert found.mean == pytest.approx(small * (1 - found.participation), rel=1e-8)
    huge = softmax_moments([1e32, 1e33, 1e100, 1e250], [[0.1], [3.0], [17.0], [35.0], [60.0]])
    t = np.array([[0.1], [3.0], [17.0], [35.0], [60.0]])
    assert huge.mean == pytest.approx(t * (1 - huge.participation), rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0.01, 30), st.sampled_from(range(len(LAWS))))
def test_properties(height, t, which):
    """What holds for any law: 1/n <= P <= 1, P falls with n and grows with t, M2 >= mean^2, signs, one token."""
    law = LAWS[which]
    reach = getattr(law, "radius", 1.0)
    n, t = 10 ** (30 * height), t / reach
    here = [float(x) for x in softmax_moments(n, t, law)]
    assert 1 / n * (1 - 1e-9) <= here[2] <= 1 + 1e-9
    assert here[1] >= here[0] ** 2 * (1 - 1e-9)
    assert softmax_moments(2 * n, t, law).participation <= here[2] * (1 + 1e-9)
    if law is None or law.dim > 1 or not isinstance(law, laws.Empirical):  # symmetric laws
        assert softmax_moments(n, 1.1 * t, law).participation >= here[2] * (1 - 1e-9)
        back = [float(x) for x in softmax_moments(n, -t, law)]
        assert back == pytest.approx([-here[0], here[1], here[2]], rel=1e-9, abs=1e-13)
    alone = [float(x) for x in softmax_moments(1, t, law)]
    law = law or laws.Gaussian(1.0)
    assert alone == pytest.approx(
        [law.mean[0].item(), (law.cov[0, 0] + law.mean[0] ** 2).item(), 1], abs=1e-11 * reach**2
    )


def test_two_tables_meet_and_the_scale_is_right():
    n = math.exp(75.0)
    for t in (0.2, 5.0, 12.0, 30.0):
        left, right = softmax_moments(n * (1 - 1e-12), t), softmax_moments(n * (1 + 1e-12), t)
        assert [float(x) for x in left] == pytest.approx([float(x) for x in right], rel=1e-9)
    wide = softmax_moments([5.0, 1e9], 1.5, laws.Gaussian(4.0))
    unit = softmax_moments([5.0, 1e9], 3.0)
    assert wide.mean == pytest.approx(2 * unit.mean, rel=1e-12)
    assert wide.second_moment == pytest.approx(4 * unit.second_moment, rel=1e-12)


def test_map_error_keeps_its_digits():
    """E(Gamma_n - t)^2 -> e^{t^2} / n (the central limit), far below the rounding of the second moment."""
    for t in (0.5, 2.0, 4.0):
        n = 1e22
        assert map_error(n, t) == pytest.approx(math.exp(t**2) * (1 + t**2) / n, rel=1e-3, abs=0)
    n, t = np.array([3.0, 50, 1e4]), np.array([[0.4], [3.0]])
    found = softmax_moments(n, t)
    assert map_error(n, t) == pytest.approx(found.second_moment - 2 * t * found.mean + t**2, rel=1e-9)


def error_by_mpmath(n, t, digits=100):
    """E(Gamma_n - t)^2 from its definition, with so many digits that what cancels may cancel."""
    with mpmath.workdps(digits):
        n, step, fine = mpmath.mpf(n), mpmath.mpf(1) / 4, mpmath.mpf(1) / 4 / t
        # log l about -log S, and tokens whose weight matters there; on one grid of x + t y.
        start = int((-mpmath.log(n) - t**2 / 2 - 28) / step)
        tokens = range(int((t - 16) / fine), int((2 * t + 8) / fine))
        powers = {i: mpmath.exp(i * step) for i in range(start + tokens[0], start + 140 + tokens[-1] + 1)}
        decays = {i: mpmath.exp(-power) for i, power in powers.items()}
        density = [fine * mpmath.npdf(j * fine) for j in tokens]
        total = mpmath.mpf(0)
        for i in range(start, start + 140):
            weights = [powers[i + j] * f for j, f in zip(tokens, density)]
            off = [j * fine - t for j in tokens]
            pair = sum(w * y * decays[i + j] for w, y, j in zip(weights, off, tokens))
            single = sum(w * powers[i + j] * y**2 * decays[i + j] for w, y, j in zip(weights, off, tokens))
            phi = 1 - sum(f * (1 - decays[i + j]) for f, j in zip(density, tokens))
            total += step * (n * single * phi ** (n - 1) + n * (n - 1) * pair**2 * phi ** (n - 2))
        return float(total)


# t, log n and `error_by_mpmath`, which the test below runs again at the first of them.
FAR = [
    (6.0, 72.0, 8.524780459280075e-15),
    (6.0, 50.0, 3.838550452713353e-06),
    (9.0, 162.0, 5.444440332033596e-34),
    (10.0, 200.0, 3.7572711745730856e-42),
    (12.0, 288.0, 4.197228430343132e-61),
]


@pytest.mark.parametrize("t, log_n, value", FAR)
def test_map_error_far_below_rounding(t, log_n, value):
    assert map_error(math.exp(log_n), t) == pytest.approx(value, rel=1e-10, abs=0)


@pytest.mark.slow
def test_map_error_against_its_definition_in_a_hundred_digits():
    t, log_n, value = FAR[0]
    assert error_by_mpmath(math.exp(log_n), t, 60) == pytest.approx(value, rel=1e-12, abs=0)


@settings(max_examples=40, deadline=None)
@given(st.floats(3, 12), st.floats(2, 4))
def test_map_error_reaches_its_central_limit_and_falls(t, exponent):
    """(1 + t^2) e^{t^2} / n, from e^{2 t^2} tokens on; at load 3 the limit is 30% away there, beyond 6 not 1%."""
    n = math.exp(min(exponent * t**2 + 6, 575))
    limit = (1 + t**2) * math.exp(t**2) / n
    assert map_error(n, t) == pytest.approx(limit, rel=0.01, abs=0)
    sizes = np.exp(np.linspace(0, math.log(n), 30))
    assert (np.diff(map_error(sizes, t)) < 0).all()


@pytest.mark.parametrize("law", LAWS[2:], ids=name)
def test_map_error_falls_like_one_over_n_for_bounded_tokens_too(law):
    errors = [n * map_error(n, 1.5, law) for n in (1e15, 1e40, 1e200)]
    assert errors[1:] == pytest.approx(errors[:1] * 2, rel=1e-9)


def test_correlations_in_pieces_are_those_at_once():
    rng = np.random.default_rng(0)
    values, kernel = rng.normal(size=30_000), rng.normal(size=9_000)
    assert softmax_law._correlate(values, kernel) == pytest.approx(np.correlate(values, kernel), rel=1e-9, abs=1e-9)
    assert softmax_law._correlate(values, kernel[:5]) == pytest.approx(np.correlate(values, kernel[:5]), rel=1e-12)


@pytest.mark.parametrize("n, t", [(2, 0.8), (5, 2.0), (300, 3.0)])
def test_own_token_averages_to_all_tokens(n, t):
    """Averaged over its own projection, an own token is a token like the others."""
    y, weight = np.polynomial.hermite_e.hermegauss(80)
    own = self_moments(n, t, y)
    average = lambda part: float(part @ weight) / math.sqrt(2 * math.pi)  # noqa: E731
    fresh = softmax_moments(n, t)
    assert average(own.mean) == pytest.approx(float(fresh.mean), rel=1e-5)
    assert average(own.second_moment) == pytest.approx(float(fresh.second_moment), rel=1e-5)
    assert average(own.own) == pytest.approx(1 / n, rel=1e-5)
    assert average(own.own_square) == pytest.approx(float(fresh.participation) / n, rel=1e-5)
    assert average(own.participation) == pytest.approx(float(fresh.participation) * (n - 1) / n, rel=1e-5)


def test_own_token_against_simulation():
    n, t, own = 40, 1.5, 1.2
    draw = torch.randn(20_000, n, dtype=torch.float64, generator=runtime.stream(21))
    draw[:, 0] = own
    w = torch.softmax(t * draw, 1)
    gamma = (w * draw).sum(1)
    drawn = (gamma, gamma**2, w[:, 0], w[:, 0] ** 2, w[:, 0] * gamma, (w[:, 1:] ** 2).sum(1))
    for found, value in zip(drawn, self_moments(n, t, own)):
        assert abs(found.mean() - float(value)) < 4 * found.std() / len(draw) ** 0.5


def test_the_check_integral_is_enforced(monkeypatch):
    monkeypatch.setattr(softmax_law, "STEP", 2.5)
    softmax_law._gaussian_averages.cache_clear()
    with pytest.raises(ArithmeticError, match="sum to 1"):
        softmax_moments(1e6, 3.0)
    softmax_law._gaussian_averages.cache_clear()


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: softmax_moments(0.5, 1), "n"),
        (lambda: softmax_moments([1, math.nan], 1), "n"),
        (lambda: softmax_moments(1e251, 1), "n"),
        (lambda: softmax_moments([], 1), "n"),
        (lambda: softmax_moments(5, math.inf), "t"),
        (lambda: softmax_moments(5, 301, laws.Rademacher(1)), "t"),
        (lambda: softmax_moments(5, 1, laws.Rademacher(2)), "law"),
        (lambda: softmax_moments(5, 1, laws.Gaussian(torch.eye(2))), "law"),
        (lambda: softmax_moments(5, 1, laws.Gaussian(1.0, [0.5])), "law"),
        (lambda: softmax_moments(5, 1, "normal"), "law"),
        (lambda: self_moments(5, [1, 2], 0.0), "t"),
        (lambda: self_moments(5, 1, math.nan), "t"),
    ],
)
def test_bad_input_is_named(make, names):
    with pytest.raises(ValueError, match=rf"^{names}.*(expected|got)"):
        make()


def test_the_name_stays():
    assert softmax_law.softmax_moments is softmax_moments
