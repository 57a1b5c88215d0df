"""Blocks in files, which a restarted server finds again and several servers may share; written and read in the background.

One thread writes and one reads. What waits to be written is found, too. The system's page cache keeps in memory what was used
lately, as far as there is room, so there is no tier of host memory in between. What fails costs a recomputation, and is said
once: after a failure of the file system nothing is tried for `RETRY_SECONDS`.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from ...core.platform.transfer import OnTheWay
from .block_files import BadBlockError, BlockFolder, file_bytes
from .tier import Fetch, TierStats

logger = logging.getLogger(__name__)

IN_FLIGHT = 1 << 30
"""Bytes of rows that may wait to be written, and as many that may wait to be used; what comes beyond is left out."""
RETRY_SECONDS = 30.0

Jobs = SimpleQueue[Callable[[], object] | None]


class FileTier:
    """A `Tier` of files.

    Args:
        root: the folder. identity: 32 bytes that differ where blocks of one hash do. limit: bytes of files. row_bytes: of a
            row. pinned: rows go to a GPU, which copies from pinned memory.

    Raises:
        ValueError: not even one block fits, or there is no such folder and none can be made.
    """

    outlives = True

    def __init__(self, root: Path, identity: bytes, limit: int, row_bytes: int, pinned: bool) -> None:
        if limit < file_bytes(row_bytes):
            raise ValueError(f"--kv-offload-size {limit} holds no KV block, whose file has {file_bytes(row_bytes)} bytes")
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--kv-offload {root}: {error.strerror}; give a folder, or host for host memory") from None
        self.stats = TierStats(limit=limit)
        self._folder = BlockFolder(root, identity, limit)
        self._row_bytes, self._pinned = row_bytes, pinned
        self._most = max(1, min(limit, IN_FLIGHT) // row_bytes)
        self._lock = threading.Lock()
        """Guards what the threads add to or take from: the next two."""
        self._waiting: dict[bytes, tuple[OnTheWay, int]] = {}
        """Hash → the rows that it is written from, and which of them."""
        self._num_fetched = 0
        """Rows that were fetched, or are being, and somebody may still use."""
        self._there: set[bytes] = set()
        """Blocks that have been seen in the folder; another process may have removed them since."""
        self._reading: Fetch | None = None
        self._rests_until = 0.0
        self._writes, self._reads = Jobs(), Jobs()
        self._threads = [
            threading.Thread(target=self._work, args=(jobs,), name=f"kv-offload-{name}", daemon=True)
            for jobs, name in ((self._reads, "reader"), (self._writes, "writer"))
        ]
        for thread in self._threads:
            thread.start()
        self._writes.put(self._list)

    # -------------------------------------------------------------------------------------------- on the engine's thread

    @property
    def most_rows(self) -> int:
        return max(0, self._most - len(self._waiting)) if self._is_well() else 0

    def has(self, block_hash: bytes) -> bool:
        if block_hash in self._waiting:
            return True
        hangs = self._reading is not None and not self._reading.is_wanted
        return self._is_well() and not hangs and self._folder.path(block_hash).exists()

    def wants(self, block_hash: bytes) -> bool:
        if block_hash in self._there:
            self._writes.put(partial(self._use, block_hash))
        return block_hash not in self._there and block_hash not in self._waiting

    def store(self, hashes: list[bytes], rows: Tensor, age: float = 0.0) -> None:
        arriving = OnTheWay(rows)
        with self._lock:
            self._waiting.update((block_hash, (arriving, index)) for index, block_hash in enumerate(hashes))
        for index, block_hash in enumerate(hashes):
            self._writes.put(partial(self._write, block_hash, index * age))

    def fetch(self, hashes: list[bytes]) -> Fetch:
        with self._lock:
            hashes = hashes[: max(0, self._most - self._num_fetched)]
            self._num_fetched += len(hashes)
        fetch = Fetch()
        weakref.finalize(fetch, self._let_go, len(hashes))
        self._reads.put(partial(self._read_all, hashes, fetch))
        return fetch

    def close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for jobs, thread in zip((self._reads, self._writes), self._threads, strict=True):
            jobs.put(None)
            thread.join(max(0.0, deadline - time.monotonic()))

    def _let_go(self, count: int) -> None:
        with self._lock:
            self._num_fetched -= count

    # ------------------------------------------------------------------------------------------------ on the two threads

    def _work(self, jobs: Jobs) -> None:
        while (job := jobs.get()) is not None:
            try:
                job()
            except OSError as error:
                self._fail(error)

    def _is_well(self) -> bool:
        return time.monotonic() >= self._rests_until

    def _fail(self, error: OSError) -> None:
        """Rest for a while, and say so unless somebody has."""
        self.stats.num_failures += 1
        if self._is_well():
            logger.warning("%s: %s; KV blocks are computed for %.0f s", self._folder.root, error.strerror, RETRY_SECONDS)
        self._rests_until = time.monotonic() + RETRY_SECONDS

    def _list(self) -> None:
        self._folder.scan()
        self._folder.make_room(0)
        self.stats.num_bytes = self._folder.num_bytes

    def _use(self, block_hash: bytes) -> bool:
        """Count a block as just used; whether the folder has it."""
        is_there = self._folder.use(block_hash)
        (self._there.add if is_there else self._there.discard)(block_hash)
        return is_there

    def _write(self, block_hash: bytes, age: float) -> None:
        """Write a row that waits, unless the folder has it or the file system fails."""
        arriving, index = self._waiting[block_hash]
        try:
            if not self._is_well():
                self.stats.num_skipped += 1
            elif not self._use(block_hash):
                row = arriving.wait()[0][index].numpy()
                self._there.difference_update(self._folder.make_room(file_bytes(row.nbytes)))
                self._folder.write(block_hash, row.data, age)
                self._there.add(block_hash)
                self.stats.store_bytes += row.nbytes
                self.stats.num_bytes = self._folder.num_bytes
        finally:
            with self._lock:
                del self._waiting[block_hash]

    def _read_all(self, hashes: list[bytes], fetch: Fetch) -> None:
        """Read blocks until one is not to be had."""
        self._reading = fetch
        try:
            for block_hash in hashes:
                row = self._row(block_hash) if fetch.is_wanted else None
                if row is None:
                    break
                fetch.rows[block_hash] = row
        finally:
            self._reading = None
            fetch.arrive()
        for block_hash in reversed(fetch.rows):
            self._use(block_hash)

    def _row(self, block_hash: bytes) -> Tensor | None:
        """A block's row, in memory or read; None if there is no good one."""
        if waiting := self._waiting.get(block_hash):
            arriving, index = waiting
            return arriving.wait()[0][index]
        row = torch.empty(self._row_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        try:
            self._folder.read(block_hash, row.numpy().data)
        except FileNotFoundError:
            return None
        except BadBlockError as error:
            self.stats.num_bad += 1
            self._there.discard(block_hash)
            logger.warning("%s: %s; the KV block is computed again", self._folder.path(block_hash), error)
            return None
        return row
