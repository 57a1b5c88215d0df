"""Hands out the blocks of an outbox: a listening socket, and a thread for each consumer that has come."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import suppress
from pathlib import Path

from .block_wire import FOREIGN, offer, read_question, send_rows
from .outbox import Outbox

logger = logging.getLogger(__name__)

MOST_CONSUMERS = 64
"""At once; more wait."""
SECONDS = 10.0
"""So long a consumer may take for one answer, or for one row."""
TICK_SECONDS = 0.5
"""So often leases are looked at when nobody comes."""


class BlockServer:
    """Listens as soon as it is made, until `close` or the end of the process.

    Args:
        address: HOST:PORT, of which port 0 is a free one, or the path of a Unix socket that only this user may open.
        shared: rows go through shared memory. outbox: what there is. identity: 32 bytes, see `kv_identity`.

    Attributes:
        address: the one that it has.

    Raises:
        ValueError: the address cannot be had.
    """

    def __init__(self, address: str, shared: bool, outbox: Outbox, identity: bytes) -> None:
        self.outbox, self._identity, self._shared = outbox, identity, shared
        try:
            self._socket = _listen(address, shared)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--kv-transfer-config: cannot listen on {address}: {error}") from None
        name = self._socket.getsockname()
        self.address: str = address if shared else f"{name[0]}:{name[1]}"
        self._socket.settimeout(TICK_SECONDS)
        self._places = threading.BoundedSemaphore(MOST_CONSUMERS)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kv-transfer-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more consumers."""
        self._is_closed = True
        self._socket.close()
        if self._shared:
            Path(self.address).unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._is_closed:
            self.outbox.expire()
            try:
                consumer, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                return  # closed
            self._places.acquire()
            threading.Thread(target=self._serve, args=(consumer,), name="kv-transfer", daemon=True).start()

    def _serve(self, consumer: socket.socket) -> None:
        try:
            with consumer:
                consumer.settimeout(SECONDS)
                self._answer(consumer)
        except OSError as error:
            self.outbox.fail()
            logger.warning("KV blocks were asked for and not fetched: %s", error)
        finally:
            self._places.release()

    def _answer(self, consumer: socket.socket) -> None:
        identity, hashes = read_question(consumer)
        if identity != self._identity:
            offer(consumer, FOREIGN, 0)
            return
        found = self.outbox.take(hashes)
        wanted = offer(consumer, self.outbox.row_bytes, len(found))
        if wanted:
            rows = [(block_hash, arriving.wait()[0][index]) for block_hash, arriving, index in found[:wanted]]
            arrived = send_rows(consumer, identity, rows, self._shared)
            self.outbox.release(hashes[:arrived])


def _listen(address: str, shared: bool) -> socket.socket:
    """A socket that listens there. A Unix socket that a killed server has left behind gives way."""
    if not shared:
        host, _, port = address.rpartition(":")
        return socket.create_server((host.strip("[]"), int(port)), family=socket.AF_INET6 if "[" in host else socket.AF_INET)
    sock = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe, suppress(FileNotFoundError):
            if probe.connect_ex(address) == 0:
                raise OSError("another server listens there")
            if Path(address).is_socket():
                Path(address).unlink()
        sock.bind(address)
        Path(address).chmod(0o600)
        sock.listen()
    except OSError:
        sock.close()
        raise
    return sock
