"""Servers that keep KV blocks in files: ended, killed in the middle of writing, and two at once over one folder."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.benchmarks.servers import as_flags, running_server
from solutions.core.engine import LLM
from solutions.memory.tiers.block_files import read_block
from solutions.tests.real_server import stopped
from solutions.tests.tiny_models import make_tiny_llama

pytestmark = pytest.mark.slow
ENGINE = {"dtype": "float32", "block_size": 4, "max_model_len": 256, "num_gpu_blocks_override": 80}
ANSWER = 8
ROW_BYTES = 3 * 2 * 4 * 2 * 12 * 4


def prompts(count: int) -> list[list[int]]:
    """Of 100 tokens each, which is a third of the memory of a server."""
    rng = random.Random(2)
    return [[rng.randrange(250) for _ in range(100)] for _ in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    make_tiny_llama(path)
    return path


@contextmanager
def serving(model: Path, kv: Path) -> Iterator[tuple[object, str]]:
    settings = ENGINE | {"model": str(model), "kv_offload": str(kv), "kv_offload_size": 64 << 20, "no_start_compiler": True}
    settings |= {"served_model_name": "tiny"}
    with running_server(*as_flags(settings)) as (server, url):
        yield server, url


def ask(url: str, prompt: list[int]) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached."""
    body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = httpx.post(f"{url}/completions", json=body | {"model": "tiny"}, timeout=60)
    answer.raise_for_status()
    content = answer.json()
    return content["choices"][0]["token_ids"], content["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected(model: Path, asked: list[list[int]]) -> list[list[int]]:
    llm = LLM(str(model), **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_server_that_is_started_again_has_all_that_it_had(model: Path, tmp_path: Path) -> None:
    asked = prompts(6)
    answers = expected(model, asked)
    for cached in (0, 96):  # of 99 tokens in blocks of 4
        with serving(model, tmp_path / "kv") as (server, url):
            assert [ask(url, prompt) for prompt in asked] == [(answer, cached) for answer in answers]
            metrics = httpx.get(url.removesuffix("/v1") + "/metrics").text
            (hits,) = [line for line in metrics.splitlines() if line.startswith("vllm:external_prefix_cache_hits_total{")]
            assert float(hits.split()[-1]) == cached * len(asked)
            assert stopped(server) == ""


def test_a_server_that_is_killed_while_it_writes_leaves_nothing_wrong(model: Path, tmp_path: Path) -> None:
    """Whole blocks under their names, however often; and the answers stay what they are."""
    asked, kv = prompts(12), tmp_path / "kv"
    answers = expected(model, asked)
    for kill_after in (4, 7, 9):
        with serving(model, kv) as (server, url):
            for number, prompt in enumerate(asked[:kill_after]):
                assert ask(url, prompt)[0] == answers[number]
            server.send_signal(signal.SIGKILL)
    for path in kv.rglob("*.kv"):
        read_block(path, path.read_bytes()[16:48], bytes.fromhex(path.stem), memoryview(bytearray(ROW_BYTES)))
    with serving(model, kv) as (server, url):
        found = [ask(url, prompt) for prompt in asked]
        assert [answer for answer, _ in found] == answers
        assert sum(cached for _, cached in found) > 0
        assert stopped(server) == ""


def test_two_servers_find_each_others_blocks(model: Path, tmp_path: Path) -> None:
    """Each is asked everything twice, in another order, at the same time."""
    asked, kv = prompts(10), tmp_path / "kv"
    answers = expected(model, asked)
    found: dict[int, list[tuple[int, list[int], int]]] = {0: [], 1: []}
    with serving(model, kv) as (one, first), serving(model, kv) as (other, second):

        def run(which: int, url: str) -> None:
            order = [*range(10)] * 2
            random.Random(which).shuffle(order)
            for number in order:
                found[which].append((number, *ask(url, asked[number])))

        threads = [threading.Thread(target=run, args=pair) for pair in ((0, first), (1, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert stopped(one) == stopped(other) == ""
    for which in (0, 1):
        assert [answer for _, answer, _ in found[which]] == [answers[number] for number, *_ in found[which]]
    # alone, each would compute every prompt once and find it once
    assert sum(cached for which in (0, 1) for _, _, cached in found[which]) > 96 * 20
