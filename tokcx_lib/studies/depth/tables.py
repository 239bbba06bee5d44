"""What chapter 12 reads off its records of a real model: errors layer by layer, and those of the heads of a layer."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tokcx_lib.records import Record
from tokcx_lib.sampling import fits
from tokcx_lib.validation import as_count, as_kind

SIZES = ["error", "fresh", "inherited", "before", "spread"]


def model_layers(table: pd.DataFrame) -> pd.DataFrame:
    """Errors of hidden states, from the table of `depth_model` or of `layerwise.layer_errors` with a column n.

    Returns
    -------
    DataFrame, indexed by n and layer: root mean squares over contexts of error, fresh, inherited, before and spread;
    passed, inherited / before, NaN in layer 1; alike, the mean inner product of fresh and inherited errors over the
    product of their sizes, 0 in layer 1; together, error^2 / (fresh^2 + inherited^2).
    """
    groups = as_kind("table", table, pd.DataFrame).groupby(["n", "layer"])
    rms = groups[SIZES].agg(lambda values: float(np.sqrt(np.mean(np.square(values)))))
    first = rms.index.get_level_values("layer") == 1
    rms["passed"] = (rms["inherited"] / rms["before"].where(~first)).where(~first)
    rms["alike"] = (groups["cross"].mean() / (rms["fresh"] * rms["inherited"])).where(~first, 0.0)
    rms["together"] = rms["error"] ** 2 / (rms["fresh"] ** 2 + rms["inherited"] ** 2)
    return rms


def model_exponents(table: pd.DataFrame, context: int) -> pd.DataFrame:
    """Exponents of the error after each layer, `fits.fit_slopes` by layer.

    Keys are drawn without replacement from `context` of them, and all of them make no error: the fit is to
    error / sqrt(1 - n / context).
    """
    left = np.sqrt(1 - as_kind("table", table, pd.DataFrame)["n"] / as_count("context", context))
    return fits.fit_slopes(table.assign(error=table["error"] / left), "error", "layer")


def head_layers(record: Record) -> pd.DataFrame:
    """Errors of the heads of each layer at the largest n, in units of the spread of the output; record `depth_heads`.

    Returns
    -------
    DataFrame, indexed by layer: total, of the sum of the heads; quadrature, what it would be for independent ones;
    worst and mean head; agreed, what it would be if all errors pointed the same way; lowest and highest, over n, of
    the root mean square of total / quadrature; expected, the same to first order; exponent, low and high of total.
    """
    table, about = as_kind("record", record, Record).table, record.meta["layers"]
    last = table[table["n"] == table["n"].max()].groupby("layer").mean()
    heads = last.filter(like="head_")
    found = last[["total", "quadrature"]].assign(worst=heads.max(axis=1), mean=heads.mean(axis=1))
    found["agreed"] = heads.sum(axis=1)
    squares = (table["total"] / table["quadrature"]) ** 2
    ratio = np.sqrt(squares.groupby([table["layer"], table["n"]]).mean())
    found["lowest"], found["highest"] = ratio.groupby("layer").min(), ratio.groupby("layer").max()
    first = {layer: np.array(about[str(layer)]["first_order"]) for layer in found.index}
    found["expected"] = pd.Series({layer: np.sqrt(c.sum() / c.trace()) for layer, c in first.items()})
    return found.join(fits.fit_slopes(table, "total", "layer")[["layer", "exponent", "low", "high"]].set_index("layer"))


def head_pairs(record: Record, n: int) -> pd.DataFrame:
    """Correlation of the errors of every two heads of a layer after the output projection, from `depth_heads`.

    Returns
    -------
    DataFrame, one row a pair: layer, head, other, measured at n tokens, and expected, to first order.
    """
    meta = as_kind("record", record, Record).meta
    if n not in meta["config"]["lengths"]:
        raise ValueError(f"n: expected one of {', '.join(map(str, meta['config']['lengths']))}, got {n}")
    rows = []
    for layer, kept in meta["layers"].items():
        measured = np.array(kept["correlation"][meta["config"]["lengths"].index(n)])
        first = np.array(kept["first_order"])
        size = np.sqrt(first.diagonal())
        for i, j in zip(*np.triu_indices(len(first), 1)):
            rows.append((int(layer), i, j, measured[i, j], first[i, j] / (size[i] * size[j])))
    return pd.DataFrame(rows, columns=["layer", "head", "other", "measured", "expected"])
