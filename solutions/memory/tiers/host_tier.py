"""Blocks in host memory, the least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from ...core.platform.huge_pages import zeros_in_huge_pages
from .tier import Fetch, TierStats


class HostTier:
    """A `Tier` of host memory. Copies to and from a GPU are queued there behind the work that they depend on.

    Args:
        limit: bytes that rows may take. row_bytes: of a row. pinned: the device is a GPU, which copies from pinned memory.

    Raises:
        ValueError: not even one block fits.
    """

    outlives = False

    def __init__(self, limit: int, row_bytes: int, pinned: bool) -> None:
        count = limit // row_bytes
        if count < 1:
            raise ValueError(f"--kv-offload-size {limit} holds no KV block of {row_bytes} bytes")
        shape = count, row_bytes
        self._rows = (
            torch.empty(shape, dtype=torch.uint8, pin_memory=True) if pinned else zeros_in_huge_pages(shape, torch.uint8)
        )
        self._place: OrderedDict[bytes, int] = OrderedDict()
        """hash → row, the least recently used first."""
        self._free = list(range(count))
        self.stats = TierStats(limit=count * row_bytes)

    @property
    def most_rows(self) -> int:
        return len(self._rows)

    def has(self, block_hash: bytes) -> bool:
        return block_hash in self._place

    def wants(self, block_hash: bytes) -> bool:
        if block_hash not in self._place:
            return True
        self._place.move_to_end(block_hash)
        return False

    def store(self, hashes: list[bytes], rows: Tensor, age: float = 0.0) -> None:
        for block_hash, row in zip(hashes, rows, strict=True):
            place = self._free.pop() if self._free else self._place.popitem(last=False)[1]
            self._place[block_hash] = place
            self._rows[place].copy_(row, non_blocking=True)
        self.stats.store_bytes += rows.nbytes
        self.stats.num_bytes = len(self._place) * self._rows.shape[1]

    def fetch(self, hashes: list[bytes]) -> Fetch:
        found: dict[bytes, Tensor] = {}
        for block_hash in hashes:
            if block_hash not in self._place:
                break
            found[block_hash] = self._rows[self._place[block_hash]]
        for block_hash in reversed(found):
            self._place.move_to_end(block_hash)
        return Fetch(found)

    def close(self, seconds: float) -> None:
        self._place.clear()
