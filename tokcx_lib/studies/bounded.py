"""Tokens of bounded support: self-attention against its limit, on spheres and bodies of one covariance (chapter 6)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from tokcx_lib.sampling import sweeps
from tokcx_lib.sampling.forms import power_law_form, random_head
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory import geometry
from tokcx_lib.theory.laws import Rademacher, Uniform, UniformBall, UniformSphere
from tokcx_lib.theory.limits import Limit, bounded_limit

BODIES = {"sphere": UniformSphere, "ball": UniformBall, "cube": Uniform, "signs": Rademacher}  # bearers of the laws


def _sweep(law, A, V, limit: Limit, config: dict, device) -> sweeps.MomentSweep:
    """Attention is in float32."""
    options = {"limit": limit.moments, "dtype": torch.float32, "device": device}
    return sweeps.MomentSweep(law, A, config["lengths"], V, **options)


def _described(limit: Limit) -> dict:
    """Size of the limit, to divide errors by, and how well it is known."""
    cov = limit.moments.cov
    return {
        "mean_scale": cov.trace().sqrt().item(),  # root mean square of the outputs
        "cov_scale": torch.linalg.matrix_norm(cov).item(),
        "limit_error": limit.error,
    }


def sphere_horizon(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of tokens uniform on the unit sphere, d = 50, over scales of the logits.

    The head is random (`random_head`); all scales see the same tokens. They span the range of the scales of Bohbot,
    Letrouit, Peyré and Vialard (ICML 2026), who multiply both projections by the scale. Attention is in float32: at the
    largest scale logits are of the order of 10^4, known to about 10^-3, which moves the moments by less than 10^-5 of
    their size.
    """
    law = UniformSphere(config["dim"])
    A, V = random_head(law.dim, config["seed"])
    limits = {scale: bounded_limit(law, scale * A, V, config["points"]) for scale in config["scales"]}
    cases = {scale: _sweep(law, scale * A, V, limit, config, device) for scale, limit in limits.items()}

    def work(replicate: int) -> Part:
        rows = [sweep.table([replicate], config["seed"]).assign(scale=scale) for scale, sweep in cases.items()]
        return Part(pd.concat(rows, ignore_index=True)[["scale", "replicate", "n", "mean_error", "cov_error"]])

    def finish(table: pd.DataFrame, _) -> pd.DataFrame:
        return table.sort_values(["scale", "replicate", "n"], ignore_index=True)

    horizon = geometry.horizon(A, law.cov)
    tilt = torch.linalg.matrix_norm(A).item() / math.sqrt(law.dim)  # root mean square of |AX|
    heads = [
        {
            "scale": scale,
            "horizon": scale * horizon,
            "root_mean_square_tilt": scale * tilt,
            "root_mean_square_load": scale * tilt / math.sqrt(law.dim),
            **_described(limit),
        }
        for scale, limit in limits.items()
    ]
    return Plan([(r,) for r in range(config["replicates"])], work, {"heads": heads}, finish)


def bounded_laws(config: dict, device) -> Plan:
    """Errors of the moments for four laws of bounded support, all of covariance I in d = 8, at the same horizons.

    A = H times `forms.power_law_form(8)`, V = I. A law of variance v is used as it is, with A / v and V / sqrt(v).
    """
    dim = config["dim"]
    form = power_law_form(dim)
    cases, limits = {}, {}
    for name in config["laws"]:
        law = BODIES[name](dim)
        variance = law.cov[0, 0]
        values = torch.eye(dim, dtype=form.dtype) / variance.sqrt()
        for horizon in config["horizons"]:
            A = horizon / variance * form
            limit = limits[name, horizon] = bounded_limit(law, A, values, config["points"])
            cases[name, horizon] = _sweep(law, A, values, limit, config, device)

    def work(replicate: int) -> Part:
        rows = [
            sweep.table([replicate], config["seed"]).assign(law=name, horizon=horizon)
            for (name, horizon), sweep in cases.items()
        ]
        columns = ["law", "horizon", "replicate", "n", "mean_error", "cov_error"]
        # In the order of the record, so that a unit can be compared to its rows there.
        return Part(pd.concat(rows)[columns].sort_values(["law", "horizon", "n"], ignore_index=True))

    def finish(table: pd.DataFrame, _) -> pd.DataFrame:
        return table.sort_values(["law", "horizon", "replicate", "n"], ignore_index=True)

    described = [{"law": name, "horizon": horizon, **_described(limit)} for (name, horizon), limit in limits.items()]
    return Plan([(r,) for r in range(config["replicates"])], work, {"limits": described}, finish)


SCALES = [float(f"{scale:.6g}") for scale in np.geomspace(10, 100_000, 9)]


def _lengths(low: int, high: int, count: int) -> list[int]:
    return [round(n) for n in np.geomspace(low, high, count)]


_SPHERE = {"dim": 50, "scales": SCALES, "points": 2**16, "seed": 6_050}

EXPERIMENTS = {
    "sphere_horizon": Experiment(
        sphere_horizon,
        ("replicate",),
        full={**_SPHERE, "lengths": _lengths(1000, 30_000, 10), "replicates": 50},
        quick={"lengths": [250, 500, 1000, 2000], "points": 2**12, "replicates": 8},
    ),
    # The range of n of the paper: for a GPU, or for patience.
    "sphere_horizon_long": Experiment(
        sphere_horizon,
        ("replicate",),
        full={**_SPHERE, "lengths": _lengths(10_000, 100_000, 6), "replicates": 200},
        quick={"lengths": [500, 1000, 2000, 4000], "points": 2**12, "replicates": 8},
    ),
    "bounded_laws": Experiment(
        bounded_laws,
        ("replicate",),
        full={
            "dim": 8,
            "laws": list(BODIES),
            "horizons": [0.5, 1.0, 2.0, 4.0],
            "lengths": _lengths(300, 10_000, 8),
            "points": 2**17,
            "seed": 6_008,
            "replicates": 60,
        },
        quick={"lengths": [250, 500, 1000, 2000], "points": 2**12, "replicates": 10},
    ),
}
