"""Every public function says what it takes: a bad argument gets a finite answer, or a ValueError that names it.

The functions are found by introspection (`catalogue`), and each argument of each is replaced in turn.
"""

import contextlib
import re
import signal
import warnings

import catalogue
import numpy as np
import pandas as pd
import pytest
import torch

from tokcx_lib.models.tokens import layer_streams, tokenize
from tokcx_lib.sampling import fits, streaming, sweeps
from tokcx_lib.sampling.streaming import prefix_attention
from tokcx_lib.studies import extremes
from tokcx_lib.theory import geometry, laws, rates, softmax_law

SECONDS = 2.0  # for one call, at most
PART = 8  # the quick test tries every eighth case
NAMES = sorted(catalogue.public_functions())
# Where an answer may hold infinity or NaN, as the docstring says: the factor of an exponential overflows, there is
# nothing to average, or a number is not asked for.
OPEN = {
    "stacks.stack_errors",
    "budgets.token_budget",
    "rates.clt_covariance",
    "rates.influence",
    "rates.influence_square",
    "rates.uniform_constant",
    "scaling.freezing_length",
    "scaling.reduced_load",
    "scaling.sphere_scaling",
}

# Functions that are called as they are: what they raise is theirs.
CALLABLE = {
    ("distributed.sharded_attention", "blocks"),
    ("distributed.sharded_states", "blocks"),
    ("sweeps.MomentSweep", "limit"),
}


class TooLong(Exception):
    pass


@contextlib.contextmanager
def at_most(seconds: float):
    """Raise TooLong in a block that takes longer."""

    def stop(*_):
        raise TooLong

    # In seconds of the processor, whatever else it has to do; again and again, where one was swallowed.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def everywhere_bad() -> dict[str, object]:
    """Values that few parameters take, whatever they are."""
    return {
        "None": None,
        "a text": "many",
        "bytes": b"1",
        "a complex number": 1j,
        "an object": object(),
        "a dictionary": {"a": 1},
        "a function": len,
        "a module": torch.nn.Linear(3, 3),
        "a law": catalogue.laws.Uniform(2),
        "NaN": float("nan"),
        "infinity": float("inf"),
        "minus infinity": -float("inf"),
        "minus one": -1,
        "zero": 0,
        "a half": 0.5,
        "1e300": 1e300,
        "10^20": 10**20,
        "10^400": 10**400,
        "a numpy integer": np.int64(5),
        "an array without axes": np.array(1.5),
        "an empty list": [],
        "a list of texts": ["a", "b"],
        "a ragged list": [[1.0], [1.0, 2.0]],
        "a list of 10^20": [1, 10**20],
        "an object array": np.array([None, 1.0], dtype=object),
        "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "an empty tensor": torch.empty(0),
        "no rows": torch.empty(0, 3, dtype=torch.float64),
        "no columns": torch.empty(3, 0, dtype=torch.float64),
        "a number tensor": torch.tensor(1.5),
        "one axis": torch.ones(7, dtype=torch.float64),
        "another shape": torch.ones(4, 5, dtype=torch.float64),
        "four axes": torch.ones(2, 2, 2, 2, dtype=torch.float64),
        "an integer tensor": torch.arange(6).reshape(2, 3),
        "a sparse tensor": torch.eye(3).to_sparse(),
        "a complex tensor": torch.ones(3, 3, dtype=torch.complex64),
        "a tensor without memory": torch.ones(3, 3, device="meta"),
        "a half precision tensor": torch.ones(3, 3, dtype=torch.float16),
        "a Series": pd.Series([1.0, 2.0], index=[3, 4]),
        "a table of texts": pd.DataFrame({"a": ["x", "y"]}),
    }  # fmt: skip


