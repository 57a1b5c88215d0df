"""Task 5.9: the end of a server: what runs finishes, nothing new comes in, and everybody is told."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from stages.core.output import RequestOutput
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.http import running
from stages.course.fixtures.waiting import until
from stages.serving import async_engine
from stages.serving.api_server import Server
from stages.serving.async_engine import AsyncEngine, EngineDeadError
from stages.serving.output_stream import OutputStream


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread is waited for in pieces of 0.1 s, so that these tests need not wait for a whole second."""
    monkeypatch.setattr(async_engine, "HEALTH_SECONDS", 0.1)


class Idle:
    """Stands in for an engine without work, and for what compiles grammars for it."""

    def __init__(self) -> None:
        self.input, self.closed, self.closed_count = SimpleNamespace(close=self.close), threading.Event(), 0
        self.asked = threading.Event()

    def close(self) -> None:
        self.closed_count += 1
        self.closed.set()

    def has_unfinished_requests(self) -> bool:
        self.asked.set()
        return False

    def check_health(self) -> None:
        pass


class Busy(Idle):
    """Stands in for an engine that is never done; its steps wait at the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.in_step, self.num_steps = threading.Event(), threading.Event(), 0

    def has_unfinished_requests(self) -> bool:
        return True

    def step(self) -> list[RequestOutput]:
        self.in_step.set()
        self.gate.wait()
        self.num_steps += 1
        return []


def server(app: Any = None) -> Server:
    return Server(uvicorn.Config(app, log_level="critical"), SimpleNamespace(is_draining=False))


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_the_second_ends(first: signal.Signals, second: signal.Signals) -> None:
    """SIGTERM from a cluster, SIGINT from a keyboard, in any order.

    Why: one means "finish what you have", two mean "now". An operator in a hurry must not have to know which is which.
    """
    one = server()
    states = []
    for sig in (first, second):
        one.handle_exit(sig, None)
        states.append((one.should_exit, one.engine.is_draining, one.force_exit))
    check_equal(states, [(True, True, False), (True, True, True)], "should_exit, is_draining, force_exit after each")


def test_nothing_takes_a_signal_back() -> None:
    """A third signal, and a fourth, change nothing.

    Why: a keyboard's SIGINT comes twice as easily as once.
    """
    one = server()
    for _ in range(2):
        one.handle_exit(signal.SIGTERM, None)
    for sig in (signal.SIGINT, signal.SIGTERM):
        one.handle_exit(sig, None)
        check_equal((one.should_exit, one.engine.is_draining, one.force_exit), (True, True, True), "state after another signal")


def test_a_signal_is_not_raised_again() -> None:
    """What uvicorn remembers of signals, and raises when it has ended, is empty.

    Why: the process would end by the signal, before the engine is closed and the last spans are sent, and not with 0.
    """
    one = server()
    one.handle_exit(signal.SIGTERM, None)
    check_equal(one._captured_signals, [], "signals that uvicorn raises in the end")


class Slow:
    """An application that answers when the gate is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.app = Starlette(routes=[Route("/", self.answer)])

    async def answer(self, _: Request) -> PlainTextResponse:
        self.loop, self.gate = asyncio.get_running_loop(), asyncio.Event()
        self.arrived.set()
        await self.gate.wait()
        return PlainTextResponse("done")

    def open(self) -> None:
        """From another thread."""
        self.loop.call_soon_threadsafe(self.gate.set)


@contextmanager
def serving(slow: Slow) -> Iterator[tuple[Server, tuple[str, int], threading.Thread]]:
    """A real server, its address, and its thread."""
    one = server(slow.app)
    with running(one) as (address, thread):
        until(lambda: one.started, "the server has started")
        yield one, address, thread


def refuses(address: tuple[str, int]) -> bool:
    """Whether nobody listens any more."""
    try:
        socket.create_connection(address, 10).close()
    except OSError:
        return True
    return False


