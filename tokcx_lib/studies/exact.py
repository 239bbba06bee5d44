"""Simulated errors of the moments of self-attention, and the exact bias of `moment_bias` beside them (chapter 9)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.sampling import sweeps
from tokcx_lib.sampling.forms import random_head
from tokcx_lib.sampling.streaming import partial_attention
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory import geometry, moment_bias, rates

QUERIES = 4000  # that the prediction of the query's own token averages over
QUANTITIES = ("second", "cov", "shared")


class MomentErrors(NamedTuple):
    """Errors of moments, (lists, d, d) each, of self-attention with V = I: unbiased, see `moment_errors`.

    `plain` (1/n) sum Gamma_n Gamma_n' - C as it is; `second` the same with its control variates; `shared` m_n m_n'
    with its own; the error of the covariance is `second` - `shared`.
    """

    plain: Tensor
    second: Tensor
    shared: Tensor


def moment_errors(tokens: Tensor, B: Tensor) -> MomentErrors:
    """Errors of the moments of self-attention over lists of whitened tokens (lists, n, d), logits <B x, z>, V = I.

    Three control variates, each of mean exactly zero whatever n, each with the coefficient 1, fixed beforehand:

    * (1/n) sum Gamma(x_i) Gamma(x_i)' - BB', what the queries would scatter at infinitely many keys;
    * the error of first order, (1/n^2) sum_{i != j} Gamma(x_i) h_ij' and its transpose, where h_ij = e^{<t_i, x_j> -
      |t_i|^2/2} (x_j - t_i), t_i = B x_i, has mean zero over x_j; sum_j h_ij is n D_i (Gamma_n(x_i) - t_i), with D_i
      the normaliser of the softmax over its mean;
    * for m_n m_n', that of the mean of (I + B) x_i, whose second moment is (I + B)(I + B)' / n.
    """
    lists, n, dim = tokens.shape
    t = tokens @ B.to(tokens).mT
    output, lse = partial_attention(t[:, None], tokens[:, None], tokens[:, None])
    x, t, output = tokens.double(), t.double(), output[:, 0].double()
    half = (t**2).sum(-1, keepdim=True) / 2
    normaliser = torch.exp(lse[:, 0, :, None].double() - half) / n
    itself = torch.exp((t * x).sum(-1, keepdim=True) - half) / n
    error = output - t
    cross = error.mT @ t / n
    first = (normaliser * error - itself * (x - t)).mT @ t / n
    eye, form = torch.eye(dim).to(x), B.to(x)
    fluctuation = t.mT @ t / n - form @ form.mT
    gap = error.mT @ error / n + cross + cross.mT
    mean, linear = output.mean(1), (x + t).mean(1)
    outer = lambda v: v[:, :, None] * v[:, None, :]  # noqa: E731
    product = outer(mean)
    shared = product - outer(linear) + (eye + form) @ (eye + form).mT / n
    # second = covariance (with its controls) + shared (with its own).
    return MomentErrors(gap + fluctuation, gap - first - first.mT - product + shared, shared)


def second_moment_bias(config: dict, device) -> Plan:
    """Mean errors of the second moment and the covariance of self-attention in d = 50, at three horizons and three n.

    Tokens N(0, `variance` I), the random head of `gaussian_horizon`, scaled to each horizon. A replicate is the mean
    over `lists` lists of n tokens. Columns `*_along`: component of the error along a fixed direction, that of the
    prediction for fresh queries (`second`, `plain`), of it less the shared keys (`cov`), and of the shared keys
    (`shared`). Columns `*_dot`: `sweeps.leave_one_out`, whose mean is the squared norm of the mean error.
    """
    dim, horizons = config["dim"], config["horizons"]
    cov = config["variance"] * torch.eye(dim, dtype=torch.float64)
    A, V = random_head(dim, config["head_seed"])
    unit = config["variance"] * A / geometry.horizon(A, cov)
    V = V * math.sqrt(config["variance"])
    runs = {int(n): run for n, run in config["runs"].items()}
    direction = {}
    for n in runs:
        for horizon in horizons:
            bias = moment_bias.second_moment_bias(n, horizon * unit, V)
            shared = rates.influence_covariance(horizon * unit, V)
            for name, matrix in (("second", bias), ("cov", bias - shared / n), ("shared", shared)):
                direction[name, n, horizon] = matrix / torch.linalg.matrix_norm(matrix)

    def work(n: int, replicate: int) -> Part:
        shape = (runs[n]["lists"], n, dim)
        stream = runtime.stream(config["seed"], n, replicate)
        tokens = torch.randn(shape, generator=stream, dtype=torch.float64).to(device, torch.float32)
        rows, packed = [], {"second": [], "cov": [], "shared": []}
        for horizon in horizons:
            plain, second, shared = (V @ part.mean(0).cpu() @ V.mT for part in moment_errors(tokens, horizon * unit))
            found = {"second": second, "cov": second - shared, "shared": shared}
            row = {"n": n, "replicate": replicate, "horizon": horizon}
            row["plain_along"] = (plain * direction["second", n, horizon]).sum().item()
            for name, matrix in found.items():
                row[f"{name}_along"] = (matrix * direction[name, n, horizon]).sum().item()
                packed[name].append(sweeps.packed(matrix).numpy())
            rows.append(row)
        return Part(pd.DataFrame(rows), {name: np.stack(parts) for name, parts in packed.items()})

    def finish(table: pd.DataFrame, arrays) -> pd.DataFrame:
        for name in ("second", "cov", "shared"):
            dots = []
            for n in runs:
                chosen = [each[name] for (m, _), each in zip(units, arrays) if m == n]
                dots.append(sweeps.leave_one_out(np.stack(chosen)).reshape(-1))  # replicates, horizons
            table[f"{name}_dot"] = np.concatenate(dots)
        return table

    units = [(n, replicate) for n, run in runs.items() for replicate in range(run["replicates"])]
    replicates = ", ".join(f"{run['replicates']} x {run['lists']} (n = {n})" for n, run in runs.items())
    return Plan(units, work, {"replicates": replicates}, finish)


def head_of(config: dict) -> tuple[Tensor, Tensor]:
    """The random head of the record `second_moment_bias`: its form of horizon 1 and its values, of whitened tokens."""
    A, V = random_head(config["dim"], config["head_seed"])
    return A / torch.linalg.matrix_norm(A, 2), V * math.sqrt(config["variance"])


def predicted(n: int, horizon: float, form: Tensor, V: Tensor) -> dict[str, Tensor]:
    """Mean errors of the moments of self-attention that theory predicts at n tokens: (d, d) matrices by name.

    `fresh`: bias of the second moment, for fresh queries; `second`: the same with the query's own token; `shared`: E m
    m' of the mean, what single tokens explain of it at this n; `limit`: its first order; `cov` = `second` - `shared`.
    The own token and the shared keys are averages over drawn queries and tokens, with fixed seeds.

    Source: chapter 9.
    """
    B = horizon * form
    x, z = torch.randn((2, QUERIES, len(form)), generator=runtime.stream(92), dtype=torch.float64)
    fresh = moment_bias.second_moment_bias(n, B, V)
    second = fresh + moment_bias.own_token_bias(n, B, V, x)
    few = 300 if horizon < 0.3 else 1000
    shared = moment_bias.shared_keys_projection(n, B, V, x[:few], z[:few])
    limit = rates.influence_covariance(B, V) / n
    return {"fresh": fresh, "second": second, "cov": second - shared, "shared": shared, "limit": limit}


def against_measured(record) -> pd.DataFrame:
    """What is predicted and measured at each n and horizon of the record `second_moment_bias`.

    Columns n, horizon, quantity (`QUANTITIES`); exact and measured, norms of the mean error, and error, the standard
    error of the measured one; first, projected, along and along_error: the component of E m m' along its first order,
    in the limit, as projected on single tokens, and measured with its standard error; own_token, what the
    query's own token adds to the norm of the second moment's.
    """
    form, V = head_of(record.meta["config"])
    rows = []
    for (n, horizon), table in record.table.groupby(["n", "horizon"]):
        known = predicted(int(n), horizon, form, V)
        unit = known["limit"] / torch.linalg.matrix_norm(known["limit"])
        first, projected = ((known[name] * unit).sum().item() for name in ("limit", "shared"))
        along = {"first": first, "projected": projected}
        along |= {"along": table["shared_along"].mean(), "along_error": table["shared_along"].sem()}
        own = torch.linalg.matrix_norm(known["second"]) - torch.linalg.matrix_norm(known["fresh"])
        for name in QUANTITIES:
            measured, error = norm_of_mean(table[f"{name}_dot"])
            exact = torch.linalg.matrix_norm(known[name]).item()
            row = {"n": n, "horizon": horizon, "quantity": name, "exact": exact, "measured": measured, "error": error}
            rows.append(row | along | {"own_token": own.item()})
    return pd.DataFrame(rows)


def norm_of_mean(dots) -> tuple[float, float]:
    """Norm of a mean matrix and its standard error, from unbiased estimates of its square (`sweeps.leave_one_out`).

    The mean of these is a sum over pairs of replicates, each of which is in two of its factors: its standard error is
    twice that of as many independent numbers.
    """
    norm = math.sqrt(dots.mean())
    return norm, dots.sem() / norm


def over_the_sweep(record, count: int = 5) -> pd.DataFrame:
    """The second moment of the record `gaussian_horizon` beside the exact law, at its `count` largest horizons.

    Columns horizon, load (root mean square), n; exact, the norm of the mean error; square, an unbiased estimate of its
    square, and error, the standard error of that; score, their distance in standard errors.
    """
    config = record.meta["config"]
    form, V = head_of({"dim": config["dim"], "head_seed": config["seed"], "variance": config["variance"]})
    rows = []
    for head in record.meta["heads"][-count:]:
        of_head = record.table[record.table["scale"] == head["scale"]]
        for n, dots in of_head.groupby("n")["second_dot"]:
            bias = moment_bias.second_moment_bias(n, head["horizon"] * form, V)
            row = {"horizon": head["horizon"], "load": head["root_mean_square_load"], "n": n}
            row |= {"exact": torch.linalg.matrix_norm(bias).item(), "square": dots.mean(), "error": 2 * dots.sem()}
            rows.append(row | {"score": (row["square"] - row["exact"] ** 2) / row["error"]})
    return pd.DataFrame(rows)


EXPERIMENTS = {
    "second_moment_bias": Experiment(
        second_moment_bias,
        ("n", "replicate"),
        full={
            "dim": 50,
            "variance": 0.1,
            "horizons": [0.25, 0.5, 0.76],
            "runs": {
                250: {"lists": 16, "replicates": 150},
                1000: {"lists": 4, "replicates": 300},
                4000: {"lists": 1, "replicates": 400},
            },
            "head_seed": 5_050,
            "seed": 9_001,
        },
        quick={
            "runs": {
                250: {"lists": 16, "replicates": 10},
                1000: {"lists": 2, "replicates": 10},
            },
        },
        tolerance=2e-3,  # float32 attention; a control variate takes away most of each number
    ),
}
