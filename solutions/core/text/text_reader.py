"""Reads the text of a sequence as its tokens come: tokens into text, up to the string or the token that ends it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer

from .detokenizer import Detokenizer, StopStrings

if TYPE_CHECKING:
    from ...batching.sequence import Sequence

MAX_MARK = 256
"""Characters from the end of a text within which `stop_until` is looked for."""


class TextSource(Protocol):
    """Gives the text of a sequence's tokens, as `Detokenizer` does."""

    def step(self) -> str:
        """Text that the next token makes sure."""
        ...

    def finish(self, end: int) -> str:
        """The rest, up to the token at `end`."""
        ...


class TextReader:
    """Reads the text of a sequence as its tokens come; the `stop_search` of one that has stop strings.

    The text of the token that ended the sequence (end of sequence or a stop token) is left out, like the stop string,
    unless `include_stop_str_in_output`. A stop string counts if a token after the first `min_tokens` completes it, and none
    behind what `stop_until` matches.

    Args:
        seq: the sequence; `seq.tokens` is read as it grows.
        tokenizer: None for no text at all.
        special_ids: tokens without text, from `special_token_ids`.

    Attributes:
        detokenizer: None for no text.
        log: reads the tokens in its place where their log-probabilities are wanted.
    """

    __slots__ = ("_found", "_so_far", "_stops", "_until", "detokenizer", "log", "seq")

    def __init__(self, seq: Sequence, tokenizer: Tokenizer | None, special_ids: frozenset[int]) -> None:
        params = seq.params
        self.seq = seq
        self.detokenizer: Detokenizer | None = None
        self.log: TextSource | None = None
        self._stops: StopStrings | None = None
        self._found = ""  # text that `find` has made and nobody has read yet
        self._until = None if params.stop_until is None else re.compile(params.stop_until)
        self._so_far = ""  # all text, where there is something to match
        if tokenizer is not None and params.detokenize:
            skipped = special_ids if params.skip_special_tokens else frozenset()
            self.detokenizer = Detokenizer(tokenizer, seq.tokens, seq.num_prompt_tokens, skipped)
            if params.stop:
                self._stops = StopStrings(params.stop, params.include_stop_str_in_output)
                seq.stop_search = self

    def read(self, ended: bool) -> str:
        """New text of all tokens not yet read; if the sequence has `ended`, with all that was held back."""
        detokenizer = self.detokenizer
        if detokenizer is None:
            return "" if self.log is None else self.log.finish(len(self.seq.tokens))
        if self._stops is not None:
            return self._take_found()
        if self.log is not None:
            return self._read_by_token(detokenizer, self.log, self.seq.finish_reason)
        if ended:
            return detokenizer.finish(self._text_end(self.seq.finish_reason))
        count = len(self.seq.tokens) - detokenizer.offset
        return detokenizer.step() if count == 1 else "".join([detokenizer.step() for _ in range(count)])

    def find(self, reason: str | None) -> str | None:
        """See `StopSearch.find`. The text on the way is kept for `read`."""
        detokenizer, stops = self.detokenizer, self._stops
        assert detokenizer is not None  # or no sequence has this reader as its search
        assert stops is not None
        self._found += self._read_by_token(detokenizer, self.log or detokenizer, reason)
        return stops.matched

    def _take_found(self) -> str:
        if self.seq.finish_reason == "abort":  # which no token brought, so what is held back is still to come
            self.find("abort")
        text, self._found = self._found, ""
        return text

    def _read_by_token(self, detokenizer: Detokenizer, source: TextSource, reason: str | None) -> str:
        """Text of the new tokens, as far as it is sure; with a `reason` to end all of it, up to a stop string."""
        unarmed = self.seq.num_prompt_tokens + self.seq.params.min_tokens
        end = self._text_end(reason)
        text = ""
        while detokenizer.offset < end:
            text += self._until_stop(source.step(), detokenizer.offset > unarmed)
            if self._stops is not None and self._stops.matched is not None:
                return text
        if reason is not None:
            text += self._until_stop(source.finish(end), end > unarmed)
            text += self._stops.flush() if self._stops is not None else ""
        return text

    def _until_stop(self, piece: str, armed: bool) -> str:
        if self._stops is None:
            return piece
        if self._until is None or not piece:
            return self._stops.push(piece, armed)
        old = len(self._so_far)
        if self._until.search(self._so_far, max(0, old - MAX_MARK)):
            return self._stops.push(piece, False)
        self._so_far += piece
        return self._stops.push(piece, armed)

    def _text_end(self, reason: str | None) -> int:
        """Index behind the last token whose text counts, if the sequence has ended for this reason; None: it has not."""
        ended_by_token = reason == "stop" and not self.seq.params.include_stop_str_in_output
        return len(self.seq.tokens) - 1 if ended_by_token else len(self.seq.tokens)
