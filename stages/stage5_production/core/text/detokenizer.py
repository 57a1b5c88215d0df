"""Token ids turned into text as they come (`Detokenizer`), and strings that end a text (`StopStrings`).

A token is not a string: a byte-level token may hold a third of a character, and a SentencePiece token begins with a
space or not depending on what came before. So text comes out in pieces that end on a whole character, and the text of a
sequence is by definition the concatenation of these pieces. Streamed or not, a caller reads the same text.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoding gives for bytes that are no character, or not yet one."""
CONTEXT_SIZES = (8, 64)
"""Tokens of context that are tried before all of them; almost always the first will do."""
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
        if text is None and self._held + 1 < MAX_HELD:
            self._held += 1
            return ""
        if text is None or self._in_character:
            return self._decide(text)
        self._settled = self.offset
        self._held = 0
        return text

    def _decide(self, text: str | None) -> str:
        """What a step gives where it is not what its stream gives. The token is read: `offset` lies behind it.

        Where `MAX_HELD` tokens wait for the rest of a character, this one among them, what cannot be one goes out (`_release`).
        Where the stream began inside a character, its first text repeats that of its context. What the tokens from `_settled`
        on add is given out instead (`_added`), is settled, and nothing is held; from there on the stream is like any other.

        Args:
            text: the stream's, which began inside a character; None: it has none, and `MAX_HELD` tokens wait.
        """
        raise NotImplementedError("Stage 5 · Task 5.11: Detokenizer._decide, see stages/stage5_production/GUIDE.md#task-5-11")

    def finish(self, end: int) -> str:
        """The text of all tokens before index `end` that are not yet read, and what is held back."""
        if self._stream is None and (text := self._read_at_once(end)) is not None:
            return text
        pieces = [self.step() for _ in range(end - self.offset)]
        pieces.append(self._added(self._settled, end))
        self._settled = end
        return "".join(pieces)

    def would_add(self, candidates: list[int]) -> list[str]:
        """What `step` would give for each of these tokens in place of the next one; "" for one that ends inside a character.

        That is what they add behind all text that is out, with the tokens that are held (those from `_settled` to `offset`). A
        special token adds nothing. It is only a question: nothing is read, and the same may be asked again.
        """
        # Hint: Text that is out is a fact. Write two columns for each case: the text of the context alone, and of the
        # context with the new tokens. Which part of the second is new?
        raise NotImplementedError("Stage 5 · Task 5.11: Detokenizer.would_add, see stages/stage5_production/GUIDE.md#task-5-11")

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
        """What `new` tokens add to the text of the `_context` before them.

        They are decoded behind the context's tokens, as a token's text depends on what stands before it. The context's text may
        end in U+FFFD, for bytes that are no character, or not yet. Those that stay as they are belong to the context. Where the
        new tokens finish a character, it is theirs, the whole character. Text before that is out already, and what is out
        stays out: where new bytes make U+FFFD of it, as in a vocabulary with byte fallback, they add what they decode to by
        themselves. Where it was the context's own last bytes that did so, the new tokens add what follows the context's text.

        Args:
            new: one token or more.
            context: ids, their text, and the part of the text that will not change, as `_context` gives them.
        """
        raise NotImplementedError("Stage 5 · Task 5.11: Detokenizer._new_text, see stages/stage5_production/GUIDE.md#task-5-11")

    def _settle(self, end: int) -> str:
        """Let go the text of the held tokens before the one at `end`, and go on there: the next token to read is that one,
        nothing is held, and a new stream starts.

        Args:
            end: at most `offset`. Tokens between the two have been read for nothing, and are read again.

        Returns:
            What they add to the text that is out (`_added`). If that ends inside a character, it ends in U+FFFD.
        """
        raise NotImplementedError("Stage 5 · Task 5.11: Detokenizer._settle, see stages/stage5_production/GUIDE.md#task-5-11")

    def _release(self) -> str:
        """Let go of what cannot be one character, but keep what may be the beginning of one.

        A character has four bytes at most, so the last 3 of the tokens read may be the beginning of one; all before them
        are garbage. But the cut may not split what decodes as one: it lies as early as possible among these, or
        behind them, where the two parts, each decoded by itself, give the text of the whole. What is before it is settled.
        What is behind it is read again, and the stream holds it as before.

        Returns:
            The text of all that is let go, in order.
        """
        raise NotImplementedError("Stage 5 · Task 5.11: Detokenizer._release, see stages/stage5_production/GUIDE.md#task-5-11")


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
