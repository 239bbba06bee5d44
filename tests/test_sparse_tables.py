"""Paired ratios of the errors of sparse attention, and the panels that show them."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from tokcx_lib import records
from tokcx_lib.studies.sparse import figures, tables


@pytest.fixture
def rows():
    """Two schemes on the same 2,000 sequences, which differ from each other much more than the schemes do."""
    draw = np.random.default_rng(0)
    size = draw.gamma(4.0, size=2000)
    errors = {"random": size, "top-k": 2 * size + 0.1 * draw.normal(size=2000)}
    parts = [
        pd.DataFrame({"load": 1.0, "budget": 32, "replicate": range(2000), "scheme": k, "error": v})
        for k, v in errors.items()
    ]
    return pd.concat(parts)


def test_ratios_are_paired(rows):
    (row,) = tables.compare(rows, "top-k", "random").itertuples()
    assert row.Index == (1.0, 32) and row.ratio == pytest.approx(2, abs=0.003)
    assert row.high - row.ratio == pytest.approx(1.96 * 0.1 / 2000**0.5 / 4, rel=0.1)  # not that of unpaired sizes
    assert tables.ratios(rows, ["top-k"], {"here": (1.0, 32)}).loc["top-k", "here"] == "2.00±0.00"
    assert tables.as_text(tables.compare(rows, "top-k", "random"), (1.0, 32)) == "2.00 (95%: 2.00 to 2.00)"
    with pytest.raises(ValueError, match="rows: expected errors of 'window'"):
        tables.compare(rows, "window", "random")


def test_what_a_key_is_worth():
    curve = pd.Series([0.4, 0.2, 0.1], index=[16, 64, 256])
    assert tables.worth(curve, 0.2) == pytest.approx(64) and tables.worth(curve, 0.2 / 2**0.5) == pytest.approx(128)


def test_panels_share_their_axes_and_have_one_key(rows):
    fig, axes = plt.subplots(1, 2, sharex=True, sharey=True)
    small = rows.assign(error=rows["error"] / 1000 * np.where(rows["scheme"] == "top-k", 1e-4, 1))
    figures.scheme_panels(fig, axes[None], {"one": (small, {":": 0.1})}, ["random", "top-k"], 1e-3)
    texts = [t.get_text() for t in axes[0].texts]
    assert texts == ["to $10^{-7}$"]
    assert [t.get_text() for t in axes[1].get_legend().get_texts()] == ["random", "top-k"]
    assert not axes[1].axison and axes[0].get_xlabel()
    colours = {colour for colour, _ in figures.SCHEME_LOOKS.values()}
    assert len(colours) == len(figures.SCHEME_LOOKS)
    plt.close(fig)


def test_the_window_experiment_by_hand():
    table, _ = records.load("sparse_window")
    table = table.assign(rms=np.sqrt(table["mse"]))
    loads = {(0, 11): "0.5", (4, 10): "1.9", (1, 9): "4.3"}
    here = table[(table["layer"] == 4) & (table["n"] == 4096) & (table["half_width"] == 1000)]
    mean = here.groupby("scheme")[["rms", "mean_error"]].mean()
    lines, found = tables.window_errors(table, loads)
    window, shared = mean.loc["window + random"] / mean.loc["random"], mean.loc["shared"] / mean.loc["random"]
    assert found.loc["1.9"].to_dict() == pytest.approx({"window": window["rms"], "shared": shared["mean_error"]})
    assert list(lines.index[::4].get_level_values(0)) == ["0.5", "1.9", "4.3"]
    wide = table[(table["layer"] == 4) & (table["n"] == 4096) & (table["scheme"] == "window + random")]
    logs = np.log(wide.groupby("keys")["rms"].mean())
    slope = -np.polyfit(np.log(logs.index), logs, 1)[0]
    assert float(tables.window_exponents(table, loads).loc[("1.9", "window, keys"), "outputs"].split()[0]) == (
        pytest.approx(slope, abs=0.1)
    )
