"""A relay between two engines, for tests of what can happen to a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class Between:
    """A relay between a consumer and its producer, which does something to what comes back.

    Args:
        address: of the producer. work: is given each piece that the producer sends, and the bytes sent before it; what it
            returns goes on; None: the connection ends.
    """

    def __init__(self, address: str, work: Callable[[bytes, int], bytes | None]) -> None:
        self._there, self._work = address, work
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError:
                return
            host, _, port = self._there.rpartition(":")
            far = socket.create_connection((host, int(port)))
            threading.Thread(target=self._copy, args=(near, far, lambda piece, _: piece), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, self._work), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, work: Callable[[bytes, int], bytes | None]) -> None:
        done = 0
        with source, target, suppress(OSError):  # whichever side ends first, and the other copy may have shut both down
            while (piece := source.recv(4096)) and (changed := work(piece, done)) is not None:
                target.sendall(changed)
                done += len(piece)
            target.shutdown(socket.SHUT_RDWR)
            source.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
