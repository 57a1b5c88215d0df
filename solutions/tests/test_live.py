"""The feed of what the engine does: its frames against the engine's own state, over HTTP, and in a file."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_config import QueueFullError
from solutions.benchmarks.servers import running_server
from solutions.benchmarks.serving import totals
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.serving.api_server import parse_flags
from solutions.serving.live.feed import FRAMES_PER_SECOND, MAX_CLIENTS, MAX_UNREAD, LiveFeed
from solutions.serving.live.recording import TraceRecorder
from solutions.serving.live.snapshot import Snapshots
from solutions.serving.live.step_control import StepControl
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve
from solutions.tests.real_server import CONTEXT, GREEDY, stopped
from solutions.tests.tiny_models import make_tiny_llama

Blocks = dict[int, tuple[set[int], bool]]


def tiny_engine(folder: Path, **settings: Any) -> LLMEngine:
    make_tiny_llama(folder)
    return LLMEngine(EngineConfig(str(folder), dtype="float32", device="cpu", max_model_len=64, **settings))


def truth(engine: LLMEngine) -> Blocks:
    """Block → owners and whether it is cached, asked block by block."""
    manager = engine.block_manager
    found: Blocks = {}
    for block in range(manager.allocator.num_blocks):
        owners = {seq_id for seq_id, table in manager.tables.items() if block in table}
        assert len(owners) == manager.allocator.ref_counts[block]
        cached = manager.prefix_cache is not None and block in manager.prefix_cache
        if owners or cached:
            found[block] = (owners, cached)
    return found


def apply(blocks: Blocks, frame: dict[str, Any]) -> Blocks:
    """What a client knows after a frame."""
    after = {} if frame["full"] else dict(blocks)
    for block, owners, cached in frame["blocks"]:
        after[block] = (set(owners), cached)
        if not owners and not cached:
            del after[block]
    return after


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpu_blocks_override": 64},
        {"num_gpu_blocks_override": 6, "max_num_seqs": 6},  # preempts
        {"num_gpu_blocks_override": 6, "swap_space": 1, "preemption_mode": "swap", "max_num_seqs": 6},
        {"num_gpu_blocks_override": 64, "enable_prefix_caching": False},
        {"num_gpu_blocks_override": 64, "speculative_config": {"method": "ngram"}},
    ],
    ids=["roomy", "recompute", "swap", "no cache", "ngram"],
)
def test_frames_add_up_to_the_engines_state(tmp_path: Path, settings: dict[str, Any]) -> None:
    engine = tiny_engine(tmp_path / "model", **settings)
    trace = tmp_path / "trace.jsonl"
    recorder = TraceRecorder(trace.open("w"), engine, "tiny")
    snapshots, dice, blocks, seen = Snapshots(engine, "tiny"), random.Random(0), {}, []
    engine.observers.append(recorder)
    engine.observers.append(SimpleNamespace(on_step=snapshots.record, on_abort=lambda *_: None))
    for number in range(12):
        prompt = [5, 6, 7, 8] * dice.randint(1, 8) + [dice.randrange(20)] * dice.randrange(4)
        params = SamplingParams(n=dice.choice([1, 1, 3]), seed=number, max_tokens=dice.randint(1, 24), ignore_eos=True)
        engine.add_request(f"r{number}", {"prompt_token_ids": prompt}, params)
    preempted = 0
    for number in range(1000):
        if number == 5:
            engine.abort_request("r3")
        engine.step()
        frame = snapshots.frame(full=number % 7 == 0)
        blocks = apply(blocks, frame)
        assert blocks == truth(engine)
        assert json.loads(json.dumps(frame)) == frame  # plain lists and numbers
        for step, _, rows, losers in frame["steps"]:
            seen.append(step)
            preempted += len(losers)
            assert all(tokens >= 1 + drafted * decodes for _, tokens, drafted, decodes in rows)
        running = [row for row in frame["sequences"] if row[2] == "running"]
        assert [row[0] for row in running] == [seq.seq_id for seq in engine.scheduler.running]
        if not engine.has_unfinished_requests():
            break
    assert seen == list(range(1, engine.stats().num_steps + 1))
    assert preempted == engine.stats().num_preemptions
    assert (preempted > 0) == (settings["num_gpu_blocks_override"] == 6)
    recorder.close()
    frames = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [frame["full"] for frame in frames] == [True] + [False] * (len(frames) - 1)
    assert frames[0]["engine"]["num_blocks"] == settings["num_gpu_blocks_override"]
    replayed: Blocks = {}
    for frame in frames:
        replayed = apply(replayed, frame)
    assert replayed == truth(engine)
    assert [step[0] for frame in frames for step in frame["steps"]] == seen
    assert frames[-1]["stats"]["num_generation_tokens"] == engine.stats().num_generation_tokens


def frames_of(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            yield json.loads(line[6:])


@pytest.mark.slow
def test_a_real_server_shows_what_it_does(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with running_server("--max-model-len", str(CONTEXT), "--record-trace", str(trace)) as (server, url):
        base = url.removesuffix("/v1")
        with httpx.stream("GET", f"{base}/live", timeout=30) as feed:
            frames = frames_of(feed.iter_lines())
            first = next(frames)
            assert (first["full"], first["sequences"], first["blocks"]) == (True, [], [])
            assert first["engine"]["model"] == GREEDY["model"]
            start = time.monotonic()
            answer = httpx.post(
                f"{url}/completions", json={**GREEDY, "prompt": "Count: 1, 2, 3,", "max_tokens": 40}, timeout=60
            )
            seconds = time.monotonic() - start
            blocks, steps, count, statuses = {}, [], 0, set()
            for frame in frames:
                count += 1
                blocks = apply(blocks, frame)
                steps += [step[0] for step in frame["steps"]]
                statuses |= {row[2] for row in frame["sequences"]}
                if not frame["sequences"]:
                    break
        metrics = totals(httpx.get(f"{base}/metrics").text)
        assert steps == list(range(steps[0], steps[0] + 40))  # one for the prompt with its first token, then one a token
        assert count <= 2 + FRAMES_PER_SECOND * seconds
        assert statuses == {"running"}
        assert not any(owners for owners, _ in blocks.values())
        assert frame["stats"]["num_generation_tokens"] == metrics["vllm:generation_tokens_total"] == 40
        assert answer.json()["usage"]["completion_tokens"] == 40
        with httpx.stream("GET", f"{base}/live", timeout=30) as feed:
            next(frames_of(feed.iter_lines()))
            start = time.monotonic()
            assert stopped(server) == ""  # a client that watches does not hold the server up
            assert time.monotonic() - start < 5
    assert sum(len(json.loads(line)["steps"]) for line in trace.read_text().splitlines()) == steps[-1]
    assert "Count" not in trace.read_text()


class Borders:
    """Stands in for an `AsyncEngine`: commands run at once, and its engine has nothing to show."""

    is_running, is_draining = True, False

    def __init__(self) -> None:
        self.engine = FakeEngine()

    def between_steps(self, command: Any) -> None:
        command()


def feed_over(async_engine: Any) -> LiveFeed:
    return LiveFeed(async_engine, "fake", StepControl(async_engine))


def feed_of(monkeypatch: pytest.MonkeyPatch) -> LiveFeed:
    feed = feed_over(Borders())
    monkeypatch.setattr(feed._snapshots, "frame", lambda full: {"full": full})
    return feed


def test_a_client_that_does_not_read_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        feed = feed_of(monkeypatch)
        slow, quick = feed.events(), feed.events()
        await anext(slow)
        await anext(quick)
        for _ in range(3 * MAX_UNREAD):
            feed._send_frame(full=False)
            await asyncio.sleep(0)
            await anext(quick)
        held = next(iter(feed._clients))
        assert held.qsize() <= MAX_UNREAD
        assert json.loads((await anext(slow))[6:])["full"]
        await slow.aclose()
        await quick.aclose()
        assert not feed._clients
        assert not feed._is_watched

    asyncio.run(main())


def test_so_many_may_watch_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        feed = feed_of(monkeypatch)
        clients = [feed.events() for _ in range(MAX_CLIENTS)]
        for client in clients:
            feed.check_room()
            await anext(client)
        with pytest.raises(QueueFullError, match="16 clients are watching"):
            feed.check_room()
        await clients[0].aclose()
        feed.check_room()
        for client in clients:
            await client.aclose()

    asyncio.run(main())


def test_the_end_of_what_happened_comes_without_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        feed = feed_of(monkeypatch)
        client = feed.events()
        await anext(client)
        feed.async_engine.engine.num_steps += 1  # and no step follows that would tell of it
        frame = json.loads((await asyncio.wait_for(anext(client), 5))[6:])
        assert frame == {"full": False}
        await client.aclose()

    asyncio.run(main())


def test_nothing_is_recorded_for_nobody(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, num_gpu_blocks_override=64)
    feed = feed_over(SimpleNamespace(engine=engine, is_draining=False))
    engine.observers.append(feed)
    engine.add_request("a", {"prompt_token_ids": [5]}, SamplingParams(max_tokens=3, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    assert feed._snapshots.frame(full=False)["steps"] == []


def test_only_this_machine_sees_it_unless_told_otherwise() -> None:
    everybody = ["--host", "0.0.0.0"]
    flags = ([], ["--host", "127.0.0.1"], ["--host", "localhost", "--no-live"], everybody, [*everybody, "--live"])
    assert [parse_flags(each).live for each in flags] == [False, True, False, False, True]
    for live in (True, False):
        with serve(FakeEngine(), live=live) as url:
            assert ("/live" in httpx.get(f"{url}/openapi.json").json()["paths"]) == live


def test_a_key_guards_it() -> None:
    with serve(FakeEngine(), ["secret"], live=True) as url:
        assert httpx.get(f"{url}/live").status_code == 401


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"error: .*no/such/folder"), running_server(
        "--max-model-len", "64", "--record-trace", str(tmp_path / "no/such/folder/trace.jsonl")
    ):  # fmt: skip
        pass
