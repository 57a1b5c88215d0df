"""Task 5.5: the engine steps in its own thread, and clients read in the event loop."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from stages.core.output import CompletionOutput, RequestOutput
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.waiting import turns, until
from stages.serving import async_engine
from stages.serving.async_engine import ENDED, FAILED, AsyncEngine
from stages.serving.output_stream import OutputStream


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread without work looks around 50 times a second, so that these tests need not wait for it."""
    monkeypatch.setattr(async_engine, "HEALTH_SECONDS", 0.02)


def output(name: str, text: str, finished: bool = False) -> RequestOutput:
    sequence = CompletionOutput(0, text, list(text.encode()), finish_reason="stop" if finished else None)
    return RequestOutput(name, None, [], [sequence], finished)


def seen(one: RequestOutput) -> tuple[str, str]:
    return one.request_id, one.outputs[0].text


class Stepper:
    """Stands in for an engine: `steps` says what each step gives; an exception is raised. Without steps it has no work.

    A step waits until the gate is opened, for 5 s at most; `waited` says whether it was.
    """

    def __init__(self, *steps: list[RequestOutput] | Exception) -> None:
        self.steps = list(steps)
        self.gate, self.in_step, self.waited = threading.Event(), threading.Event(), True
        self.gate.set()
        self.log: list[str] = []
        self.num_polls = self.num_checks = 0

    def has_unfinished_requests(self) -> bool:
        self.num_polls += 1
        return bool(self.steps)

    def step(self) -> list[RequestOutput]:
        self.log.append("step")
        self.in_step.set()
        self.waited = self.gate.wait(5)
        result = self.steps.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def check_health(self) -> None:
        self.num_checks += 1
        assert self.num_checks < 50, "it sleeps and does not wake up"


def run(engine: Stepper, *commands: Callable[[AsyncEngine], None], stop_after: int | None = None) -> list[tuple[str, Any]]:
    """Run the engine's thread here until it ends; what it posted to the loop, in order: outputs and reasons.

    Args:
        commands: that it finds at its start. stop_after: so many posts it is told to stop; None: only when there is no work.
    """
    bridge = AsyncEngine(engine)
    posted: list[tuple[str, Any]] = []

    def post(callback: Callable[..., None], *args: Any) -> None:
        callback(*args)  # there is no other thread here
        if stop_after is not None and len(posted) == stop_after:
            bridge._stopping = True

    bridge._post = post
    bridge._deliver = lambda outputs: posted.append(("_deliver", outputs))
    bridge._fail = lambda reason: posted.append(("_fail", reason))
    bridge._commands = [lambda command=command: command(bridge) for command in commands]
    unfinished = engine.has_unfinished_requests

    def poll() -> bool:
        if (not unfinished() and not bridge._commands) or engine.num_polls > 100:
            bridge._stopping = True
        return bool(engine.steps)

    engine.has_unfinished_requests = poll
    bridge._run()
    return posted


# ------------------------------------------------------------------------------------------------------- the stream


def stream_of(*names: str, delta: bool = True) -> OutputStream:
    return OutputStream(list(names), lambda ids: None, delta)


async def rest(stream: OutputStream) -> list[tuple[str, str]]:
    """All that there is to read, up to the end."""
    got = []
    while True:
        try:
            got.append(seen(await asyncio.wait_for(stream.__anext__(), 10)))
        except StopAsyncIteration:
            return got


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_what_waits_is_read_in_the_order_of_requests(names: str, delta: bool) -> None:
    """One, then the other, then the first again: both pieces of the first come first, as one, whatever the requests' names.
    Where an output holds all so far, the newest of the first comes first, for it has waited since its first one.

    Why: at most one output a request waits, so a slow reader costs no more than the text that he has not read. And what has
    waited longest is read first, or a request with many pieces is never read, or keeps another from it.
    """
    one, other = names

    async def main(*outputs: RequestOutput) -> list[tuple[str, str]]:
        stream = stream_of("a", "b", delta=delta)
        for each in outputs:
            stream.put(each)
        first = seen(await asyncio.wait_for(stream.__anext__(), 10))
        stream.put(output(other, "y", True))
        stream.put(output(one, "3", True))
        return [first, *await rest(stream)]

    got = asyncio.run(main(output(one, "1"), output(other, "x"), output(one, "2")))
    expected = [(one, "12"), (other, "xy"), (one, "3")] if delta else [(one, "2"), (other, "y"), (one, "3")]
    check_equal(got, expected, "outputs that are read")


