"""Gaussian tokens: self-attention against its closed-form limit, over horizons and dimensions (chapters 3 and 5)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from tokcx_lib import runtime
from tokcx_lib.sampling import sweeps
from tokcx_lib.sampling.forms import power_law_form, random_head
from tokcx_lib.sampling.streaming import self_attention_moments
from tokcx_lib.studies.runs import Experiment, Part, Plan
from tokcx_lib.theory import geometry
from tokcx_lib.theory.laws import Gaussian
from tokcx_lib.theory.limits import gaussian_limit


def _white(dim: int) -> Gaussian:
    return Gaussian(torch.eye(dim, dtype=torch.float64))


def gaussian_moments(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of standard normal tokens, V = I, over horizons, in d = 1 and d = 8.

    d = 1: A = H, in float64. d = 8: A is H times `forms.power_law_form(8)`, in float32, with fewer tokens and
    replicates. All horizons of a replicate see the same tokens.
    """
    runs = {int(dim): run for dim, run in config["runs"].items()}
    heads = {}
    for dim, run in runs.items():
        law = _white(dim)
        form, dtype = (law.cov, torch.float64) if dim == 1 else (power_law_form(dim), torch.float32)
        heads[dim] = sweeps.MomentSweep(
            law, form, run["lengths"], scales=config["horizons"], dtype=dtype, device=device
        )

    def work(dim: int, replicate: int) -> Part:
        table = heads[dim].table([replicate], config["seed"] + dim).rename(columns={"scale": "horizon"})
        table.insert(0, "dim", dim)
        return Part(table)

    def finish(table: pd.DataFrame, _) -> pd.DataFrame:
        return table.sort_values(["dim", "horizon", "replicate", "n"], ignore_index=True)

    units = [(dim, replicate) for dim, run in runs.items() for replicate in range(run["replicates"])]
    replicates = " and ".join(f"{run['replicates']} (d = {dim})" for dim, run in runs.items())
    return Plan(units, work, {"replicates": replicates}, finish)


def gaussian_horizon(config: dict, device) -> Plan:
    """Errors of the moments of self-attention of Gaussian tokens with covariance `variance` I, in d = 50, over scales.

    The head is random (`forms.random_head`); its logits are multiplied by each of `scales`, on the same tokens. The
    grid is that of Bohbot, Letrouit, Peyré and Vialard (ICML 2026); the limit is in closed form, where they sample it.
    Column `second_dot`: `sweeps.leave_one_out`, whose mean over replicates is the squared norm of the mean error of the
    second moment, without bias.
    """
    dim, scales = config["dim"], config["scales"]
    cov = config["variance"] * torch.eye(dim, dtype=torch.float64)
    A, V = random_head(dim, config["seed"])
    sweep = sweeps.MomentSweep(
        Gaussian(cov), A, config["lengths"], V, scales=scales, dtype=torch.float32, device=device
    )

    def work(replicate: int) -> Part:
        table, second = sweep.errors(replicate, config["seed"])
        return Part(table, {"second": sweeps.packed(second).float().numpy()})

    def finish(table: pd.DataFrame, arrays) -> pd.DataFrame:
        dots = sweeps.leave_one_out(np.stack([each["second"] for each in arrays]))  # replicates, scales, lengths
        return table.assign(second_dot=dots.reshape(-1)).sort_values(["scale", "replicate", "n"], ignore_index=True)

    horizon = geometry.horizon(A, cov)
    load = config["variance"] * torch.linalg.matrix_norm(A).item()  # E s^2 = |cov^1/2 A cov^1/2|_F^2
    heads = [{"scale": s, "horizon": s * horizon, "root_mean_square_load": s * load} for s in scales]
    return Plan([(r,) for r in range(config["replicates"])], work, {"heads": heads}, finish)


SPECTRA = {"rank one": math.inf, "1/k": 1.0, "1/sqrt(k)": 0.5, "flat": 0.0}  # decay of the singular values


