"""Causal, rotary and serial attention: theory against brute force, against simulation, and against wrong constants."""

import math

import numpy as np
import pytest
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import prefixes, streaming
from tokcx_lib.studies.causal_rotary.experiments import EXPERIMENTS
from tokcx_lib.theory import causal, laws, rates, rotary, serial

# ------------------------------------------------------------ causal


@pytest.mark.parametrize("slope", [0.3, 1.5, 3.0])
def test_the_table_of_prefixes_is_plain_causal_attention(slope):
    y = laws.Gaussian(1.0).sample(700, runtime.stream(1300))
    found = prefixes.scalar_outputs(y, slope)
    logits = slope * y @ y.mT
    whole = torch.softmax(logits, 1) @ y[:, 0]
    torch.testing.assert_close(found.whole, whole, rtol=0, atol=3e-5)
    plain = streaming.prefix_attention(slope * y[1:], y[:-1], y[:-1], [699], causal=True)[0][:, 0]
    torch.testing.assert_close(found.before, plain, rtol=0, atol=3e-5)
    finer = prefixes.scalar_outputs(y, slope, mesh=0.2)
    torch.testing.assert_close(finer.before, plain, rtol=0, atol=1e-8)


def test_parts_of_the_table_join(monkeypatch):
    y = laws.Gaussian(1.0).sample(300, runtime.stream(1301))
    once = prefixes.scalar_outputs(y, 1.0)
    monkeypatch.setattr(prefixes, "_CELLS", 2000)
    torch.testing.assert_close(prefixes.scalar_outputs(y, 1.0).before, once.before, rtol=1e-11, atol=1e-12)


def test_how_often_a_key_is_read():
    weights = causal.reading_weights(6)
    assert weights.tolist() == pytest.approx([sum(1 / (i - 1) for i in range(j + 1, 7)) for j in range(1, 7)])
    long = causal.reading_weights(10_000)
    assert long.mean().item() == pytest.approx(1 - 1e-4)
    assert long[999].item() == pytest.approx(math.log(10), rel=1e-3)
    assert long.square().mean().item() == pytest.approx(2, rel=0.01)


def test_covariance_of_the_causal_mean_is_that_of_its_first_order():
    """By integration over the normal law, in one dimension; and what a forgotten 2 would say."""
    H = 0.5
    z = torch.linspace(-14, 14, 40_001, dtype=torch.float64)[:, None]
    density = torch.exp(-(z[:, 0] ** 2) / 2)
    density = density / density.sum()
    pull = causal.key_influence(z, [[H]])[:, 0]
    own = H * z[:, 0]
    expected = density @ own**2 + 2 * density @ (own * pull) + 2 * density @ pull**2
    assert causal.mean_covariance([[H]]).item() == pytest.approx(expected.item(), rel=1e-6)
    assert causal.mean_covariance([[H]]).item() == pytest.approx(3.45331, rel=1e-5)
    assert abs(rates.influence_covariance([[H]]).item() / expected.item() - 1) > 0.3


def test_first_order_covariance_in_two_dimensions():
    B = torch.tensor([[0.4, -0.2], [0.1, 0.3]], dtype=torch.float64)
    means = torch.stack(
        [causal.first_order(torch.randn(400, 2, generator=runtime.stream(1302, r)).double(), B) for r in range(4000)]
    )
    found, exact = 400 * means.mT @ means / 4000, causal.mean_covariance(B)
    # n = 400: the weights' mean square is still below 2.
    weights = causal.reading_weights(400)
    pull = exact - rates.influence_covariance(B)
    exact = exact + (weights.square().mean() - 2) * pull - (1 - weights.mean()) * (B + B.mT)
    error = torch.sqrt((exact.diagonal()[:, None] * exact.diagonal() + exact**2) / 4000)
    assert ((found - exact).abs() < 4 * error).all()


def test_stable_factor_of_pareto_sums():
    """Symmetric Pareto terms with weights log(n/j): typical size against equal weights, and against a lost root."""
    psi, n, count = 1.5, 2000, 4000
    alpha, wide, even = 1 + 1 / psi, [], []
    weights = causal.reading_weights(n)
    for r in range(count):
        u = torch.rand(n, generator=runtime.stream(1303, r), dtype=torch.float64) * 2 - 1
        terms = u.sign() * u.abs() ** (-1 / alpha)
        wide.append(weights @ terms)
        even.append(terms.sum())
    size = [torch.stack(x).abs().sqrt().mean() ** 2 for x in (wide, even)]
    ratio = (size[0] / size[1]).item()
    assert ratio == pytest.approx(causal.stable_factor(psi), rel=0.05)
    assert ratio != pytest.approx(math.gamma(1 + alpha), rel=0.05)
    assert causal.stable_factor(1.0) == pytest.approx(math.sqrt(2))


