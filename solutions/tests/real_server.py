"""The server in a process of its own with the default model, as fixtures: its address, an `openai` client, the tokenizer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m"
CONTEXT = 512
CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name three colours."}]
GREEDY = {"model": MODEL, "temperature": 0.0}


@contextmanager
def running(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process, and its address with ``/v1``; it is killed at the end if it still runs."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "solutions.serving.api_server", "--host", "127.0.0.1", "--port", "0", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:  # fmt: skip
        try:
            lines: list[str] = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    break
            else:
                pytest.fail("the server did not start:\n" + "".join(lines))
            assert any("KV cache" in line and "tokens" in line for line in lines)
            yield server, found[0]
        finally:
            server.kill()


def stopped(server: subprocess.Popen[str]) -> str:
    """End the server with SIGTERM, and see that it ends well; what it has printed since its address."""
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) in (0, -signal.SIGTERM)
    return server.stdout.read()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a running server."""
    # float32, where what a step holds besides a request does not change its most likely token
    with running("--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "256MiB", "--dtype", "float32") as (server, url):
        yield url
        assert stopped(server) == ""  # nothing was logged: no request of these tests is the server's fault


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from solutions.models.loader import load_tokenizer, resolve_model

    return load_tokenizer(resolve_model(MODEL))