def gaussian_spectra(config: dict, device) -> Plan:
    """Errors of heads of equal horizons and different effective rank, on the same whitened tokens (chapter 5).

    A is the horizon times `forms.power_law_form` of each decay in `SPECTRA`; V = I.
    """
    dim = config["dim"]
    forms = {name: power_law_form(dim, config["seed"], decay) for name, decay in SPECTRA.items()}

    heads = _sweeps(_white(dim), forms, config, device)

    def work(replicate: int) -> Part:
        return Part(_by_head(heads, replicate, config["seed"]))

    loads = {name: torch.linalg.matrix_norm(form).item() for name, form in forms.items()}
    return Plan([(r,) for r in range(config["replicates"])], work, {"root_mean_square_load_per_horizon": loads})


def _sweeps(law: Gaussian, forms: dict, config: dict, device) -> dict[str, sweeps.MomentSweep]:
    """Sweeps over all horizons for named forms of horizon 1, V = I, in float32."""
    options = {"scales": config["horizons"], "dtype": torch.float32, "device": device}
    return {name: sweeps.MomentSweep(law, form, config["lengths"], **options) for name, form in forms.items()}


def _by_head(heads: dict[str, sweeps.MomentSweep], replicate: int, seed: int) -> pd.DataFrame:
    """Rows of one replicate for each of several heads, at all horizons, on the same tokens if their law is the same."""
    tables = []
    for name, sweep in heads.items():
        table = sweep.table([replicate], seed).rename(columns={"scale": "horizon"})
        table.insert(0, "head", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def gaussian_dimensions(config: dict, device) -> Plan:
    """Errors over dimensions, for whitened tokens and V = I, of two heads of equal horizons (chapter 5).

    Head `random` is `forms.random_head` divided by its horizon, so that its load grows with the dimension; head `1/k`
    is `forms.power_law_form`, whose load hardly does. In one dimension a head of horizon 1 is a sign: with the seed of
    the record `random` is 1 and `1/k` is -1. Small dimensions spread more and cost less: `factors` says how many
    times `replicates` each of them gets.
    """

    factors = {int(dim): factor for dim, factor in config["factors"].items()}
    heads = {}
    for dim in factors:
        form = random_head(dim, config["seed"])[0]
        forms = {"random": form / torch.linalg.matrix_norm(form, 2), "1/k": power_law_form(dim, config["seed"])}
        heads[dim] = _sweeps(_white(dim), forms, config, device)

    def work(dim: int, replicate: int) -> Part:
        table = _by_head(heads[dim], replicate, config["seed"] + dim)
        table.insert(0, "dim", dim)
        return Part(table)

    units = [(dim, r) for dim, factor in factors.items() for r in range(factor * config["replicates"])]
    described = ", ".join(f"{factor * config['replicates']} (d = {dim})" for dim, factor in factors.items())
    return Plan(units, work, {"replicates": described})


def stretched_tokens(dim: int, condition: float) -> torch.Tensor:
    """Eigenvalues (dim,) of a covariance, from 1 down to 1 / condition in equal ratios, float64."""
    return condition ** -torch.linspace(0, 1, dim, dtype=torch.float64)


def reach_cases(dim: int, condition: float, reach: float, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Covariances and forms (Sigma, A) of equal two-sided horizon 1, whose reach and one-sided horizon differ.

    With B = Sigma^1/2 A Sigma^1/2 in random bases: ``round`` tokens, covariance I; ``stretched`` ones, of unit reach;
    ``far``, the same with another reach. ``aligned``: stretched tokens whose long axes are those that B looks along.
    """
    values, B = stretched_tokens(dim, condition), power_law_form(dim, seed)
    shapes = {
        "round": (torch.ones_like(values), B),
        "stretched": (values, B),
        "far": (reach * values, B),
        "aligned": (values, torch.diag(1 / torch.arange(1, dim + 1, dtype=torch.float64))),
    }
    return {name: (torch.diag(v), b / v.sqrt() / v.sqrt()[:, None]) for name, (v, b) in shapes.items()}


def gaussian_reach(config: dict, device) -> Plan:
    """Errors for tokens that are not isotropic: reach and one-sided horizon differ, the coupling does not (chapter 5).

    The cases of `reach_cases`, V = I, each on tokens of its own.
    """
    cases = reach_cases(config["dim"], config["condition"], config["reach"], config["seed"])
    heads = [_sweeps(Gaussian(cov), {name: form}, config, device) for name, (cov, form) in cases.items()]

    def work(replicate: int) -> Part:
        tables = [_by_head(head, replicate, config["seed"] + number) for number, head in enumerate(heads)]
        return Part(pd.concat(tables, ignore_index=True))

    described = {
        name: {
            "reach": geometry.reach(cov),
            "one_sided_horizon": geometry.horizon(form, cov, "one"),
            "one_sided_coupling": geometry.coupling(form, cov, "one"),
            "coupling": geometry.coupling(form, cov),
        }
        for name, (cov, form) in cases.items()
    }
    return Plan([(r,) for r in range(config["replicates"])], work, {"cases": described})


def value_matrices(dim: int, seed: int) -> dict[str, torch.Tensor]:
    """Value matrices for the head `forms.power_law_form(dim, seed)`, whose leading key direction is u, float64.

    ``identity``; ``random`` as in `forms.random_head`; ``along``, which keeps the direction u only; ``across``, all but
    u.
    """
    form = power_law_form(dim, seed)
    u = torch.linalg.svd(form).U[:, 0]
    along, one = torch.outer(u, u), torch.eye(dim, dtype=torch.float64)
    return {"identity": one, "random": random_head(dim, seed)[1], "along": along, "across": one - along}


def gaussian_values(config: dict, device) -> Plan:
    """Errors of one head under four value matrices, on whitened tokens (chapter 5).

    Weights do not depend on values and outputs are linear in them: attention is computed once, for V = I.
    """
    dim, lengths, law = config["dim"], config["lengths"], _white(config["dim"])
    form, values = power_law_form(dim, config["seed"]), value_matrices(dim, config["seed"])

    def work(replicate: int) -> Part:
        tokens = law.sample(lengths[-1], runtime.stream(config["seed"], replicate)).to(device, torch.float32)
        rows = []
        for horizon in config["horizons"]:
            found = self_attention_moments(tokens, horizon * form, None, lengths)
            for name, V in values.items():
                errors = found.seen_through(V).errors(gaussian_limit(law, horizon * form, V))
                rows += [(name, horizon, replicate, *row) for row in zip(lengths, *(part.tolist() for part in errors))]
        return Part(pd.DataFrame(rows, columns=["values", "horizon", "replicate", "n", "mean_error", "cov_error"]))

    return Plan([(r,) for r in range(config["replicates"])], work)


HORIZONS = [0.01, 0.03, 0.1, 0.2, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]

# A GPU affords more than these four horizons, 10,000 tokens and 40 replicates; one CPU core does them in minutes.
SMALL = {
    "horizons": [0.25, 0.5, 1.0, 2.0],
    "lengths": [round(n) for n in np.geomspace(300, 10_000, 8)],
    "replicates": 40,
}
QUICK = {"lengths": [250, 500, 1000, 2000], "replicates": 4}

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
    "gaussian_spectra": Experiment(
        gaussian_spectra, ("replicate",), full={"dim": 50, **SMALL, "seed": 5_150}, quick=QUICK
    ),
    "gaussian_dimensions": Experiment(
        gaussian_dimensions,
        ("dim", "replicate"),
        full={"factors": {1: 20, 2: 8, 8: 3, 50: 3, 200: 3}, **SMALL, "seed": 5_251},
        quick={**QUICK, "factors": {1: 20, 2: 5, 8: 2, 50: 1}},
    ),
    "gaussian_reach": Experiment(
        gaussian_reach,
        ("replicate",),
        full={"dim": 50, "condition": 100.0, "reach": 10.0, **SMALL, "seed": 5_350},
        quick=QUICK,
    ),
    "gaussian_values": Experiment(
        gaussian_values, ("replicate",), full={"dim": 50, **SMALL, "replicates": 200, "seed": 5_450}, quick=QUICK
    ),
}
