"""Answers of which not all is said to the user: what the model has written, read as thoughts, text and calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..core.output import CompletionOutput, RequestOutput
from .openai_answers import (
    AssistantMessage,
    CalledFunction,
    ChatChunkChoice,
    ChatCompletionChunk,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from .reasoning.thinking import Thinking
from .responses import ChatReply
from .tool_calls.calling import ToolUse
from .tool_calls.source import Piece


class _Choice:
    """A choice so far.

    Attributes:
        pieces: what has been read of it and no chunk has carried.
        token_ids: all of them, if it may think. num_thoughts: how many of them are thoughts, once it has ended.
    """

    def __init__(self, use: ToolUse | None, thinking: Thinking | None, echo: str) -> None:
        self._thoughts = None if thinking is None else thinking.parser()
        self._calls = None if use is None else use.parser()
        self.pieces = [Piece(echo)] if echo else []
        self.token_ids: list[int] = []
        self.num_thoughts = 0

    @property
    def has_called(self) -> bool:
        """Whether there are calls, and all of them are whole."""
        return self._calls is not None and self._calls.is_whole

    def read(self, text: str, ended: bool) -> None:
        """Take in new text; with `ended` it is the last."""
        pieces = [Piece(text)]
        if self._thoughts is not None:
            pieces = self._thoughts.feed(text) + (self._thoughts.finish() if ended else [])
        for piece in pieces:
            self.pieces += [piece] if self._calls is None or piece.is_thought else self._calls.feed(piece.text)
        if ended and self._calls is not None:
            self.pieces += self._calls.finish()


class ParsedReply(ChatReply):
    """``/v1/chat/completions`` with tools, with thoughts, or with the beginning of the answer that the request has brought.

    Args:
        use: what may be called; None: nothing. thinking: how it thinks; None: not at all.
        echo: what every choice begins with. The others are those of `ChatReply`.
    """

    def __init__(self, use: ToolUse | None, thinking: Thinking | None, echo: str, *args: Any) -> None:
        super().__init__(*args)
        self._use, self._thinking, self._echo = use, thinking, echo
        self._choices: dict[int, _Choice] = {}

    @property
    def usage(self) -> Usage:
        """Also the tokens of thoughts, of the choices that have ended."""
        usage = super().usage
        if self._thinking is not None:
            thoughts = sum(choice.num_thoughts for choice in self._choices.values())
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=thoughts)
        return usage

    def choices(self, output: RequestOutput) -> Iterable[tuple[int, CompletionOutput]]:
        """A sequence whose new text is held back, because it may begin a call or end the thoughts, comes without it."""
        for index, sequence in super().choices(output):
            if (choice := self._choices.get(index)) is None:
                choice = self._choices[index] = _Choice(self._use, self._thinking, self._echo)
            choice.read(sequence.text, sequence.finished)
            if self._thinking is not None:
                choice.token_ids += sequence.token_ids
                if sequence.finished:
                    choice.num_thoughts = self._thinking.count(self.tokenizer, choice.token_ids)
            if self.request.include_reasoning is False:
                choice.pieces = [piece for piece in choice.pieces if not piece.is_thought]
            yield index, replace(sequence, text=sequence.text if choice.pieces else "")

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
        if sequence.finish_reason == "stop" and self._use is not None and self._choices[index].has_called:
            return "function_call" if self._use.is_legacy else "tool_calls"
        return sequence.finish_reason

    def _message(self, index: int, sequence: CompletionOutput) -> AssistantMessage:
        choice = self._choices[index]
        said = "".join(piece.text for piece in choice.pieces if piece.call is None and not piece.is_thought)
        thought = "".join(piece.text for piece in choice.pieces if piece.is_thought) or None
        calls: dict[int, CalledFunction] = {}
        for piece in choice.pieces:
            if piece.call is not None:
                called = calls.setdefault(piece.call, CalledFunction(name=piece.name or "", arguments=""))
                called.arguments += piece.text
        if self._thinking is None and not calls:
            return AssistantMessage(content=said)
        message = AssistantMessage(content=said or None, reasoning=thought, reasoning_content=thought)
        if self._use is not None and calls:
            if self._use.is_legacy:
                message.function_call = calls[0]
            else:
                message.tool_calls = [ToolCall(id=self._use.format.call_id(), function=called) for called in calls.values()]
        return message

    def _delta(self, choice: _Choice) -> Delta:
        said, thought, deltas = "", "", dict[int, ToolCallDelta]()
        for piece in choice.pieces:
            if piece.is_thought:
                thought += piece.text
            elif piece.call is None:
                said += piece.text
            else:
                delta = deltas.setdefault(piece.call, ToolCallDelta(index=piece.call, function=FunctionDelta(arguments="")))
                delta.function.arguments += piece.text
                if piece.name is not None and self._use is not None:
                    delta.id, delta.type, delta.function.name = self._use.format.call_id(), "function", piece.name
        choice.pieces.clear()
        new = Delta(content=said or None, reasoning=thought or None, reasoning_content=thought or None)
        if self._use is not None and self._use.is_legacy:
            new.function_call = deltas[0].function if deltas else None
        else:
            new.tool_calls = list(deltas.values()) or None
        return new