def test_ratio_of_levels_against_drawn_largest_terms_and_its_limit():
    H, n, form = 1.3, 1000, [[1.3]]
    weights, tops = causal.reading_weights(n), []
    for r in range(3000):
        pull = causal.key_influence(torch.randn(n, 1, generator=runtime.stream(1307, r)).double(), form)[:, 0].abs()
        tops.append(((weights * pull).max().item(), pull.max().item()))
    # The level that the largest term exceeds with probability 1 - 1/e.
    masked, whole = np.quantile(np.array(tops), math.exp(-1), axis=0)
    assert masked / whole == pytest.approx(causal.level_ratio(H, n), rel=0.05)
    far = [causal.level_ratio(H, n) for n in (1e3, 1e6, 1e12, 1e100)]
    assert far == sorted(far) and far[-1] == pytest.approx(causal.stable_factor(H**2), rel=0.002)


# ------------------------------------------------------------ rotary


def test_plane_factor_is_the_length_of_a_mean_of_unit_vectors():
    for n, theta in ((1, 0.3), (7, 1.0), (50, 0.01), (12, 2 * math.pi / 12), (9, 4.0), (5, 2 * math.pi)):
        vectors = np.exp(1j * theta * np.arange(1, n + 1))
        assert rotary.plane_factor(n, theta) == pytest.approx(abs(vectors.mean()), abs=1e-12)
    theta = 1e-3
    assert rotary.plane_factor(rotary.half_length(theta), theta) == pytest.approx(0.5, rel=1e-4)
    # Planted: the sine of the whole angle, and 2 pi in the place of 3.79.
    assert rotary.plane_factor(2 * math.pi / theta, theta) < 1e-3


def test_turning_back_keys_and_turning_the_query_agree():
    q, theta = torch.tensor([1.0, 2.0, -0.5, 0.3]).double(), [0.7, 0.1]
    for delta in (0.0, 1.0, 5.0):
        key = torch.tensor([0.2, -1.0, 0.4, 0.9]).double()
        turned_key = torch.cat([_rotation(delta * a) @ key[2 * m : 2 * m + 2] for m, a in enumerate(theta)])
        assert (rotary.turned(q, theta, [delta])[0] @ key).item() == pytest.approx((q @ turned_key).item())


def _rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def test_distance_average_in_parts_and_for_isotropic_keys(monkeypatch):
    q, theta = [0.6, 0.2, -0.3, 0.5], [1.0, 0.05]
    law = laws.Gaussian(torch.eye(4))
    once = rotary.distance_average(law, q, theta, 40)
    lengths = once.reshape(-1, 2).norm(dim=1).numpy()
    own = np.linalg.norm(np.reshape(q, (2, 2)), axis=1)
    assert lengths == pytest.approx(own * rotary.plane_factor(40, theta))
    monkeypatch.setattr(rotary, "_ROWS", 7)
    torch.testing.assert_close(rotary.distance_average(law, q, theta, 40), once)


def test_torus_average_is_the_limit_of_distance_averages():
    mean, q = torch.tensor([0.5, 0.5, 0.0, -0.8]).double(), [1.0, 0.3, 1.2, 0.0]
    law = laws.Gaussian(0.5 * torch.eye(4), mean)
    far = rotary.distance_average(law, q, [1.0, math.sqrt(2)], 300_000)
    torch.testing.assert_close(far, rotary.torus_average(q, mean, 0.5), rtol=0, atol=1e-4)
    assert rotary.torus_average(q, torch.zeros(4)).abs().max() == 0


def test_an_odd_relation_between_angles_leaves_something():
    """Keys that are wider along one axis, one plane turning twice as fast as the other: the limit is not zero."""
    cov = torch.tensor([[2.0, 0, 0.8, 0], [0, 0.5, 0, 0], [0.8, 0, 2.0, 0], [0, 0, 0, 0.5]]).double()
    q = torch.tensor([1.0, 0, 1.0, 0]).double()
    related = rotary.distance_average(laws.Gaussian(cov), q, [2.0, 1.0], 200_000).norm()
    free = rotary.distance_average(laws.Gaussian(cov), q, [2.0, math.sqrt(1.1)], 200_000).norm()
    assert free < 0.01 < 0.1 < related


