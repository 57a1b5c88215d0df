"""Blocks of engines that compute prompts, fetched by their hashes: a tier below the prefix cache that lies in other processes.

All producers are asked what they have of a prompt, and the one with most of it sends it, on a thread of its own for each
prompt. A producer that does not answer, sends something wrong or takes too long is not asked again for `RETRY_SECONDS`. What
does not come is computed.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import ExitStack

from torch import Tensor

from ..tiers.tier import Fetch
from .block_wire import MOST_BLOCKS, BadRowError, ask, take
from .transfer_stats import TransferStats

logger = logging.getLogger(__name__)

ASK_SECONDS = 2.0
"""So long a producer may take to say what it has, or to send some bytes more."""
RETRY_SECONDS = 5.0
IN_FLIGHT = 1 << 30
"""Most bytes of one prompt's rows; what comes behind them is computed."""
MOST_FETCHES = 8
"""At once. More there can only be where those that nobody waits for any more have not noticed."""


class Producer:
    """An engine that may be asked.

    Args:
        address: HOST:PORT, or the path of a Unix socket. shared: rows come through shared memory.
    """

    def __init__(self, address: str, shared: bool) -> None:
        self.address, self.shared = address, shared
        self._rests_until = 0.0

    @property
    def is_well(self) -> bool:
        """Whether it is to be asked now."""
        return time.monotonic() >= self._rests_until

    def rest(self, reason: object) -> None:
        """Leave it alone for a while, and say so unless somebody has."""
        if self.is_well:
            logger.warning("%s: %s; prompts are computed here for %.0f s", self.address, reason, RETRY_SECONDS)
        self._rests_until = time.monotonic() + RETRY_SECONDS

    def connect(self) -> socket.socket:
        """A new connection. Raises OSError if there is none."""
        if not self.shared:
            host, _, port = self.address.rpartition(":")
            return socket.create_connection((host.strip("[]"), int(port)), ASK_SECONDS)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(ASK_SECONDS)
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock


class RemoteTier:
    """A `Tier` of other engines' blocks; it keeps nothing itself.

    Args:
        addresses: of the producers. shared: rows come through shared memory. identity: 32 bytes, see `kv_identity`.
        row_bytes: of a row. pinned: rows go to a GPU.
    """

    outlives = False
    most_rows = 0

    def __init__(self, addresses: tuple[str, ...], shared: bool, identity: bytes, row_bytes: int, pinned: bool) -> None:
        self.stats = TransferStats()
        self._producers = [Producer(address, shared) for address in addresses]
        self._identity, self._row_bytes, self._pinned = identity, row_bytes, pinned
        self._most = min(MOST_BLOCKS, max(1, IN_FLIGHT // row_bytes))
        self._lock = threading.Lock()
        """Guards counters, and the threads that fetch."""
        self._threads: set[threading.Thread] = set()

    def has(self, block_hash: bytes) -> bool:
        return len(self._threads) < MOST_FETCHES and any(producer.is_well for producer in self._producers)

    def wants(self, block_hash: bytes) -> bool:
        return False

    def store(self, hashes: list[bytes], rows: Tensor, age: float = 0.0) -> None:
        """Nothing is stored: `wants` says so."""

    def fetch(self, hashes: list[bytes]) -> Fetch:
        fetch = Fetch()
        thread = threading.Thread(target=self._fetch, args=(hashes[: self._most], fetch), name="kv-transfer", daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
        return fetch

    def close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # ----------------------------------------------------------------------------------------- on a thread for each prompt

    def _fetch(self, hashes: list[bytes], fetch: Fetch) -> None:
        try:
            with ExitStack() as stack:
                if (best := self._best(hashes, stack)) is not None:
                    producer, sock, count = best
                    self._take(producer, sock, hashes[:count], fetch)
        finally:
            fetch.arrive()
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _best(self, hashes: list[bytes], stack: ExitStack) -> tuple[Producer, socket.socket, int] | None:
        """The producer that has most of these blocks, the connection to it, and how many it has; None if nobody has any. All
        connections are closed with `stack`, which tells the others that nothing is taken."""
        best: tuple[Producer, socket.socket, int] | None = None
        for producer in self._producers:
            most = 0 if best is None else best[2]
            if not producer.is_well or most == len(hashes):
                continue
            try:
                sock = stack.enter_context(producer.connect())
                count = ask(sock, self._identity, hashes, self._row_bytes)
            except OSError as error:
                self._fail(producer, error)
                continue
            if count > most:
                best = producer, sock, count
        return best

    def _take(self, producer: Producer, sock: socket.socket, hashes: list[bytes], fetch: Fetch) -> None:
        def keep(block_hash: bytes, row: Tensor) -> None:
            fetch.rows[block_hash] = row
            with self._lock:
                self.stats.num_received += 1
                self.stats.received_bytes += row.nbytes

        try:
            take(
                sock, self._identity, hashes, self._row_bytes, self._pinned, producer.shared, keep, lambda: fetch.is_wanted
            )  # fmt: skip
        except OSError as error:
            if fetch.is_wanted or time.monotonic() - fetch.begun > ASK_SECONDS:  # else the client has left
                self._fail(producer, error)

    def _fail(self, producer: Producer, error: OSError) -> None:
        with self._lock:
            self.stats.num_failures += 1
            self.stats.num_bad += isinstance(error, BadRowError)
        producer.rest(error)
