"""Log-probabilities as callers see them: each token with the text that it added to the answer, or would have added.

The text of a token depends on what stands around it. A byte-level token may hold a third of a character, a SentencePiece token
begins with a space unless the text begins with it, and a stop string may cut a token in two. One promise settles all of this:

    The texts of the tokens, joined, are the text. Always.

So a token carries the characters that it completes. Tokens before it that hold a part of such a character carry "". A token
carries no more than the answer does: text that a stop string cuts off, special tokens that are left out and the token that
ended the text are "". Bytes that are no character when the text ends become U+FFFD, at the last token that holds some of them.

An alternative's text is what it would have added in the same place. One that would have added nothing, because it is special or
holds a part of a character, is shown as it decodes by itself.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from .detokenizer import REPLACEMENT, Detokenizer

if TYPE_CHECKING:
    from ...batching.sequence import Sequence
    from ..sampling.sampler import TokenLogprobs

LOCAL_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
"""With these a token decodes to the same text behind any text that ends on a whole character."""
ANCHOR = "a"
"""A text that stands for any text: a token is decoded behind it."""


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position, before any penalty or temperature."""

    logprob: float
    rank: int
    """1 is the most likely token; tokens that tie share a rank."""
    decoded_token: str | None = None
    """What the token adds to the text in this place, see `core/text/logprobs.py`; None without a text."""


