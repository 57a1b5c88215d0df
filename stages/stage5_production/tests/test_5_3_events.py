"""Task 5.3: an answer piece by piece, as server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from stages.core.output import CompletionOutput, RequestOutput
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.http import running
from stages.serving.async_engine import EngineDeadError
from stages.serving.openai_protocol import ChatCompletionRequest, CompletionRequest
from stages.serving.responses import ChatReply, CompletionReply, _event, server_sent_events


class Chunk(BaseModel):
    says: str | None
    more: str | None = None


class PlainReply:
    """Stands in for a reply: its chunks say what they are."""

    def __init__(self, include_usage: bool = False) -> None:
        self.request = SimpleNamespace(include_usage=include_usage)
        self.given = 0

    def opening(self) -> Iterable[Chunk]:
        return [Chunk(says="open")]

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        self.given += len(output.outputs)
        return [(sequence.index, sequence) for sequence in output.outputs]

    def chunk(self, index: int, sequence: CompletionOutput) -> Chunk:
        return Chunk(says=f"{index}:{sequence.text}")

    def closing(self) -> Chunk:
        return Chunk(says=f"usage of {self.given}")


def output(*sequences: CompletionOutput) -> RequestOutput:
    return RequestOutput("r", None, [], list(sequences), all(sequence.finished for sequence in sequences))


def piece(text: str, index: int = 0, finish: str | None = None, logprobs: Any = None) -> CompletionOutput:
    return CompletionOutput(index, text, [1], None, logprobs, finish)


async def outputs(*items: RequestOutput | Exception) -> AsyncIterator[RequestOutput]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def events(reply: Any, *items: RequestOutput | Exception) -> list[str]:
    """What is sent for some outputs, or an error after them; each chunk by what it says."""

    async def main() -> list[str]:
        return [event async for event in server_sent_events(reply, outputs(*items))]

    return [says(event) for event in asyncio.run(main())]


def says(event: str) -> str:
    data = event.removeprefix("data: ").removesuffix("\n\n")
    return data if data == "[DONE]" else json.loads(data).get("says", data)


def test_an_event_is_a_line_and_an_empty_line() -> None:
    """``data: {"says":"hi","more":null}`` and two line breaks; a field without a value is a null, also where nobody set it.

    Why: at the empty line a client knows that the event is complete; without it, it waits for more. And clients read a field
    that they know, such as ``finish_reason``, without asking whether it is there.
    """
    for text in ("hi", None):
        event = _event(Chunk(says=text))
        check_equal((event[:6], event[-3:]), ("data: ", "}\n\n"), "beginning and end of the event")
        check_equal(json.loads(event[6:]), {"says": text, "more": None}, "JSON of the event")


def test_a_line_break_in_the_text_is_none_on_the_wire() -> None:
    """A text with two line breaks stays on its line.

    Why: JSON writes them as \\n. A text that is put in as it is would end the event in its middle.
    """
    event = _event(Chunk(says="a\n\nb"))
    check_equal(event.count("\n"), 2, "line breaks in the event")
    check_equal(says(event), "a\n\nb", "text that comes out")


def test_opening_then_pieces_then_done() -> None:
    """Two pieces of an answer between the opening and ``[DONE]``.

    Why: a client reads until ``[DONE]``; a connection that merely ends may have broken.
    """
    check_equal(
        events(PlainReply(), output(piece("a")), output(piece("b", finish="stop"))), ["open", "0:a", "0:b", "[DONE]"], "events"
    )


def test_each_piece_of_each_choice_is_an_event() -> None:
    """An output with pieces of two choices, then one with the second's end.

    Why: with n sequences a step brings a piece of each, and a chunk that held both would need another format.
    """
    both = output(piece("a", 0, "length"), piece("b", 1))
    check_equal(events(PlainReply(), both, output(piece("c", 1, "stop"))), ["open", "0:a", "1:b", "1:c", "[DONE]"], "events")


def test_nothing_is_not_sent() -> None:
    """A token whose text is held back gives no event, also with an empty list of log-probabilities; the end gives one without
    text; and so do log-probabilities.

    Why: half of a character is no text yet. But the last chunk says why the answer ended, and the client waits for that.
    """
    steps = [output(piece("")), output(piece("", logprobs=[{1: None}])), output(piece("", logprobs=[]))]
    check_equal(events(PlainReply(), *steps, output(piece("", finish="stop"))), ["open", "0:", "0:", "[DONE]"], "events")


def test_an_answer_that_ends_at_once_opens_too() -> None:
    """The first token ends it and has no text: the opening, the end, ``[DONE]``. Or its text is the whole answer.

    Why: the client waits for a role and for a reason, however short the answer is.
    """
    check_equal(events(PlainReply(), output(piece("", finish="stop"))), ["open", "0:", "[DONE]"], "events of no text")
    check_equal(events(PlainReply(), output(piece("a", finish="stop"))), ["open", "0:a", "[DONE]"], "events of one token")


def test_a_choice_may_end_without_a_text_while_others_go_on() -> None:
    """The first of two choices ends with a piece without text, then the second, three outputs later.

    Why: a choice ends when it ends, not with its request. A client that shows two answers side by side would wait for the
    reason of one until the other is through, and then never learn it.
    """
    steps = [output(piece("a"), piece("b", 1)), output(piece("", 0, "stop")), output(piece("c", 1)), output(piece("", 1)),
             output(piece("", 1, "length"))]  # fmt: skip
    for step, ended in zip(steps, (False, False, False, False, True), strict=True):
        step.finished = ended  # of the request, which has two choices
    check_equal(events(PlainReply(), *steps), ["open", "0:a", "1:b", "0:", "1:c", "1:", "[DONE]"], "events")


@pytest.mark.parametrize("wanted", [False, True])
def test_usage_comes_last_and_when_asked_for(wanted: bool) -> None:
    """With ``stream_options: {"include_usage": true}`` one more chunk, behind all others.

    Why: it is known at the end only, and clients that did not ask for it do not expect a chunk without choices.
    """
    got = events(PlainReply(wanted), output(piece("a", finish="stop")))
    check_equal(got, ["open", "0:a", *["usage of 1"] * wanted, "[DONE]"], "events")


def test_two_prompts_with_two_choices_each() -> None:
    """Four choices that end one after the other, and a usage: what a client of ``/v1/completions`` reads.

    Why: a request may be a list of prompts. Whoever ends with the first of them has a quarter of the answer, and the client
    waits for the rest for ever.
    """
    options = {"include_usage": True}
    body = CompletionRequest(model="m", prompt=["a", "b"], n=2, stream=True, stream_options=options)
    reply = CompletionReply("id", body, {"x": [1, 2], "y": [3]}, None)
    steps = [("y", piece("A", 0), piece("B", 1)), ("x", piece("C", 0, "stop"), piece("D", 1, "length")),
             ("y", piece("E", 1, "stop")), ("y", piece("F", 0)), ("y", piece("G", 0, "length"))]  # fmt: skip
    ends = [False, True, False, False, True]
    items = [RequestOutput(name, None, [], list(pieces), end) for (name, *pieces), end in zip(steps, ends, strict=True)]
    chunks = [json.loads(event) for event in events(reply, *items)[:-1]]
    texts, reasons = dict.fromkeys(range(4), ""), {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        check_equal(choice["index"] in reasons, False, f"choice {choice['index']} has ended before")
        texts[choice["index"]] += choice["text"]
        reasons |= {choice["index"]: choice["finish_reason"]} if choice["finish_reason"] else {}
    check_equal(texts, {0: "C", 1: "D", 2: "AFG", 3: "BE"}, "texts of the choices")
    check_equal(reasons, {0: "stop", 1: "length", 2: "length", 3: "stop"}, "why they ended")
    check_equal([bool(chunk.get("usage")) for chunk in chunks], [False] * 7 + [True], "chunks with a usage")
    check_equal(chunks[-1]["usage"]["completion_tokens"], 7, "tokens of the usage")


def test_a_piece_is_sent_when_it_is_there() -> None:
    """The opening and the first piece can be read before there is a second output.

    Why: this is what streaming is for. Who gathers first and sends then has written the whole answer with more bytes.
    """

    async def main() -> list[str]:
        ready = asyncio.Queue[RequestOutput]()

        async def slowly() -> AsyncIterator[RequestOutput]:
            while True:
                yield await ready.get()

        stream = server_sent_events(PlainReply(), slowly())
        got = []
        for text, count in (("a", 2), ("b", 1)):
            ready.put_nowait(output(piece(text)))
            got += [await asyncio.wait_for(anext(stream), 10) for _ in range(count)]
        await stream.aclose()  # a client that leaves: nothing may be caught here
        return [says(event) for event in got]

    check_equal(asyncio.run(main()), ["open", "0:a", "0:b"], "events, one after the other")


def test_the_opening_waits_for_the_first_piece() -> None:
    """Two outputs without text, then one with: what comes before it is read, the opening goes out with it, and only once.

    Why: a prompt of 10,000 tokens takes seconds. Load generators take the first event's time for that of the first token, and
    an event that leaves before has them report milliseconds.
    """

    async def main() -> list[tuple[int, str]]:
        given = 0

        async def counted() -> AsyncIterator[RequestOutput]:
            nonlocal given
            for text in ("", "", "a", "b"):
                given += 1
                yield output(piece(text))

        return [(given, says(event)) async for event in server_sent_events(PlainReply(), counted())]

    expected = [(3, "open"), (3, "0:a"), (4, "0:b"), (4, "[DONE]")]
    check_equal(asyncio.run(main()), expected, "outputs that were read before an event, and the event")


def test_an_error_before_the_first_piece_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The engine dies while the prompt is computed: the error and ``[DONE]``.

    Why: nobody has spoken yet.
    """
    with caplog.at_level(logging.CRITICAL):
        got = events(PlainReply(), EngineDeadError("the engine is dead"))
    check_equal((json.loads(got[0])["error"]["code"], got[1:]), (503, ["[DONE]"]), "code, and the events behind")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineDeadError("the engine is dead"), 503, "the engine is dead"),
        (KeyError("/secret/path"), 500, "internal server error"),
    ],
)
def test_an_error_in_the_middle_is_an_event(
    error: Exception, code: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After the first piece the engine dies, or a bug strikes.

    Why: the status, 200, is out already. What clients may know of an error goes into the stream; of a bug that is nothing.
    """
    with caplog.at_level(logging.CRITICAL):
        got = events(PlainReply(True), output(piece("a")), error)
    check_equal([*got[:2], *got[3:]], ["open", "0:a", "[DONE]"], "events besides the error")
    found = json.loads(got[2])["error"]
    check_equal((found["code"], found["message"]), (code, message), "code and message")


def test_an_error_of_the_opening_is_an_event(caplog: pytest.LogCaptureFixture) -> None:
    """The chunks that open an answer cannot be made: an event with the code 500, and ``[DONE]``.

    Why: a generator that raises ends the connection, and clients try again what will fail again.
    """

    class Broken(PlainReply):
        def opening(self) -> Iterable[Chunk]:
            raise KeyError("a bug")

    with caplog.at_level(logging.CRITICAL):
        got = events(Broken(), output(piece("a", finish="stop")))
    check_equal((json.loads(got[0])["error"]["code"], got[1:]), (500, ["[DONE]"]), "code, and the events behind")


def test_a_bug_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The exception that the client does not see.

    Why: somebody has to repair it.
    """
    events(PlainReply(), KeyError("a bug"))
    check_equal(any("KeyError" in (record.exc_text or "") for record in caplog.records), True, "the log has the exception")


def test_every_choice_opens_with_its_role() -> None:
    """Three choices: three chunks with the role and an empty text.

    Why: the role comes once; clients take it from the first chunk of each choice.
    """
    body = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}], n=3)
    chunks = list(ChatReply("id", body, {"r": [1]}, None).opening())
    got = [(choice.index, choice.delta.role, choice.delta.content) for chunk in chunks for choice in chunk.choices]
    check_equal(got, [(i, "assistant", "") for i in range(3)], "index, role and text")
    check_equal(len(chunks), 3, "chunks")


