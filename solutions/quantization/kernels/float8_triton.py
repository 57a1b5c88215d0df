"""Matrix products of weights in float8 and activations that are rounded to it: a card from 8.9 on multiplies both as they are.

A token's activations get a scale for each group of columns that shares one in a row of weights. Where a row has one scale,
`torch._scaled_mm` multiplies; where it has several, as DeepSeek's blocks of 128 × 128 say, the kernel here does, which scales
the sum of each group. Weights that were made for whole activations are widened in registers instead.
Source: DeepSeek-V3 (2024), section 3.3.2 (fine-grained scales, sums in float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.platform.triton_mode import INTERPRETED, cast, tl, triton
from ..layout.float8 import FLOAT8, LARGEST, ScaledFloat8, has_float8
from .w4a16_triton import FEW_ROWS, MAX_ROWS, MIN_SPLIT, PROGRAMS

BLOCK_K = 128
"""Inputs of a tile; all of one group, so groups must be whole tiles."""
BLOCK_N = 64


def supports(weight: ScaledFloat8) -> bool:
    """Whether `Float8Linear` can take these weights."""
    whole_rows = weight.group_size >= weight.shape[1]
    return (whole_rows or weight.group_size % BLOCK_K == 0) and has_float8(weight.codes.device)


class Float8Linear:
    """One matrix of [N, K] in float8.

    Args:
        weight: as `supports` wants it. rounds_inputs: activations become float8 as well. bias: [N] or None.
        num_splits: parts of K; None: as many as help.

    Attributes:
        codes: [N, K] float8. scales: [G, N] float32.
    """

    def __init__(
        self, weight: ScaledFloat8, rounds_inputs: bool = True, bias: Tensor | None = None, num_splits: int | None = None
    ) -> None:
        self.codes, self.scales = weight.codes.contiguous(), weight.scales.t().contiguous()
        self.group_size = min(weight.group_size, weight.shape[1])
        self.rounds_inputs, self.bias, self.num_splits = rounds_inputs, bias, num_splits
        fits = len(self.scales) == 1 and not any(size % 16 for size in weight.shape)
        self.by_torch = fits and rounds_inputs and num_splits is None

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """``x · weightᵀ + bias``: [T, K] -> [T, N] in the type of `x`; the sums are float32. With `add_to` [T, N] the result is
        added to that in place."""
        if not len(x):
            y = x.new_empty(0, len(self.codes))
        elif self.by_torch and x.dtype == torch.bfloat16:  # the one type that it gives for scales of rows
            codes, scales = round_inputs(x, self.group_size)
            y = torch._scaled_mm(codes, self.codes.t(), scale_a=scales, scale_b=self.scales, out_dtype=x.dtype)
        else:
            y = self._multiply(x)
        if self.bias is not None:
            y += self.bias
        return y if add_to is None else add_to.add_(y)

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, [N, K] float32."""
        return ScaledFloat8(self.codes, self.scales.t(), self.group_size).dequantize()

    def _multiply(self, x: Tensor) -> Tensor:
        (rows, columns), outputs = x.shape, len(self.codes)
        inputs, scales = round_inputs(x, self.group_size) if self.rounds_inputs else (x, None)
        block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
        tiles, parts = (triton.cdiv(rows, block_m), triton.cdiv(outputs, BLOCK_N)), triton.cdiv(columns, BLOCK_K)
        most = min(PROGRAMS // (tiles[0] * tiles[1]), parts // MIN_SPLIT) if rows <= FEW_ROWS else 1
        splits = self.num_splits or max(1, most)
        out = x.new_empty(splits, rows, outputs, dtype=x.dtype if splits == 1 else torch.float32)
        float8_kernel[*tiles, splits](
            inputs, scales, self.codes, self.scales, out, rows, outputs, columns, inputs.stride(0), self.group_size,
            triton.cdiv(parts, splits) * BLOCK_K, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)


def round_inputs(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Activations [T, K] as float8 of the same shape, and the scales of their groups, [T, G] float32."""
    rows, columns = x.shape
    groups = triton.cdiv(columns, group_size)
    codes, scales = torch.empty(x.shape, dtype=FLOAT8, device=x.device), x.new_empty(rows, groups, dtype=torch.float32)
    block = triton.next_power_of_2(group_size)
    round_kernel[rows, groups](
        x,
        codes,
        scales,
        columns,
        x.stride(0),
        group_size,
        LARGEST=LARGEST,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return codes, scales


@triton.jit
def round_kernel(x, codes, scales, num_inputs, x_stride, group_size, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """One group of one row a program."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = group * group_size + tl.arange(0, BLOCK)
    is_input = (tl.arange(0, BLOCK) < group_size) & (place < num_inputs)
    values = tl.load(x + row * x_stride + place, is_input, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    tl.store(scales + row * tl.num_programs(1) + group, scale)
    tl.store(codes + row * num_inputs + place, cast(values / scale, codes.dtype.element_ty), is_input)


@triton.jit
def scaled_product(a, b, scales, x_scales, place, is_row):
    """Inputs of one group times weights, with their scales, [BLOCK_M, BLOCK_N] float32.

    Args:
        a: [BLOCK_M, BLOCK_K], float8 with `x_scales`, those of the rows at `place` [BLOCK_M]; or of another type, with None.
        b: [BLOCK_K, BLOCK_N] float8. scales: [BLOCK_N].
    """
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif x_scales is None:
        b = b.to(a.dtype)
    product = tl.dot(a, b, input_precision="ieee") * scales[None, :]
    if x_scales is not None:
        product *= tl.load(x_scales + place, is_row, other=0.0)[:, None]
    return product


@triton.jit
def float8_kernel(
    x, x_scales, weights, scales, out, num_rows, num_outputs, num_inputs, x_stride, group_size, inputs_a_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of outputs over one part of the inputs.

    Args:
        x: [T, K], rows `x_stride` apart, float8 with `x_scales` [T, G]; or of another type, with None.
        weights: [N, K] float8. scales: [G, N].
        out: [splits, T, N], of which this program writes its part's sums.
        group_size, inputs_a_split: inputs of a group and of a part, multiples of BLOCK_K (or at least K).
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * inputs_a_split
    last = tl.minimum(first + inputs_a_split, num_inputs)
    is_row, is_output = row < num_rows, output < num_outputs
    num_groups = tl.cdiv(num_inputs, group_size)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, last, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        is_input = place < last
        of_rows, of_weights = is_row[:, None] & is_input[None, :], is_input[:, None] & is_output[None, :]
        a = tl.load(x + row[:, None].to(tl.int64) * x_stride + place[None, :], of_rows, other=0.0)  # [BLOCK_M, BLOCK_K]
        b = tl.load(weights + output[None, :].to(tl.int64) * num_inputs + place[:, None], of_weights, other=0.0)
        group = start // group_size
        of_outputs = tl.load(scales + group * num_outputs + output, is_output, other=0.0)
        total += scaled_product(a, b, of_outputs, x_scales, row * num_groups + group, is_row)
    at = (tl.program_id(2) * num_rows + row[:, None]).to(tl.int64) * num_outputs + output[None, :]
    tl.store(out + at, cast(total, out.dtype.element_ty), is_row[:, None] & is_output[None, :])
