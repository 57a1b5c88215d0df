"""Two engines, one that computes prompts and one that goes on: the tokens of one engine, whatever happens on the way."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.memory.transfer import block_server, block_wire, remote_tier
from solutions.memory.transfer.transfer_stats import TransferStats
from solutions.tests.engine_twins import folder
from solutions.tests.relay import Between
from solutions.tests.slow_cases import slow_after

SIZE = 4
ROW_BYTES = 3 * 2 * SIZE * 3 * 32 * 4
"""Of a block of the tiny LLaMA: layers, keys and values, tokens, heads, elements, bytes of each."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "block_size": SIZE, "max_model_len": 64, "num_gpu_blocks_override": 36,
    "max_num_seqs": 3, "attention_backend": "torch", "enable_cpu_kernels": False,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "chunks": ("llama", {"max_num_batched_tokens": 7}),
    "few blocks": ("llama", {"num_gpu_blocks_override": 18}),
    "swap": ("llama", {"num_gpu_blocks_override": 18, "preemption_mode": "swap", "swap_space": 1 << 17}),
    "window": ("mistral", {}),
    "latents": ("deepseek_v2", {"attention_backend": "auto"}),
    "int8": ("llama", {"kv_cache_dtype": "int8"}),
    "drafts": ("llama", {"speculative_config": '{"method": "ngram", "prompt_lookup_min": 1}'}),
}


def prompts(lengths: tuple[int, ...] = (19, 20, 21, 3, 4, 5, 40, 33), seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(250) for _ in range(length)] for length in lengths]


def make(name: str, role: str, address: str, connector: str = "tcp", transfer: Any = (), **settings: Any) -> LLMEngine:
    keys = {"kv_connector": connector, "kv_role": role, "kv_addresses": [address], **dict(transfer)}
    return LLMEngine(EngineConfig(model=str(folder(name)), **(SETTINGS | settings), kv_transfer_config=json.dumps(keys)))


@contextmanager
def pair(case: str, connector: str, home: Path, **transfer: Any) -> Iterator[tuple[LLMEngine, LLMEngine]]:
    """A producer and a consumer of it."""
    name, settings = CASES[case]
    address = str(home / "kv.sock") if connector == "shm" else "127.0.0.1:0"
    first = make(name, "kv_producer", address, connector, transfer, **settings)
    second = make(name, "kv_consumer", address_of(first), connector, **settings)
    try:
        yield first, second
    finally:
        first.tiers.close()
        second.tiers.close()


def address_of(producer: LLMEngine) -> str:
    return producer.tiers.tier.server.address