def test_what_runs_is_finished_and_nothing_new_comes_in() -> None:
    """A signal while a request runs: it gets its answer, the next one finds no server, and the server ends.

    Why: at every deployment users would lose their answers, or a server would go on for ever because more of them come.
    """
    slow = Slow()
    with serving(slow) as (one, address, thread):
        answers: list[httpx.Response] = []
        url = "http://{}:{}/".format(*address)
        asking = threading.Thread(target=lambda: answers.append(httpx.get(url, timeout=20)))
        asking.start()
        check_equal(slow.arrived.wait(10), True, "the request has arrived")
        one.handle_exit(signal.SIGTERM, None)
        until(lambda: refuses(address), "a new client finds no server")
        check_equal(answers, [], "answers, before the work is done")
        slow.open()
        asking.join(10)
        thread.join(10)
        check_equal([answer.text for answer in answers], ["done"], "answers")
        check_equal(thread.is_alive(), False, "the server still runs")


def test_a_second_signal_does_not_wait() -> None:
    """A request would take a minute.

    Why: an orchestrator waits for some seconds and then kills; the server had better end by itself, and tidily.
    """
    slow = Slow()
    with serving(slow) as (one, address, thread), socket.create_connection(address, 10) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        check_equal(slow.arrived.wait(10), True, "the request has arrived")
        for _ in range(2):
            one.handle_exit(signal.SIGTERM, None)
        thread.join(10)
        check_equal(thread.is_alive(), False, "the server still runs")


# ------------------------------------------------------------------------------------------------- the engine's thread


def start(engine: Any, **settings: Any) -> AsyncEngine:
    """An engine whose thread runs, and which posts nothing."""
    stopped, bridge = AsyncEngine(Idle()), AsyncEngine(engine, **settings)
    stopped._post = bridge._post = lambda callback, *args: None
    stopped.shutdown()
    stopped._run()  # ends at once, here, where a missing function would be seen
    bridge._thread.start()
    return bridge


def test_shutdown_waits_for_the_step_that_runs() -> None:
    """It is called in the middle of a step.

    Why: behind it the memory of the model is given back, under the feet of a step that still computes.
    """
    engine = Busy()
    bridge = start(engine)
    engine.in_step.wait(10)
    ended = threading.Thread(target=bridge.shutdown)
    ended.start()
    until(lambda: bridge._stopping, "the thread is told to stop")
    engine.gate.set()
    ended.join(10)
    check_equal((ended.is_alive(), bridge._thread.is_alive()), (False, False), "waits still, thread lives")
    check_equal(engine.num_steps, 1, "steps")


class LongStep:
    """Stands in for a thread whose step lasts for so many seconds of waiting for it; they pass at once."""

    ident = 1

    def __init__(self, seconds: float) -> None:
        self.left, self.num_looks = seconds, 0

    def is_alive(self) -> bool:
        self.num_looks += 1
        assert self.num_looks < 100_000, "it looks and does not wait"
        return self.left > 0

    def join(self, timeout: float | None = None) -> None:
        self.left -= self.left if timeout is None else timeout


@pytest.mark.parametrize("seconds", [0.05, 1.5, 100.0])
def test_a_long_step_is_waited_for_to_its_end(seconds: float) -> None:
    """The step that runs ends after 0.05, 1.5 or 100 seconds; none of them is so long that it counts as hanging.

    Why: a prefill of 100,000 tokens takes its time. Behind `shutdown` the memory in which it computes is given back.
    """
    bridge = AsyncEngine(Idle())
    bridge._thread = LongStep(seconds)
    bridge._is_stalled = lambda: False
    bridge.shutdown()
    check_equal(bridge._thread.left <= 0, True, "the step has ended when shutdown returns")


