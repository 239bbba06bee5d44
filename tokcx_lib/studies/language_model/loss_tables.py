"""What a model's loss is against what the errors of its heads foretell: tables of the records (chapter 14)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from scipy import stats

from tokcx_lib.validation import as_number, as_positive

LATE = 1024  # the position from which on tokens are late
ERROR = 0.1  # of a head's output, in spreads of the values: what budgets are for


def costs(table: pd.DataFrame, first: int = LATE, by: tuple[str, ...] = ("order", "keys")) -> pd.DataFrame:
    """What a token costs more when heads read some of their keys: means over articles, which are independent.

    Parameters
    ----------
    table : of the record `language_model_loss`, or one with its columns; first : the position from which tokens count.

    Returns
    -------
    DataFrame, index `by`, columns excess (nats), half, the half-width of its 95% interval over articles (Student; NaN
    of one article), factor, that of the perplexity, and articles

    Raises
    ------
    ValueError
        If no row begins at `first` or later.
    """
    rows = table[table["first"] >= as_number("first", first, least=0)]
    if rows.empty:
        raise ValueError(f"first: expected at most {table['first'].max()}, got {first}")
    rows = rows.assign(sum=rows["excess"] * rows["tokens"])
    means = rows.groupby([*by, "replicate"])[["sum", "tokens"]].sum()
    found = (means["sum"] / means["tokens"]).groupby(list(by))
    count = found.count()
    half = found.sem() * stats.t.ppf(0.975, (count - 1).clip(lower=1))
    mean = found.mean()
    return pd.DataFrame({"excess": mean, "half": half, "factor": np.exp(mean), "articles": count})


def by_position(table: pd.DataFrame, keys: int) -> pd.DataFrame:
    """Excess (nats), mean over articles, of each order with so many keys: a row an order, a column a first position."""
    rows = table[table["keys"] == keys]
    return rows.groupby(["order", "first"])["excess"].mean().unstack("first")


def forecasts(table: pd.DataFrame) -> pd.DataFrame:
    """Errors of the heads' outputs in the record `language_model_forecast`, in spreads of the values.

    Returns
    -------
    DataFrame, index order and keys, columns median, over heads, of the root mean square over articles; rms, over heads
    and articles; within, the share of the heads whose error is at most ERROR
    """
    names = [name for name in table if name.startswith("error_")]
    squares = table.set_index(["order", "layer", "head"])[names].pow(2).groupby(["order", "layer", "head"]).mean()
    squares.columns = pd.Index([int(name.removeprefix("error_")) for name in names], name="keys")
    long = squares.stack().rename("square").reset_index()
    groups = long.groupby(["order", "keys"])["square"]
    found = pd.DataFrame({"median": groups.median() ** 0.5, "rms": groups.mean() ** 0.5})
    return found.assign(within=groups.apply(lambda each: (each <= ERROR**2).mean()))


def budgets(table: pd.DataFrame) -> pd.DataFrame:
    """Keys that heads need in the record `language_model_forecast`, each head the median over articles.

    Returns
    -------
    DataFrame, index order, columns half, nine_tenths and every: keys that are enough for that share of the heads; mean,
    what heads need on average
    """
    each = table.groupby(["order", "layer", "head"])["budget"].median().groupby("order")
    shares = {"half": 0.5, "nine_tenths": 0.9, "every": 1.0}
    found = {name: each.quantile(share, interpolation="higher") for name, share in shares.items()}
    return pd.DataFrame({**found, "mean": each.mean()})


def enough(excess: pd.Series, most: float) -> float:
    """The number of keys at which a loss that falls with them is `most` nats: log-log between those measured.

    Parameters
    ----------
    excess : nats, index keys, increasing; most : positive.

    Returns
    -------
    float; the first of the keys if that is enough, NaN if the last is not
    """
    most = as_positive("most", most)
    above = np.flatnonzero(excess.to_numpy() > most)
    if len(above) == 0:
        return float(excess.index[0])
    if above[-1] == len(excess) - 1:
        return math.nan
    ends = excess.iloc[[above[-1] + 1, above[-1]]].clip(lower=1e-6)
    return float(np.exp(np.interp(math.log(most), np.log(ends), np.log(ends.index.to_numpy(dtype=float)))))


def foretold(loss: pd.DataFrame, forecast: pd.DataFrame, first: int = LATE) -> pd.DataFrame:
    """Errors of heads beside the loss, for each order and number of keys: columns of `forecasts` and `costs`."""
    return forecasts(forecast).join(costs(loss, first), how="inner").sort_values("rms")


def agreement(table: pd.DataFrame, error: str = "rms") -> dict[str, float]:
    """How far errors of heads foretell the loss, from `foretold`.

    Returns
    -------
    dict of float
        rank, the rank correlation of error and excess over all orders and numbers of keys; exponent, the slope of log
        excess against log error, and scatter, the standard deviation about that line as a factor
    """
    rank = stats.spearmanr(table[error], table["excess"]).statistic
    some = table[table["excess"] > 0]
    x, y = np.log(some[error]), np.log(some["excess"])
    slope, intercept = np.polyfit(x, y, 1)
    return {
        "rank": float(rank),
        "exponent": float(slope),
        "scatter": math.exp(np.std(y - slope * x - intercept, ddof=2)),
    }
