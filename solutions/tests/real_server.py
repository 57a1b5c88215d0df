"""The server in a process of its own with the default model, as fixtures: its address, an `openai` client, the tokenizer."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from solutions.benchmarks.servers import as_flags, running_server

if TYPE_CHECKING:  # tests of kernels need no client, nor does a machine that only runs those
    import openai

MODEL = "smollm2-135m"
CONTEXT = 512
SETTINGS = {
    "max_model_len": CONTEXT, "kv_cache_memory_bytes": 256 << 20, "dtype": "float32", "no_start_compiler": True
}  # fmt: skip
"""In float32, what a step holds besides a request does not change its most likely token. Most tests compile no grammar."""
CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Name three colours."}]
GREEDY = {"model": MODEL, "temperature": 0.0}


def stopped(server: subprocess.Popen[str]) -> str:
    """End the server with SIGTERM, and see that it ends well; what it has printed since its address."""
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    return server.stdout.read()


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Address of a running server, the same for all tests of a process."""
    with running_server(*as_flags(SETTINGS)) as (server, url):
        yield url
        assert stopped(server) == ""  # nothing was logged: no request of these tests is the server's fault


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from solutions.models.loader import load_tokenizer, resolve_model

    return load_tokenizer(resolve_model(MODEL))
