"""What stands between the matrix products of a layer, on a CPU in C++ (``layers_cpu.cpp``): normalisation and rotation."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core import native

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LENGTH, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "rms_norm": [_POINTER, _POINTER, _POINTER, _LENGTH, _LENGTH, ctypes.c_float],
    "rotate": [_POINTER, _LENGTH, _POINTER, _POINTER, _LENGTH, _LENGTH, _LENGTH],
}


@cache
def _kernel(name: str, dtype: torch.dtype) -> Any:
    kernel = getattr(native.load(), f"{name}_{_NAMES[dtype]}")
    kernel.argtypes, kernel.restype = _ARGUMENTS[name], None
    return kernel


def supports_norm(weight: Tensor) -> bool:
    """Whether `rms_norm` can be used with this weight."""
    return weight.dtype in _NAMES and len(weight) % 16 == 0 and native.load() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension of a contiguous [T, hidden]."""
    y = torch.empty_like(x)
    _kernel("rms_norm", x.dtype)(x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(x), x.shape[1], eps)
    return y


def supports_rotation(head_dim: int) -> bool:
    """Whether `rotate_` can be used with heads of this size."""
    return head_dim % 32 == 0 and native.load() is not None


def rotate_(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE in place on `heads` [T, H, D], whose heads lie behind one another; `rope` is (cos, signed sin), [T, 1, D] each."""
    cos, signed_sin = rope
    kernel = _kernel("rotate", heads.dtype)
    kernel(heads.data_ptr(), heads.stride(0), cos.data_ptr(), signed_sin.data_ptr(), len(heads), heads.shape[1], heads.shape[2])
    return heads
