"""The layers between matrix products, fused in Triton so that each reads its input once and writes its result once.

They are bound by memory: x/√(mean x²) in PyTorch's single operations would move a row six times. All arithmetic is float32.
The sum that goes into a norm, of the residual stream and a layer's result, is made inside the product before it, see
`attach.add_inside`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.platform.triton_mode import cast, tl, triton

SILU_COLUMNS = 1024
"""Elements of a row that one program of `silu_mul` computes."""


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
    _norm_kernel[grid](
        x, weight, out, x.stride(0), out.stride(0), eps, offset, ADD=add, SIZE=size, BLOCK=block, num_warps=warps
    )


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
        _silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), columns, BLOCK=SILU_COLUMNS)
    return out


@triton.jit
def _norm_kernel(
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
def _silu_mul_kernel(gate_up, out, stride, size, BLOCK: tl.constexpr):
    """Part of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + row * stride + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + column, mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, cast(gate / (1.0 + tl.exp(-gate)) * up, out.dtype.element_ty), mask)
