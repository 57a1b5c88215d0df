"""Matrix products with packed weights on a CPU, computed by ``linear_cpu.cpp``: in the weights' own type, or in int8.

int8 quantizes each output channel of the weights when they are packed, and each token's activations as they come (W8A8, dynamic
per token and per channel; Dettmers et al., "LLM.int8()", NeurIPS 2022, §2.1). A scale is the largest magnitude over 127.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...core import native
from ...core.huge_pages import empty_in_huge_pages

PANEL = 32
"""Columns of a panel, as in core/native.h."""
STORE, ADD, SILU_MUL = 0, 1, 2

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Linear(native.Arguments):
    """`Linear` of the C++ file."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "w", "scales", "sums", "bias", "y", "bytes", "row_scales")] + [
        (name, ctypes.c_int64) for name in ("ldx", "ldy", "n", "k", "epilogue")
    ]


def supports(dtype: torch.dtype, in_features: int, quantization: str | None = None) -> bool:
    """Whether a matrix can be packed: the kernels are built, and have code for this type and number of columns."""
    return dtype in _NAMES and in_features % (16 if quantization == "int8" else 2) == 0 and native.load() is not None


class PackedLinear:
    """One matrix of [N, K], packed.

    Args:
        weight: [N, K], float32 or bfloat16. With `gated` the first half of the rows is the gate, the second is up.
        bias: [N] or None.
        quantization: None or "int8".
        gated: the product is followed by ``silu(gate) · up``, so the result has N / 2 columns.

    Attributes:
        weight: the packed weights, [P, K, 32] for P panels in the kernel's order (for int8 beside `scales` and `sums`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: str | None = None, gated: bool = False) -> None:
        self.num_rows, self.num_columns = weight.shape
        self.out_features = self.num_rows // 2 if gated else self.num_rows
        self.epilogue = SILU_MUL if gated else STORE
        order = gate_and_up_order(self.num_rows) if gated else None
        dtype, name = weight.dtype, _NAMES[weight.dtype]
        self.scales = self.sums = None
        if quantization == "int8":
            weight, self.scales, self.sums = quantize_channels(weight)
            if order is not None:
                self.scales, self.sums = self.scales[order], self.sums[order]
            self.scales, self.sums = _padded(self.scales), _padded(self.sums)
        self.weight = pack(weight if order is None else weight[order])
        self.bias = None if bias is None else _padded((bias if order is None else bias[order]).float())
        self._dtype = dtype
        self._arguments = _Linear(n=self.num_rows, k=self.num_columns, w=self.weight.data_ptr())
        for field in ("scales", "sums", "bias"):
            tensor = getattr(self, field)
            setattr(self._arguments, field, None if tensor is None else tensor.data_ptr())
        self._kernel = native.Kernel(f"linear_{'int8_' if quantization else ''}{name}", self._arguments)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """``x · weightᵀ + bias``.

        Args:
            x: [T, K], rows contiguous. add_to: [T, N], to which the result is added in place.

        Returns:
            [T, N], or `add_to`.
        """
        rows = x.shape[0]
        y = native.result("linear", rows, self.out_features, self._dtype) if add_to is None else add_to
        arguments = self._arguments
        arguments.x, arguments.ldx, arguments.rows = x.data_ptr(), x.stride(0), rows
        arguments.y, arguments.ldy = y.data_ptr(), y.stride(0)
        arguments.epilogue = self.epilogue if add_to is None else ADD
        if self.scales is not None:
            quantized = native.result("quantized", rows, self.num_columns, torch.uint8)
            row_scales = native.result("row_scales", rows, 1, torch.float32)
            arguments.bytes, arguments.row_scales = quantized.data_ptr(), row_scales.data_ptr()
        self._kernel()
        return y


def gate_and_up_order(rows: int) -> Tensor:
    """Rows so that each panel has 16 of the gate and the same 16 of up.

    Raises:
        ValueError: half of the rows is no multiple of 16.
    """
    half = rows // 2
    if half % 16:
        raise ValueError(f"a gated matrix needs a multiple of 32 rows, got {rows}")
    gate = torch.arange(half).view(-1, 16)
    return torch.cat((gate, gate + half), dim=1).flatten()


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weights [N, K] with a scale [N] float32 and the sum [N] int32 of each row."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    quantized = (weight / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8)
    return quantized, scales, quantized.sum(dim=1, dtype=torch.int32)


def pack(weight: Tensor) -> Tensor:
    """[N, K] in panels of 32 rows: [P, K / g, 32, g], g values of a row side by side (1 float, 2 bfloat16, 4 int8)."""
    rows, columns = weight.shape
    group = 4 // weight.itemsize
    panels = -(-rows // PANEL)
    if rows % PANEL:
        weight = torch.cat((weight, weight.new_zeros(panels * PANEL - rows, columns)))
    in_order = weight.view(panels, PANEL, columns // group, group).transpose(1, 2)
    return empty_in_huge_pages(tuple(in_order.shape), weight.dtype).copy_(in_order)


def unpack(packed: Tensor, rows: int) -> Tensor:
    """The [rows, K] matrix that `pack` was given."""
    panels, groups, _, group = packed.shape
    return packed.transpose(1, 2).reshape(panels * PANEL, groups * group)[:rows]


def _padded(values: Tensor) -> Tensor:
    """Zeros at the end up to a whole panel, where the kernel reads them."""
    missing = -len(values) % PANEL
    return torch.cat((values, values.new_zeros(missing))).contiguous()
