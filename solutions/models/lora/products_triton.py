"""What adapters add to a layer's product, in Triton: two kernels a layer for any number of adapters.

The rows of a step lie in the order of their adapters, cut into tiles of one adapter each (`AdaptersOfStep.tiles`). The first
kernel shrinks a tile to the adapter's rank, the second expands it into the rows that it came from; each adapter's A and B are
read once for a tile. (Chen et al., "Punica", 2023, call this segmented gather matrix-vector products.)

In the first kernel few tiles read long rows, so the inputs are cut into parts, whose sums the second one adds in their order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.platform.triton_mode import INTERPRETED, cast, tl, triton
from ...parallelism.linear import Linear
from .products import TILE, AdaptedProduct, AdaptersOfStep, Weights

BLOCK_R, BLOCK_K, BLOCK_N = 16, 64, 64
"""Of the rank, the inputs and the outputs, what a program takes at once."""
INPUTS_A_SPLIT, MAX_SPLITS = 512, 8


class TritonProduct(AdaptedProduct):
    """`AdaptedProduct` around any product.

    Args:
        num_slots: most adapters.
    """

    def __init__(
        self, layer: Linear, product: Callable[..., Tensor], hidden_size: int, step: AdaptersOfStep, dtype: torch.dtype,
        num_slots: int,
    ) -> None:  # fmt: skip
        super().__init__(layer, product, hidden_size, step, dtype)
        device = step.device
        self._table = torch.zeros(num_slots + 1, 3, dtype=torch.int64, device=device)  # where A and B are, and the rank
        blocks, first = [], 0
        for piece, shard in enumerate(self.pieces.values()):
            end = first + len(shard)
            blocks += [(piece, at, end) for at in range(first, end, BLOCK_N)]
            first = end
        self._blocks = torch.tensor(blocks, dtype=torch.int32, device=device)
        self._splits = max(1, min(MAX_SPLITS, len(self.inputs) // INPUTS_A_SPLIT))

    def _keep(self, slot: int, weights: Weights | None) -> None:
        entry = [0, 0, 0]
        if weights is not None:
            a, b = weights[0], torch.cat(weights[1])
            weights, entry = (a, [b]), [a.data_ptr(), b.data_ptr(), b.shape[1]]
        super()._keep(slot, weights)
        self._table[slot] = torch.tensor(entry, dtype=torch.int64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to `y` what the rows' adapters say of `x`."""
        ranks = [kept[1][0].shape[1] for slot, _ in self.step.rows if (kept := self._weights.get(slot)) is not None]
        if not ranks:
            return
        tiles, order, rank, pieces = self.step.tiles, self.step.order, max(ranks), len(self.pieces)
        inner = x.new_empty(self._splits, len(x), pieces, rank, dtype=torch.float32)
        shrink_kernel[len(tiles), pieces * triton.cdiv(rank, BLOCK_R), self._splits](
            x, inner, tiles, order, self._table, x.shape[1], x.stride(0), *inner.stride()[:3],
            triton.cdiv(triton.cdiv(x.shape[1], self._splits), BLOCK_K) * BLOCK_K, triton.cdiv(rank, BLOCK_R),
            TILE=TILE, BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K,
        )  # fmt: skip
        expand_kernel[len(tiles), len(self._blocks)](
            inner, y, tiles, order, self._table, self._blocks, y.stride(0), *inner.stride()[:3],
            SPLITS=self._splits, TILE=TILE, BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N,
        )  # fmt: skip


def shrink(
    x, inner, tiles, order, table, num_inputs, x_stride, split_stride, row_stride,
    piece_stride, inputs_a_split, rank_blocks, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows times BLOCK_R rows of a piece's A, over one part of the inputs.

    Args:
        x: [T, K], rows `x_stride` apart. inner: [splits, T, pieces, rank] float32, rows in the order of `order`.
        tiles: [tiles, 3], slot, first and end of a tile's rows in `order` [T]. table: [slots, 3], addresses of A
            [pieces, rank, K] and B, and the rank. rank_blocks: programs for a piece.
    """
    tile = tiles + tl.program_id(0) * 3
    entry = table + tl.load(tile) * 3
    rank = tl.load(entry + 2)
    piece = tl.program_id(1) // rank_blocks
    first_rank = tl.program_id(1) % rank_blocks * BLOCK_R
    if first_rank >= rank:
        return
    a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
    place = tl.load(tile + 1) + tl.arange(0, TILE)
    is_row = place < tl.load(tile + 2)
    row = tl.load(order + place, is_row, other=0)
    r = first_rank + tl.arange(0, BLOCK_R)
    is_rank = r < rank
    start = tl.program_id(2) * inputs_a_split
    total = tl.zeros((TILE, BLOCK_R), tl.float32)
    for at in range(start, tl.minimum(start + inputs_a_split, num_inputs), BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        is_input = k < num_inputs
        left = tl.load(x + row[:, None] * x_stride + k[None, :], is_row[:, None] & is_input[None, :], other=0.0)
        weights = a + (piece * rank + r)[None, :] * num_inputs + k[:, None]
        right = tl.load(weights, is_input[:, None] & is_rank[None, :], other=0.0)
        if INTERPRETED:  # which would multiply the bits of bfloat16 as integers
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    to = inner + tl.program_id(2).to(tl.int64) * split_stride + piece * piece_stride
    tl.store(to + place.to(tl.int64)[:, None] * row_stride + r[None, :], total, is_row[:, None] & is_rank[None, :])


def expand(
    inner, y, tiles, order, table, blocks, y_stride, split_stride, row_stride,
    piece_stride, SPLITS: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to one tile of rows, in BLOCK_N columns of one piece, what `shrink` has left times their part of B.

    Args:
        y: [T, N], rows `y_stride` apart. blocks: [N / BLOCK_N, 3], a block's piece, its first column, and the end of the piece.
    """
    tile, block = tiles + tl.program_id(0) * 3, blocks + tl.program_id(1) * 3
    entry = table + tl.load(tile) * 3
    rank = tl.load(entry + 2)
    if rank == 0:
        return
    b = tl.load(entry + 1).to(tl.pointer_type(y.dtype.element_ty))
    place = tl.load(tile + 1) + tl.arange(0, TILE)
    is_row = place < tl.load(tile + 2)
    column = tl.load(block + 1) + tl.arange(0, BLOCK_N)
    is_column = column < tl.load(block + 2)
    rows = inner + place.to(tl.int64)[:, None] * row_stride + tl.load(block) * piece_stride
    total = tl.zeros((TILE, BLOCK_N), tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        is_rank = r < rank
        left = tl.zeros((TILE, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLITS):
            left += tl.load(rows + split * split_stride + r[None, :], is_row[:, None] & is_rank[None, :], other=0.0)
        right = tl.load(b + column[None, :] * rank + r[:, None], is_rank[:, None] & is_column[None, :], other=0.0)
        left = cast(left, right.dtype)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    row = tl.load(order + place, is_row, other=0)
    to = y + row[:, None] * y_stride + column[None, :]
    is_both = is_row[:, None] & is_column[None, :]
    tl.store(to, cast(tl.load(to, is_both, other=0.0).to(tl.float32) + total, y.dtype.element_ty), is_both)


shrink_kernel, expand_kernel = triton.jit(shrink), triton.jit(expand)
