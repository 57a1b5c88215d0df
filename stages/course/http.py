"""A real HTTP server in a thread, for the tests of stage 5."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

PATIENCE = 10
"""Seconds that the server gets to end."""


@contextmanager
def running(server: uvicorn.Server) -> Iterator[tuple[tuple[str, int], threading.Thread]]:
    """Run a server on a free port; gives its address and its thread, and ends it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()  # who connects before the server is ready waits
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield sock.getsockname(), thread
        finally:
            server.should_exit = server.force_exit = True
            thread.join(PATIENCE)