def variants(valid) -> dict[str, object]:
    """The valid value in other forms, and with other numbers."""
    if isinstance(valid, list) and valid and isinstance(valid[0], (int, float)):
        return {
            "the last number alone": valid[-1],
            "512": 512,
            "backwards": valid[::-1],
            "negative": [-x for x in valid],
            "not whole": [x + 0.5 for x in valid],
            "an array": np.array(valid),
            "a tensor": torch.tensor(valid),
            "nested": [valid],
        }
    if not isinstance(valid, torch.Tensor):
        return {} if isinstance(valid, (bool, int, float)) else {"512": 512}
    if not valid.is_floating_point():
        whole = valid.to(torch.int64)
        return {"out of range": whole + 1000, "negative": -whole, "not whole": valid * 1.5}
    poisoned = valid.clone()
    poisoned[(0,) * valid.ndim] = torch.nan
    read_only = valid.numpy().copy()
    read_only.flags.writeable = False
    frame = pd.DataFrame if valid.ndim == 2 else pd.Series
    return {
        "512": 512,
        "float16": valid.half(),
        "bfloat16": valid.bfloat16(),
        "float32": valid.float(),
        "whole numbers": (4 * valid).long(),
        "sparse": valid.to_sparse(),
        "complex": valid.to(torch.complex128),
        "without memory": valid.to("meta"),
        "with a gradient": valid.clone().requires_grad_(),
        "with NaN": poisoned,
        "infinite": torch.full_like(valid, torch.inf),
        "1e200": torch.full_like(valid, 1e200, dtype=torch.float64),
        "1e30 in float32": torch.full_like(valid, 1e30).float(),
        "zeros": torch.zeros_like(valid),
        "no rows": valid[:0],
        "last axis shorter": valid[..., :-1],
        "one axis more": valid[None],
        "one row": valid[0],
        "numpy float16": valid.numpy().astype(np.float16),
        "big-endian": valid.numpy().astype(">f8"),
        "long double": valid.numpy().astype(np.longdouble),
        "read-only": read_only,
        "a table": frame(valid.numpy()) if valid.ndim in (1, 2) else valid,
        "lists": valid.tolist(),
        "objects": valid.numpy().astype(object),
    }


def outcome(name: str, parameter: str, value, most: float = SECONDS) -> str:
    """`good` or what is wrong with the answer to a call in which one argument is replaced."""
    given = catalogue.arguments(name) | {parameter: value}
    word = "device" if name == "runtime.device" else parameter
    try:
        with at_most(most), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ResourceWarning)
            answer = catalogue.call(name, given)
    except TooLong:
        return "never ends"
    except ValueError as error:
        # Its name, or that of an argument which it does not fit, at the beginning.
        names = "|".join(given)
        if re.search(rf"(?<!\w){word}(?!\w)", str(error)) or re.match(rf"({names})(, (\w+))*:", str(error)):
            return "refused"
        return f"nameless ValueError: {str(error)[:150]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    if name in OPEN or all(np.isfinite(part).all() for part in catalogue.numbers(answer)):
        return "good"
    return "NaN or infinity"


def cases(name: str) -> list[tuple[str, str, object]]:
    """(parameter, what it is replaced by, the value)."""
    found = []
    for parameter, valid in catalogue.arguments(name).items():
        if parameter != "self":
            values = everywhere_bad() | variants(valid)
            if (name, parameter) in CALLABLE:
                values = {what: value for what, value in values.items() if not callable(value)}
            found += [(parameter, *case) for case in values.items()]
    return found