def test_a_request_of_one_token_ends_alone() -> None:
    """Of three requests one ends with its first output; the others go on, and the stream ends with the last of them.

    Why: prompts of one request have answers of different lengths.
    """

    async def main() -> list[tuple[str, str]]:
        stream, got = stream_of("a", "b", "c"), []
        for one in (output("b", "1", True), output("a", "2"), output("c", "3", True), output("a", "4", True)):
            stream.put(one)
            got.append(seen(await asyncio.wait_for(stream.__anext__(), 10)))
        return got + await rest(stream)

    check_equal(asyncio.run(main()), [("b", "1"), ("a", "2"), ("c", "3"), ("a", "4")], "outputs that are read")


def test_a_reader_who_keeps_up_gets_every_piece() -> None:
    """Read after each put: three pieces.

    Why: joining is for what waits. What has been read is gone.
    """

    async def main() -> list[tuple[str, str]]:
        stream, got = stream_of("a"), []
        for one in (output("a", "1"), output("a", "2"), output("a", "3", True)):
            stream.put(one)
            got.append(seen(await asyncio.wait_for(stream.__anext__(), 10)))
        return got + await rest(stream)

    check_equal(asyncio.run(main()), [("a", "1"), ("a", "2"), ("a", "3")], "outputs that are read")


def test_outputs_that_hold_all_so_far_replace_each_other() -> None:
    """Without deltas the newest is enough.

    Why: joined they would say everything twice.
    """

    async def main() -> list[tuple[str, str]]:
        stream = stream_of("a", delta=False)
        for one in (output("a", "1"), output("a", "12"), output("a", "123", True)):
            stream.put(one)
        return await rest(stream)

    check_equal(asyncio.run(main()), [("a", "123")], "outputs that are read")


class Counted(asyncio.Event):
    """An event that is waited for now and then, and not again and again."""

    num_waits = 0

    async def wait(self) -> bool:
        self.num_waits += 1
        assert self.num_waits < 50, "it does not sleep: the event is set, and nothing is there"
        return await super().wait()


def test_a_reader_sleeps_until_something_comes() -> None:
    """Who reads first is woken by what is put later, and by the end of all requests.

    Why: a client waits for most of its time. Asking again and again would take the loop from all others.
    """

    async def main() -> tuple[bool, list[tuple[str, str]]]:
        stream = stream_of("a", "b")
        stream._changed = Counted()
        stream._changed.set()  # of something that has been read
        reading = asyncio.create_task(rest(stream))
        await turns()
        asleep = not reading.done()
        for one in (output("a", "1", True), output("b", "2", True)):
            stream.put(one)
            await turns()
        return asleep, await asyncio.wait_for(reading, 10)

    check_equal(asyncio.run(main()), (True, [("a", "1"), ("b", "2")]), "asleep before; outputs that are read")


def test_the_error_comes_after_what_waits_and_once() -> None:
    """One output, then the engine fails: the output, the error, the end.

    Why: what has been computed belongs to the client. And who reads on after the error must not hang.
    """

    async def main() -> list[str]:
        stream, got = stream_of("a"), []
        stream.accept()
        stream.put(output("a", "1"))
        stream.fail(RuntimeError("dead"))
        for _ in range(3):
            try:
                got.append(seen(await asyncio.wait_for(stream.__anext__(), 10))[1])
            except (RuntimeError, StopAsyncIteration) as error:
                got.append(type(error).__name__)
        return got

    check_equal(asyncio.run(main()), ["1", "RuntimeError", "StopAsyncIteration"], "what three reads give")


# ------------------------------------------------------------------------------------------------- the engine's thread