class TokenTexts:
    """Texts of a vocabulary's tokens that need no context, each computed once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._inside: dict[int, str | None] = {}
        self._anchor = _anchor(tokenizer) if _is_local(tokenizer) else None

    def alone(self, token: int) -> str:
        """What the token decodes to by itself; U+FFFD for a part of a character, its name for a special one."""
        text = self._alone.get(token)
        if text is None:
            text = self._alone[token] = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def inside(self, token: int) -> str | None:
        """What the token adds behind any text that ends on a whole character; None: it depends on the text."""
        if self._anchor is None:
            return None
        if token not in self._inside:
            both = self.tokenizer.decode([self._anchor, token], skip_special_tokens=False)
            known = both.startswith(ANCHOR) and REPLACEMENT not in both
            self._inside[token] = both[len(ANCHOR) :] if known else None
        return self._inside[token]

    def candidates(self, detokenizer: Detokenizer, token: int, entry: TokenLogprobs, in_text: bool) -> dict[int, str]:
        """What the alternatives in an entry would have added in place of the `token` that the detokenizer reads next.

        Args:
            in_text: whether text stands before it, all of it whole characters.
        """
        tokens = [other for other in entry.token_ids if other != token]
        texts = {token: self.inside(token) if in_text else None for token in tokens}
        unknown = [token for token in tokens if not texts[token] or token in detokenizer.special_ids]
        if unknown:
            texts |= zip(unknown, detokenizer.would_add(unknown), strict=True)
        return {token: text or self.alone(token) for token, text in texts.items()}


def _is_local(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    spec = json.loads(tokenizer.decoder.__getstate__())
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    return all(part["type"] in LOCAL_DECODERS and not part.get("stop") for part in parts)


def _anchor(tokenizer: Tokenizer) -> int | None:
    """A token that is nothing but a letter."""
    ids = tokenizer.encode(ANCHOR, add_special_tokens=False).ids
    return ids[-1] if ids and tokenizer.decode(ids[-1:], skip_special_tokens=False) == ANCHOR else None


@dataclass(slots=True)
class _Read:
    """A token that was read and what it added to the text, before any stop string cut it."""

    token: int
    entry: TokenLogprobs
    texts: dict[int, str]
    piece: str = ""

    def cut(self, text: str | None) -> dict[int, Logprob]:
        """The entries of its position, when `text` is what the answer has of the token; None: the answer has no text."""
        texts = {} if text is None else self.texts | {self.token: text}
        columns = zip(self.entry.token_ids, self.entry.logprobs, self.entry.ranks, strict=True)
        return {token: Logprob(logprob, rank, texts.get(token)) for token, logprob, rank in columns}


class TokenLog:
    """The tokens of one sequence with their log-probabilities, from when they are sampled until their text is sure.

    Tokens that share a character go out together, with the text that they add.

    Args:
        seq: its `cumulative_logprob` is kept.
        detokenizer: of the sequence; None for no text.
        texts: None for no text.
    """

    def __init__(self, seq: Sequence, detokenizer: Detokenizer | None, texts: TokenTexts | None) -> None:
        self._seq = seq
        self._detokenizer = detokenizer
        self._texts = texts
        self._sampled: deque[TokenLogprobs] = deque()  # of tokens that are not yet read, or that came behind the end
        self._num_noted = seq.num_prompt_tokens  # tokens whose entries are taken, prompt included
        self._groups: deque[list[_Read]] = deque()  # tokens read; those of a group share a character
        self._open = False  # whether the last group waits for more tokens
        self._sure = ""  # text that is out of the detokenizer and not yet given to tokens
        self._in_text = False

    def add(self, entries: list[TokenLogprobs]) -> None:
        """Take the entries of tokens that are about to be appended. Those behind one that ends the sequence are not used."""
        self._sampled.extend(entries)

    def step(self) -> str:
        """Read the next token: the text that it adds."""
        detokenizer = self._detokenizer
        assert detokenizer is not None  # or the reader takes all tokens by `finish`
        read = self._note()
        read.piece = detokenizer.step()
        self._open = detokenizer.holds
        self._in_text = _ends_whole(read.piece)
        return read.piece

    def finish(self, end: int) -> str:
        """Read the rest: the text that the tokens before index `end` still hold back, and those behind, which have none."""
        holding = self._groups[-1][-1] if self._open else None
        while self._num_noted < len(self._seq.tokens):
            self._note()
        self._open = False
        text = "" if self._detokenizer is None else self._detokenizer.finish(end)
        if holding is not None:
            holding.piece += text
        return text

    def give(self, text: str, ended: bool) -> tuple[str, list[dict[int, Logprob]]]:
        """The text that is sure, in whole tokens, and the entries of these tokens.

        Args:
            text: what has become sure since the last call.
            ended: nothing more comes, so the rest goes out too.
        """
        self._sure += text
        given, done, entries = self._sure, 0, []
        while self._groups:
            group = self._groups[0]
            if not ended and ((self._open and len(self._groups) == 1) or done + _length(group) > len(given)):
                break
            for read in self._groups.popleft():
                entries.append(read.cut(None if self._texts is None else given[done : done + len(read.piece)]))
                done += len(read.piece)
        self._sure = given[done:]
        return given[:done], entries

    def _note(self) -> _Read:
        """Take the entry of the next token to read."""
        entry = self._sampled.popleft()
        token = self._seq.tokens[self._num_noted]
        self._num_noted += 1
        self._seq.cumulative_logprob += entry.logprobs[entry.token_ids.index(token)]
        texts = {}
        if self._texts is not None and self._detokenizer is not None:
            texts = self._texts.candidates(self._detokenizer, token, entry, self._in_text)
        read = _Read(token, entry, texts)
        if self._open:
            self._groups[-1].append(read)
        else:
            self._groups.append([read])
        return read


def _length(group: list[_Read]) -> int:
    return sum(len(read.piece) for read in group)


class PromptLog:
    """Log-probabilities of a prompt's tokens; special ones are shown.

    Args:
        tokens: the prompt's.
        texts: None for no text.

    Attributes:
        entries: one a token, None until it is known; always for token 0, which nothing predicts.
    """

    def __init__(self, tokens: list[int], texts: TokenTexts | None) -> None:
        self.entries: list[dict[int, Logprob] | None] = [None] * len(tokens)
        self._tokens = tokens
        self._texts = texts
        self._detokenizer = None if texts is None else Detokenizer(texts.tokenizer, tokens, 0)
        self._in_text = False

    def add(self, start: int, entries: list[TokenLogprobs]) -> None:
        """Take the entries of tokens ``start``, ``start + 1``, …; those that are known already are the same."""
        for index, entry in enumerate(entries, start):
            if self.entries[index] is None:
                self.entries[index] = self._read(index, entry)

    def _read(self, index: int, entry: TokenLogprobs) -> dict[int, Logprob]:
        token = self._tokens[index]
        detokenizer = self._detokenizer
        if self._texts is None or detokenizer is None:
            return _Read(token, entry, {}).cut(None)
        while detokenizer.offset < index:
            self._step(detokenizer)
        texts = self._texts.candidates(detokenizer, token, entry, self._in_text)
        return _Read(token, entry, texts).cut(self._step(detokenizer))

    def _step(self, detokenizer: Detokenizer) -> str:
        piece = detokenizer.step()
        if detokenizer.offset == len(self._tokens):
            piece += detokenizer.finish(len(self._tokens))
        self._in_text = _ends_whole(piece)
        return piece


def _ends_whole(piece: str) -> bool:
    """Whether the next token stands behind a whole character, when the last one added `piece`."""
    return bool(piece) and REPLACEMENT not in piece


def texts_of(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each of some tokens adds to their text, special ones included."""
    detokenizer = Detokenizer(tokenizer, tokens, 0)
    pieces = [detokenizer.step() for _ in tokens]
    if pieces:
        pieces[-1] += detokenizer.finish(len(tokens))
    return pieces
