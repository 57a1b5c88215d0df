"""Task 5.7: the server says no early, to all of a request's prompts or to none."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from stages.batching.scheduler_config import QueueFullError
from stages.course.fixtures.checks import check_equal
from stages.serving.async_engine import AsyncEngine
from stages.serving.output_stream import OutputStream


class Queue:
    """Stands in for an engine: takes `room` requests, of which some tokens wait."""

    def __init__(self, waiting: int = 0, room: int = 10, known: tuple[str, ...] = ()) -> None:
        self.num_waiting_tokens, self.room, self.taken = waiting, room, list(known)
        self.aborted: list[str] = []

    def submit(self, request: Any) -> None:
        if request.request_id in self.taken:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if len(self.taken) >= self.room:
            raise QueueFullError(f"{self.room} sequences are waiting")
        self.taken.append(request.request_id)
        self.num_waiting_tokens += len(request.prompt_token_ids)

    def abort_request(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.taken.remove(request_id)


def requests(*lengths: int) -> list[Any]:
    return [SimpleNamespace(request_id=f"r{i}", prompt_token_ids=[0] * length) for i, length in enumerate(lengths)]


def accept(queue: Queue, lengths: list[int], limit: int | None = None) -> tuple[Exception | None, list[str]]:
    """Hand requests to an engine as its thread does; what the stream was told, and the reasons of rejections."""
    reasons: list[str] = []
    told: list[str] = []

    def post(callback: Callable[..., None], *args: Any) -> None:
        told.append("told")
        callback(*args)  # there is no other thread here

    async def main() -> Exception | None:
        engine = AsyncEngine(queue, limit)
        engine.on_rejection = reasons.append
        engine._post = post
        stream = OutputStream([request.request_id for request in requests(*lengths)], lambda ids: None)
        engine._accept(requests(*lengths), stream)
        check_equal(len(told), 1, "how often the stream was told")
        return stream.accepted.exception()

    return asyncio.run(main()), reasons


def test_what_fits_is_taken() -> None:
    """Two prompts of 10 and 20 tokens in an empty queue without a limit.

    Why: the stream waits to hear of it; who is not told waits for ever.
    """
    queue = Queue()
    check_equal(accept(queue, [10, 20]), (None, []), "what the stream was told, and rejections")
    check_equal(queue.taken, ["r0", "r1"], "requests that the engine has")


@pytest.mark.parametrize(("waiting", "length", "taken"), [(90, 10, True), (90, 11, False), (99, 1, True), (100, 1, False)])
def test_tokens_that_wait_have_a_limit(waiting: int, length: int, taken: bool) -> None:
    """With at most 100 tokens, those that wait and the new prompt's together may be 100.

    Why: a queue of requests says nothing of time: ten prompts of ten tokens are done before one of a million begins.
    """
    queue = Queue(waiting)
    error, reasons = accept(queue, [length], limit=100)
    check_equal(error is None, taken, "taken")
    check_equal(reasons, [] if taken else ["tokens"], "reasons of rejections")
    check_equal(queue.taken, ["r0"] if taken else [], "requests that the engine has")


def test_an_empty_queue_takes_any_prompt() -> None:
    """500 tokens with a limit of 100, when nothing waits.

    Why: a prompt longer than the limit would otherwise never be served, and its client tries again for ever.
    """
    check_equal(accept(Queue(), [500], limit=100), (None, []), "what the stream was told, and rejections")


def test_without_a_limit_nothing_is_counted() -> None:
    """None is no limit.

    Why: comparing with None is an error in the engine's thread, which ends it.
    """
    check_equal(accept(Queue(10**9), [10], limit=None), (None, []), "what the stream was told, and rejections")


def test_zero_is_a_limit() -> None:
    """With 0 tokens that may wait a prompt gets into an empty queue only.

    Why: 0 is false in Python, and no limit would be the opposite of what somebody wants who writes 0.
    """
    check_equal(accept(Queue(0), [10], limit=0), (None, []), "what the stream was told, and rejections, with an empty queue")
    error, reasons = accept(Queue(1), [10], limit=0)
    check_equal((type(error), reasons), (QueueFullError, ["tokens"]), "type of the error, reasons, with one token waiting")


def test_all_prompts_or_none() -> None:
    """Of three prompts the third finds no room: the first two are taken back.

    Why: an answer to half of a request is no answer, and its work would block the queue for others.
    """
    queue = Queue(room=2)
    error, reasons = accept(queue, [1, 2, 3])
    check_equal(type(error), QueueFullError, "type of the error")
    check_equal((queue.taken, sorted(queue.aborted)), ([], ["r0", "r1"]), "taken and aborted")
    check_equal(reasons, ["requests"], "reasons of rejections")


@pytest.mark.parametrize("waiting", [0, 1])
def test_each_prompt_of_a_request_counts(waiting: int) -> None:
    """60 and 50 tokens with a limit of 100: the second does not fit behind the first, in an empty queue either.

    Why: a list of prompts is a way around a limit that is asked once.
    """
    queue = Queue(waiting)
    error, reasons = accept(queue, [60, 50], limit=100)
    check_equal((type(error), reasons), (QueueFullError, ["tokens"]), "type of the error, reasons")
    check_equal((queue.taken, queue.aborted), ([], ["r0"]), "taken and aborted")


def test_other_errors_are_no_rejections() -> None:
    """The second of three ids is in use: that fails the request, the first is taken back, and the metrics do not call it a full
    queue.

    Why: who watches the rejections adds machines when they rise. And the first prompt would run for nobody.
    """
    queue = Queue(known=("r1",))
    error, reasons = accept(queue, [1, 1, 1])
    check_equal((type(error), reasons), (ValueError, []), "type of the error, reasons")
    check_equal((queue.taken, queue.aborted), (["r1"], ["r0"]), "taken and aborted")


class RankDiedError(RuntimeError):
    """What breaks an engine."""


def test_a_failure_is_no_refusal() -> None:
    """The engine breaks at the second of two prompts: that comes out, and the stream is not told that it was refused.

    Why: what happened is not known, so the engine's thread has to end. Taken for a refusal, the engine would go on broken, and
    clients would be told of its inside.
    """
    queue = Queue()
    submit = queue.submit

    def break_at_the_second(request: Any) -> None:
        if queue.taken:
            raise RankDiedError
        submit(request)

    queue.submit = break_at_the_second
    with pytest.raises(RankDiedError):
        accept(queue, [1, 2])


def test_the_message_says_what_is_full() -> None:
    """Both numbers and what to do.

    Why: it goes to the client as the text of a 429.
    """
    error, _ = accept(Queue(95), [6], limit=100)
    check_equal(str(error), "95 tokens of prompts are waiting, at most 100 may; try again later", "message")


def test_nobody_has_to_listen() -> None:
    """Without `on_rejection` a full queue is refused all the same.

    Why: the engine is used without metrics too.
    """
    listened: list[Callable[[str], None] | None] = []

    async def main() -> Exception | None:
        engine = AsyncEngine(Queue(room=0))
        listened.append(engine.on_rejection)
        engine._post = lambda callback, *args: callback(*args)
        stream = OutputStream(["r0"], lambda ids: None)
        engine._accept(requests(1), stream)
        return stream.accepted.exception()

    check_equal(type(asyncio.run(main())), QueueFullError, "type of the error")
    check_equal(listened, [None], "who listens")


@pytest.mark.parametrize("number", range(4))
def test_any_prompts_are_taken_together_or_not_at_all(number: int) -> None:
    """Random prompts at a queue that has random tokens waiting, a random limit and random room.

    Why: who is refused must have left nothing behind, whichever of his prompts it was.
    """
    dice = random.Random(570 + number)
    for _ in range(12):
        lengths = [dice.randrange(1, 60) for _ in range(dice.randrange(1, 6))]
        queue, limit = Queue(dice.choice([0, dice.randrange(1, 90)]), dice.randrange(1, 7)), dice.randrange(40, 200)
        tokens, fault = queue.num_waiting_tokens, None
        for taken, length in enumerate(lengths):
            if fault is None and tokens and tokens + length > limit:
                fault = "tokens"
            elif fault is None and taken >= queue.room:
                fault = "requests"
            tokens += length
        error, reasons = accept(queue, lengths, limit)
        check_equal(error is None, fault is None, f"whether prompts of {lengths} were taken")
        check_equal(reasons, [fault] if fault else [], "reasons of rejections")
        check_equal(queue.taken, [] if fault else [f"r{i}" for i in range(len(lengths))], "requests that the engine has")