def run(engine: LLMEngine, asked: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    """All at once, invariants checked behind each step."""
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            answers[output.request_id] = list(output.outputs[0].token_ids)
        engine.scheduler.check_invariants()
    assert engine.stats().kv_cache_usage == 0
    return [answers[str(number)] for number in range(len(asked))]


def prefill(engine: LLMEngine, asked: list[list[int]]) -> None:
    run(engine, asked, SamplingParams(temperature=0, max_tokens=1))


@cache
def alone(case: str, is_greedy: bool = True) -> list[list[int]]:
    """What one engine says."""
    name, settings = CASES[case]
    engine = LLMEngine(EngineConfig(model=str(folder(name)), **(SETTINGS | settings)))
    return run(engine, prompts(), GREEDY if is_greedy else SEEDED)


def stats(engine: LLMEngine) -> TransferStats:
    found = engine.stats().kv_offload
    assert isinstance(found, TransferStats)
    return found


def settled(engine: LLMEngine) -> TransferStats:
    """A producer's counters when all that it sends has been said to have come."""
    places = engine.tiers.tier.server._places
    for _ in range(block_server.MOST_CONSUMERS):
        assert places.acquire(timeout=20)
    places.release(block_server.MOST_CONSUMERS)
    return stats(engine)


@pytest.fixture(params=["tcp", "shm"])
def connector(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long, and a producer that failed is asked again only when a test says so."""
    monkeypatch.setattr(remote_tier, "ASK_SECONDS", 1.0)
    monkeypatch.setattr(remote_tier, "RETRY_SECONDS", 1000.0)


@pytest.mark.parametrize("case", slow_after(3, list(CASES)))
def test_two_engines_write_what_one_writes(case: str, connector: str, tmp_path: Path) -> None:
    """Prompts of k·B - 1, k·B and k·B + 1 tokens among them: so many full blocks come as do not hold the last token."""
    with pair(case, connector, tmp_path) as (first, second):
        prefill(first, prompts())
        assert run(second, prompts()) == alone(case)
        sent, got = settled(first), stats(second)
        blocks = sum((len(prompt) - 1) // SIZE for prompt in prompts())
        assert got.num_received == got.received_bytes // second.tiers.rows.num_bytes
        if case in ("plain", "chunks", "latents", "int8", "drafts"):
            assert (got.num_received, got.num_hits, sent.num_sent) == (blocks, SIZE * blocks, blocks)
            assert (sent.num_bytes, len(first.tiers.tier)) == (0, 0)
        assert got.num_received > 0
        assert (got.num_bad, got.num_failures, sent.num_failures, sent.num_skipped) == (0, 0, 0, 0)


def test_seeded_answers_are_those_of_one_engine(connector: str, tmp_path: Path) -> None:
    with pair("plain", connector, tmp_path) as (first, second):
        prefill(first, prompts())
        assert run(second, prompts(), SEEDED) == alone("plain", is_greedy=False)
        assert stats(second).num_received > 0


def test_a_prompt_that_the_producer_has_cached_is_handed_over_again(tmp_path: Path) -> None:
    with pair("plain", "tcp", tmp_path) as (first, second):
        (prompt,) = prompts((41,))
        for number in range(2):
            prefill(first, [prompt])
            second.block_manager.prefix_cache.clear()
            run(second, [prompt])
            assert stats(second).num_received == 10 * (number + 1)
            assert settled(first).num_bytes == len(first.tiers.tier) == 0


def test_what_two_requests_share_stays_for_the_second(tmp_path: Path) -> None:
    with pair("plain", "tcp", tmp_path) as (first, second):
        common, *ends = prompts((20, 5, 6))
        prefill(first, [common + end for end in ends])
        for end, left in zip(ends, (6, 0), strict=True):
            second.block_manager.prefix_cache.clear()
            run(second, [common + end])
            settled(first)
            assert len(first.tiers.tier) == left
        assert stats(second).num_received == 12


def test_an_outbox_that_is_full_leaves_out_what_comes(tmp_path: Path) -> None:
    with pair("plain", "tcp", tmp_path, kv_buffer_size=7 * ROW_BYTES) as (first, second):
        prefill(first, prompts())
        assert stats(first).num_bytes <= 7 * ROW_BYTES
        assert stats(first).num_skipped > 0
        assert run(second, prompts()) == alone("plain")
        assert 0 < stats(second).num_received <= 7


def test_what_nobody_fetches_goes_when_its_lease_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_server, "TICK_SECONDS", 0.01)
    with pair("plain", "tcp", tmp_path, kv_lease_seconds=0.05) as (first, _):
        outbox, gone = first.tiers.tier, threading.Event()
        expire = outbox.expire

        def expire_and_tell() -> None:
            expire()
            if stats(first).num_expired == 10:
                gone.set()

        outbox.expire = expire_and_tell
        prefill(first, prompts((41,)))
        assert gone.wait(20)
        assert stats(first).num_bytes == 0


def test_a_producer_that_is_not_there_costs_a_computation(quick: None, tmp_path: Path) -> None:
    with pair("plain", "tcp", tmp_path) as (first, second):
        first.tiers.close()
        first.tiers.tier.server._thread.join(10)
        assert run(second, prompts()) == alone("plain")
        assert stats(second).num_failures == 1  # after which it is left alone


def test_another_model_is_told_from_this_one(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    first = make("qwen3", "kv_producer", "127.0.0.1:0")
    second = make("llama", "kv_consumer", address_of(first))
    prefill(first, prompts())
    assert run(second, prompts()) == alone("plain")
    assert "it computes other keys and values" in caplog.text
    assert stats(second).num_received == 0
    first.tiers.close()


@contextmanager
def pair_with(work: Callable[[bytes, int], bytes | None]) -> Iterator[tuple[LLMEngine, LLMEngine]]:
    first = make("llama", "kv_producer", "127.0.0.1:0")
    between = Between(address_of(first), work)
    second = make("llama", "kv_consumer", between.address)
    try:
        yield first, second
    finally:
        between.close()
        first.tiers.close()
        second.tiers.close()


def test_a_connection_that_ends_in_the_middle_loses_no_token(quick: None) -> None:
    with pair_with(lambda piece, done: piece if done < 3 * ROW_BYTES else None) as (first, second):
        prefill(first, prompts())
        assert run(second, prompts()) == alone("plain")
        assert stats(second).num_failures == 1
        assert 2 <= stats(second).num_received < 5


@pytest.mark.parametrize("place", [100, ROW_BYTES + 200])
def test_a_bit_that_turns_on_the_way_is_noticed(place: int, quick: None) -> None:
    def turn(piece: bytes, done: int) -> bytes:
        changed = bytearray(piece)
        if done <= place < done + len(piece):
            changed[place - done] ^= 1
        return bytes(changed)

    with pair_with(turn) as (first, second):
        prefill(first, prompts())
        assert run(second, prompts()) == alone("plain")
        assert (stats(second).num_bad, stats(second).num_failures) == (1, 1)
        assert stats(second).num_received == place // ROW_BYTES


def test_a_link_that_is_too_slow_is_given_up(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The producer's answer stops in the middle of a row until all answers are there."""
    go_on = threading.Event()
    monkeypatch.setattr(remote_tier, "ASK_SECONDS", 0.2)

    def hold(piece: bytes, done: int) -> bytes:
        if done > ROW_BYTES:
            go_on.wait(60)
        return piece

    with pair_with(hold) as (first, second):
        prefill(first, prompts())
        try:
            assert run(second, prompts()) == alone("plain")
        finally:
            go_on.set()
        assert stats(second).num_failures == 1


def test_who_is_no_engine_gets_nothing(tmp_path: Path) -> None:
    with pair("plain", "tcp", tmp_path) as (first, second):
        host, _, port = address_of(first).rpartition(":")
        for said in (
            b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n" * 3,
            block_wire._ASK.pack(block_wire.MAGIC, bytes(32), 1 << 40),
        ):
            with socket.create_connection((host, int(port)), 10) as sock:
                sock.sendall(said)
                with pytest.raises((ConnectionError, AssertionError)):
                    assert sock.recv(1)
        prefill(first, prompts())
        assert run(second, prompts()) == alone("plain")
        assert stats(second).num_received > 0


def test_a_consumer_asks_all_producers_and_takes_from_the_one_that_has_most(tmp_path: Path) -> None:
    firsts = [make("llama", "kv_producer", "127.0.0.1:0") for _ in range(3)]
    second = make(
        "llama", "kv_consumer", "", transfer={"kv_addresses": [address_of(first) for first in firsts]}
    )  # fmt: skip
    (prompt,) = prompts((41,))
    prefill(firsts[0], [prompt[:21]])
    prefill(firsts[1], [prompt[:33]])
    prefill(firsts[2], [prompt[:13]])
    run(second, [prompt])
    assert [settled(first).num_sent for first in firsts] == [0, 8, 0]
    assert stats(second).num_received == 8
    for engine in (*firsts, second):
        engine.tiers.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_connector": "nixl"}, "kv_connector is one of shm, tcp, not 'nixl'"),
        ({"kv_role": "kv_both"}, "kv_role is one of kv_producer, kv_consumer"),
        ({"kv_addresses": "here"}, "kv_addresses is a list"),
        ({"kv_addresses": []}, "kv_addresses is a list"),
        ({"kv_addresses": ["a:1", "b:1"]}, "a kv_producer has one address"),
        ({"kv_addresses": ["a:70000"]}, "'a:70000' is no address for tcp"),
        ({"kv_connector": "shm", "kv_addresses": ["a:1"]}, "is no address for shm"),
        ({"kv_buffer_size": 0}, "kv_buffer_size is a number above 0"),
        ({"kv_lease_seconds": True}, "kv_lease_seconds is a number above 0"),
        ({"kv_rank": 0}, "there is no 'kv_rank'"),
        ({"kv_buffer_size": ROW_BYTES - 1}, "holds no KV block"),
        ({"kv_addresses": ["203.0.113.77:0"]}, "cannot listen on"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"--kv-transfer-config: .*{message}"):
        make("llama", "kv_producer", "127.0.0.1:0", transfer=change)


def test_a_socket_that_a_killed_server_left_gives_way_and_a_living_one_does_not(tmp_path: Path) -> None:
    address = str(tmp_path / "kv.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(address)
    first = make("llama", "kv_producer", address, "shm")
    assert (tmp_path / "kv.sock").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="another server listens there"):
        make("llama", "kv_producer", address, "shm")
    first.tiers.close()
    assert not (tmp_path / "kv.sock").exists()
