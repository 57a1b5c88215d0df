"""The bridge between event loop and engine, with an engine whose steps the test controls."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable

import pytest

from solutions.batching.sampling_params import RequestOutputKind, SamplingParams
from solutions.batching.scheduler_config import QueueFullError
from solutions.core.output import CompletionOutput, Logprob, RequestOutput
from solutions.serving.async_engine import INLINE_LIMIT, AsyncEngine, EngineDeadError
from solutions.serving.output_stream import OutputStream
from solutions.tests.fake_engine import FakeEngine

FOREVER = 4000


def run(fake: FakeEngine, scenario: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Run a scenario on a started engine, with a time limit, and stop the engine."""

    async def main() -> None:
        engine = AsyncEngine(fake)
        engine.start()
        try:
            await asyncio.wait_for(scenario(engine), 10)
        finally:
            if fake.gate is not None:
                fake.gate.set()
            await asyncio.to_thread(engine.shutdown)

    asyncio.run(main())


def tokens(max_tokens: int, n: int = 1) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, n=n, output_kind=RequestOutputKind.DELTA)


async def text_of(stream: OutputStream) -> str:
    return "".join([output.outputs[0].text async for output in stream])


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_concurrent_requests_each_get_their_own_outputs_in_order() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        async def one(i: int) -> None:
            assert await text_of(await engine.generate(f"r{i}", "hi", tokens(i))) == "abcdefghij"[:i]

        await asyncio.gather(*(one(i) for i in range(1, 11)))
        assert not engine._streams

    run(FakeEngine(), scenario)


def test_outputs_of_a_step_take_one_hop_to_the_loop() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)

    async def scenario(engine: AsyncEngine) -> None:
        hops: list[str] = []
        post = engine._post
        engine._post = lambda callback, *args: (hops.append(callback.__name__), post(callback, *args))
        stream = await engine.submit(await engine.prepare("r", ["a"] * 8, tokens(5)))
        gate.set()
        outputs = [output async for output in stream]
        assert len(outputs) == 40
        assert hops == ["accept"] + ["_deliver"] * 5
        assert {output.request_id for output in outputs} == {f"r-{i}" for i in range(8)}

    run(fake, scenario)


def test_the_loop_goes_on_while_a_step_runs() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)

    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.generate("r", "hi", tokens(1))
        await asyncio.to_thread(fake.in_step.wait)
        for _ in range(50):
            await asyncio.sleep(0)
        assert fake.num_steps == 0
        gate.set()
        assert await text_of(stream) == "a"

    run(fake, scenario)


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_leaving_a_stream_aborts_its_requests_and_no_others(how: str) -> None:
    fake = FakeEngine()

    async def read(stream: OutputStream) -> None:
        async with stream:
            async for _ in stream:
                if how == "break":
                    break

    async def scenario(engine: AsyncEngine) -> None:
        left = await engine.submit(await engine.prepare("left", ["a", "b"], tokens(FOREVER)))
        other = await engine.generate("other", "c", tokens(FOREVER))
        reader = asyncio.create_task(read(left))
        await until(lambda: fake.num_steps > 3)
        left.close() if how == "close" else reader.cancel() if how == "cancel" else None
        await asyncio.wait([reader])
        await until(lambda: len(fake.aborted) >= 2)
        assert sorted(fake.aborted) == ["left-0", "left-1"]
        assert list(fake.running) == ["other"]
        other.close()
        await until(lambda: not fake.running)

    run(fake, scenario)


def test_an_abort_waits_for_the_step_border_and_not_longer() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)

    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.generate("r", "hi", tokens(FOREVER))
        await asyncio.to_thread(fake.in_step.wait)
        stream.close()
        assert [output async for output in stream] == []
        assert fake.aborted == []
        gate.set()
        await until(lambda: fake.aborted == ["r"])
        assert fake.num_steps == 1

    run(fake, scenario)


def test_cancelling_a_submission_takes_it_back() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)

    async def scenario(engine: AsyncEngine) -> None:
        first = await engine.generate("first", "hi", tokens(3))
        await asyncio.to_thread(fake.in_step.wait)
        late = asyncio.create_task(engine.generate("late", "hi", tokens(FOREVER)))
        await until(lambda: "late" in engine._streams)
        late.cancel()
        await asyncio.wait([late])
        gate.set()
        assert await text_of(first) == "abc"
        await until(lambda: fake.aborted == ["late"])

    run(fake, scenario)


def test_a_full_queue_takes_all_or_nothing() -> None:
    fake = FakeEngine(max_waiting=2)

    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(QueueFullError):
            await engine.submit(await engine.prepare("big", ["a", "b", "c"], tokens(FOREVER)))
        assert not fake.running
        assert await text_of(await engine.generate("small", "a", tokens(2))) == "ab"

    run(fake, scenario)


