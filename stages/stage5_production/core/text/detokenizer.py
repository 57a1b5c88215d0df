"""Token ids turned into text as they come (`Detokenizer`), strings that end a text (`StopStrings`), and both at work on
a sequence (`TextReader`).

A token is not a string: a byte-level token may hold a third of a character, and a SentencePiece token begins with a
space or not depending on what came before. So text comes out in pieces that end on a whole character, and the text of a
sequence is by definition the concatenation of these pieces. Streamed or not, a caller reads the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from ...batching.sequence import Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for bytes that are no character, or not yet one."""
CONTEXT_SIZES = (8, 64)
"""Tokens of context that are tried before all of them; almost always the first will do."""
MAX_MARK = 256
"""Characters from the end of a text within which `stop_until` is looked for."""
MAX_HELD = 16
"""Tokens that may wait for the rest of a character. It has four bytes at most, so this many are no single character."""


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that `skip_special_tokens` leaves out of the text."""
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def _shared_prefix(a: str, b: str) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


class Detokenizer:
    """Text of one sequence, a token at a time, never half a character and never text of the prompt.

    A thin layer over `tokenizers.decoders.DecodeStream`, which decodes the last few tokens twice, without and with the
    new one, and gives the difference. The layer adds what a server needs beyond that:

    - the stream starts behind the prompt, also when the prompt ends inside a character (vllm #48853);
    - what is held back at the end comes out as U+FFFD, as a plain decode would give it;
    - when a byte changes how those before it decode (byte-fallback vocabularies), the stream fails with "Invalid
      prefix" (vllm #17448): the tokens held back are decoded by themselves and a new stream starts;
    - garbage that never becomes a character is let go after `MAX_HELD` tokens; the stream would decode all of it again
      at each step, 80 µs a token over the first thousand.

    Args:
        tokenizer: the `tokenizers.Tokenizer` below a transformers fast tokenizer (``backend_tokenizer``).
        tokens: the sequence's own list, prompt first; it is read as it grows and never changed.
        start: index of the first token whose text is wanted, usually the prompt's length.
        special_ids: `special_token_ids` of the tokenizer to leave these out of the text; empty to keep them.

    Attributes:
        offset: index of the next token to read.
    """

    __slots__ = ("_held", "_in_character", "_settled", "_skip", "_stream", "_tokenizer", "offset", "special_ids", "tokens")

    def __init__(self, tokenizer: Tokenizer, tokens: list[int], start: int, special_ids: frozenset[int] = frozenset()) -> None:
        self.tokens = tokens
        self.offset = start
        self._tokenizer = tokenizer
        self.special_ids = special_ids
        self._skip = bool(special_ids)
        self._settled = start  # tokens before this index have given all of their text
        self._held = 0  # tokens from there on that wait for others, special ones not counted
        self._stream: DecodeStream | None = None  # made at the first step
        self._in_character = False  # whether the stream starts inside a character

    @property
    def holds(self) -> bool:
        """Whether tokens that are read wait for the rest of a character."""
        return self._held > 0

    def step(self) -> str:
        """The text that ``tokens[offset]`` adds, often none; moves on by one token."""
        token = self.tokens[self.offset]
        if (stream := self._stream) is None:
            stream = self._start_stream()
        self.offset += 1
        if token in self.special_ids:
            return ""
        try:
            text = stream.step(self._tokenizer, token)
        except Exception as error:  # tokenizers raises no narrower class
            if not str(error).startswith("Invalid prefix"):
                raise
            return self._settle(self.offset)
        if text is None:
            self._held += 1
            return "" if self._held < MAX_HELD else self._release()
        if self._in_character:  # the stream's first text then repeats its context
            self._in_character = False
            text = self._added(self._settled, self.offset)
        self._settled = self.offset
        self._held = 0
        return text

    def finish(self, end: int) -> str:
        """The text of all tokens before index `end` that are not yet read, and what is held back."""
        if self._stream is None and (text := self._read_at_once(end)) is not None:
            return text
        pieces = [self.step() for _ in range(end - self.offset)]
        pieces.append(self._added(self._settled, end))
        self._settled = end
        return "".join(pieces)

    def would_add(self, candidates: list[int]) -> list[str]:
        """What `step` would give for each of these tokens in place of the next one; "" for one that ends inside a character."""
        held, context = self.tokens[self._settled : self.offset], self._context(self._settled)
        texts = [self._new_text([*held, token], context) if token not in self.special_ids else "" for token in candidates]
        return ["" if text.endswith(REPLACEMENT) else text for text in texts]

    def _read_at_once(self, end: int) -> str | None:
        """The same text as token by token, in one tenth of the time; None if only reading token by token can tell.

        Where no bytes were replaced, decoding is monotonic: each piece ends on a character and each later decode starts
        with the earlier ones, so the pieces add up to the whole.
        """
        context, before, _ = self._context(self.offset)
        whole = self._decode(context + self.tokens[self.offset : end])
        if not whole.startswith(before) or whole.find(REPLACEMENT, len(before)) >= 0:
            return None
        self.offset = self._settled = end
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _context(self, end: int) -> tuple[list[int], str, str]:
        """The fewest tokens before `end` that tell how the next ones decode; their text; the part of it that will not change.

        The two texts differ if the tokens end inside a character: the second ends before it.
        """
        ids, text = [], ""
        for size in (*CONTEXT_SIZES, end):
            ids = self.tokens[max(0, end - size) : end]
            text = self._decode(ids)
            for cut in range(4):
                stem = self._decode(ids[: len(ids) - cut]) if cut else text
                if stem and not stem.endswith(REPLACEMENT):
                    return ids, text, stem
        return ids, text, text.rstrip(REPLACEMENT)

    def _start_stream(self) -> DecodeStream:
        context, text, _ = self._context(self.offset)
        self._in_character = text.endswith(REPLACEMENT)
        self._stream = stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        return stream

    def _added(self, start: int, end: int) -> str:
        """What ``tokens[start:end]`` add to the text before them; also the character that they complete, if any."""
        return self._new_text(self.tokens[start:end], self._context(start)) if end > start else ""

    def _new_text(self, new: list[int], context: tuple[list[int], str, str]) -> str:
        """What `new` tokens add to the text of the `_context` before them."""
        ids, before, stem = context
        whole = self._decode(ids + new)
        if whole.startswith(stem):
            return whole[max(len(stem), _shared_prefix(before, whole)) :]
        if whole.startswith(before):  # a byte before them spoiled the stem, so nothing new did
            return whole[len(before) :]
        return self._decode(new)  # the new bytes spoiled text that is already out

    def _settle(self, end: int) -> str:
        """Let go the text of the held tokens before `end` and start a new stream there."""
        text = self._added(self._settled, end)
        self._settled = self.offset = end
        self._held = 0
        self._start_stream()
        return text

    def _release(self) -> str:
        """Let go of what cannot be one character, but keep what may be the beginning of one."""
        start, end, tokens = self._settled, self.offset, self.tokens
        whole = self._decode(tokens[start:end])
        cut = end - 3
        while self._decode(tokens[start:cut]) + self._decode(tokens[cut:end]) != whole:  # a cut inside a character
            cut += 1
        text = self._settle(cut)
        return text + "".join([self.step() for _ in range(end - cut)])


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what may be the start of one.

    The last ``max(len(stop)) - 1`` characters are always held back, so no part of a stop string is ever given out. The
    piece that completes a match decides: of the matches in it the one that starts earliest counts, of several that
    start there the first listed.

    Attributes:
        matched: the string found, or None.
    """

    __slots__ = ("_hold", "_include", "_stops", "_tail", "matched")

    def __init__(self, stops: Iterable[str], include_in_text: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include_in_text
        self._hold = max(map(len, self._stops)) - 1
        self._tail = ""
        self.matched: str | None = None

    def push(self, piece: str, armed: bool = True) -> str:
        """Take a piece of text; give out what is sure to stay. With `armed` False a match in this piece is none."""
        # Hint: How many characters at the end of what you have can still be a part of a stop string that is not
        # complete?
        raise NotImplementedError("Stage 5 · Task 5.4: StopStrings.push, see stages/stage5_production/GUIDE.md#task-5-4")

    def flush(self) -> str:
        """The text held back, when nothing more comes; a second time, or behind a match, there is none."""
        raise NotImplementedError("Stage 5 · Task 5.4: StopStrings.flush, see stages/stage5_production/GUIDE.md#task-5-4")


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
