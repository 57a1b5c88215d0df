"""What a tier below the device's prefix cache does: keeps blocks by their hash, and hands them out again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a server names its flags and asks for its port before torch is imported
    from torch import Tensor


@dataclass(slots=True)
class TierStats:
    """Counters of a tier since the start; `num_bytes` and `limit` are bytes that it holds now and may hold.

    `num_skipped` counts blocks that were not kept, as more came than could be written; `num_bad` blocks that were found
    damaged or foreign; `num_failures` times that the file system failed.
    """

    num_queries: int = 0
    """Prompt tokens that the device's prefix cache did not have."""
    num_hits: int = 0
    """Of those, tokens found here."""
    load_bytes: int = 0
    store_bytes: int = 0
    num_skipped: int = 0
    num_bad: int = 0
    num_failures: int = 0
    num_bytes: int = 0
    limit: int = 0


class Fetch:
    """Blocks on their way from a tier.

    Args:
        rows: hash → row, for the first few of those that were asked for; None: they come later.

    Attributes:
        begun: when, by `time.monotonic`. is_wanted: whoever brings the blocks may stop when it is not.
    """

    def __init__(self, rows: dict[bytes, Tensor] | None = None) -> None:
        self.rows: dict[bytes, Tensor] = {} if rows is None else rows
        self.begun, self.is_wanted = time.monotonic(), True
        self._arrived = threading.Event()
        if rows is not None:
            self._arrived.set()

    def arrive(self) -> None:
        """Nothing more comes."""
        self._arrived.set()

    def wait(self, seconds: float) -> bool:
        """Wait for what comes, so long at most; whether all of it is there."""
        return self._arrived.wait(seconds)


class Tier(Protocol):
    """Keeps rows of bytes by hash. Its methods are called on the engine's thread, and wait for no disk.

    Attributes:
        outlives: what it keeps is there when the process has ended. most_rows: so many it will take at once.
    """

    outlives: bool

    @property
    def stats(self) -> TierStats: ...

    @property
    def most_rows(self) -> int: ...

    def has(self, block_hash: bytes) -> bool:
        """Whether a block is likely here."""
        ...

    def wants(self, block_hash: bytes) -> bool:
        """Whether a block that leaves the device would be new here. One that is not counts as just used."""
        ...

    def store(self, hashes: list[bytes], rows: Tensor, age: float = 0.0) -> None:
        """Keep rows [n, num_bytes], at most `most_rows`, that may still be computed on a device. With an `age` each counts as
        last used so many seconds before the one in front of it."""
        ...

    def fetch(self, hashes: list[bytes]) -> Fetch:
        """Bring blocks, in their order, as far as they are here. What is fetched counts as just used, the first as the last:
        the others are worth nothing without it."""
        ...

    def close(self, seconds: float) -> None:
        """Finish what has begun, within so many seconds. The tier cannot be used afterwards."""
        ...
