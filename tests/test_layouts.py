"""Every public function gives the same answer on every layout in memory of the tensors that it takes.

The functions are found by introspection (`catalogue`). Each tensor of a call is replaced by the same numbers laid out
in another way, and the answer compared with that on contiguous ones.
"""

import catalogue
import numpy as np
import pytest
import torch

PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5}


def matrices(lay):
    """A layout of tensors with two axes or more."""
    return lambda x: lay(x) if x.ndim >= 2 else None


LAYOUTS = {
    "transposed": matrices(lambda x: x.mT.contiguous().mT),
    "Fortran order": matrices(lambda x: np.asfortranarray(x.numpy())),
    "every other entry": lambda x: torch.stack([x, 1 - x], -1).flatten(-2)[..., ::2],
    "every other row": matrices(lambda x: torch.stack([x, 1 - x], -2).flatten(-3, -2)[..., ::2, :]),
    "inside a larger one": matrices(lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4), value=9)[..., 3:-4, 1:-2]),
    "at an offset": lambda x: torch.cat([1 - x, x])[len(x) :],
    "one column expanded": matrices(lambda x: x[..., :1].expand(x.shape)),
    "one row expanded": lambda x: x[:1].expand(x.shape),
    "backwards, from numpy": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "backwards rows, from numpy": matrices(lambda x: np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1]),
}


def places(name: str) -> list[tuple[str, int | None]]:
    """The tensors among the arguments of a function: parameter, and number in a list or pair of tensors."""
    found = []
    for parameter, value in catalogue.arguments(name).items():
        if isinstance(value, torch.Tensor) and value.ndim and value.dtype != torch.bool:
            found.append((parameter, None))
        elif isinstance(value, (list, tuple)) and parameter != "self":
            found += [(parameter, i) for i, x in enumerate(value) if isinstance(x, torch.Tensor) and x.ndim]
    return found


FUNCTIONS = [name for name in sorted(catalogue.public_functions()) if places(name)]


def in_precision(value, dtype):
    """A value with all floating-point tensors in it in one precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(in_precision(part, dtype) for part in value)
    return type(value)(in_precision(part, dtype) for part in value) if type(value) in (list, tuple) else value


def answer(name: str, given: dict, parameter: str, number: int | None, value):
    """Numbers of the answer with one tensor replaced, or the text of a ValueError."""
    if number is not None:
        parts = list(given[parameter])
        parts[number] = value
        value = given[parameter]._make(parts) if hasattr(given[parameter], "_make") else parts
    try:
        return catalogue.numbers(catalogue.call(name, given | {parameter: value}))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_answer_does_not_depend_on_the_layout(name):
    for dtype, tolerance in PRECISIONS.items():
        given = {key: in_precision(value, dtype) for key, value in catalogue.arguments(name).items()}
        for parameter, number in places(name):
            tensor = given[parameter] if number is None else given[parameter][number]
            usual = answer(name, given, parameter, number, tensor)
            for layout, lay in LAYOUTS.items():
                laid = lay(tensor)
                if laid is None or number is not None and not isinstance(laid, torch.Tensor):
                    continue
                expected = usual
                if "expanded" in layout:  # other numbers
                    plain = laid.clone(memory_format=torch.contiguous_format)
                    expected = answer(name, given, parameter, number, plain)
                found = answer(name, given, parameter, number, laid)
                where = f"{parameter} {'' if number is None else number} {layout} {dtype}"
                if isinstance(expected, str):
                    assert found == expected, where
                    continue
                assert not isinstance(found, str) and len(found) == len(expected), f"{where}: {found}"
                for one, other in zip(found, expected):
                    size = np.abs(other[np.isfinite(other)]).max(initial=1e-300)
                    assert np.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True), where
