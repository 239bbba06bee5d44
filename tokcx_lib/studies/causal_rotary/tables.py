"""What the records of causal, serial and rotary attention say, with standard errors (chapter 13)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tokcx_lib.theory import causal, rates, rotary, serial

HALF_POWER = 0.5  # typical sizes are (E |x|^(1/2))^2: stable laws have this moment


def _mean(values: pd.Series) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean(), values.sem()


def _first_order_variance(horizon: float, n: int, mask: bool) -> float:
    """n times the variance of the first order over n independent tokens, exactly."""
    pull = serial.pull_covariance(horizon, 1.0).item()
    weights = causal.reading_weights(n) if mask else None
    first, second = (1.0, 1.0) if weights is None else (weights.mean().item(), weights.square().mean().item())
    return horizon**2 + 2 * horizon * first + second * pull


def causal_variances(table: pd.DataFrame) -> pd.DataFrame:
    """n Var of the mean of the outputs, a row for each horizon, n and mask.

    The mean of the outputs has mean zero, so this is n times the mean of its square. Columns: measured and its error;
    controlled and its error, where the square of the first order over the same tokens is taken off and its exact mean
    added; limit, the value of chapter 13 (causal) or chapter 10 (whole).
    """
    rows = []
    for (H, n), part in table.groupby(["horizon", "n"]):
        for mask in ("causal", "whole"):
            square, linear = part[mask] ** 2, part[f"{mask}_linear"] ** 2
            found, error = _mean(n * square)
            rest, rest_error = _mean(n * (square - linear))
            exact = _first_order_variance(H, n, mask == "causal")
            form = [[H]]
            limit = (causal.mean_covariance(form) if mask == "causal" else rates.influence_covariance(form)).item()
            rows.append((H, n, mask, found, error, exact + rest, rest_error, limit))
    names = ["horizon", "n", "mask", "measured", "error", "controlled", "controlled_error", "limit"]
    return pd.DataFrame(rows, columns=names)


def _size_ratio(above: pd.Series, below: pd.Series) -> tuple[float, float]:
    """Ratio of typical sizes (E |x|^{1/2})^2, and its standard error."""
    above, below = above.abs() ** HALF_POWER, below.abs() ** HALF_POWER
    ratio = above.mean() / below.mean()
    spread = (above - ratio * below).sem() / below.mean()
    return ratio ** (1 / HALF_POWER), spread * ratio ** (1 / HALF_POWER - 1) / HALF_POWER


def scale_ratios(table: pd.DataFrame, many: pd.DataFrame) -> pd.DataFrame:
    """How much wider the pull of the keys is under the mask, a row for each horizon and n.

    Ratio of typical sizes of the mean output less the queries' own part, causal over whole, on the same tokens.

    Parameters
    ----------
    table : of the record of attention; many : of that of the first order over many tokens.

    Returns
    -------
    Columns attention and first_order, each with its standard error (NaN where there is no attention); level, the ratio
    of the largest terms at this n (`causal.level_ratio`); limit.
    """
    rows = []
    for (H, n), part in table.groupby(["horizon", "n"]):
        own = part["queries"]
        found = [_size_ratio(part[f"causal{kind}"] - own, part[f"whole{kind}"] - own) for kind in ("", "_linear")]
        rows.append((H, n, *found[0], *found[1]))
    for (H, n), part in many.groupby(["horizon", "n"]):
        rows.append((H, n, np.nan, np.nan, *_size_ratio(part["causal"], part["whole"])))
    names = ["horizon", "n", "attention", "error", "first_order", "first_order_error"]
    found = pd.DataFrame(rows, columns=names).sort_values(["horizon", "n"], ignore_index=True)
    found["level"] = [causal.level_ratio(H, n) for H, n in zip(found["horizon"], found["n"])]
    found["limit"] = [causal.stable_factor(H**2) for H in found["horizon"]]
    return found


def serial_variances(table: pd.DataFrame, horizon: float) -> pd.DataFrame:
    """n Var of the mean of the outputs over serial sequences, a row for each correlation and mask."""
    rows = []
    for (r, n), part in table.groupby(["correlation", "n"]):
        for mask in ("whole", "causal"):
            found, error = _mean(n * part[mask] ** 2)
            rows.append((r, n, mask, found, error, serial.long_run_variance(horizon, r, mask == "causal")))
    return pd.DataFrame(rows, columns=["correlation", "n", "mask", "measured", "error", "limit"])


def rotary_lengths(table: pd.DataFrame, angles) -> pd.DataFrame:
    """Length of the mean output of a rotary query, a row for each load and n.

    Columns: many, the distance average, which holds for many tokens; exact, with the participation of n tokens;
    measured and its error, of the output along the exact mean.
    """
    rows, planes = [], range(len(angles))
    for (load, n), part in table.groupby(["load", "n"]):
        q = np.ravel([[load / len(angles) ** 0.5, 0.0] for _ in planes])
        exact = rotary.mean_lengths(n, q, angles)
        size = np.linalg.norm(exact)
        along = sum(part[f"along_{m}"] * exact[m] for m in planes) / size
        many = load / len(angles) ** 0.5 * np.linalg.norm(rotary.plane_factor(n, angles))
        rows.append((load, n, many, size, *_mean(along)))
    return pd.DataFrame(rows, columns=["load", "n", "many", "exact", "measured", "error"])


def plane_lengths(table: pd.DataFrame, angles) -> pd.DataFrame:
    """The same plane by plane, as shares of the query's length there: columns load, n, plane, measured, error."""
    rows = []
    for (load, n), part in table.groupby(["load", "n"]):
        unit = load / len(angles) ** 0.5
        rows += [(load, n, m, *_mean(part[f"along_{m}"] / unit)) for m in range(len(angles))]
    return pd.DataFrame(rows, columns=["load", "n", "plane", "measured", "error"])