def test_commands_come_before_the_step() -> None:
    """Two commands and work for one step.

    Why: commands take effect at a step border and in their order: who submits and aborts at once has nothing left.
    """
    engine = Stepper([output("a", "1")])
    run(engine, lambda _: engine.log.append("first"), lambda _: engine.log.append("second"))
    check_equal(engine.log, ["first", "second", "step"], "order")


def test_a_step_is_one_post() -> None:
    """Three outputs of a step, then a step without any, then one output.

    Why: each post wakes the loop and costs a system call; a step with 256 outputs makes one.
    """
    outputs = [output(name, "1") for name in "abc"]
    posted = run(Stepper(outputs, [], [output("a", "2", True)]))
    got = [(name, [seen(one) for one in what]) for name, what in posted if name == "_deliver"]
    check_equal(got, [("_deliver", [("a", "1"), ("b", "1"), ("c", "1")]), ("_deliver", [("a", "2")])], "posts of outputs")


def test_it_is_known_since_when_a_step_runs() -> None:
    """Within a step `_step_since` is its start, outside it is None.

    Why: somebody else watches whether a step hangs; the thread that hangs cannot.
    """
    engine = Stepper([output("a", "1", True)])
    found: list[Any] = []
    bridge = AsyncEngine(engine)
    bridge._post = lambda callback, *args: found.append(("posted", bridge._step_since))
    step, polled = engine.step, engine.has_unfinished_requests

    def watched() -> list[RequestOutput]:
        found.append(("in the step", abs(time.monotonic() - bridge._step_since) < 5))
        return step()

    def poll() -> bool:
        bridge._stopping = not polled()
        return bool(engine.steps)

    engine.step, engine.has_unfinished_requests = watched, poll
    bridge._run()
    check_equal(found, [("in the step", True), ("posted", None), ("posted", None)], "what was seen, and when")


def test_a_command_is_no_step() -> None:
    """An abort comes while nothing runs: `_step_since` is None while it is carried out, and afterwards.

    Why: a clock that no step stops goes on. After a while an idle server takes itself for hung, and ends.
    """
    found: list[Any] = []
    bridge = AsyncEngine(Stepper())
    bridge._post = lambda callback, *args: found.append(bridge._step_since)

    def stop() -> None:
        found.append(bridge._step_since)
        bridge._stopping = True

    bridge._commands = [lambda: found.append(bridge._step_since), stop]
    bridge._run()
    check_equal(found, [None] * 3, "`_step_since` in two commands, and at the end")


def test_no_step_is_made_while_none_may_be() -> None:
    """There is work, and `may_step` says no: commands are carried out, and the engine does not step.

    Why: who looks at the engine's state between two steps has stopped it.
    """
    engine, asked = Stepper([output("a", "1")]), []
    bridge = AsyncEngine(engine)
    bridge._post = lambda callback, *args: None

    def may_step() -> bool:
        asked.append(1)
        bridge._stopping = len(asked) > 3
        return False

    bridge.may_step = may_step
    bridge._commands = [lambda: engine.log.append("command")]
    bridge._run()
    check_equal(engine.log, ["command"], "what was done")


def test_who_may_not_step_sleeps() -> None:
    """There is work, `may_step` says no, and no command comes: the thread sleeps, and checks the engine's health.

    Why: a bridge that wakes for work it may not do turns as fast as it can, beside whatever it was stopped for.
    """
    bridge, engine = AsyncEngine(Stepper()), Stepper([output("a", "1")])
    bridge._stopping = True
    check_equal(bridge._next_commands(), None, "commands when the thread has to end")

    def check() -> None:
        raise RuntimeError("it slept, and checked")

    bridge, engine.check_health = AsyncEngine(engine), check
    bridge.may_step = lambda: False
    with pytest.raises(RuntimeError, match="it slept"):
        bridge._next_commands()


def test_nothing_is_begun_behind_the_end() -> None:
    """It is told to stop while a command waits: no commands, and no step.

    Why: the memory is given back as soon as the thread is through.
    """
    engine = Stepper([output("a", "1")])
    bridge = AsyncEngine(engine)
    bridge._stopping, bridge._commands = True, [print]
    check_equal(bridge._next_commands(), None, "commands when the thread has to end")


