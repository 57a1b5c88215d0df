"""Whole KV blocks as rows of bytes: what a tier below the device keeps of a block, all layers one behind the other."""

from __future__ import annotations

import torch
from torch import Tensor


class BlockRows:
    """Reads and writes blocks of a KV cache as rows.

    Args:
        tensors: all that holds something of a block, on one device: [2, num_blocks, ...] each, of any types.

    Attributes:
        num_bytes: of a row. layout: shape of a block in each tensor, and its type, in words.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors, self._device = tensors, tensors[0].device
        self.layout = [f"{tuple(tensor.shape[2:])} {tensor.dtype}" for tensor in tensors]
        sizes = [2 * tensor[0, 0].nbytes for tensor in tensors]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.num_bytes = sum(sizes)

    def read(self, blocks: list[int]) -> Tensor:
        """The content of n blocks, [n, num_bytes] uint8 on the cache's device, without waiting for the work that is queued
        there."""
        rows = torch.empty((len(blocks), self.num_bytes), dtype=torch.uint8, device=self._device)
        index = torch.tensor(blocks).to(self._device, non_blocking=True)
        for tensor, part in zip(self._tensors, self._parts(rows), strict=True):
            part.copy_(tensor.index_select(1, index).transpose(0, 1))
        return rows

    def write(self, rows: list[Tensor], blocks: list[int]) -> None:
        """Put rows [num_bytes] uint8, each in memory of the host, into blocks; nothing else changes."""
        index = torch.tensor(blocks).to(self._device, non_blocking=True)
        if self._device.type == "cpu":
            there = torch.stack(rows)
        else:
            there = torch.empty((len(rows), self.num_bytes), dtype=torch.uint8, device=self._device)
            for target, row in zip(there, rows, strict=True):
                target.copy_(row, non_blocking=True)
        for tensor, part in zip(self._tensors, self._parts(there), strict=True):
            tensor.index_copy_(1, index, part.transpose(0, 1))

    def _parts(self, rows: Tensor) -> list[Tensor]:
        """Of rows [n, num_bytes] what belongs to each tensor, [n, 2, ...], as a view."""
        parts = []
        for tensor, start in zip(self._tensors, self._starts, strict=True):
            size = 2 * tensor[0, 0].nbytes
            parts.append(rows[:, start : start + size].view(tensor.dtype).unflatten(1, (2, *tensor.shape[2:])))
        return parts