def test_exact_mean_of_a_rotary_head():
    """Draws of ten keys at load 1: within 3.5 standard errors of the exact law, and far from the distance average."""
    q, theta, n = torch.tensor([0.5, 0.0] * 4).double(), [1.0, 0.1, 0.01, 0.001], 10
    tilts = rotary.turned(q, theta, torch.arange(1, n + 1))
    keys = torch.randn(4000, n, 8, generator=runtime.stream(1304), dtype=torch.float64)
    outputs = (torch.softmax((keys * tilts).sum(2), 1)[..., None] * keys).sum(1)
    direction = torch.nn.functional.normalize(tilts.mean(0), dim=0)
    along = outputs @ direction
    exact = np.linalg.norm(rotary.mean_lengths(n, q, theta))
    error = along.std().item() / 4000**0.5
    assert abs(along.mean().item() - exact) < 3.5 * error
    assert abs(along.mean().item() - np.linalg.norm(0.5 * rotary.plane_factor(n, theta))) > 8 * error


def test_planes_that_still_turn_slowly():
    assert rotary.frequencies(10_000, 4).tolist() == pytest.approx([1.0, 0.01])
    assert rotary.slow_planes(10_000, 4, 300) == 1 and rotary.slow_planes(10_000, 4, 400) == 0


# ------------------------------------------------------------ serial


def test_pull_covariance_by_simulation_and_at_its_ends():
    H = 0.6
    assert serial.pull_covariance(H, 1.0) == pytest.approx((1 - H**4) ** -1.5)
    assert serial.pull_covariance(H, 0.0) == 0
    x, w = torch.randn(2, 400_000, 1, generator=runtime.stream(1305), dtype=torch.float64)
    for r in (0.5, -0.8):
        y = r * x + math.sqrt(1 - r**2) * w
        products = causal.key_influence(x, [[H]])[:, 0] * causal.key_influence(y, [[H]])[:, 0]
        error = products.std().item() / 400_000**0.5
        assert abs(products.mean().item() - serial.pull_covariance(H, r)) < 4 * error


@pytest.mark.parametrize("H, r", [(0.5, 0.5), (0.5, -0.5), (-0.3, 0.8), (0.9, 0.9)])
def test_long_run_variance_is_the_sum_of_covariances(H, r):
    lags = np.arange(1, 2000)
    power = np.concatenate([[1.0], np.repeat(r**lags, 2)])  # both sides
    for mask, times in ((False, 1), (True, 2)):
        direct = ((H**2 + 2 * H) * power + times * serial.pull_covariance(H, power)).sum()
        assert serial.long_run_variance(H, r, mask) == pytest.approx(direct, rel=1e-9)
    assert serial.long_run_variance(H, 0.0) == pytest.approx(rates.influence_covariance([[H]]).item())
    assert serial.long_run_variance(H, 0.0, True) == pytest.approx(causal.mean_covariance([[H]]).item())


# ------------------------------------------------------------ runs


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_one_unit_of_each_run(name):
    experiment = EXPERIMENTS[name]
    plan = experiment.plan(experiment.config("quick"), torch.device("cpu"))
    table = plan.work(*plan.units[0]).table
    assert (table["n"] == plan.units[0][0]).all() and table.notna().all().all()
    if "causal_linear" in table:
        gap = (table["whole"] - table["whole_linear"]).abs().median()
        assert gap < table["whole"].abs().median()


def test_lengths_with_fewer_replicates():
    config = {**EXPERIMENTS["causal_stable"].config("full"), "replicates": 50, "fewer": {"4000": 21}, "block": 20}
    plan = EXPERIMENTS["causal_stable"].plan(config, torch.device("cpu"))
    assert [unit for unit in plan.units if unit[0] == 4000] == [(4000, 0), (4000, 1)]
    assert plan.meta == {"replicates": "50, 21 at n = 4000"}


def test_own_tokens_hardly_matter_and_ever_less():
    """n E (difference of the means with and without own tokens)^2, against n Var = 3.4: the limit is the same."""
    sizes = []
    for n, count in ((100, 400), (400, 200), (1600, 25)):
        gaps = []
        for r in range(count):
            y = laws.Gaussian(1.0).sample(n, runtime.stream(1306, n, r))
            logits = (0.5 * y @ y.mT).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
            own = (torch.softmax(logits, 1) @ y).mean().item()
            before = prefixes.scalar_outputs(y, 0.5).before.sum().item() / n
            gaps.append(n * (own - before) ** 2)
        sizes.append(np.mean(gaps))
    assert sizes[2] < sizes[1] < sizes[0] and sizes[2] < 0.1
