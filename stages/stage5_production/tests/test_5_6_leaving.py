"""Task 5.6: who leaves gives back what was held for him."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from stages.core.output import CompletionOutput, RequestOutput
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.http import running
from stages.course.fixtures.waiting import turns, until
from stages.serving.app import close_on_disconnect
from stages.serving.async_engine import AsyncEngine
from stages.serving.output_stream import OutputStream


def output(name: str, finished: bool) -> RequestOutput:
    return RequestOutput(name, None, [], [CompletionOutput(0, "t", [1])], finished)


class Engine:
    """Stands in for an engine: only knows what was aborted."""

    def __init__(self) -> None:
        self.aborted: list[str] = []

    def abort_request(self, request_id: str) -> None:
        self.aborted.append(request_id)


def stream_of(*names: str) -> tuple[OutputStream, list[str]]:
    """A stream, and the ids that it has aborted so far."""
    aborted: list[str] = []
    return OutputStream(list(names), aborted.extend), aborted


# ------------------------------------------------------------------------------------------------------- the stream


def test_a_closed_stream_aborts_what_is_unfinished() -> None:
    """Of three requests one has finished and was read.

    Why: the other two would run to their ends for nobody, and hold their blocks all the while.
    """

    async def main() -> list[str]:
        stream, aborted = stream_of("a", "b", "c")
        stream.put(output("b", True))
        await anext(stream)
        stream.close()
        return sorted(aborted)

    check_equal(asyncio.run(main()), ["a", "c"], "requests that were aborted")


@pytest.mark.parametrize("waiting", [["a"], ["c", "b"], ["a", "b", "c"]])
def test_who_leaves_with_something_to_read_is_aborted_too(waiting: list[str]) -> None:
    """Outputs wait unread for one, two or all of three requests, none of which has finished.

    Why: a client who leaves has mostly not read all there was. His blocks would stay taken until an answer that nobody reads is
    complete. Whoever is told looks at the ids when he gets to it: by then they must still be there.
    """

    async def main() -> list[str]:
        told: list[list[str]] = []
        stream = OutputStream(["a", "b", "c"], told.append)
        for name in waiting:
            stream.put(output(name, False))
        stream.close()
        return sorted(name for names in told for name in names)

    check_equal(asyncio.run(main()), ["a", "b", "c"], "requests that were aborted")


def test_an_error_that_waits_changes_nothing() -> None:
    """The stream has failed, and nobody has read the error: the unfinished are aborted all the same.

    Why: who closes cannot know whether they still run. To abort what is gone costs nothing; the other way round it does.
    """

    async def main() -> list[str]:
        stream, aborted = stream_of("a", "b")
        stream.accept()
        stream.fail(RuntimeError("late"))
        stream.close()
        return sorted(aborted)

    check_equal(asyncio.run(main()), ["a", "b"], "requests that were aborted")


def test_a_stream_is_closed_once() -> None:
    """Closed by the watcher of the connection and again at the end of the response.

    Why: both ways out exist. An id may belong to somebody else by then.
    """

    async def main() -> list[str]:
        stream, aborted = stream_of("a")
        stream.close()
        stream.close()
        return aborted

    check_equal(asyncio.run(main()), ["a"], "requests that were aborted")


def test_whoever_waits_sees_the_end() -> None:
    """A reader sleeps while another task closes the stream; what had come is dropped.

    Why: the response's own task waits there. If it is not woken it stays for ever, with all that it holds.
    """

    async def main() -> list[str]:
        got = []
        stream, _ = stream_of("a")
        asleep = asyncio.create_task(anext(stream, "the end"))
        await turns()
        stream.close()
        got.append(await asyncio.wait_for(asleep, 10))
        other, _ = stream_of("a")
        other.put(output("a", False))
        other.close()
        got.append(await asyncio.wait_for(anext(other, "the end"), 10))
        return got

    check_equal(asyncio.run(main()), ["the end", "the end"], "what the readers get")


# ------------------------------------------------------------------------------------------------------- the engine


def abort(known: list[str], names: list[str]) -> tuple[int, list[str], list[str]]:
    """Abort requests of an engine that knows some; how many commands that sent, ids that they abort, streams that are left."""

    async def main() -> tuple[int, list[str], list[str]]:
        engine = Engine()
        bridge = AsyncEngine(engine)
        bridge._streams = {name: OutputStream([name], lambda ids: None) for name in known}
        bridge._abort(names)
        check_equal(engine.aborted, [], "aborted before the step border")
        commands = list(bridge._commands)
        for command in commands:
            command()
        return len(commands), engine.aborted, sorted(bridge._streams)

    return asyncio.run(main())


def test_an_abort_is_one_command_for_all() -> None:
    """Three requests of one client, of five.

    Why: the engine is in a step, in another thread; nothing may be changed under it. It takes commands at the next border.
    """
    check_equal(abort(["a", "b", "c", "d", "e"], ["b", "c", "e"]), (1, ["b", "c", "e"], ["a", "d"]), "commands, ids, streams")


@pytest.mark.parametrize(("names", "commands"), [(["a", "done"], 1), (["done"], 0), ([], 0)])
def test_what_has_finished_is_not_aborted(names: list[str], commands: int) -> None:
    """Ids without a stream.

    Why: they have left the engine, which does not know them any more; and there is nothing to wake it for.
    """
    aborted = ["a"] if "a" in names else []
    check_equal(abort(["a", "b"], names)[:2], (commands, aborted), "commands and ids")


def test_who_leaves_when_one_of_his_prompts_is_done() -> None:
    """Two of three prompts still run; the third's output has come, and was not read.

    Why: the other two hold blocks; the third has none, and its name may be somebody else's by now.
    """

    async def main() -> tuple[list[str], list[str]]:
        engine = Engine()
        bridge = AsyncEngine(engine)
        stream = OutputStream(["a", "b", "c"], bridge._abort)
        bridge._streams = {"a": stream, "c": stream, "other": OutputStream(["other"], bridge._abort)}
        stream.put(output("b", True))
        stream.put(output("c", False))
        stream.close()
        for command in bridge._commands:
            command()
        return sorted(engine.aborted), sorted(bridge._streams)

    check_equal(asyncio.run(main()), (["a", "c"], ["other"]), "requests that were aborted, and streams that are known")


def test_the_last_output_of_an_aborted_request_finds_nobody() -> None:
    """A step was running when its request was aborted.

    Why: its output comes after the abort. A stream that is still known would be written to for nobody.
    """

    async def main() -> list[str]:
        bridge = AsyncEngine(Engine())
        stream = OutputStream(["a"], bridge._abort)
        bridge._streams = {"a": stream}
        stream.close()
        return sorted(bridge._streams)

    check_equal(asyncio.run(main()), [], "streams that are known")


# --------------------------------------------------------------------------------------------------- the connection


def test_only_a_disconnect_closes() -> None:
    """First the rest of a body, in two messages, then one of another kind, then the client leaves.

    Why: the first message of a connection is not its end; a request with a body would be aborted at once. And servers may send
    messages that nobody here has heard of.
    """

    async def main() -> list[list[str]]:
        stream, aborted = stream_of("a")
        messages = asyncio.Queue[dict[str, Any]]()
        watch = asyncio.create_task(close_on_disconnect(SimpleNamespace(receive=messages.get), stream))
        seen = []
        for kind in ("http.request", "http.request", "http.of_tomorrow", "http.disconnect"):
            messages.put_nowait({"type": kind})
            await turns()
            seen.append(list(aborted))
        await asyncio.wait_for(watch, 10)
        return seen

    check_equal(asyncio.run(main()), [[], [], [], ["a"]], "aborted after each message")


def test_who_no_longer_watches_closes_nothing() -> None:
    """The watcher is cancelled while requests run.

    Why: whoever takes the connection over, as a streaming response does, cancels it. The client is still there.
    """

    async def main() -> list[str]:
        stream, aborted = stream_of("a")
        messages = asyncio.Queue[dict[str, Any]]()
        watch = asyncio.create_task(close_on_disconnect(SimpleNamespace(receive=messages.get), stream))
        messages.put_nowait({"type": "http.request"})
        await turns()
        watch.cancel()
        await asyncio.wait([watch], timeout=10)
        if not watch.cancelled():
            watch.result()
        before = list(aborted)
        stream.put(output("a", True))
        return [*before, *[one.request_id async for one in stream]]

    check_equal(asyncio.run(main()), ["a"], "requests that were aborted, then those that were read")


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_of_a_real_server_leaves(leaves: bool) -> None:
    """Over a real connection: it is closed in the middle, or the answer is waited for.

    Why: within a step the blocks have to be free for others; and who stays must not be taken for somebody who has left.
    """
    aborted: list[str] = []
    waiting = threading.Event()

    async def endpoint(request: Request) -> PlainTextResponse:
        await request.body()
        stream = OutputStream(["a"], aborted.extend)
        watch = asyncio.create_task(close_on_disconnect(request, stream))
        asyncio.get_running_loop().call_later(60 if leaves else 0.5, stream.put, output("a", True))
        waiting.set()
        outputs = [one async for one in stream]
        watch.cancel()
        return PlainTextResponse(str(len(outputs)))

    abort(["a"], ["a"])  # so that an empty function says so here, not in the server
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    with running(uvicorn.Server(uvicorn.Config(app, log_level="critical"))) as (address, _):
        with socket.create_connection(address, 10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
            waiting.wait(10)
            answer = b"" if leaves else client.makefile("rb").read()
        if leaves:
            until(lambda: aborted, "the request is aborted, long before its answer")
    check_equal(aborted, ["a"] if leaves else [], "requests that were aborted")
    check_equal(leaves or answer.endswith(b"\r\n\r\n1"), True, "who stays has his answer")


@pytest.mark.parametrize("number", range(4))
def test_any_stream_aborts_what_is_unfinished(number: int) -> None:
    """Random requests, some of which have finished and were read, and some of which have something to read.

    Why: clients leave at any time.
    """
    dice = random.Random(560 + number)
    names = [f"{dice.randrange(10**6)}" for _ in range(dice.randrange(1, 9))]
    done = dice.sample(names, dice.randrange(len(names)))

    async def main() -> list[str]:
        stream, aborted = stream_of(*names)
        for name in done:
            stream.put(output(name, True))
            await anext(stream)
        for name in set(names).difference(done):
            if dice.random() < 0.5:
                stream.put(output(name, False))
        stream.close()
        return sorted(aborted)

    check_equal(asyncio.run(main()), sorted(set(names).difference(done)), "requests that were aborted")