def test_an_idle_engine_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread sleeps and has nothing to do for a long time.

    Why: who sets a flag and does not wake the sleeper waits for its next look at the clock.
    """
    monkeypatch.setattr(async_engine, "HEALTH_SECONDS", 5.0)
    idle = Idle()
    bridge = start(idle)
    check_equal(idle.asked.wait(10), True, "the thread has looked for work")
    began = time.monotonic()
    bridge.shutdown()
    check_equal(bridge._thread.is_alive(), False, "thread lives")
    check_equal(time.monotonic() - began < 4, True, "at once")


def test_a_step_that_hangs_is_given_up() -> None:
    """Its time is over, and it has not come back.

    Why: a kernel that waits for a dead GPU never returns. The process has to end all the same.
    """
    engine = Busy()
    bridge = start(engine, stall_seconds=0.2)
    engine.in_step.wait(10)
    ended = threading.Thread(target=bridge.shutdown, daemon=True)
    ended.start()
    ended.join(10)
    gave_up = not ended.is_alive()
    engine.gate.set()
    check_equal(gave_up, True, "shutdown returned")


def test_shutdown_before_the_start_does_nothing() -> None:
    """No thread has been started.

    Why: a server that finds its port taken shuts down what it has.
    """
    bridge = AsyncEngine(Idle())
    bridge.shutdown()
    bridge.shutdown()


def test_what_compiles_grammars_is_ended() -> None:
    """It is ended by the time `shutdown` returns, and before the engine's thread is waited for, whose step may take long.

    Why: a grammar that takes ten seconds to compile would keep its process alive behind the server, and whoever waits for it
    would not be told.
    """
    idle = Idle()
    AsyncEngine(idle).shutdown()
    check_equal(idle.closed_count, 1, "calls of engine.input.close()")
    busy = Busy()
    bridge = start(busy)
    busy.in_step.wait(10)
    ended = threading.Thread(target=bridge.shutdown)
    ended.start()
    closed = busy.closed.wait(10)
    busy.gate.set()
    ended.join(10)
    check_equal(closed, True, "engine.input.close() was called while a step was running")


# ---------------------------------------------------------------------------------------------------------- the end


def fail(bridge: AsyncEngine, *reasons: str) -> list[tuple[int, str]]:
    """Let an engine with two streams, one of which serves two requests, die; errors that each is told, and their text."""

    async def main() -> list[tuple[int, str]]:
        told: list[tuple[int, str]] = []
        streams = [OutputStream(["a", "b"], lambda ids: None), OutputStream(["c"], lambda ids: None)]
        for number, stream in enumerate(streams):
            stream.accept()
            stream.fail = lambda error, number=number: told.append((number, f"{type(error).__name__}: {error}"))
        bridge._streams = {"a": streams[0], "b": streams[0], "c": streams[1]}
        for reason in reasons:
            bridge._fail(reason)
        check_equal(bridge._streams, {}, "streams that are still known")
        with pytest.raises(EngineDeadError, match=reasons[0]):
            await bridge.submit([])
        return sorted(told)

    return asyncio.run(main())


def test_everybody_is_told_once() -> None:
    """Two streams, three requests, and later a second failure.

    Why: a stream that is not told hangs until its client gives up. The first reason is the one that helps.
    """
    told = fail(AsyncEngine(Idle()), "it broke", "it broke again")
    check_equal(told, [(0, "EngineDeadError: it broke"), (1, "EngineDeadError: it broke")], "what each stream was told")


@pytest.mark.parametrize("stopping", [False, True])
def test_a_death_is_news_and_a_shutdown_is_not(stopping: bool) -> None:
    """`on_death` is called once, after the streams have been told; not when somebody has asked for the end.

    Why: it ends the process with an error, which is what makes an orchestrator start another one.
    """
    bridge = AsyncEngine(Idle())
    order: list[int] = []
    bridge.on_death = lambda: order.append(len(bridge._streams))
    bridge._stopping = stopping
    told = fail(bridge, "it broke", "it broke again")
    check_equal(told, [(0, "EngineDeadError: it broke"), (1, "EngineDeadError: it broke")], "what each stream was told")
    check_equal(order, [] if stopping else [0], "streams that were known at each call of on_death")


def test_an_idle_engine_dies_too() -> None:
    """Nobody has a stream when it fails: `on_death` is called.

    Why: a rank that dies at night is found by the health check, when no client is there. A server that stays up is sent the
    next one.
    """
    bridge = AsyncEngine(Idle())
    calls: list[str] = []
    bridge.on_death = lambda: calls.append("called")
    bridge._fail("it broke")
    check_equal(calls, ["called"], "calls of on_death")


@pytest.mark.parametrize("number", range(3))
def test_any_reason_is_told_as_it_is(number: int) -> None:
    """An engine that dies of a random reason, and of another one afterwards: every stream hears of the first.

    Why: what a client is told is all that its operator has to go by.
    """
    dice = random.Random(590 + number)
    first, second = ("".join(dice.choices("abc defg", k=12)) for _ in range(2))
    expected = [(0, f"EngineDeadError: {first}"), (1, f"EngineDeadError: {first}")]
    check_equal(fail(AsyncEngine(Idle()), first, second), expected, "what each stream was told")
