"""Exponents at values worked out by hand, and how they compare."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokcx_lib.theory import rates


@pytest.mark.parametrize(
    "psi, kind, value",
    [
        (1.0, "reported", 1 / 66),
        (1.0, "balance", 1 / 4),
        (0.25, "balance", 0.4),
        (1.0, "subgaussian", 1 / 4),
        (0.1, "subgaussian", 1 / 2),
        (4.0, "gaussian", 1 / 5),
        (0.5, "gaussian", 1 / 2),
        (1.0, "bias", (math.sqrt(5) - 1) / 2),
        (0.1, "bias", 1.0),
    ],
)
def test_known_values(psi, kind, value):
    assert rates.exponent(psi, kind) == pytest.approx(value, rel=1e-12)


@given(psi=st.floats(1e-6, 1e6))
def test_order_of_the_exponents(psi):
    reported, balance, gaussian = (rates.exponent(psi, kind) for kind in ("reported", "balance", "gaussian"))
    assert reported < balance < gaussian <= 0.5
    assert reported < rates.exponent(psi, "subgaussian") <= gaussian * (1 + 1e-12)
    assert gaussian <= rates.exponent(psi, "bias") * (1 + 1e-6)
    if psi >= 1:
        assert gaussian == pytest.approx(2 * balance)


def test_hardmax_asymptote():
    assert rates.hardmax_mean(math.e**2) == pytest.approx(math.log(4) / 4)
    assert rates.hardmax_mean(1e6, 3.0) == pytest.approx(3 * rates.hardmax_mean(1e6))


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda: rates.exponent(0.0, "balance"), "psi"),
        (lambda: rates.exponent(float("nan"), "balance"), "psi"),
        (lambda: rates.exponent(1.0, "sharp"), "kind"),
        (lambda: rates.hardmax_mean(1.0), "n"),
        (lambda: rates.hardmax_mean(10, -1.0), "sigma"),
    ],
)
def test_bad_input_is_named(call, names):
    with pytest.raises(ValueError, match=rf"^{names}: expected"):
        call()
