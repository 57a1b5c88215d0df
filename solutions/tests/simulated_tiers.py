"""A tier below the prefix cache for `Simulation`, whose blocks hold prefixes: the real one, but for what a row is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from solutions.attention.tiered_manager import TieredBlockManager
from solutions.memory.tiers.host_tier import HostTier
from solutions.memory.tiers.tier import Fetch


class SimulatedRows:
    """Blocks of a simulated device as rows of 8 bytes, each the number of a list of what the slots of a block hold.

    Args:
        device: slot → its content. block_size: slots in a block.
    """

    num_bytes = 8

    def __init__(self, device: dict[int, Any], block_size: int) -> None:
        self.device, self.block_size = device, block_size
        self.contents: list[list[Any]] = []

    def read(self, blocks: list[int]) -> Tensor:
        first = len(self.contents)
        for block in blocks:
            slots = range(block * self.block_size, (block + 1) * self.block_size)
            self.contents.append([self.device.get(slot) for slot in slots])
        return torch.arange(first, len(self.contents))[:, None].view(torch.uint8)

    def write(self, rows: list[Tensor], blocks: list[int]) -> None:
        for row, block in zip(rows, blocks, strict=True):
            for offset, content in enumerate(self.contents[int(row.clone().view(torch.int64))]):
                self.device[block * self.block_size + offset] = content


class LateFetch(Fetch):
    """Comes when it was asked for a few times, or when somebody waits for it alone."""

    def __init__(self, rows: dict[bytes, Tensor], asked: int) -> None:
        super().__init__()
        self.rows, self._asked = rows, asked

    def wait(self, seconds: float) -> bool:
        self._asked = 0 if seconds > 1 else self._asked - (seconds > 0)
        return self._asked <= 0


class LateTier(HostTier):
    """A tier as slow as a disk; whoever is sent blocks has them, whatever becomes of the tier's own.

    Args:
        delay: so many steps a block takes.
    """

    def __init__(self, limit: int, row_bytes: int, delay: int) -> None:
        super().__init__(limit, row_bytes, pinned=False)
        self.delay = delay

    def fetch(self, hashes: list[bytes]) -> Fetch:
        return LateFetch({name: row.clone() for name, row in super().fetch(hashes).rows.items()}, self.delay)


def make_tiered(
    device: dict[int, Any], sizes: tuple[int, int, int], watermark: float, window: int | None, num_rows: int, delay: int
) -> TieredBlockManager:
    """A block manager over a simulated device, with a tier of so many rows; `sizes` as of `BlockManager`."""
    rows: Any = SimulatedRows(device, sizes[1])
    limit = num_rows * rows.num_bytes
    tier = LateTier(limit, rows.num_bytes, delay) if delay else HostTier(limit, rows.num_bytes, pinned=False)
    manager = TieredBlockManager(*sizes, window, tier, rows)
    manager.watermark_blocks = int(watermark * sizes[0])
    return manager
