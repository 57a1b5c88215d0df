"""Log-probabilities in the formats of OpenAI's two interfaces. `core/text/logprobs.py` defines what a token's text is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

from ..core.text.detokenizer import REPLACEMENT
from ..core.text.logprobs import Logprob, texts_of
from .openai_answers import ChatLogprobs, CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob

MIN_LOGPROB = -9999.0
"""What OpenAI reports for a token that is all but impossible; JSON has no -inf."""

Position: TypeAlias = "dict[int, Logprob]"
"""The tokens of one place, by id: the sampled one and the most likely ones."""


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, MIN_LOGPROB)


def token_text(token_id: int, entry: Logprob) -> str:
    """The token as text, or its id if the engine has no tokenizer."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def without_texts(positions: Sequence[Position | None]) -> list[Any]:
    """The same positions, whose tokens are called by their ids."""
    return [
        None if position is None else {token: replace(entry, decoded_token=None) for token, entry in position.items()}
        for position in positions
    ]


def prompt_logprobs(positions: Sequence[Position | None] | None) -> PromptLogprobs:
    """The log-probabilities of a prompt in vLLM's form."""
    if positions is None:
        return None
    return [
        None
        if position is None
        else {
            token: PromptLogprob(logprob=finite(entry.logprob), rank=entry.rank, decoded_token=entry.decoded_token)
            for token, entry in _by_rank(position)
        }
        for position in positions
    ]


def _by_rank(position: Position) -> list[tuple[int, Logprob]]:
    """The most likely token first; the lower id of those that tie."""
    return sorted(position.items(), key=lambda item: (item[1].rank, item[0]))


# ------------------------------------------------------------------------------------------------------ completions


def completion_logprobs(
    token_ids: list[int], positions: Sequence[Position | None], start: int, echoed: list[str]
) -> CompletionLogprobs:
    """The lists of ``/v1/completions``.

    Args:
        token_ids: tokens of a choice.
        positions: theirs; None for one that nothing predicts.
        start: characters of the choice before them.
        echoed: texts of the first of them, which are the prompt's.
    """
    result = CompletionLogprobs()
    for index, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
        if position is None:  # nothing predicts the first token of a prompt
            text = echoed[index]
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
        else:
            own = position[token_id]
            text = echoed[index] if index < len(echoed) else token_text(token_id, own)
            result.token_logprobs.append(finite(own.logprob))
            result.top_logprobs.append(_by_text(position, token_id, text))
        result.tokens.append(text)
        result.text_offset.append(start)
        start += len(text)
    return result


def _by_text(position: Position, token_id: int, text: str) -> dict[str, float]:
    """The log-probabilities of a place by the tokens' texts. If several tokens have one text, the sampled one keeps it, or
    else the likeliest; the others are named by their ids, as are tokens without a text."""
    names = {text: token_id}
    for other, entry in _by_rank(position):
        if other != token_id:
            names.setdefault(token_text(other, entry), other)
    texts = {other: name for name, other in names.items()}
    return {texts.get(other, f"token_id:{other}"): finite(entry.logprob) for other, entry in _by_rank(position)}


def prompt_texts(tokenizer: Any, prompt: str | list[int], token_ids: list[int], echo: str) -> list[str]:
    """A text for each of a prompt's tokens. Joined, they are `echo`: the prompt itself, or what its tokens decode to.

    Special tokens that the tokenizer has put around a text have an empty one. Where the tokenizer has changed the text itself
    (other forms of Unicode, lower case), the tokens share the original text.
    """
    if tokenizer is None:
        return [f"token_id:{token}" for token in token_ids]
    if isinstance(prompt, list):
        return _shared(echo, texts_of(tokenizer.backend_tokenizer, token_ids))
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    inner = encoded["input_ids"]
    around = len(token_ids) - len(inner)
    before = next((n for n in range(around + 1) if token_ids[n : n + len(inner)] == inner), None)
    if before is None or not inner:
        return _shared(echo, texts_of(tokenizer.backend_tokenizer, token_ids))
    texts = texts_of(tokenizer.backend_tokenizer, inner)
    if "".join(texts) != echo:
        starts = [0, *(start for start, _ in encoded["offset_mapping"][1:]), len(echo)]
        texts = [echo[a:b] for a, b in pairwise(starts)]
    return [""] * before + texts + [""] * (around - before)


def _shared(text: str, pieces: list[str]) -> list[str]:
    """The text cut into parts as long as the pieces; the last one gets the rest."""
    parts, start = [], 0
    for piece in pieces:
        parts.append(text[start : start + len(piece)])
        start += len(piece)
    parts[-1] += text[start:]
    return parts


# ------------------------------------------------------------------------------------------------------------- chat


def chat_logprobs(tokenizer: Any, token_ids: list[int], positions: list[Position], k: int) -> ChatLogprobs:
    """The log-probabilities of these tokens for a chat answer, each with the k likeliest tokens of its place.

    The bytes of the tokens, joined, are those of the text. Tokens that share a character share its bytes.
    """
    entries = [position[token_id] for token_id, position in zip(token_ids, positions, strict=True)]
    texts = [token_text(token_id, entry) for token_id, entry in zip(token_ids, entries, strict=True)]
    raws = _shared_bytes(tokenizer, token_ids, texts)
    content = []
    for token_id, position, text, raw in zip(token_ids, positions, texts, raws, strict=True):
        own = _named(position[token_id], text, raw)
        likeliest = _by_rank(position)[:k]
        top = [own if other == token_id else _alternative(tokenizer, other, entry) for other, entry in likeliest]
        content.append(TokenLogprob(**own, top_logprobs=[TopLogprob(**each) for each in top]))
    return ChatLogprobs(content=content)


def _named(entry: Logprob, text: str, raw: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(raw)}


def _alternative(tokenizer: Any, token_id: int, entry: Logprob) -> dict[str, Any]:
    text, raw = token_text(token_id, entry), token_bytes(tokenizer, token_id)
    return _named(entry, text, text.encode() if raw is None or _is_text(raw) else raw)


def _is_text(raw: bytes) -> bool:
    return REPLACEMENT not in raw.decode(errors="replace")


def _shared_bytes(tokenizer: Any, token_ids: list[int], texts: list[str]) -> list[bytes]:
    """The bytes of each token of an answer, whose texts are `texts`.

    They are the text's; where tokens share a character, or hold bytes that are none, each has those that it brings.
    """
    result: list[bytes] = []
    group: list[int] = []  # of tokens without text, until one has text
    for token_id, text in zip(token_ids, texts, strict=True):
        group.append(token_id)
        if not text:
            continue
        own = [b""] * (len(group) - 1) + [text.encode()]
        if len(group) > 1 or REPLACEMENT in text:
            raws = [token_bytes(tokenizer, each) or b"" for each in group]
            brought = [b"" if _is_text(raw) else raw for raw in raws[:-1]] + raws[-1:]
            if b"".join(brought).decode(errors="replace") == text:
                own = brought
        result += own
        group = []
    return result + [b""] * len(group)


def token_bytes(tokenizer: Any, token_id: int) -> bytes | None:
    """The bytes that a token stands for by itself, or None if they are not known.

    They are its text's, unless it holds only a part of a character. Then the vocabulary has them: SentencePiece writes a byte
    as ``<0xE2>``, byte-level BPE gives each byte a printable character.
    """
    if tokenizer is None:
        return None
    text: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if REPLACEMENT not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters of GPT-2's byte-level BPE: printable bytes stand for themselves, the others, in order, for the
    code points from 256 on (Radford et al. 2019, `encoder.py:bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
