"""What stands between the matrix products of a layer, on a CPU in C++ (``layers_cpu.cpp``): normalisation, rotation, rows of a
table."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...core.platform import native

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Norm(native.Arguments):
    """`Norm` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        ("n", ctypes.c_int64),
        ("eps", ctypes.c_double),
        ("offset", ctypes.c_double),
    )


class _PiecesNorm(native.Arguments):
    """`PiecesNorm` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("ldx", "ldy", "pieces", "n", "add")),
        ("eps", ctypes.c_double),
        ("offset", ctypes.c_double),
    )


class _Rotation(native.Arguments):
    """`Rotation` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("ldx", "heads", "dim")),
    )


class _Rows(native.Arguments):
    """`Rows` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "index", "y")),
        *((name, ctypes.c_int64) for name in ("from_apart", "to_apart", "size")),
    )


def supports_norm(weight: Tensor) -> bool:
    """Whether `NativeNorm` can be used with this weight."""
    return weight.dtype in _NAMES and len(weight) % 16 == 0 and native.load() is not None


class NativeNorm:
    """RMSNorm: ``x / sqrt(mean(x²) + eps) · (offset + weight)`` over the last dimension of a contiguous [T, hidden]; with
    `add_to` of that shape the result is added to it in place."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self._weight = weight
        self._arguments = _Norm(weight=weight.data_ptr(), n=len(weight), eps=eps, offset=offset)
        self._kernel = native.Kernel(f"rms_norm_{_NAMES[weight.dtype]}", self._arguments)
        self._pieces = _Pieces(weight, eps, offset, add=True)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        rows, width = x.shape
        if add_to is not None:
            return self._pieces(x.unsqueeze(1), add_to)
        y = native.result("norm", rows, width, x.dtype)
        arguments = self._arguments
        arguments.x, arguments.y, arguments.rows = x.data_ptr(), y.data_ptr(), rows
        self._kernel()
        return y


class NativeHeadNorm:
    """RMSNorm in place of each head of [T, H, D], heads that lie behind one another; the weight is one that `supports_norm`."""

    def __init__(self, weight: Tensor, eps: float, offset: float = 0.0) -> None:
        self._pieces = _Pieces(weight, eps, offset, add=False)

    def __call__(self, heads: Tensor) -> Tensor:
        return self._pieces(heads, heads)


class _Pieces:
    """`norm_pieces` of the C++ file."""

    def __init__(self, weight: Tensor, eps: float, offset: float, add: bool) -> None:
        self._weight = weight
        self._arguments = _PiecesNorm(weight=weight.data_ptr(), n=len(weight), eps=eps, offset=offset, add=add)
        self._kernel = native.Kernel(f"norm_pieces_{_NAMES[weight.dtype]}", self._arguments)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:  # [T, pieces, n], and y with as many elements a row
        arguments = self._arguments
        arguments.x, arguments.y, arguments.ldx, arguments.ldy = x.data_ptr(), y.data_ptr(), x.stride(0), y.stride(0)
        arguments.rows, arguments.pieces, _ = x.shape
        self._kernel()
        return y


def supports_rotation(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `NativeRotation` can be used with heads of this size and type."""
    return head_dim % 32 == 0 and dtype in _NAMES and native.load() is not None


class NativeRotation:
    """RoPE in place on [T, H, D] heads that lie behind one another."""

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        self._arguments = _Rotation(dim=head_dim)
        self._kernel = native.Kernel(f"rotate_{_NAMES[dtype]}", self._arguments)

    def __call__(self, heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`rope` is (cos, signed sin), contiguous [T, 1, D] each."""
        arguments = self._arguments
        arguments.x, arguments.ldx = heads.data_ptr(), heads.stride(0)
        arguments.cosines, arguments.sines = rope[0].data_ptr(), rope[1].data_ptr()
        arguments.rows, arguments.heads, _ = heads.shape
        self._kernel()
        return heads


class NativeRows:
    """Rows of a table [V, n], whose rows are contiguous and which stays where it is."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        size = table.element_size()
        self._arguments = _Rows(table=table.data_ptr(), from_apart=table.stride(0) * size, size=table.shape[1] * size)
        self._kernel = native.Kernel("take_rows", self._arguments)

    def __call__(self, index: Tensor, out: Tensor) -> Tensor:
        """Put the rows at `index` [T] int64 into `out` [T, n], whose rows are contiguous."""
        arguments = self._arguments
        arguments.index, arguments.y = index.data_ptr(), out.data_ptr()
        arguments.rows, arguments.to_apart = len(index), out.stride(0) * out.element_size()
        self._kernel()
        return out
