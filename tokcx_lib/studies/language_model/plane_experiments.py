"""Rotary planes of the packaged language model: what they add to logits, and what heads and loss lose without them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tokcx_lib import runtime
from tokcx_lib.models.capture import Attention, capture
from tokcx_lib.models.loading import evaluating
from tokcx_lib.models.text_parts import without_cache
from tokcx_lib.studies.language_model.answering import token_losses
from tokcx_lib.studies.language_model.loss_experiments import opened
from tokcx_lib.studies.language_model.planes import CHANGES, angles, output_errors, shares, without_turning
from tokcx_lib.studies.runs import Experiment, Part, Plan

GROUPS = ("fast", "middle", "slow", "standing")
NEAR = 64  # tokens: a fast plane turns once in so many or fewer


def groups(theta: Tensor, context: int) -> dict[str, list[int]]:
    """Planes by how far they turn in a context of n tokens.

    fast : once in 64 tokens or fewer; middle : in up to n; slow : in more than n, but by more than a radian in n;
    standing : by a radian in n at most. What is fast is nothing else.
    """
    period = 2 * math.pi / theta
    fast, whole, standing = period <= NEAR, period <= context, theta * context <= 1
    chosen = fast, whole & ~fast, ~fast & ~whole & ~standing, ~fast & standing
    return {name: which.nonzero()[:, 0].tolist() for name, which in zip(GROUPS, chosen)}


def language_model_planes(config: dict, device) -> Plan:
    """Every head of the language model, by groups of planes: one row a head and group, a window is a unit.

    From `queries` queries of the last half of the window: pattern and content, the group's shares of the variance of
    the logits (`planes.shares`); error_still and error_gone, how far outputs move when the group is changed in this
    layer alone (`planes.output_errors`). In the JSON: theta, the groups, and the shares of single planes, mean over
    heads and windows.
    """
    model, ids, meta = opened(device, config)
    context, theta = config["context"], angles(model.model)
    found = groups(theta, context)
    rows = torch.linspace(context // 2, context - 1, config["queries"]).round().long().to(device)

    def work(replicate: int) -> Part:
        table, single = [], []

        def read(attention: Attention) -> None:
            parts = shares(attention.q[0], attention.k[0], theta, rows)
            single.append(np.stack([part.mean(0).cpu().numpy() for part in parts]))
            for group, planes in found.items():
                errors = [output_errors(attention, theta, planes, change, rows) for change in CHANGES]
                columns = [part[:, planes].sum(-1) for part in parts] + errors
                for head, numbers in enumerate(zip(*(column.tolist() for column in columns))):
                    table.append((replicate, attention.layer, head, group, *numbers))

        with evaluating(model.model), torch.inference_mode(), runtime.one_thread(), capture(model.model, read):
            model.model(ids[replicate, None, :-1].to(device), **without_cache(model.model))
        names = ["pattern", "content", *(f"error_{change}" for change in CHANGES)]
        columns = ["replicate", "layer", "head", "group", *names]
        return Part(pd.DataFrame(table, columns=columns), {"shares": np.mean(single, axis=0)})

    def summary(arrays: list[dict[str, np.ndarray]]) -> dict:
        mean = np.mean([each["shares"] for each in arrays], axis=0)
        lists = dict(zip(("pattern", "content"), mean))
        return {"planes": {name: [float(f"{x:.4g}") for x in values] for name, values in lists.items()}}

    meta |= {"theta": [float(f"{x:.6g}") for x in theta.tolist()], "groups": found}
    return Plan([(r,) for r in range(config["replicates"])], work, meta, summary=summary)


def language_model_still(config: dict, device) -> Plan:
    """Loss of late tokens when the planes of a group are still or gone in every head: a window and a group are a unit.

    Means over the tokens that are read from position `late` on; excess is what a token costs more than in the whole
    model, with the error of that difference over these tokens.
    """
    model, ids, meta = opened(device, config)
    theta = angles(model.model)
    found = groups(theta, config["context"])

    def work(replicate: int, group: int) -> Part:
        whole = token_losses(model, ids[replicate])[config["late"] :]
        rows = []
        for change in CHANGES:
            answer = without_turning(theta, found[GROUPS[group]], change)
            lost = token_losses(model, ids[replicate], answer)[config["late"] :]
            more = lost - whole
            error = (more.std() / len(more) ** 0.5).item()
            rows.append((replicate, group, GROUPS[group], change, lost.mean().item(), more.mean().item(), error))
        names = ["replicate", "group", "name", "change", "loss", "excess", "excess_error"]
        return Part(pd.DataFrame(rows, columns=names))

    units = [(r, group) for r in range(config["replicates"]) for group in range(len(GROUPS))]
    return Plan(units, work, {**meta, "groups": found})


_SHARED = {"corpus": "wikipedia-en", "context": 2048, "seed": 20_261_614}
EXPERIMENTS = {
    "language_model_planes": Experiment(
        language_model_planes,
        ("replicate",),
        full={**_SHARED, "queries": 16, "replicates": 4},
        quick={"corpus": "scipy-docs", "context": 256, "queries": 8, "replicates": 1},
        tolerance=1e-3,
    ),
    "language_model_still": Experiment(
        language_model_still,
        ("replicate", "group"),
        full={**_SHARED, "late": 1024, "replicates": 4},
        quick={"corpus": "scipy-docs", "context": 256, "late": 128, "replicates": 1},
        tolerance=1e-3,
    ),
}