@pytest.mark.parametrize("wanted", [False, True])
def test_an_opening_has_a_usage_of_no_token(wanted: bool) -> None:
    """With ``continuous_usage_stats`` each chunk says the usage so far. The opening, which waits for the first piece: no token.

    Why: gateways bill by the last usage that they have seen, and the role is no token.
    """
    options = {"include_usage": True, "continuous_usage_stats": wanted}
    messages = [{"role": "user", "content": "hi"}]
    body = ChatCompletionRequest(model="m", messages=messages, n=2, stream=True, stream_options=options)
    reply = ChatReply("id", body, {"r": [1, 2, 3]}, None)
    list(reply.choices(output(piece("a", 0), piece("b", 1))))
    got = [chunk.usage and (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in reply.opening()]
    check_equal(got, [(3, 0) if wanted else None] * 2, "prompt and completion tokens of each opening chunk")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_first_chunk_says_the_prompt(wanted: bool, count: int) -> None:
    """With ``return_token_ids`` the first of the opening chunks has the prompt's ids, another one none; without it none has.

    Why: who trains on answers needs the very ids that were computed, and two choices share one prompt: once is enough.
    """
    messages = [{"role": "user", "content": "hi"}]
    body = ChatCompletionRequest(model="m", messages=messages, n=count, stream=True, return_token_ids=wanted)
    chunks = ChatReply("id", body, {"r": [7, 8, 9]}, None).opening()
    expected = [[7, 8, 9] if wanted else None, None][:count]
    check_equal([chunk.prompt_token_ids for chunk in chunks], expected, "ids of each opening chunk")


def test_the_openai_client_reads_it() -> None:
    """A chat of two choices with characters of several bytes and a line break, over HTTP.

    Why: the format has one judge, and it is the client that everybody uses.
    """
    body = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}], n=2, stream=True)
    steps = [output(piece("Grüß\n", 0), piece("你", 1)), output(piece("😀", 0, "stop"), piece("好", 1, "length"))]
    list(ChatReply("id", body, {"r": [1]}, None).opening())  # so that an empty function says so here, not in the server

    async def endpoint(_: Request) -> StreamingResponse:
        return StreamingResponse(
            server_sent_events(ChatReply("id", body, {"r": [1]}, None), outputs(*steps)), media_type="text/event-stream"
        )

    app = Starlette(routes=[Route("/v1/chat/completions", endpoint, methods=["POST"])])
    texts = {0: "", 1: ""}
    with (
        running(uvicorn.Server(uvicorn.Config(app, log_level="critical"))) as ((host, port), _),
        openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="-", max_retries=0, timeout=20) as client,
    ):
        for chunk in client.chat.completions.create(model="m", messages=[], stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content
    check_equal(texts, {0: "Grüß\n😀", 1: "你好"}, "texts that the client has read")


@pytest.mark.parametrize("number", range(3))
def test_any_answer_comes_out_as_it_went_in(number: int) -> None:
    """Random texts, among them line breaks, quotes and other scripts, of random choices.

    Why: a stream is the answer, whatever it says.
    """
    dice = random.Random(530 + number)
    for _ in range(4):
        texts = ["".join(dice.choices('ab "\\\n\r:{}däß€漢🙂', k=dice.randrange(1, 12))) for _ in range(dice.randrange(1, 8))]
        pieces = [(dice.randrange(4), text) for text in texts]
        got = events(PlainReply(), *(output(piece(text, index)) for index, text in pieces))
        check_equal(got, ["open", *(f"{index}:{text}" for index, text in pieces), "[DONE]"], "events")
        for text in texts:
            check_equal(_event(Chunk(says=text)).splitlines()[1:], [""], f"lines of the event of {text!r}, but for the first")
