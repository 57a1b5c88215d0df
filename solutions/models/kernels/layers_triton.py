"""The layers between matrix products, fused in Triton so that each reads its input once and writes its result once.

They are bound by memory: x/√(mean x²) in PyTorch's single operations would move a row six times. All arithmetic is float32.
The sum that goes into a norm, of the residual stream and a layer's result, is made inside the product before it, see
`attach.add_inside`.

Beside them the grouped product of experts: rows that are sorted by expert, each times its own expert's matrix, in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.platform.triton_mode import INTERPRETED, cast, tl, triton

SILU_COLUMNS = 1024
"""Elements of a row that one program of `silu_mul` computes."""
BLOCK_N, BLOCK_K = 64, 64
MAX_ROWS = 64
"""Most rows of a tile of a grouped product."""
MAX_SHARES = 8
"""Most programs that share an expert's rows."""


def rms_norm(x: Tensor, add_to: Tensor | None = None, *, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · (offset + weight)`` over each row (Zhang and Sennrich, 2019).

    Args:
        x: [T, hidden], its rows may lie apart. weight: [hidden]. add_to: [T, hidden], what the result is added to in place.

    Returns:
        [T, hidden] in the dtype of `x`.
    """
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device) if add_to is None else add_to
    if rows:
        _norm(x, weight, out, (rows, 1), eps, offset, add_to is not None)
    return out


def norm_heads_(heads: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm` of every head by itself, in place.

    Args:
        heads: [T, H, D], the heads of a token behind one another. weight: [D].
    """
    if heads.numel():
        _norm(heads, weight, heads, (heads.shape[0], heads.shape[1]), eps, offset, False)
    return heads


def _norm(x: Tensor, weight: Tensor, out: Tensor, grid: tuple[int, int], eps: float, offset: float, add: bool) -> None:
    """grid: (rows, pieces of a row). add: to what `out` holds."""
    size = len(weight)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 512))
    norm_kernel[grid](x, weight, out, x.stride(0), out.stride(0), eps, offset, ADD=add, SIZE=size, BLOCK=block, num_warps=warps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up``, the middle of a gated MLP (Shazeer, 2020).

    Args:
        gate_up: [T, 2·I], gate in the first half of a row and up in the second.

    Returns:
        [T, I].
    """
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(columns, SILU_COLUMNS))
        silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), columns, BLOCK=SILU_COLUMNS)
    return out


def grouped_product(x: Tensor, weights: Tensor, bounds: Tensor, out: Tensor, biases: Tensor | None = None) -> Tensor:
    """``out[i] = weights[e] · x[i] + biases[e]`` for the rows bounds[e] <= i < bounds[e + 1] of each expert; other rows stay as
    they are.

    Args:
        x: [R, K], dense. weights: [E, N, K]. bounds: [E + 1] int64. out: [R, N], dense. biases: [E, N]; None: there are none.
    """
    count, num_outputs, num_inputs = weights.shape
    if len(x):
        block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(triton.cdiv(len(x), count))))
        grid = (count, triton.cdiv(num_outputs, BLOCK_N), min(MAX_SHARES, triton.cdiv(len(x), block_m)))
        grouped_kernel[grid](
            x, weights, biases, bounds, out, num_outputs, num_inputs, BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K
        )
    return out


@triton.jit
def norm_kernel(
    x, weight, out, x_stride, out_stride, eps, offset, ADD: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One piece of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    first = tl.program_id(1) * SIZE
    values = tl.load(x + row * x_stride + first + column, mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(values * values, 0) / SIZE + eps)
    normed = values * factor * (tl.load(weight + column, mask, other=0.0).to(tl.float32) + offset)
    if ADD:
        normed += tl.load(out + row * out_stride + first + column, mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + first + column, cast(normed, out.dtype.element_ty), mask)


@triton.jit
def silu_mul_kernel(gate_up, out, stride, size, BLOCK: tl.constexpr):
    """Part of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + row * stride + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + column, mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, cast(gate / (1.0 + tl.exp(-gate)) * up, out.dtype.element_ty), mask)


@triton.jit
def grouped_kernel(
    x, weights, biases, bounds, out, num_outputs, num_inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some outputs of one expert, for every so many tiles of its rows."""
    expert = tl.program_id(0).to(tl.int64)
    first, last = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = weights + expert * num_outputs * num_inputs
    for start in range(first + tl.program_id(2) * BLOCK_M, last, tl.num_programs(2) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, num_inputs, BLOCK_K):
            place = begin + tl.arange(0, BLOCK_K)
            of_rows = (row < last)[:, None] & (place < num_inputs)[None, :]
            of_weights = (output < num_outputs)[None, :] & (place < num_inputs)[:, None]
            a = tl.load(x + row[:, None] * num_inputs + place[None, :], of_rows, other=0.0)
            b = tl.load(matrix + output[None, :] * num_inputs + place[:, None], of_weights, other=0.0)
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total += tl.dot(a, b, input_precision="ieee")
        if biases is not None:
            total += tl.load(biases + expert * num_outputs + output, output < num_outputs, other=0.0).to(tl.float32)[None, :]
        inside = (row < last)[:, None] & (output < num_outputs)[None, :]
        tl.store(out + row[:, None] * num_outputs + output[None, :], cast(total, out.dtype.element_ty), inside)
