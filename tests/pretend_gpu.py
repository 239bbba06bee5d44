"""A GPU that is none: tensors that say `cuda` and compute on the CPU, so that every CUDA branch runs, with numbers.

PyTorch's fake tensors have shapes, precisions and devices, and no numbers: nothing that reads one (`item`, `tolist`,
`numpy`) gets past them. Here a tensor on "cuda" wraps one on the CPU. As with fake tensors, an operation that mixes
devices raises, but for the cases that CUDA takes: numbers (tensors without axes), indices, and copies. What only CUDA
has, fused attention, is refused where its kernels would refuse it or read other numbers, and computed plainly.

    with pretend_gpu() as used:
        ...
    used  # names of the operations that ran on "cuda"
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
MIXES = {aten.copy_.default, aten._to_copy.default}  # take tensors of any two devices
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
HALF = (torch.float16, torch.bfloat16)


class OnCuda(Tensor):
    """A tensor on the GPU that is none; `inner` has its numbers.

    To PyTorch's own code it lies on the CPU, since a build without CUDA has no guard for another device; `device`, that
    Python sees, says otherwise, and what moves or reads tensors is taken care of here.
    """

    @staticmethod
    def __new__(cls, inner: Tensor):
        options = {"dtype": inner.dtype, "device": inner.device, "requires_grad": inner.requires_grad}
        options |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, inner.size(), **options)

    def __init__(self, inner: Tensor):
        self.inner = inner.detach()

    device = property(lambda self: CUDA)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def __repr__(self, **_):
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.numpy or func is Tensor.__array__:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it first.")
        if func is Tensor.tolist:
            return args[0].inner.tolist()
        if func is Tensor.cpu:
            return args[0].inner.clone()
        if func is Tensor.to:
            return _moved(*args, **kwargs)
        if func in (torch.quantile, Tensor.quantile) and not isinstance(args[1], Tensor):
            return OnCuda(args[0].inner.quantile(*args[1:], **kwargs))  # makes a tensor of its own, inside PyTorch
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def _moved(tensor, *args, **kwargs):
    """`Tensor.to` where either tensor is on the GPU that is none."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ("non_blocking", "memory_format", "copy")}
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)):
            device = arg
    place = tensor.device if device is None else torch.device(device)
    inner = tensor.inner if isinstance(tensor, OnCuda) else tensor
    if place.type == tensor.device.type and dtype in (None, tensor.dtype):
        return tensor
    if place.type == tensor.device.type == "cuda":
        return aten._to_copy.default(tensor, dtype=dtype)
    inner = inner.to(dtype=dtype, copy=True)
    return OnCuda(inner) if place.type == "cuda" else inner


class Mode(TorchDispatchMode):
    """Sees what makes tensors from nothing, and operations on CPU tensors that ask for a device."""

    def __init__(self, used: Counter):
        super().__init__()
        self.used = used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.used)


def _is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func, args, kwargs, used: Counter | None = None):
    flat, spec = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, OnCuda)]
    asked = kwargs.get("device")
    if not there and not _is_cuda(asked):
        return func(*args, **kwargs)
    if used is not None:
        used[str(func)] += 1
    goes = _is_cuda(asked) or (asked is None and bool(there))
    if func in (aten._local_scalar_dense.default, aten.equal.default, aten.is_same_size.default):
        goes = False
    elif func is aten.copy_.default:
        goes = isinstance(args[0], OnCuda)
    elif func not in MIXES:
        _require_one_device(func, args, flat)
    inside = [x.inner if isinstance(x, OnCuda) else x for x in flat]
    args, kwargs = tree_unflatten(inside, spec)
    kwargs = {k: (torch.device("cpu") if k == "device" and v is not None else v) for k, v in kwargs.items()}
    answer = KERNELS.get(func, func)(*args, **kwargs)
    if func is aten.copy_.default or str(func).split(".")[1].endswith("_"):
        return flat[0]  # in place: the tensor that was given
    if func._schema.is_mutable and any(argument.is_out for argument in func._schema.arguments):
        return tree_unflatten(flat, spec)[1]["out"]
    if not goes:
        return answer
    # A view shares its memory: the inner one does, and that is what is written to.
    return tree_map_only(Tensor, lambda x: x if isinstance(x, OnCuda) else OnCuda(x), answer)


