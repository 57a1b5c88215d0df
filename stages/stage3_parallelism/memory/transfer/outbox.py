"""Blocks that an engine has computed for others, for a short time and within a limit of bytes.

A block has a lease for each request that has computed or found it here. A lease ends when somebody has fetched the block, or
after some seconds; without one the block is gone. What finds no room is left out, and whoever wants it computes it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...core.platform.transfer import OnTheWay
from ..tiers.tier import Fetch
from .transfer_stats import TransferStats


@dataclass(slots=True)
class _Kept:
    """A row of what a step has left here, how often it is wanted, and until when."""

    rows: OnTheWay
    index: int
    num_leases: int
    until: float


class Outbox:
    """A `Tier` that never gives a block back to its own engine. `take` and `release` may be called on any thread.

    Args:
        limit: bytes that rows may take, those included that are just being sent. row_bytes: of a row. seconds: of a lease.
        clock: in seconds, monotonic.

    Raises:
        ValueError: not even one block fits.
    """

    outlives = False

    def __init__(self, limit: int, row_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if limit < row_bytes:
            raise ValueError(f"--kv-transfer-config: a kv_buffer_size of {limit} holds no KV block of {row_bytes} bytes")
        self.stats = TransferStats(limit=limit)
        self.row_bytes, self._seconds, self._clock = row_bytes, seconds, clock
        self._lock = threading.RLock()
        """Guards all below, the counters included; memory may be given back while it is held."""
        self._kept: dict[bytes, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def most_rows(self) -> int:
        return max(0, self.stats.limit - self.stats.num_bytes) // self.row_bytes

    def has(self, block_hash: bytes) -> bool:
        return False

    def wants(self, block_hash: bytes) -> bool:
        return False

    def lease(self, block_hash: bytes) -> bool:
        """Keep a block for one request more, and all its leases for a whole one from now on; whether it is here."""
        # Hint: Three small machines. Draw each: which blocks are new behind a step, who still wants a block, and what
        # the next byte on the wire means.
        raise NotImplementedError("Stage 3 · Task 3.10: Outbox.lease, see stages/stage3_parallelism/GUIDE.md#task-3-10")

    def store(self, hashes: list[bytes], rows: Tensor, age: float = 0.0) -> None:
        """Keep rows [n, num_bytes] for one request. Their memory is given back when the last of them is gone."""
        arriving = OnTheWay(rows)
        with self._lock:
            weakref.finalize(arriving, self._count, -rows.nbytes)
            self._count(rows.nbytes)
            self.stats.store_bytes += rows.nbytes
            until = self._clock() + self._seconds
            self._kept.update((name, _Kept(arriving, index, 1, until)) for index, name in enumerate(hashes))

    def fetch(self, hashes: list[bytes]) -> Fetch:
        return Fetch({})

    def close(self, seconds: float) -> None:
        with self._lock:
            self._kept.clear()

    def take(self, hashes: list[bytes]) -> list[tuple[bytes, OnTheWay, int]]:
        """The first of these blocks, up to one that is not here, as (hash, rows, which of them). No lease changes; rows stay
        while somebody holds them."""
        raise NotImplementedError("Stage 3 · Task 3.10: Outbox.take, see stages/stage3_parallelism/GUIDE.md#task-3-10")

    def release(self, hashes: list[bytes]) -> None:
        """Blocks that somebody has fetched: each loses a lease, and with the last one it is gone. `num_sent` and `sent_bytes`
        count all of them, those included that were gone already."""
        raise NotImplementedError("Stage 3 · Task 3.10: Outbox.release, see stages/stage3_parallelism/GUIDE.md#task-3-10")

    def fail(self) -> None:
        """Note that a transfer was broken off."""
        with self._lock:
            self.stats.num_failures += 1

    def expire(self) -> None:
        """Let go what nobody has come for in time: a block whose `until` has come, with all its leases. `num_expired` counts
        blocks."""
        raise NotImplementedError("Stage 3 · Task 3.10: Outbox.expire, see stages/stage3_parallelism/GUIDE.md#task-3-10")

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.stats.num_bytes += num_bytes