def test_a_fault_fails_every_request_and_the_engine_stays_dead(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeEngine(fail_at=3)

    async def scenario(engine: AsyncEngine) -> None:
        assert engine.is_running
        prepared = await engine.prepare("r", ["a", "b"], tokens(FOREVER))
        streams = await asyncio.gather(*(engine.submit([request]) for request in prepared))
        results = await asyncio.gather(*(text_of(stream) for stream in streams), return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError, EngineDeadError]
        assert "/secret" not in str(results[0])
        assert not engine.is_running
        with pytest.raises(EngineDeadError):
            await engine.generate("later", "c", tokens(1))

    with caplog.at_level(logging.ERROR):
        run(fake, scenario)
    assert "a fault in /secret/path" in caplog.text


def test_a_fault_fails_a_submission_that_waits_for_the_step_border() -> None:
    gate = threading.Event()
    fake = FakeEngine(fail_at=1, gate=gate)

    async def scenario(engine: AsyncEngine) -> None:
        await engine.generate("first", "a", tokens(1))
        await asyncio.to_thread(fake.in_step.wait)
        late = asyncio.create_task(engine.generate("late", "b", tokens(1)))
        await until(lambda: "late" in engine._streams)
        gate.set()
        with pytest.raises(EngineDeadError):
            await late

    run(fake, scenario)


def test_an_invalid_request_does_not_reach_the_engine() -> None:
    fake = FakeEngine()

    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(ValueError, match="prompt_token_ids"):
            await engine.generate("r", {"prompt_token_ids": [256]}, tokens(1))
        assert not fake.submitted
        assert not engine._streams

    run(fake, scenario)


def test_a_request_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    gate = threading.Event()

    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.generate("r", "a", tokens(2))
        with pytest.raises(ValueError, match="in use"):
            await engine.generate("r", "a", tokens(2))
        gate.set()
        assert await text_of(stream) == "ab"

    run(FakeEngine(gate=gate), scenario)


def test_only_long_prompts_leave_the_loop_to_be_tokenized() -> None:
    fake = FakeEngine()

    async def scenario(engine: AsyncEngine) -> None:
        await engine.prepare("short", ["x" * INLINE_LIMIT], tokens(1))
        await engine.prepare("long", ["x" * (INLINE_LIMIT // 2)] * 3, tokens(1))
        main = threading.current_thread().name
        assert fake.prepared_in[0] == main
        assert len(fake.prepared_in) == 4
        assert main not in fake.prepared_in[1:]

    run(fake, scenario)


def test_an_idle_engine_sleeps() -> None:
    fake = FakeEngine()

    async def scenario(engine: AsyncEngine) -> None:
        await text_of(await engine.generate("r", "a", tokens(2)))
        polls = fake.num_polls
        await asyncio.sleep(0.2)
        assert fake.num_polls - polls < 5  # it looks once more, and then it need not
        assert await text_of(await engine.generate("s", "a", tokens(2))) == "ab"  # and wakes up

    run(fake, scenario)


def test_shutdown_ends_the_thread_and_fails_what_runs() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.generate("r", "a", tokens(FOREVER))
        await asyncio.to_thread(engine.shutdown)
        assert not engine._thread.is_alive()
        assert not engine.is_running
        with pytest.raises(EngineDeadError, match="shutting down"):
            await text_of(stream)

    run(FakeEngine(), scenario)


def piece(text: str, index: int = 0, finish: str | None = None, name: str = "r", logprob: float | None = None) -> RequestOutput:
    """A delta of one sequence, a token a letter."""
    tokens = [ord(letter) for letter in text]
    logprobs = None if logprob is None else [{token: Logprob(logprob, 1)} for token in tokens]
    return RequestOutput(name, None, [], [CompletionOutput(index, text, tokens, logprob, logprobs, finish)], finish is not None)


def test_what_a_slow_reader_left_comes_in_one_piece() -> None:
    async def scenario() -> None:
        stream = OutputStream(["r", "s"], lambda ids: None, delta=True)
        for output in (
            piece("ab", logprob=-1.0),
            piece("x", 1),
            piece("c", logprob=-2.0),
            piece("z", name="s"),
            piece("y", 1, "stop"),
        ):
            stream.put(output)
        first, second = await anext(stream), await anext(stream)
        assert (first.request_id, second.request_id) == ("r", "s")
        assert first.finished
        assert not second.finished
        a, b = first.outputs
        assert (a.text, a.token_ids, a.cumulative_logprob, a.finish_reason) == ("abc", [97, 98, 99], -2.0, None)
        assert [next(iter(entry.values())).logprob for entry in a.logprobs] == [-1.0, -1.0, -2.0]
        assert (b.text, b.token_ids, b.logprobs, b.finish_reason) == ("xy", [120, 121], None, "stop")

    asyncio.run(scenario())


def test_of_outputs_that_hold_all_so_far_the_newest_stays() -> None:
    async def scenario() -> None:
        stream = OutputStream(["r"], lambda ids: None)
        for text, finish in (("a", None), ("ab", None), ("abc", "stop")):
            stream.put(piece(text, finish=finish))
        assert [output.outputs[0].text async for output in stream] == ["abc"]

    asyncio.run(scenario())


def test_what_waits_is_read_before_an_error_and_an_error_once() -> None:
    async def scenario() -> None:
        stream = OutputStream(["r"], lambda ids: None, delta=True)
        stream.accept()
        stream.put(piece("a"))
        stream.fail(EngineDeadError("gone"))
        assert (await anext(stream)).outputs[0].text == "a"
        with pytest.raises(EngineDeadError, match="gone"):
            await anext(stream)
        assert [output async for output in stream] == []

    asyncio.run(scenario())


def test_an_unread_stream_holds_one_output_a_request() -> None:
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.generate("r", "hi", tokens(500, n=2))
        await until(lambda: any(output.finished for output in stream._waiting.values()))
        assert len(stream._waiting) == 1
        output = await anext(stream)
        assert [len(sequence.text) for sequence in output.outputs] == [500, 500]

    run(FakeEngine(), scenario)
