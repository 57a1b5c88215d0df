"""Answers that may call tools: what the model has written, read as text and calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.output import CompletionOutput, RequestOutput
from .openai_answers import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionResponse,
    Delta,
    FinishReason,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from .responses import ChatReply
from .tool_calls.calling import ToolUse
from .tool_calls.source import Piece
from .tool_calls.tool_format import ToolParser


@dataclass(slots=True)
class _Choice:
    """A choice so far; `pieces` are those that no chunk has carried."""

    parser: ToolParser
    pieces: list[Piece] = field(default_factory=list)


class ToolReply(ChatReply):
    """``/v1/chat/completions`` with tools.

    Args:
        use: what may be called. The others are those of `ChatReply`.
    """

    def __init__(self, use: ToolUse, *args: Any) -> None:
        super().__init__(*args)
        self._use = use
        self._choices: dict[int, _Choice] = {}

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        """A sequence whose new text is held back, because it may begin a call, comes without it."""
        for index, sequence in super().choices(output):
            choice = self._choices.setdefault(index, _Choice(self._use.parser()))
            choice.pieces += choice.parser.feed(sequence.text)
            if sequence.finished:
                choice.pieces += choice.parser.finish()
            yield index, sequence if choice.pieces else replace(sequence, text="")

    def whole(self, outputs: list[RequestOutput]) -> ChatCompletionResponse:
        choices = [
            ChatChoice(
                index=index,
                message=self._message(self._choices[index]),
                logprobs=self._logprobs(sequence),
                finish_reason=self._reason(index, sequence),
                stop_reason=sequence.stop_reason,
                token_ids=self.take_ids(index),
            )
            for output in outputs
            for index, sequence in self.choices(output)
        ]
        choices.sort(key=lambda choice: choice.index)
        return ChatCompletionResponse(**self.head, choices=choices, usage=self.usage, **self.about_prompt(outputs))

    def opening(self) -> Iterable[ChatCompletionChunk]:
        """The same without an empty text: whether there will be a text is not known yet."""
        for chunk in super().opening():
            chunk.choices[0].delta.content = None
            yield chunk

    def chunk(self, index: int, sequence: CompletionOutput) -> ChatCompletionChunk:
        choice = ChatChunkChoice(
            index=index,
            delta=self._delta(self._choices[index]),
            logprobs=self._logprobs(sequence),
            finish_reason=self._reason(index, sequence),
            stop_reason=sequence.stop_reason,
            token_ids=self.take_ids(index),
        )
        return ChatCompletionChunk(**self.head, choices=[choice], usage=self.usage_so_far(index))

    def _reason(self, index: int, sequence: CompletionOutput) -> FinishReason | None:
        """Why a choice has ended: with its calls, if it has any and they are whole."""
        if sequence.finish_reason == "stop" and self._choices[index].parser.is_whole:
            return "function_call" if self._use.is_legacy else "tool_calls"
        return sequence.finish_reason

    def _message(self, choice: _Choice) -> AssistantMessage:
        said = "".join(piece.text for piece in choice.pieces if piece.call is None)
        calls: dict[int, CalledFunction] = {}
        for piece in choice.pieces:
            if piece.call is not None:
                called = calls.setdefault(piece.call, CalledFunction(name=piece.name or "", arguments=""))
                called.arguments += piece.text
        if not calls:
            return AssistantMessage(content=said)
        if self._use.is_legacy:
            return AssistantMessage(content=said or None, function_call=calls[0])
        new = [ToolCall(id=self._use.format.call_id(), function=called) for called in calls.values()]
        return AssistantMessage(content=said or None, tool_calls=new)

    def _delta(self, choice: _Choice) -> Delta:
        said, deltas = "", dict[int, ToolCallDelta]()
        for piece in choice.pieces:
            if piece.call is None:
                said += piece.text
                continue
            delta = deltas.setdefault(piece.call, ToolCallDelta(index=piece.call, function=FunctionDelta(arguments="")))
            delta.function.arguments += piece.text
            if piece.name is not None:
                delta.id, delta.type, delta.function.name = self._use.format.call_id(), "function", piece.name
        choice.pieces.clear()
        if self._use.is_legacy:
            return Delta(content=said or None, function_call=deltas[0].function if deltas else None)
        return Delta(content=said or None, tool_calls=list(deltas.values()) or None)
