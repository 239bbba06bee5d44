"""How often the intervals of `fits.fit_slope` hold the true slope, in simulated sweeps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from tokcx_lib import runtime
from tokcx_lib.sampling import fits, sweeps
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory.laws import Gaussian

RUNNING = "running mean"


def running_means(lengths, replicates: int, generator) -> np.ndarray:
    """|mean| of the first n of one draw of standard normal numbers, (replicates, lengths): exponent exactly 1/2.

    Sums over the stretches between lengths are drawn, not the numbers themselves: their law is the same.
    """
    rng = np.random.default_rng(generator.initial_seed())
    sums = rng.normal(size=(replicates, len(lengths))) * np.sqrt(np.diff(lengths, prepend=0))
    return np.abs(sums.cumsum(1)) / np.asarray(lengths)


def usual_interval(table: pd.DataFrame, error: str, level: float = 0.95) -> tuple[float, float]:
    """The interval of a textbook regression of log mean error on log n: it takes the errors at all n as independent."""
    mean = table.groupby("n")[error].mean()
    line = stats.linregress(np.log(mean.index), np.log(mean))
    margin = stats.t.ppf((1 + level) / 2, len(mean) - 2) * line.stderr
    return -line.slope - margin, -line.slope + margin


def curves(config: dict, sweep: int, device=None) -> dict[str, pd.DataFrame]:
    """The error curves of one simulated sweep, by name: columns replicate, n and error."""
    lengths, count = config["lengths"], max(config["sizes"])
    index = pd.MultiIndex.from_product([range(count), lengths], names=["replicate", "n"])
    errors = running_means(lengths, count, runtime.stream(config["seed"], sweep, 1))
    found = {RUNNING: pd.DataFrame({"error": errors.ravel()}, index).reset_index()}
    numbers = range(sweep * count, (sweep + 1) * count)
    heads = sweeps.MomentSweep(Gaussian(1.0), [[1.0]], lengths, scales=config["horizons"], device=device)
    table = heads.table(numbers, config["seed"])
    table["replicate"] -= sweep * count
    for horizon, part in table.groupby("scale"):
        for error, name in (("mean_error", "mean"), ("cov_error", "variance")):
            part = part.reset_index(drop=True)
            found[f"{name}, H = {horizon:g}"] = part[["replicate", "n"]].assign(error=part[error])
    return found


def interval_coverage(config: dict, device) -> Plan:
    """Intervals of the slope from simulated sweeps, beside the true slope, known from elsewhere.

    Curves: a running mean of normal numbers, whose mean error is sqrt(2 / (pi n)) exactly; and self-attention of
    standard normal tokens in d = 1, A = H, errors of mean and variance. There the truth is the slope, over the same
    lengths, of the mean over all replicates of all *other* sweeps. A sweep's first replicates, as many as each of
    `sizes` says, make the sweeps of fewer replicates. Columns `usual_low` and `usual_high`: `usual_interval`; `covered`
    and `usual_covered`: whether the intervals hold the truth.
    """
    lengths, sizes, count = config["lengths"], config["sizes"], config["sweeps"]

    def work(sweep: int) -> Part:
        rows, means = [], {}
        for name, table in curves(config, sweep, device).items():
            means[name] = table.groupby("n")["error"].mean().to_numpy()
            for size in sizes:
                part = table[table["replicate"] < size]
                slope = fits.fit_slope(part, "error", seed=sweep)
                usual = dict(zip(("usual_low", "usual_high"), usual_interval(part, "error")))
                found = {key: getattr(slope, key) for key in ("exponent", "low", "high", "curvature", "straight")}
                rows.append({"sweep": sweep, "curve": name, "size": size, **found, **usual})
        return Part(pd.DataFrame(rows), means)

    def finish(table: pd.DataFrame, arrays) -> pd.DataFrame:
        names = [name for name in arrays[0] if name != RUNNING]
        truth = {(RUNNING, sweep): 0.5 for sweep in range(count)}
        for name in names:
            means = np.stack([each[name] for each in arrays])
            others = (means.sum(0) - means) / (count - 1)
            slopes = -np.polyfit(np.log(lengths), np.log(others).T, 1)[0]
            truth.update({(name, sweep): slope for sweep, slope in enumerate(slopes.tolist())})
        known = pd.Series([truth[key] for key in zip(table["curve"], table["sweep"])])
        return table.assign(
            truth=known,
            covered=known.between(table["low"], table["high"]),
            usual_covered=known.between(table["usual_low"], table["usual_high"]),
        )

    return Plan([(sweep,) for sweep in range(count)], work, {}, finish)


EXPERIMENTS = {
    "interval_coverage": Experiment(
        interval_coverage,
        ("sweep",),
        full={
            "horizons": [0.5, 2.0],
            "lengths": [20, 29, 41, 58, 83, 118, 169, 241, 344, 491, 701, 1000],
            "sizes": [20, 40, 200],
            "sweeps": 300,
            "seed": 20_264_000,
        },
        quick={"sizes": [20, 40], "sweeps": 20},
    )
}
