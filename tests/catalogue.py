"""The public functions of the library, found by introspection, and for each of them arguments that it takes.

`public_functions` gives the functions and classes that a module defines without an underscore, and the methods of the
laws and of the sweep. `arguments` gives a call of each. A new function whose parameters have no example here makes the
tests fail that go through all of them: give an example, or name it in `ELSEWHERE`, with the reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import typing

import numpy as np
import pandas as pd
import torch

import tokcx_lib
from tokcx_lib.models import subsampled
from tokcx_lib.models.heads import Head
from tokcx_lib.sampling import binned, sweeps
from tokcx_lib.sampling.streaming import Partial, partial_attention
from tokcx_lib.studies.depth import joint, stacks
from tokcx_lib.theory import laws
from tokcx_lib.theory.limits import Moments

# Modules whose functions are tested elsewhere, and why not here.
MODULES_ELSEWHERE = {
    "__main__": "runs the command line",
    "agreement": "takes a device",
    "answering": "takes models",
    "architectures": "takes models and their configurations",
    "capture": "takes models",
    "checkpoint_files": "reads files",
    "checkpoints": "reads and writes files",
    "cli": "takes the words of a command line",
    "compare": "reads what probes wrote",
    "context": "takes models",
    "context_figures": "draws",
    "context_page": "writes pages",
    "corpora": "reads files",
    "figures": "draws",
    "heads": "takes models",
    "layers": "takes models",
    "loading": "takes folders of models",
    "loss": "takes what attention was seen to read",
    "loss_tables": "takes what was measured",
    "measures": "takes models",
    "pages": "writes pages",
    "peer": "measures, for minutes",
    "plan": "takes models",
    "planes": "takes models",
    "plots": "draws",
    "policies": "takes what attention was seen to read",
    "pooled": "takes models and texts",
    "pooled_page": "writes pages",
    "predictions": "takes what was measured",
    "queries": "takes what attention was seen to read",
    "question": "takes models and texts, good and bad ones in tests of its own",
    "records": "reads and writes files",
    "registry": "names the runs",
    "report": "writes pages",
    "resuming": "reads and writes files",
    "runs": "reads and writes files",
    "slopes": "takes what was measured",
    "suite": "measures, for minutes",
    "summary": "takes what was measured",
    "tables": "takes what was measured",
    "text_parts": "takes models",
    "texts": "takes models and texts",
    "token_files": "reads and writes files",
    "tokenization": "takes a tokenizer",
    "tokens": "takes models and texts",
    "validation": "is what the doors of all others are made of",
    "windows": "takes models and texts",
    **dict.fromkeys(
        (
            "bounded",
            "coverage",
            "exact",
            "experiments",
            "gaussian",
            "head_experiments",
            "loss_experiments",
            "plane_experiments",
            "token_experiments",
        ),
        "runs experiments, for minutes",
    ),
}
ELSEWHERE = {
    "runtime.one_thread": "takes nothing",
    "distributed.barrier": "takes nothing",
    "distributed.gather": "hands on a tensor as it is",
    "distributed.gather_objects": "hands on anything as it is",
    "distributed.total": "hands on a tensor as it is",
    "distributed.local_rank": "takes nothing",
    "distributed.rank": "takes nothing",
    "distributed.shard": "takes any list",
    "distributed.world": "takes nothing",
    "scalar.between": "reads a table that its caller made",
    "retrieval.article_embeddings": "takes a model",
    "retrieval.collect": "takes articles",
    "retrieval.context_attention": "takes a model",
    "retrieval.draw_errors": "takes a model",
    "retrieval.paragraphs": "takes a model",
    "retrieval.passages": "takes a model",
    "layerwise.layer_errors": "takes a model",
    "laws.Law": "a protocol",
    "runtime.hub_answers": "takes nothing",
    "runtime.peak_memory": "takes a device",
    "runtime.profile": "takes nothing",
    "runtime.report": "takes nothing",
    "subsampled.contexts": "takes a model",
    "subsampled.encode": "takes a model",
}


def public_functions() -> dict[str, typing.Callable]:
    """`module.name` or `module.Class.method` -> the function, class or unbound method; all that is not `ELSEWHERE`."""
    found = {}
    for module in pkgutil.walk_packages(tokcx_lib.__path__, "tokcx_lib."):
        own = module.name.rpartition(".")[2]
        if module.ispkg or own in MODULES_ELSEWHERE or module.name.startswith("tokcx_lib.check."):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.name:
                continue
            if inspect.isfunction(value):
                found[f"{own}.{name}"] = value
            elif inspect.isclass(value) and "_fields" not in vars(value):  # named tuples take anything
                found[f"{own}.{name}"] = value
                for method in ("sample", "log_mgf", "tilted_mean", "tilted_cov", "table", "errors"):
                    if callable(getattr(value, method, None)):
                        found[f"{own}.{name}.{method}"] = getattr(value, method)
    return {name: value for name, value in found.items() if name not in ELSEWHERE and not name.startswith("laws.Law.")}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIM = 3
COV = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.8, 0.1], [0.0, 0.1, 0.6]], dtype=torch.float64)
FORM = 0.4 * normal(DIM, DIM, seed=1)
VALUES = normal(2, DIM, seed=2)
LAWS = {
    "Gaussian": {"cov": COV, "mean": normal(DIM, seed=3)},
    "SerialGaussian": {"cov": COV, "correlation": 0.5},
    "Rademacher": {"dim": DIM},
    "Uniform": {"dim": DIM},
    "UniformSphere": {"dim": DIM, "radius": 1.5},
    "UniformBall": {"dim": DIM, "radius": 1.5},
    "GaussianMixture": {
        "weights": torch.tensor([0.3, 0.7]),
        "means": normal(2, DIM),
        "covs": torch.stack([COV, COV / 2]),
    },
    "Empirical": {"tokens": normal(40, DIM), "weights": torch.full((40,), 1 / 40, dtype=torch.float64)},
}


@functools.cache
def law(name: str = "Gaussian"):
    return getattr(laws, name)(**LAWS[name])


@functools.cache
def _head(number: int = 0) -> Head:
    W_Q, W_K, W_V = (0.5 * normal(2, DIM, seed=10 + 3 * number + i) for i in range(3))
    return Head(0, number, W_Q, W_K, W_V, normal(2, seed=20 + number), 0.7)


@functools.cache
def _sweep() -> sweeps.MomentSweep:
    return sweeps.MomentSweep(law(), FORM, [5, 20], VALUES, scales=[0.5, 1.0])


@functools.cache
def _stack() -> stacks.Stack:
    return stacks.gaussian_stack(COV, [stacks.Layer(FORM, 0.3 * FORM, 0.9)] * 2)


@functools.cache
def _binned(seed: int = 0) -> binned.BinnedTokens:
    return binned.draw(1000, seed, bins=50)


@functools.cache
def _table() -> pd.DataFrame:
    n = np.array([10, 100, 1000])
    rows = [(r, k, (1 + 0.1 * np.sin(3 * r + k)) / np.sqrt(k)) for r in range(8) for k in n]
    return pd.DataFrame(rows, columns=["replicate", "n", "error"])


def _contexts() -> subsampled.Contexts:
    ids = torch.arange(10).reshape(2, 5)
    real = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return subsampled.Contexts(ids, real, ids % 5 == 0)


def _partial(seed: int = 0) -> Partial:
    return partial_attention(normal(4, DIM), normal(9, DIM, seed=seed + 1), normal(9, 2, seed=seed + 2))


def _blocks():
    return [(normal(20, DIM, seed=s), normal(20, 2, seed=s + 5)) for s in range(2)]


def _slices(start: int, stop: int):
    return [(normal(40, DIM)[start:stop], normal(40, 2)[start:stop])]


def _unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


SAMPLE = normal(200, seed=4)
SPARSE = {"q": normal(4, DIM), "k": normal(40, DIM, seed=1), "v": normal(40, 2, seed=2),
          "positions": torch.tensor([0, 5, 20, 39]), "budget": 8, "generator": 0}  # fmt: skip
ATTENTION = {"q": normal(6, DIM), "k": normal(40, DIM, seed=1), "v": normal(40, 2, seed=2), "lengths": [3, 20, 40]}
SAME = {"q": normal(40, DIM), "k": normal(40, DIM, seed=1), "v": normal(40, 2, seed=2), "lengths": [3, 20, 40]}
HEADS = {"head": _head(), "pool": normal(40, DIM), "queries": normal(6, DIM, seed=1), "lengths": [4, 20],
         "replicates": 2, "seed": 0, "window": 2, "alpha": 0.5, "law": law(), "device": "cpu"}  # fmt: skip
LIMIT = Moments(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
SWEEP = {"law": law(), "A": FORM, "V": VALUES, "lengths": [5, 20], "replicates": 2, "replicate": 1, "seed": 0,
         "queries": normal(6, DIM), "scales": [0.5, 1.0], "radii": [0.5, 1.0], "limit": None, "dtype": torch.float64,
         "device": "cpu", "starts": 8, "tokens": normal(40, DIM), "radius": 1.0, "generator": 0}  # fmt: skip
FOUR = {"u": torch.linspace(0, 1, 5, dtype=torch.float64), "start": normal(5), "end": normal(5, seed=1),
        "rise_start": normal(5, seed=2), "rise_end": normal(5, seed=3)}  # fmt: skip
STATES = [normal(2, 5, DIM, seed=s) for s in range(3)]
TILT = normal(5, DIM)

# Arguments of the functions of a module, by the names of parameters; those of one function beside it override them.
MODULES: dict[str, dict] = {
    "attention": {"law": law(), "tokens": normal(40, DIM), "x": normal(6, DIM), "A": FORM, "V": VALUES},
    "binned": {"n": 1000, "generator": 0, "bins": 50, "limit": 10.0, "level": 2.0, "tokens": _binned(),
               "draws": [_binned(0), _binned(1)], "slopes": [0.3, 0.6], "mesh": 0.5, "slope": 0.4,
               "tilts": normal(7), "points": normal(20, seed=1), "counts": torch.arange(20.0, dtype=torch.float64)},
    "causal": {"n": 20, "z": normal(12, DIM), "B": FORM / 3, "V": VALUES, "psi": 1.5, "horizon": 1.2},
    "convergence": HEADS | {"limit": LIMIT, "heads": [_head(0), _head(1)],
                            "blocks": [normal(20, DIM, seed=s) for s in range(2)],
                            "segments": [[_partial(s), _partial(s + 5)] for s in range(3)]},
    "stacks": {"cov": COV, "layers": [stacks.Layer(FORM, 0.3 * FORM, 0.9)], "keep_trace": True, "dim": DIM, "depth": 2,
              "horizon": 0.5, "value": 0.5, "seed": 0, "stack": _stack(), "layer": stacks.Layer(FORM, 0.3 * FORM, 0.9),
              "x": normal(12, DIM), "keys": normal(9, DIM), "shifts": normal(12, DIM, seed=1),
              "queries": normal(4, DIM), "tokens": normal(20, DIM), "lengths": [5, 20], "split_most": 10,
              "horizons": [0.3, 0.5], "draws": [_binned(0), _binned(1)], "probes": normal(3)},
    "influence": {"horizons": [0.9, 0.5, 1.2], "value": 0.5, "layers": [1, 3],
                  "config": {"stacks": {"one": [0.9, 0.5]}, "lengths": [1000, 2000], "replicates": 3, "bins": 100,
                             "seed": 0}},
    "distributed": {"state": _partial(), "q": normal(4, DIM), "blocks": _slices, "lengths": [3, 40], "device": "cpu"},
    "retrieval": {"embeddings": _unit(6, DIM), "index": _unit(5, DIM, seed=1), "count": 3, "share": 0.5,
                   "critical": normal(6, 4).abs(), "error": normal(6).abs(), "states": STATES,
                   "whole": [s + 0.1 for s in STATES], "text": torch.tensor([[True] * 5, [True] * 4 + [False]])},
    "extremes": {"n": 1000, "replicates": 5, "generator": 0, "dim": DIM, "count": 4, "frames": 3,
                 "tokens": normal(20, 2)},
    "budgets": {"load": 0.8, "error": 0.5, "n": 20, "tokens": 20, "reduced": [0.3, 0.7],
                "kind": "typical"},
    "drawn_keys": {"n": [1, 5, 20.5, 30], "total": 30.0, "load": 2.0},
    "bias_law": {"n": 1e4, "s": 2.0, "p": 1.5, "horizon": 1.2},
    "stable_limit": {"B": 1.5 * torch.eye(2, dtype=torch.float64), "W": normal(2, 2, seed=2), "variances": [0.5, 2.0],
                     "power": 1.5, "r": [10.0, 1e4], "horizons": [1.5, 1.0], "values": [1.0, 0.5], "along": True,
                     "n": 1e6, "horizon": 1.5},
    "stable_density": {"x": [0.3, 40.0], "alpha": 1.5},
    "lemmas": {"theta": 0.5, "horizons": [0.5, 1.0], "horizon": 0.25, "lengths": [5, 1000], "tokens": 2000, "seed": 0,
               "reduced": [0.3, 0.7], "replicates": 3, "sizes": [1, 2], "level": 0.5},
    "verdicts": {"values": normal(3, 20), "count": 20, "error": 0.05, "draws": 100, "seed": 0, "counts": (20,),
                 "table": pd.DataFrame({"horizon": np.repeat([0.5, 1.5], 60), "mean": normal(120).numpy()})},
    "forms": {"decay": 1.0, "dim": DIM, "seed": 0},
    "hardmax": {"n": 20, "sigma": 1.5, "m": normal(3), "dim": 2},
    "scalar": FOUR | {"tokens": normal(20, 1), "slopes": [0.3, 0.6], "V": None, "lengths": [5, 20]},
    "uniform": SWEEP,
    "fits": {"table": _table(), "error": "error", "level": 0.9, "resamples": 50, "seed": 0, "weighted": True,
             "by": "half"},
    "geometry": {"cov": COV, "A": FORM, "sided": "one", "x": normal(6, DIM), "shift": normal(DIM)},
    "joint": {"heads": [_head(0), _head(1)], "outputs": [normal(DIM, 2, seed=s) for s in range(2)],
              "queries": normal(6, DIM, seed=1), "pool": normal(40, DIM), "errors": normal(2, 6, 2),
              "limits": joint.Limits(normal(2, 6, 2), 1.0), "lengths": [4, 20], "replicates": 2, "seed": 0,
              "grams": torch.stack([normal(8, 2, seed=s).mT @ normal(8, 2, seed=s) for s in range(4)])},
    "laws": {"n": 7, "generator": 0, "t": TILT},
    "limits": {"law": law("UniformBall"), "A": FORM, "V": VALUES, "points": 64, "repeats": 2, "seed": 0},
    "moment_bias": {"n": 50.0, "B": FORM, "V": VALUES, "beta": [0.8, 0.3, 0.1], "queries": normal(6, DIM),
                    "tokens": normal(7, DIM)},
    "one_query": {"n": 1000.0, "load": 1.5, "replicates": 4, "generator": 0},
    "prefixes": {"tokens": normal(20, 1), "slope": 0.5, "mesh": 0.6},
    "rates": {"psi": 0.5, "kind": "gaussian", "n": 100.0, "sigma": 1.5, "law": law(), "t": TILT, "B": FORM, "W": VALUES,
              "z": TILT, "radius": 0.5, "A": FORM, "support": None, "spread": None, "cov": COV, "V": VALUES},
    "rotary": {"base": 100.0, "dim": 4, "n": 50, "theta": [1.0, 0.1], "q": normal(4), "mean": normal(4, seed=1),
               "variance": 0.5, "distances": [1.0, 2.0, 5.0], "law": laws.Gaussian(torch.eye(4))},
    "runtime": {"name": "cpu", "seed": 3, "keys": 3},
    "scaled": {"logits": normal(2, 6, 40), "values": normal(2, 40, DIM, seed=1), "factors": normal(6, seed=2).abs(),
               "tokens": _binned(), "load": 1.5},
    "scaling": {"scheme": "yarn", "n": [10.0, 1e5], "anchor": 512.0, "load": 1.5, "power": 2.0, "kappa": [0.2, 0.7],
                "dim": DIM, "spread": [0.5, 3.0]},
    "serial": {"horizon": 0.5, "correlation": 0.4, "causal": True},
    "softmax_law": {"n": [10.0, 1e5], "t": 1.5, "law": laws.Gaussian(2.0), "own": [0.5, -1.0]},
    "schemes": SPARSE | {"keys": torch.arange(20).reshape(4, 5), "log_weights": normal(4, 5), "state": _partial(),
                        "whole": _partial(3), "n": 40, "width": 8, "extra": 3, "weighted": True, "unit": 1.5},
    "theory": {"q": normal(4, DIM), "k": normal(40, DIM, seed=1), "v": normal(40, 2, seed=2), "draws": [5, 20],
                   "load": 1.2, "dim": DIM, "budget": [5, 20], "n": 100.0, "correlation": 0.5, "count": 6,
                   "stride": 2.0, "x": TILT, "t": normal(5, DIM, seed=1), "lags": torch.arange(-3, 4),
                    "reduced_load": 1.5},
    "streaming": ATTENTION | {"a": _partial(0), "b": _partial(3), "blocks": _blocks(), "law": law(), "seed": 0,
                              "start": 5, "stop": 20, "dtype": torch.float64, "device": "cpu", "x": normal(40, DIM),
                              "A": FORM, "V": VALUES, "shift": normal(DIM), "causal": True, "grouped": False},
    "subsampled": {"batch": _contexts(), "keys": 2, "seed": 0, "layers": 2, "keep_special": True,
                   "seen": torch.ones(2, 5, dtype=torch.bool), "states": STATES[0], "real": _contexts().real},
    "sweeps": SWEEP | {"tabulate": True, "errors": normal(5, 2, 4), "matrices": torch.stack([COV, FORM @ FORM.mT])},
    "tails": {"x": SAMPLE, "k": 10, "side": "upper", "share": 0.1, "shares": (0.1, 0.05), "t": 0.5, "points": 8,
              "n": 50, "window": 10, "pooled": True, "outlier": 3.0, "head": _head(), "queries": normal(6, DIM),
              "keys": normal(200, DIM), "quantiles": (0.05, 0.95)},
    "twins": {"keys": normal(40, DIM), "values": normal(40, 2), "generator": 0, "z": normal(20), "skewness": 0.5},
}  # fmt: skip
FUNCTIONS: dict[str, dict] = {
    "stacks.scalar_errors": {"stack": stacks.scalar_stack([0.3, 0.5])},
    "stacks.step": {"x": normal(12, DIM)},
    "limits.gaussian_limit": {"law": law(), "shift": normal(DIM)},
    "fits.fit_slopes": {"table": pd.concat([_table().assign(half=h) for h in (0, 1)])},
    "verdicts.ideal_rates": {"horizons": [1.5], "counts": (20,)},
    "lemmas.query_exponents": {
        "errors": pd.DataFrame(
            {
                "sigma": 0.3,
                "n": [1000, 2000] * 3,
                "replicate": [0, 0, 1, 1, 2, 2],
                "error": [0.2, 0.1, 0.25, 0.12, 0.21, 0.11],
                "share": 1.0,
            }
        )
    },
    "lemmas.minimax_means": {"n": 1000, "psi": 1.0},
    "lemmas.pair_gaps": {"lengths": [5, 20]},
    "lemmas.query_errors": {"lengths": [1000, 2000]},
    "rates.exponent": {},
    "softmax_law.self_moments": {"t": 1.5},
    "theory.pair_covariance": {"correlation": [0.5, 0.1]},
    "theory.serial_error": {"scheme": "window", "budget": 20, "n": 100},
    "theory.top_mass": {"k": [1, 5]},
    "theory.frozen_missing_mass": {"k": [1, 5]},
    "streaming.prefix_moments": SAME,
    "tails.log_mgf": {"x": SAMPLE.reshape(2, 100), "t": [0.5, -0.5]},
    "tails.normal_log_mgf": {"t": [0.5, 1.0]},
    "tails.token_geometry": {"x": normal(60, DIM)},
    "tails.whiten": {"x": normal(60, DIM)},
}
# The last value of a parameter is the one tried: keyword options that stand in the signature only.
OPTIONS = {"fits.fit_slopes": ("options",), "runtime.stream": ("keys",)}


def arguments(name: str) -> dict:
    """Arguments of the public function `name`, by the names of its parameters: all of them."""
    function = public_functions()[name]
    module, *rest = name.split(".")
    known = MODULES.get(module, {}) | FUNCTIONS.get(name, {})
    if module == "laws" and rest[0] not in LAWS:
        raise LookupError(f"{name}: no example of this law in LAWS of tests/catalogue.py")
    if module == "laws" and len(rest) == 1:
        known = LAWS[rest[0]]
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.name == "self":
            found["self"] = _sweep() if module == "sweeps" else law(rest[0])
        elif parameter.name not in known:
            raise LookupError(f"{name}: no example of the argument {parameter.name} in tests/catalogue.py")
        else:
            found[parameter.name] = known[parameter.name]
    return found


def call(name: str, given: dict):
    """What the function answers; an iterator is read to its end."""
    function = public_functions()[name]
    positional = name == "runtime.stream"
    answer = function(*given.values()) if positional else function(**given)
    return list(answer) if inspect.isgenerator(answer) else answer


def numbers(answer) -> list[np.ndarray]:
    """All numbers of an answer, as float64 arrays."""
    if isinstance(answer, torch.Tensor):
        if answer.is_meta or answer.layout != torch.strided:
            return [np.array(np.nan)]
        return [answer.detach().cpu().double().numpy()]
    if isinstance(answer, np.ndarray):
        return [answer.astype(float)]
    if isinstance(answer, pd.DataFrame):
        return [answer.select_dtypes("number").to_numpy(dtype=float)]
    if isinstance(answer, (bool, int, float, np.number)):
        return [np.asarray(answer if abs(answer) < 2**1000 else np.inf, dtype=float)]
    if isinstance(answer, dict):
        return [part for value in answer.values() for part in numbers(value)]
    if isinstance(answer, (tuple, list)):
        return [part for value in answer for part in numbers(value)]
    if hasattr(answer, "mean") and hasattr(answer, "cov"):  # a law
        return numbers((answer.mean, answer.cov))
    return []