def _require_one_device(func, args, flat) -> None:
    rest = flat
    if func in INDEXING:
        rest = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
        for index in args[1]:
            if index is not None and not isinstance(args[0], OnCuda) and isinstance(index, OnCuda):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    elsewhere = [x for x in rest if isinstance(x, Tensor) and not isinstance(x, OnCuda) and x.ndim > 0]
    if elsewhere and any(isinstance(x, OnCuda) for x in rest):
        shape = tuple(elsewhere[0].shape)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got one of shape {shape} on cpu")


# ---- the kernels that only CUDA has ----


def _aligned(name: str, x: Tensor, bytes_: int) -> None:
    if x.stride(-1) != 1 or x.shape[-1] % 8:
        raise RuntimeError(
            f"{name}: last axis {x.shape[-1]} of stride {x.stride(-1)}; a multiple of 8 of stride 1 wanted"
        )
    unit = bytes_ // x.element_size()
    if x.storage_offset() % unit or any(s % unit for s, n in zip(x.stride()[:-1], x.shape[:-1]) if n > 1):
        raise RuntimeError(f"{name}: misaligned address, strides {x.stride()}, offset {x.storage_offset()}")


def _attend(q, k, v, scale):
    logits = scale * (q.float() @ k.float().mT)
    return (torch.softmax(logits, -1) @ v.float()).to(q.dtype), torch.logsumexp(logits, -1)


def _one_kind(name, q, k, v, dtypes):
    if any(x.ndim != 4 or x.dtype != q.dtype for x in (q, k, v)) or q.dtype not in dtypes:
        raise RuntimeError(f"{name}: no kernel for {[(tuple(x.shape), x.dtype) for x in (q, k, v)]}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise RuntimeError(f"{name}: shapes {[tuple(x.shape) for x in (q, k, v)]}")
    if q.shape[1] > 65_535:
        raise RuntimeError(f"{name}: {q.shape[1]} heads are more than a grid of CUDA has")
    for x in (q, k, v):
        _aligned(name, x, 16)


def efficient(q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale=None):
    _one_kind("efficient attention", q, k, v, (torch.float32, *HALF))
    assert bias is None and not causal and not dropout
    output, lse = _attend(q, k, v, scale)
    padding = -lse.shape[-1] % 32  # the kernel fills up the queries of its log-sum-exp
    lse = torch.nn.functional.pad(lse, (0, padding), value=math.inf) if with_lse else lse[..., :0]
    return output, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    _one_kind("flash attention", q, k, v, HALF)
    if q.shape[-1] > 256 or q.shape[-1] != v.shape[-1]:
        raise RuntimeError(f"flash attention: head sizes {q.shape[-1]} and {v.shape[-1]}; one, of at most 256, wanted")
    assert not causal and not dropout
    output, lse = _attend(q, k, v, scale)
    none = torch.zeros((), dtype=torch.int64)
    return output, lse, None, None, q.shape[2], k.shape[2], none, none, none


KERNELS = {
    aten._scaled_dot_product_efficient_attention.default: efficient,
    aten._scaled_dot_product_flash_attention.default: flash,
}


class Queue:
    """A queue of work: here each piece is done at once."""

    def __init__(self, device=None):
        pass

    def wait_stream(self, other) -> None:
        pass


@contextmanager
def pretend_gpu() -> Iterator[Counter]:
    """Inside the block there is a device "cuda"; yields how often each operation ran on it."""
    used: Counter = Counter()
    stand_ins = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "a GPU that is none",
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": Queue,
        "current_stream": Queue,
        "stream": lambda queue: nullcontext(),
    }
    with ExitStack() as stack:
        for name, call in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, call))
        # Wrapped tensors have no place in a module's old parameters, nor in inference mode.
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        # `torch.tensor(..., device="cuda")` then makes a tensor on the CPU and moves it, which the mode sees.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(Mode(used))
        yield used
