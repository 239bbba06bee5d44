"""Every public function gives the same answer on every layout in memory of the tensors that it takes.

The functions are found by introspection (`catalogue`). The tensors of a call are replaced by the same numbers laid out
in another way, and the answer compared with that on contiguous ones.
"""

import catalogue
import numpy as np
import pytest
import torch

PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5}
SINGLE = ("attention", "convergence", "distributed", "joint", "sparse", "streaming")  # run in float32 as well


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


def lay_out(value, lay, inside: bool = False):
    """The tensors of an argument, by themselves or in a list or a named tuple, in another layout; the rest as it is.

    Named tuples are made by the library, of tensors: inside them numpy's layouts are left out.
    """
    if isinstance(value, torch.Tensor):
        laid = lay(value) if value.ndim and value.dtype != torch.bool else None
        return value if laid is None or inside and isinstance(laid, np.ndarray) else laid
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(lay_out(part, lay, inside=True) for part in value)
    return [lay_out(part, lay, inside) for part in value] if isinstance(value, list) else value


def contiguous(value):
    """The same numbers, row by row."""
    return lay_out(value, lambda x: x.clone(memory_format=torch.contiguous_format))


def takes_tensors(name: str) -> bool:
    given = catalogue.arguments(name)
    return any(lay_out(value, lambda x: x.clone()) is not value for key, value in given.items() if key != "self")


FUNCTIONS = [name for name in sorted(catalogue.public_functions()) if takes_tensors(name)]


def in_precision(value, dtype):
    """A value with all floating-point tensors in it in one precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(in_precision(part, dtype) for part in value)
    return type(value)(in_precision(part, dtype) for part in value) if type(value) in (list, tuple) else value


def answer(name: str, given: dict):
    """Numbers of the answer, or the text of a ValueError."""
    try:
        return catalogue.numbers(catalogue.call(name, given))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_answer_does_not_depend_on_the_layout(name):
    for dtype, tolerance in PRECISIONS.items():
        if dtype == torch.float32 and name.split(".")[0] not in SINGLE:
            continue
        given = {key: in_precision(value, dtype) for key, value in catalogue.arguments(name).items()}
        usual = answer(name, given)
        for layout, lay in LAYOUTS.items():
            laid = {key: value if key == "self" else lay_out(value, lay) for key, value in given.items()}
            found, expected = answer(name, laid), usual
            if "expanded" in layout:  # other numbers
                expected = answer(name, {key: contiguous(value) for key, value in laid.items()})
            if isinstance(expected, str):
                assert found == expected, f"{layout} {dtype}"
                continue
            assert not isinstance(found, str), f"{layout} {dtype}: {found}"
            for one, other in zip(found, expected, strict=True):
                size = np.abs(other[np.isfinite(other)]).max(initial=1.0)
                assert np.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True), f"{layout} {dtype}"
