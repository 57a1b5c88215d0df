"""The arg-max of rows as long as a vocabulary, and the few largest, on a CPU in C++ (``selection_cpu.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..platform import native

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Argmax(native.Arguments):
    """`Argmax` of the C++ file."""

    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("ldx", ctypes.c_int64), ("n", ctypes.c_int64))


class _Best(native.Arguments):
    """`Best` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "values", "y")),
        *((name, ctypes.c_int64) for name in ("ldx", "n", "k")),
    )


def supports(x: Tensor) -> bool:
    """Whether `native_argmax` can be used with this [R, W]."""
    return x.device.type == "cpu" and x.dtype in _NAMES and x.stride(1) == 1 and native.load() is not None


def native_argmax(x: Tensor) -> Tensor:
    """[R] index of the largest of each row [R, W], the first among equals; NaN counts as the largest, as in torch.argmax."""
    y = torch.empty(len(x), dtype=torch.int64)
    arguments = _Argmax(rows=len(x), x=x.data_ptr(), y=y.data_ptr(), ldx=x.stride(0), n=x.shape[1])
    native.Kernel(f"argmax_{_NAMES[x.dtype]}", arguments)()
    return y


class NativeBest:
    """The `count` largest of each row of [R, W], W at least `count`: which of `ids` [W] they are, in falling order.

    What a drafting head is asked in each of its passes, so it can be recorded.
    """

    def __init__(self, ids: Tensor, count: int, dtype: torch.dtype) -> None:
        self._ids = ids
        self._arguments = _Best(ids=ids.data_ptr(), n=len(ids), k=count)
        self._kernel = native.Kernel(f"best_{_NAMES[dtype]}", self._arguments)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """Put them into `out`, a contiguous [R, count] int64."""
        arguments, rows = self._arguments, len(x)
        values = native.result("values", rows, arguments.k, torch.float32)
        arguments.x, arguments.ldx, arguments.rows = x.data_ptr(), x.stride(0), rows
        arguments.y, arguments.values = out.data_ptr(), values.data_ptr()
        self._kernel()
        return out
