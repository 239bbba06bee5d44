"""Gaussian tokens: self-attention against its closed-form limit, over horizons and dimensions (chapters 3 and 5)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from tokcx_lib import geometry, runtime, sweeps
from tokcx_lib.laws import Gaussian
from tokcx_lib.runs import Experiment, Part, Plan


def gaussian_moments(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of standard normal tokens, V = I, over horizons, in d = 1 and d = 8.

    d = 1: A = H, in float64. d = 8: A is H times `sweeps.power_law_form(8)`, in float32, with fewer tokens and
    replicates. All horizons of a replicate see the same tokens.
    """
    runs = {int(dim): run for dim, run in config["runs"].items()}

    def work(dim: int, replicate: int) -> Part:
        law = Gaussian(torch.eye(dim, dtype=torch.float64))
        form = law.cov if dim == 1 else sweeps.power_law_form(dim)
        table = sweeps.horizon_sweep(
            law,
            form,
            None,
            config["horizons"],
            runs[dim]["lengths"],
            [replicate],
            seed=config["seed"] + dim,
            dtype=torch.float64 if dim == 1 else torch.float32,
            device=device,
        ).rename(columns={"scale": "horizon"})
        table.insert(0, "dim", dim)
        return Part(table)

    def finish(table: pd.DataFrame, _) -> pd.DataFrame:
        return table.sort_values(["dim", "horizon", "replicate", "n"], ignore_index=True)

    units = [(dim, replicate) for dim, run in runs.items() for replicate in range(run["replicates"])]
    replicates = " and ".join(f"{run['replicates']} (d = {dim})" for dim, run in runs.items())
    return Plan(units, work, {"replicates": replicates}, finish)


def random_head(dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A = W_K' W_Q / sqrt(dim) and V, of a head whose three matrices have independent entries N(0, 1 / dim), float64."""
    stream = runtime.stream(seed)
    query, key, value = torch.randn((3, dim, dim), generator=stream, dtype=torch.float64) / math.sqrt(dim)
    return key.mT @ query / math.sqrt(dim), value


def gaussian_horizon(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of Gaussian tokens with covariance `variance` I, in d = 50, over scales.

    The head is random (`random_head`); its logits are multiplied by each of `scales`, on the same tokens. The grid is
    that of Bohbot, Letrouit, Peyré and Vialard (ICML 2026); the limit is in closed form, where they sample it.
    Column `second_dot`: `sweeps.leave_one_out`, whose mean over replicates is the squared norm of the mean error of the
    second moment, without bias.
    """
    dim, scales, lengths = config["dim"], config["scales"], config["lengths"]
    cov = config["variance"] * torch.eye(dim, dtype=torch.float64)
    law = Gaussian(cov)
    A, V = random_head(dim, config["seed"])
    upper = torch.triu_indices(dim, dim)
    # A symmetric matrix as a vector of the same norm: entries off the diagonal count twice.
    weight = torch.where(upper[0] == upper[1], 1.0, math.sqrt(2))

    def work(replicate: int) -> Part:
        table, second = sweeps.horizon_errors(
            law, A, V, scales, lengths, replicate, config["seed"], dtype=torch.float32, device=device
        )
        packed = (second[..., upper[0], upper[1]] * weight).float().numpy()
        return Part(table, {"second": packed})

    def finish(table: pd.DataFrame, arrays) -> pd.DataFrame:
        dots = sweeps.leave_one_out(np.stack([each["second"] for each in arrays]))  # replicates, scales, lengths
        return table.assign(second_dot=dots.reshape(-1)).sort_values(["scale", "replicate", "n"], ignore_index=True)

    horizon = geometry.horizon(A, cov)
    load = config["variance"] * torch.linalg.matrix_norm(A).item()  # E s^2 = |cov^1/2 A cov^1/2|_F^2
    heads = [{"scale": s, "horizon": s * horizon, "root_mean_square_load": s * load} for s in scales]
    return Plan([(r,) for r in range(config["replicates"])], work, {"heads": heads}, finish)


HORIZONS = [0.01, 0.03, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]

EXPERIMENTS = {
    "gaussian_moments": Experiment(
        gaussian_moments,
        ("dim", "replicate"),
        full={
            "horizons": HORIZONS,
            "runs": {
                1: {"lengths": [100, 300, 1000, 3000, 10_000, 30_000, 100_000], "replicates": 400},
                8: {"lengths": [100, 300, 1000, 3000, 10_000, 30_000], "replicates": 24},
            },
            "seed": 20_260_000,
        },
        quick={
            "runs": {
                1: {"lengths": [100, 300, 1000, 3000], "replicates": 20},
                8: {"lengths": [100, 300, 1000], "replicates": 10},
            },
        },
    ),
    "gaussian_horizon": Experiment(
        gaussian_horizon,
        ("replicate",),
        full={
            "dim": 50,
            "variance": 0.1,
            "scales": [float(f"{scale:.6g}") for scale in np.geomspace(0.05, 50, 12)],
            "lengths": [round(n) for n in np.geomspace(1000, 30_000, 12)],
            "replicates": 200,
            "seed": 5_050,
        },
        quick={"lengths": [250, 500, 1000, 2000], "replicates": 10},
    ),
}