def test_a_rank_that_has_died_ends_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    """`check_health` raises while the engine is idle: the last post says that the engine has failed.

    Why: the next user would wait for a rank that does not answer.
    """

    def check() -> None:
        raise RuntimeError("rank 1 has died")

    engine, posted = Stepper(), []
    engine.check_health = check
    bridge = AsyncEngine(engine)

    def has_unfinished_requests() -> bool:
        engine.num_polls += 1
        bridge._stopping = engine.num_polls > 20
        return False

    engine.has_unfinished_requests = has_unfinished_requests
    bridge._post, bridge._fail = (lambda callback, *args: callback(*args)), posted.append
    with caplog.at_level(logging.ERROR):
        bridge._run()
    check_equal(posted, [FAILED], "reasons that were posted")


def test_the_end_is_told_last() -> None:
    """Told to stop after its first post, with steps left: it stops, and says so.

    Why: streams that are not told wait for ever.
    """
    engine = Stepper(*[[output("a", "1")]] * 5)
    posted = run(engine, stop_after=1)
    check_equal([name for name, *_ in posted], ["_deliver", "_fail"], "posts")
    check_equal(posted[-1][1], ENDED, "reason")


@pytest.mark.parametrize("where", ["step", "command"])
def test_an_exception_ends_the_thread_and_its_text_stays_in_the_log(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """A step or a command fails.

    Why: the engine's state is unknown then, so nothing more is computed with it. And clients learn that it failed, not how.
    """
    error = ValueError("/secret/path")

    def fail(_: AsyncEngine) -> None:
        raise error

    with caplog.at_level(logging.ERROR):
        posted = run(Stepper(error, [output("a", "1")])) if where == "step" else run(Stepper([output("a", "1")]), fail)
    check_equal([name for name, *_ in posted], ["_fail"], "posts")
    check_equal(posted[0][1], FAILED, "reason")
    check_equal(any("/secret/path" in (record.exc_text or "") for record in caplog.records), True, "the log has the exception")


def test_an_idle_engine_sleeps_and_checks_its_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without work, with a check every 0.05 s, until there were three; another, that would sleep for a minute, gets a command.

    Why: a server is idle for most of the night. And a rank that dies meanwhile is to be noticed before the next user comes.
    """
    bridge = AsyncEngine(Stepper())
    bridge._stopping = True
    check_equal(bridge._next_commands(), None, "commands when the thread has to end")
    for seconds, num_checks in ((0.05, 3), (60.0, 0)):
        monkeypatch.setattr(async_engine, "HEALTH_SECONDS", seconds)
        engine, got = Stepper(), []
        bridge = AsyncEngine(engine)
        thread = threading.Thread(target=lambda bridge=bridge, got=got: got.append(bridge._next_commands()), daemon=True)
        began = time.monotonic()
        thread.start()
        until(
            lambda engine=engine, least=num_checks: engine.num_polls and engine.num_checks >= least,
            "it looks for work and checks",
        )
        polls, checks, took = engine.num_polls, engine.num_checks, time.monotonic() - began
        bridge._send(print)
        thread.join(10)
        check_equal(thread.is_alive(), False, "still asleep 10 s after a command")
        check_equal(got, [[print]], "commands")
        few = (checks <= took / seconds + 1, polls <= 2 * checks + 4)
        check_equal(few, (True, True), f"{checks} checks and {polls} polls in {took:.2f} s are few")


def test_with_work_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests run and there is no command: an empty list, at once. Each command comes once.

    Why: waiting for a command in every step would be the end of throughput.
    """
    monkeypatch.setattr(async_engine, "HEALTH_SECONDS", 5.0)
    bridge = AsyncEngine(Stepper([]))
    start = time.monotonic()
    check_equal(bridge._next_commands(), [], "commands")
    bridge._commands = [print, repr]
    check_equal(bridge._next_commands(), [print, repr], "commands")
    check_equal(bridge._next_commands(), [], "commands after that")
    check_equal(time.monotonic() - start < 4, True, "at once")


# --------------------------------------------------------------------------------------------------- on the event loop


def test_outputs_find_their_streams() -> None:
    """Of three outputs one is of a request that was aborted while the step ran.

    Why: it has no stream any more. An error there would end the deliveries of all others.
    """

    async def main() -> tuple[list[Any], list[str]]:
        bridge = AsyncEngine(Stepper())
        one, other = stream_of("a"), stream_of("b")
        bridge._streams = {"a": one, "b": other}
        bridge._deliver([output("a", "1"), output("gone", "1"), output("b", "2", True)])
        return [seen(await anext(one)), *await rest(other)], sorted(bridge._streams)

    check_equal(asyncio.run(main()), ([("a", "1"), ("b", "2")], ["a"]), "what was read, and streams that are still known")


def test_a_stream_is_known_until_its_last_request_has_finished() -> None:
    """Two prompts of one request: the first ends, and the second goes on.

    Why: if the stream is forgotten with the first, the outputs of the second find nobody, and the client waits for ever.
    """

    async def main() -> tuple[list[Any], list[str]]:
        bridge, stream = AsyncEngine(Stepper()), stream_of("a", "b")
        bridge._streams = {"a": stream, "b": stream}
        bridge._deliver([output("a", "1", True), output("b", "1")])
        check_equal(sorted(bridge._streams), ["b"], "requests whose stream is known when one of two has finished")
        bridge._deliver([output("b", "2", True)])
        return await rest(stream), sorted(bridge._streams)

    check_equal(asyncio.run(main()), ([("a", "1"), ("b", "12")], []), "what was read, and streams that are still known")


def test_the_loop_goes_on_while_a_step_runs() -> None:
    """A step in another thread that lasts until the loop, which does other things meanwhile, lets it end.

    Why: that is why there are two threads. A step in the loop would let every other client, and the load balancer, wait.
    """

    async def main() -> bool:
        engine = Stepper([output("a", "1", True)])
        engine.gate.clear()
        bridge = AsyncEngine(engine)
        bridge._loop = asyncio.get_running_loop()
        stream = stream_of("a")
        bridge._streams = {"a": stream}
        bridge._fail = lambda reason: None
        running = bridge._loop.run_in_executor(None, bridge._run)
        reading = asyncio.create_task(rest(stream))
        await asyncio.to_thread(engine.in_step.wait, 10)
        await turns()
        engine.gate.set()
        await asyncio.wait([reading, running], return_when=asyncio.FIRST_COMPLETED)
        bridge._stopping = True
        bridge._send(print)
        await running
        check_equal(await reading, [("a", "1")], "what was read")
        return engine.waited

    check_equal(asyncio.run(main()), True, "the loop goes on and lets the step end")


@pytest.mark.parametrize("number", range(4))
def test_any_reader_gets_all_in_the_order_of_waiting(number: int) -> None:
    """Pieces of random requests are put, and read whenever the dice say so: what has waited longest first, joined to one.

    Why: the engine and its clients are never in step.
    """
    dice = random.Random(550 + number)
    names = [f"{dice.randrange(10**6)}" for _ in range(dice.randrange(2, 6))]

    async def main() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        stream, got, expected, waiting = stream_of(*names), [], [], {}
        left = dict.fromkeys(names, 0) | {name: dice.randrange(1, 7) for name in names}
        while left or waiting:
            if left and dice.random() < 0.6:
                name, text = dice.choice(list(left)), chr(dice.randrange(97, 123))
                left[name] -= 1
                stream.put(output(name, text, left[name] == 0))
                waiting[name] = waiting.get(name, "") + text
                if left[name] == 0:
                    del left[name]
            elif waiting:
                first = next(iter(waiting))
                expected.append((first, waiting.pop(first)))
                got.append(seen(await asyncio.wait_for(stream.__anext__(), 10)))
        return got + await rest(stream), expected

    check_equal(*asyncio.run(main()), "outputs that are read")
