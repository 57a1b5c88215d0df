"""What a format of thinking consists of, and what it makes of one answer: its parts, its form, its tokens.

An answer that thinks is thoughts, a mark, and what it says. Where it begins within thinking, the prompt holds the first mark.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Any

from ...batching.sampling_params import StructuredOutput
from ..tool_calls.calling import START, ToolUse
from ..tool_calls.source import Reader, Source, Step
from ..tool_calls.tool_format import Form, as_form, as_output, either, not_beginning, sequence

ANY: Form = {"type": "any_text"}


@dataclass(slots=True, frozen=True)
class ThinkingFormat:
    """How a family of models thinks.

    Attributes:
        begins, ends: what thoughts stand between, as the family's models and its chat templates write it.
        always: an answer thinks even without a mark at its beginning, unless the prompt has ended that.
        has_special_tokens: its marks are tokens that a text usually leaves out.
    """

    begins: tuple[str, ...]
    ends: tuple[str, ...]
    always: bool = False
    has_special_tokens: bool = False


@dataclass(slots=True, frozen=True)
class Thinking:
    """How the answers to one request may think.

    Attributes:
        is_open: an answer begins within its thoughts, with or without a mark; otherwise it thinks if it begins with the mark.
        budget: tokens that its thoughts may have; None: any number.
    """

    format: ThinkingFormat
    is_open: bool
    budget: int | None = None

    def form(self, asked: StructuredOutput | None, use: ToolUse | None = None) -> StructuredOutput | None:
        """The form of an answer: thoughts within the budget, and then what is asked for, or the calls of `use`; None: any.

        Raises:
            ValueError: see `ToolUse.form`.
        """
        begins = self.format.begins
        if use is not None:
            said, at_once = use.form(), use.form(begins)
        elif asked is not None:
            said = at_once = as_form(asked)
        elif self.budget is not None:
            said, at_once = ANY, not_beginning(begins)
        else:
            return None
        thoughts = ANY if self.budget is None else {**ANY, "max_tokens": self.budget}
        ends = [*self.format.ends]

        def thought(*marks: str) -> Form:
            return either(*({"type": "tag", "begin": mark, "content": thoughts, "end": ends} for mark in marks))

        if self.is_open:
            return as_output(sequence(thought(*begins, ""), said))
        return as_output(either(sequence(thought(*begins), said), at_once))

    def before(self) -> str:
        """A regular expression for what stands just before what an answer says."""
        ends = "|".join(map(re.escape, self.format.ends))
        return f"(?:{ends})" if self.is_open else f"(?:{START}|{ends})"

    def parser(self) -> ThoughtParser:
        """What reads one answer."""
        return ThoughtParser(self)

    def count(self, tokenizer: Any, token_ids: list[int]) -> int:
        """How many tokens of an answer are thoughts, without their marks. Where no mark is a token by itself, a token that
        holds the border between two texts counts as the later one's."""
        begins, ends = self.format.begins, self.format.ends
        marks = [tokenizer.encode(mark, add_special_tokens=False) for mark in (*begins, *ends)]
        if list(map(len, marks)) == [1, 1]:
            (first,), (last,) = marks
            start = int(token_ids[:1] == [first])
            stop = token_ids.index(last) if last in token_ids else len(token_ids)
            return stop - start if start or self.is_open else 0

        def length(count: int) -> int:
            return len(tokenizer.decode(token_ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))

        text = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        begun = max((len(mark) for mark in begins if text.startswith(mark)), default=0)
        if not begun and not self.is_open:
            return 0
        ended = min((at for mark in ends if (at := text.find(mark, begun)) >= 0), default=None)
        places = range(len(token_ids) + 1)
        start = bisect_left(places, begun, key=length)
        return (len(token_ids) if ended is None else bisect_right(places, ended, key=length) - 1) - start


class ThoughtParser(Reader):
    """Tells thoughts from what an answer says, as it comes. All characters stay but those of the marks."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        super().__init__(Source(()))

    def _read(self) -> Step[None]:
        source, marks = self._source, self._thinking.format
        if (yield from source.next_of(*marks.begins)) or self._thinking.is_open:
            for piece in source.until(*marks.ends):
                yield piece and replace(piece, is_thought=True)
        yield from source.until()
