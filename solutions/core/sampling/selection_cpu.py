"""The arg-max of rows as long as a vocabulary, on a CPU in C++ (``selection_cpu.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..platform import native

_NAMES = {torch.float32: "argmax_f32", torch.bfloat16: "argmax_bf16"}


class _Argmax(native.Arguments):
    """`Argmax` of the C++ file."""

    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("ldx", ctypes.c_int64), ("n", ctypes.c_int64))


def supports(x: Tensor) -> bool:
    """Whether `native_argmax` can be used with this [R, W]."""
    return x.device.type == "cpu" and x.dtype in _NAMES and x.stride(1) == 1 and native.load() is not None


def native_argmax(x: Tensor) -> Tensor:
    """[R] index of the largest of each row [R, W], the first among equals; NaN counts as the largest, as in torch.argmax."""
    y = torch.empty(len(x), dtype=torch.int64)
    arguments = _Argmax(rows=len(x), x=x.data_ptr(), y=y.data_ptr(), ldx=x.stride(0), n=x.shape[1])
    native.Kernel(_NAMES[x.dtype], arguments)()
    return y
