"""Matrix products with 4-bit weights in Triton: weights become numbers in registers, activations are as they are (W4A16).

With few rows the product waits for memory, which delivers a quarter of the bytes; then there are also too few tiles of outputs
to keep a card busy, so the inputs are cut into several parts (split-K), whose sums are added afterwards, always in one order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.platform.triton_mode import INTERPRETED, cast, tl, triton
from ..layout.groups import GroupQuantized, pack_int32

BLOCK_K = 32
"""Inputs of a tile; all of one group, so groups must be whole tiles."""
BLOCK_N = 64
MAX_ROWS = 64
"""Rows of a tile at most; at least 16, as tensor cores want."""
FEW_ROWS = 32
"""Up to so many rows the inputs are cut."""
PROGRAMS = 256
"""About so many programs keep a large card busy."""
MIN_SPLIT = 4
"""Tiles of inputs that a part has at least."""


def supports(weight: GroupQuantized) -> bool:
    """Whether the kernel can take these weights."""
    whole_rows = weight.group_size >= weight.shape[1]
    return weight.bits == 4 and weight.shape[1] % 8 == 0 and (whole_rows or weight.group_size % BLOCK_K == 0)


class TritonLinear:
    """One matrix of [N, K] in 4 bits.

    Args:
        weight: codes in their own order or another, see `GroupQuantized`. num_splits: parts of K; None: as many as help.
        bias: [N] or None.

    Attributes:
        packed: [K / 8, N] int32, the first of 8 inputs in the lowest bits. scales, zeros: [G, N] float16.
    """

    def __init__(self, weight: GroupQuantized, num_splits: int | None = None, bias: Tensor | None = None) -> None:
        self.num_rows, self.num_columns = weight.shape
        self.group_size = min(weight.group_size, self.num_columns)
        self.packed = pack_int32(weight.codes, 4).t().contiguous()
        self.scales = weight.scales.t().to(torch.float16).contiguous()
        self.zeros = weight.zeros.t().to(torch.float16).contiguous()
        self.order, self.bias = weight.order, bias
        self.num_splits = num_splits

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """``x · weightᵀ + bias``: [T, K] -> [T, N] in the type of `x`; the sums are float32.

        With `add_to` [T, N] the result is added to that in place.
        """
        if self.order is not None:
            x = x[:, self.order]
        rows = x.shape[0]
        block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(rows)))
        tiles = triton.cdiv(rows, block_m) * triton.cdiv(self.num_rows, BLOCK_N)
        splits = self._splits(rows, tiles)
        out = x.new_empty(splits, rows, self.num_rows, dtype=x.dtype if splits == 1 else torch.float32)
        grid = (triton.cdiv(rows, block_m), triton.cdiv(self.num_rows, BLOCK_N), splits)
        w4a16_kernel[grid](
            x, self.packed, self.scales, self.zeros, out, rows, self.num_rows, self.num_columns, x.stride(0), self.group_size,
            triton.cdiv(triton.cdiv(self.num_columns, BLOCK_K), splits) * BLOCK_K,
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        y = out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
        if self.bias is not None:
            y += self.bias
        return y if add_to is None else add_to.add_(y)

    def _splits(self, rows: int, tiles: int) -> int:
        if self.num_splits is not None:
            return self.num_splits
        if rows > FEW_ROWS:
            return 1
        most: int = triton.cdiv(self.num_columns, BLOCK_K) // MIN_SPLIT
        return max(1, min(PROGRAMS // tiles, most))


@triton.jit
def w4a16_kernel(
    x, packed, scales, zeros, out, num_rows, num_outputs, num_inputs, x_stride, group_size, inputs_a_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of outputs over one part of the inputs.

    Args:
        x: [T, K], rows `x_stride` apart. packed: [K / 8, N] int32. scales, zeros: [G, N].
        out: [splits, T, N], of which this program writes its part's sums.
        group_size, inputs_a_split: inputs of a group and of a part, multiples of BLOCK_K (or at least K).
    """
    # Hint: Write the kernel for x and weights in float first: a loop over K in steps of BLOCK_K, tl.load of both tiles,
    # tl.dot. Then exchange the load of the weights.
    raise NotImplementedError("Stage 4 · Task 4.6: w4a16_kernel, see stages/stage4_optimization/GUIDE.md#task-4-6")
