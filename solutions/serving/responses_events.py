"""What a model says, as the output items and the events of the Responses API.

Source: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from .openai_answers import Usage
from .translated_wire import AnswerBuilder, Event

Item = dict[str, Any]


class ResponseBuilder(AnswerBuilder):
    """Builds one response.

    Args:
        response_id: begins with ``resp_``.
        created: seconds since 1970. model: the name that the request used.
        echo: the fields that say what was asked for; see `ResponsesRequest.echo`.

    Attributes:
        answer: the response as it is now. Its events hold copies.
    """

    def __init__(self, response_id: str, created: int, model: str, echo: dict[str, Any]) -> None:
        head = {"id": response_id, "object": "response", "created_at": created, "status": "in_progress", "model": model}
        self.answer = head | {"error": None, "incomplete_details": None, "output": [], "usage": None} | echo
        self._number = 0
        self._open: Item | None = None
        self._calls: dict[int, Item] = {}  # index in the chat's answer → item

    def begin(self, usage: Usage) -> Iterator[Event]:
        yield self._event("created", response=self._snapshot())
        yield self._event("in_progress", response=self._snapshot())

    def thought(self, delta: str) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "reasoning":
            item = {"type": "reasoning", "summary": [], "content": []}
            yield from self._begin_part(item, "rs", {"type": "reasoning_text", "text": ""})
        self._part()["text"] += delta
        yield self._event("reasoning_text.delta", **self._place(), content_index=0, delta=delta)

    def text(self, delta: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "message":
            item = {"type": "message", "role": "assistant", "content": []}
            new = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._begin_part(item, "msg", new)
        part = self._part()
        part["text"] += delta
        part["logprobs"] += logprobs
        yield self._event("output_text.delta", **self._place(), content_index=0, delta=delta, logprobs=logprobs)

    def call(self, index: int, call_id: str | None, name: str | None, arguments: str) -> Iterator[Event]:
        if index not in self._calls:
            item = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
            yield from self._begin(item, "fc")
            self._calls[index] = item
        if arguments:
            self._calls[index]["arguments"] += arguments
            yield self._event("function_call_arguments.delta", **self._place(), delta=arguments)

    def end(self, finish_reason: str, stop_reason: int | str | None, usage: Usage) -> Iterator[Event]:
        """Without anything said or thought before, the answer is an empty text."""
        if not self.answer["output"]:
            yield from self.text("", [])
        cut = finish_reason == "length"
        yield from self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        details = {"reason": "max_output_tokens"} if cut else None
        self.answer |= {
            "status": status,
            "incomplete_details": details,
            "usage": usage_of(usage),
            "completed_at": int(time.time()),
        }
        yield self._event(status, response=self._snapshot())

    def fail(self, message: str, status: int) -> Iterator[Event]:
        yield from self._close("incomplete")
        self.answer |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        yield self._event("failed", response=self._snapshot())

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _snapshot(self) -> dict[str, Any]:
        return {**self.answer, "output": list(self.answer["output"])}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.answer["output"]) - 1}

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        part: dict[str, Any] = self._open["content"][0]
        return part

    def _begin(self, item: Item, prefix: str) -> Iterator[Event]:
        yield from self._close("completed")
        item |= {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress"}
        self.answer["output"].append(item)
        self._open = item
        index = len(self.answer["output"]) - 1
        yield self._event("output_item.added", output_index=index, item=_copy(item))

    def _begin_part(self, item: Item, prefix: str, part: dict[str, Any]) -> Iterator[Event]:
        """The same with one part, whose text is to come."""
        yield from self._begin(item, prefix)
        item["content"].append(part)
        yield self._event("content_part.added", **self._place(), content_index=0, part=dict(part))

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is open, if there is one."""
        item = self._open
        if item is None:
            return
        place = self._place()
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("function_call_arguments.done", **place, **done)
        else:
            part = dict(self._part())
            kind, more = (
                ("output_text", {"logprobs": part["logprobs"]}) if item["type"] == "message" else ("reasoning_text", {})
            )
            yield self._event(f"{kind}.done", **place, content_index=0, text=part["text"], **more)
            yield self._event("content_part.done", **place, content_index=0, part=part)
        item["status"] = status
        yield self._event("output_item.done", output_index=place["output_index"], item=_copy(item))
        self._open = None


def usage_of(usage: Usage) -> dict[str, Any]:
    """A usage as this API writes it."""
    cached, details = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details
    thoughts = 0 if details is None else details.reasoning_tokens
    return {
        "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": thoughts},
        "total_tokens": usage.total_tokens,
    }  # fmt: skip


def _copy(item: Item) -> Item:
    """An item as it is now: its text grows later."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)