@pytest.fixture(autouse=True)
def quietly(monkeypatch):
    """Small work on one thread, and no bars of progress."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_answered(name):
    answer = catalogue.call(name, catalogue.arguments(name))
    assert name in OPEN or all(np.isfinite(part).all() for part in catalogue.numbers(answer))


def faults(name: str, some: list) -> list[str]:
    found = [(parameter, what, outcome(name, parameter, value)) for parameter, what, value in some]
    return [f"{parameter} = {what}: {result}" for parameter, what, result in found if result not in ("good", "refused")]


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_argument_is_understood_or_refused_by_name(name):
    """A part of all cases, another one for each function."""
    assert faults(name, cases(name)[NAMES.index(name) % PART :: PART]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_bad_argument_is_understood_or_refused_by_name(name):
    assert faults(name, cases(name)) == []


# ------------------------------------------------------------ messages that say what to do


def refused(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def test_lengths_given_as_one_number_are_refused_with_the_list_they_should_be():
    q, k, v = (catalogue.normal(9, 3, seed=s) for s in range(3))
    for lengths in (9, np.int64(9), torch.tensor(9), "9", None):
        with refused(r"^lengths: expected a list of increasing integers, such as \[9\]"):
            prefix_attention(q, k, v, lengths)
    expected = prefix_attention(q, k, v, [3, 9])
    for lengths in ((3, 9), range(3, 10, 6), np.array([3, 9]), torch.tensor([3, 9]), pd.Series([3, 9], index=[5, 6])):
        assert torch.equal(prefix_attention(q, k, v, lengths), expected)


def test_a_sample_where_a_law_is_expected_is_pointed_to_empirical():
    tokens = catalogue.normal(9, 3)
    for call in (
        lambda: rates.clt_covariance(tokens, torch.zeros(3)),
        lambda: sweeps.pointwise_sweep(tokens, tokens, [5], 2, 0),
        lambda: list(streaming.drawn_blocks(tokens, 0, 0, 5)),
    ):
        with refused(r"^law: expected a law, such as .*laws.Empirical\(tokens\), got Tensor of shape \(9, 3\)"):
            call()
    with refused("^law: expected a law made from it"):
        rates.clt_covariance(laws.Uniform, torch.zeros(3))
    with refused(r"^law: expected Gaussian, .*, got Tensor of shape \(9, 3\)$"):
        softmax_law.map_error(10, 1.0, law=tokens)


def test_scalar_tokens_are_asked_for_as_a_column():
    for name in ("steiner_point", "steiner_estimate"):
        options = {"frames": 3} if name == "steiner_estimate" else {}
        with refused(r"^tokens: expected 2 axes, \(n, d\).*x\[:, None\]"):
            getattr(extremes, name)(torch.ones(5), **options)


def test_grouped_queries_are_told_both_remedies_and_both_are_right():
    q, k, v = catalogue.normal(8, 5, 3), catalogue.normal(2, 9, 3, seed=1), catalogue.normal(2, 9, 4, seed=2)
    with refused(
        r"^k: expected batch \(8,\).*k.repeat_interleave\(4, -3\).*q.unflatten\(-3, \(2, 4\)\).flatten\(-3, -2\)"
    ):
        streaming.partial_attention(q, k, v)
    repeated = streaming.partial_attention(q, k.repeat_interleave(4, -3), v.repeat_interleave(4, -3)).output
    folded = streaming.partial_attention(q.unflatten(-3, (2, 4)).flatten(-3, -2), k, v).output
    assert torch.allclose(folded.unflatten(-2, (4, 5)).flatten(0, 1), repeated, atol=1e-12)


def test_a_table_of_several_settings_is_refused_by_fit_slope():
    law = laws.Gaussian(torch.eye(2))
    table = sweeps.pointwise_sweep(law, torch.ones(2, 2), [5, 10], 3, 0)
    # The entries of an error differ too, but they are no setting.
    with refused("^table: expected one row for each replicate and n, got 12 for 6, which 'query' tells apart;.*`by`"):
        fits.fit_slope(table, "error")
    with refused(r"^error: expected a column 'error' in the table, which has .*, 'error', .*, 'error'\]$"):
        fits.fit_slope(pd.concat([table, table["error"]], axis=1), "error")
    assert len(fits.fit_slopes(table, "error", "query", resamples=20)) == 2


def test_a_plain_model_is_refused_where_a_tokenizer_is_needed():
    with refused("^model: expected a TextModel from load_model, got Linear"):
        layer_streams(torch.nn.Linear(2, 2), "text", [0])
    with refused("^model: expected a TextModel from load_model, got Linear"):
        tokenize(torch.nn.Linear(2, 2), "text")


def test_numbers_in_other_forms_are_the_same_numbers():
    cov = np.array([[2.0, 0.5], [0.5, 1.0]])
    read_only, masked = cov.copy(), np.ma.masked_array(cov, cov < 0.7)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in (cov, read_only, cov.astype(">f8"), cov[::-1, ::-1][::-1, ::-1], cov.tolist(), pd.DataFrame(cov),
                     cov.astype(object), cov.astype(np.longdouble), torch.tensor(cov, requires_grad=True)):  # fmt: skip
            assert geometry.reach(form) == geometry.reach(cov)
        assert geometry.reach(cov.astype(np.float16)) == pytest.approx(geometry.reach(cov), rel=1e-6)
    with refused("^cov: expected finite values"):
        geometry.reach(masked)
    with refused("^psi: expected a positive finite number, got an integer of 1329 bits"):
        rates.exponent(10**400, "gaussian")


def test_a_count_is_bounded_by_the_memory_of_this_machine():
    with refused("^n: expected an integer from 1 to"):
        laws.Uniform(3).sample(10**13)
    with refused("^lengths: expected integers from 1 to"):
        sweeps.pointwise_sweep(laws.Uniform(3), torch.ones(1, 3), [10, 10**13], 2, 0)
