"""A server over an engine whose steps the test controls: in a thread of the test, or as a program."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from solutions.serving.api_server import bind
from solutions.serving.app import create_app
from solutions.serving.async_engine import AsyncEngine
from solutions.serving.connections import TimedConnection
from solutions.tests.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
FOREVER = 4000
"""Tokens of an answer that no test reads to its end."""
PROGRAM = """
import sys
from solutions.core import engine
from solutions.serving import api_server
from solutions.tests.fake_engine import FakeEngine
engine.LLMEngine = lambda config: FakeEngine()
sys.exit(api_server.main(["--host", "127.0.0.1", "--port", "0", "--served-model-name", "fake", *sys.argv[1:]]))
"""


@contextmanager
def serve(
    engine: FakeEngine | AsyncEngine, api_keys: list[str] | None = None, *, connection_timeout: float = 30, **settings: Any
) -> Iterator[str]:
    """A server over an engine; gives its address. A fake engine that waits at its gate is let go at the end."""
    sock = bind("127.0.0.1", 0)
    running = engine if isinstance(engine, AsyncEngine) else AsyncEngine(engine)
    app = create_app(running, ["fake"], api_keys, **settings)
    http = partial(TimedConnection, seconds=connection_timeout)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, http=http))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        if isinstance(engine, FakeEngine) and engine.gate is not None:
            engine.gate.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def program(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a program over a fake engine, and its address."""
    command = [sys.executable, "-c", PROGRAM, *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "http://" in line)
        try:
            yield process, line.split(" at ")[1].split(",")[0]
        finally:
            process.kill()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def body(**fields: object) -> dict[str, object]:
    return {"model": "fake", "prompt": "hi", "max_tokens": 3, **fields}
