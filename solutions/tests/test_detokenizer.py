"""Tokens into text (`Detokenizer`) and stop strings (`StopStrings`).

Oracles: the tokenizer's own decode of all ids at once, Python's UTF-8 decoder, and `str.find` over the whole text.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from solutions.core.text.detokenizer import MAX_HELD, Detokenizer, StopStrings, special_token_ids
from solutions.models.loader import load_tokenizer, resolve_model

VOCAB_SIZE = 49_152
TEXTS = {
    "ascii": "The quick brown fox jumps over the lazy dog, 12,345 times.\n\n\tdef f(x): return x ** 2\n",
    "accents": "Zażółć gęślą jaźń; Ærøskøbing, crème brûlée, naïve façade, ďábelské ódy",
    "cjk": "今天天气如何？日本語の文章。한국어 문장도 있다. 龘靐齉",
    "emoji": "🙂 ok 🎉🎉 👍🏽 🇩🇪 flags",
    "zwj": "family 👨‍👩‍👧‍👦 and 🏳️‍🌈, heart ❤️‍🔥",
    "combining": "e\u0301 a\u0308\u0304 n\u0303 Z\u0351\u036b\u0343\u036a\u0302 กำลัง",
    "rtl": "שלום עולם مرحبا بالعالم",
    "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010fffd end",
    "replacement": "a \ufffd b \ufffd\ufffd",
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model("smollm2-135m"))


@pytest.fixture(scope="session")
def byte_tokens(tokenizer: Any) -> list[int]:
    """The token that is exactly one byte, for each of the 256 that the vocabulary has (-1 for the others)."""
    # GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    ids = [tokenizer.backend_tokenizer.token_to_id(letters[byte]) for byte in range(256)]
    return [-1 if token is None else token for token in ids]


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    """A small vocabulary of Llama 2's kind: words that begin with ▁, and a token for each byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁▁", "▁Hello", "▁world", "He", "llo", "A", "!", "\n", "é", "你", "▁[/INST]"]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def read(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    """The pieces that a Detokenizer gives for each token, and at the end."""
    tokens = list(prompt)
    detokenizer = Detokenizer(tokenizer, tokens, len(prompt), special_token_ids(tokenizer) if skip else frozenset())
    pieces = []
    for token in output:
        tokens.append(token)
        pieces.append(detokenizer.step())
    return [*pieces, detokenizer.finish(len(tokens))]


def read_at_once(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    special_ids = special_token_ids(tokenizer) if skip else frozenset()
    return Detokenizer(tokenizer, [*prompt, *output], len(prompt), special_ids).finish(len(prompt) + len(output))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_pieces_add_up_and_end_on_whole_characters_at_every_boundary(tokenizer: Any, text: str) -> None:
    ids = encode(tokenizer, text)
    backend = tokenizer.backend_tokenizer
    for cut in range(1, len(ids)):
        pieces = read(backend, encode(tokenizer, "Prompt: "), ids[:cut])
        assert "".join(pieces) == tokenizer.decode(ids[:cut])
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(pieces[:-1]), "half a character came out"


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_output_goes_on_behind_the_prompt_wherever_it_ends(tokenizer: Any, text: str) -> None:
    """Prompt and output meet at every token boundary, also inside a character, which then belongs to the output."""
    ids = encode(tokenizer, text)
    for cut in range(1, len(ids)):
        prompt_text = tokenizer.decode(ids[:cut])
        whole = prompt_text.rstrip("\ufffd") if not text.startswith(prompt_text) else prompt_text
        pieces = read(tokenizer.backend_tokenizer, ids[:cut], ids[cut:])
        assert "".join(pieces) == text[len(whole) :]
        assert read_at_once(tokenizer.backend_tokenizer, ids[:cut], ids[cut:]) == text[len(whole) :]


def test_prompt_that_ends_inside_a_character_never_comes_out(tokenizer: Any, byte_tokens: list[int]) -> None:
    """vLLM issue 48853: the whole prompt was streamed back."""
    half = [byte_tokens[byte] for byte in "🌶".encode()[:2]]
    rest = [byte_tokens[byte] for byte in "🌶".encode()[2:]]
    prompt = [*encode(tokenizer, "Hello world "), *half]
    assert read(tokenizer.backend_tokenizer, prompt, [*rest, *encode(tokenizer, " hot")]) == ["", "🌶", " hot", ""]
    assert "".join(read(tokenizer.backend_tokenizer, prompt, encode(tokenizer, "plain"))) == "plain"
    assert "".join(read(tokenizer.backend_tokenizer, prompt, rest[:1])) == ""


def test_special_tokens(tokenizer: Any) -> None:
    ids = [1, *encode(tokenizer, "user 你"), 2, *encode(tokenizer, " done"), 2]
    backend = tokenizer.backend_tokenizer
    assert "".join(read(backend, [1, 1, 2], ids)) == "user 你 done"
    assert "".join(read(backend, [1, 1, 2], ids, skip=False)) == "<|im_start|>user 你<|im_end|> done<|im_end|>"
    assert special_token_ids(backend) == set(tokenizer.all_special_ids) | special_token_ids(backend)
    assert all(tokenizer.decode([token], skip_special_tokens=True) == "" for token in special_token_ids(backend))


def test_special_tokens_inside_a_character_do_not_break_it(tokenizer: Any, byte_tokens: list[int]) -> None:
    first, second, third = (byte_tokens[byte] for byte in "你".encode())
    ids = [first, *[2] * (2 * MAX_HELD), second, third]
    assert "".join(read(tokenizer.backend_tokenizer, [5], ids)) == "你"


any_token = st.one_of(st.integers(0, VOCAB_SIZE - 1), st.integers(0, 400))  # the low ids are special tokens and bytes


@settings(max_examples=400, deadline=None)
@given(prompt=st.lists(any_token, min_size=1, max_size=12), ids=st.lists(any_token, max_size=60), skip=st.booleans())
def test_random_tokens(tokenizer: Any, prompt: list[int], ids: list[int], skip: bool) -> None:
    """Whatever the ids, the pieces add up to what decoding all at once adds to the prompt's text."""
    backend = tokenizer.backend_tokenizer
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    both = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    text = "".join(read(backend, prompt, ids, skip))
    assert text == read_at_once(backend, prompt, ids, skip)
    if before.endswith("\ufffd"):  # the last character may belong to both
        assert both.endswith(text)
        assert len(before.rstrip("\ufffd")) <= len(both) - len(text) <= len(before)
    else:
        assert both == before + text
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=80))
def test_invalid_utf8_reads_as_python_reads_it(tokenizer: Any, byte_tokens: list[int], data: bytes) -> None:
    ids = [byte_tokens[byte] for byte in data if byte_tokens[byte] >= 0]
    expected = bytes(byte for byte in data if byte_tokens[byte] >= 0).decode("utf-8", errors="replace")
    assert "".join(read(tokenizer.backend_tokenizer, encode(tokenizer, "x"), ids)) == expected


def test_endless_garbage_comes_out_in_time(tokenizer: Any, byte_tokens: list[int]) -> None:
    lead = byte_tokens["你".encode()[0]]
    pieces = read(tokenizer.backend_tokenizer, encode(tokenizer, "x"), [lead] * 500)
    assert "".join(pieces) == "\ufffd" * 500
    silent, longest = 0, 0
    for piece in pieces[:-1]:
        silent = 0 if piece else silent + 1
        longest = max(longest, silent)
    assert longest < MAX_HELD


def test_a_long_text_of_split_characters_stays_whole(tokenizer: Any) -> None:
    text = "龘靐齉🌶" * MAX_HELD
    pieces = read(tokenizer.backend_tokenizer, encode(tokenizer, "x"), encode(tokenizer, text))
    assert pieces.count("") > 2 * MAX_HELD, "far more tokens wait, one after the other, than may wait together"
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


def test_garbage_before_a_character_does_not_break_it(tokenizer: Any, byte_tokens: list[int]) -> None:
    """The character's first bytes are the last of the held tokens when these are let go."""
    lead, *rest = (byte_tokens[byte] for byte in "🌶".encode())
    for garbage in range(2 * MAX_HELD):
        ids = [lead] * (garbage + 1) + rest
        assert "".join(read(tokenizer.backend_tokenizer, encode(tokenizer, "x"), ids)) == "\ufffd" * garbage + "🌶"


def test_errors_of_the_tokenizer_pass(tokenizer: Any) -> None:
    with pytest.raises((TypeError, OverflowError)):
        Detokenizer(tokenizer.backend_tokenizer, [5, -1], 1).step()


def test_byte_fallback_keeps_the_first_space(llama: Tokenizer) -> None:
    ids = {word: llama.token_to_id(word) for word in ("<s>", "▁Hello", "▁world", "▁", "▁[/INST]", "A", "!")}
    hello, world, space, inst = ids["▁Hello"], ids["▁world"], ids["▁"], ids["▁[/INST]"]
    assert read(llama, [1, hello], [world, space, space, ids["A"]]) == [" world", " ", " ", "A", ""]
    assert read_at_once(llama, [1, hello], [world, space, space, ids["A"]]) == " world  A"
    assert read(llama, [1, inst], [hello]) == [" Hello", ""]
    assert read(llama, [1, hello, *[2] * 20], [world]) == [" world", ""], "special tokens are no text to begin after"
    assert read(llama, [1], [hello, world]) == ["Hello", " world", ""], "the text itself begins here"


def test_byte_fallback_survives_invalid_prefix(llama: Tokenizer) -> None:
    """vLLM issue 17448: a stray byte makes U+FFFD of the whole run of byte tokens, also of what is already out."""
    runs = [llama.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    stray, letter, hello = llama.token_to_id("<0xFF>"), llama.token_to_id("A"), llama.token_to_id("▁Hello")
    ids = [*runs, stray, letter, hello, *runs, letter]
    pieces = read(llama, [1, hello], ids)
    assert pieces == ["", "", "你", "", "\ufffdA", " Hello", "", "", "你", "A", ""]
    assert read_at_once(llama, [1, hello], ids) == "".join(pieces)


def test_byte_fallback_after_a_long_run_of_bytes(llama: Tokenizer) -> None:
    """A context cut inside a character would spoil the run of bytes that goes on in the output."""
    run = [llama.token_to_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    for more in range(3):
        prompt = [1, llama.token_to_id("A"), *run * 40, *run[:more]]
        ids = [*run[more:], *run]
        assert "".join(read(llama, prompt, ids)) == "你你"
        assert read_at_once(llama, prompt, ids) == "你你"


def test_byte_fallback_after_a_prompt_that_is_no_text(llama: Tokenizer) -> None:
    """A stray byte spoils the byte before it too, yet the space that follows belongs to the output."""
    zero, stray, inst = llama.token_to_id("<0x00>"), llama.token_to_id("<0x80>"), llama.token_to_id("▁[/INST]")
    assert read(llama, [zero, stray], [inst]) == [" [/INST]", ""]
    assert read_at_once(llama, [zero, stray], [inst]) == " [/INST]"


@settings(max_examples=400, deadline=None)
@given(prompt=st.lists(st.integers(0, 270), min_size=1, max_size=12), ids=st.lists(st.integers(0, 270), max_size=40))
def test_byte_fallback_random_tokens_read_alike_at_once(llama: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    assert "".join(read(llama, prompt, ids)) == read_at_once(llama, prompt, ids)


def stop_text(pieces: list[str], stops: list[str], include: bool = False) -> tuple[list[str], str | None]:
    finder, given_out = StopStrings(stops, include), []
    for piece in pieces:
        given_out.append(finder.push(piece))
        if finder.matched is not None:
            return given_out, finder.matched
    return [*given_out, finder.flush()], None


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "matched"),
    [
        (["one two"], ["two"], "one ", "two"),
        (["one t", "wo three"], ["two"], "one ", "two"),
        (["a", "b", "c", "d"], ["bcd"], "a", "bcd"),
        (["one two"], ["one two"], "", "one two"),
        (["one"], ["o"], "", "o"),
        (["abc"], ["bc", "ab"], "", "ab"),
        (["abc"], ["abc", "ab"], "", "abc"),
        (["abc"], ["ab", "abc"], "", "ab"),
        (["ab", "c"], ["abc", "ab"], "", "ab"),
        (["aab", "aac"], ["aac"], "aab", "aac"),
        (["a", "a", "a", "b"], ["aab"], "a", "aab"),
        (["mississippi"], ["issip"], "miss", "issip"),
        (["x", "🙂", "é"], ["🙂é"], "x", "🙂é"),
        (["x", "", "y"], ["xy"], "", "xy"),
        (["ab"], ["abc"], "ab", None),
        ([], ["abc"], "", None),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], text: str, matched: str | None) -> None:
    out, found = stop_text(pieces, stops)
    assert ("".join(out), found) == (text, matched)
    out, found = stop_text(pieces, stops, include=True)
    assert ("".join(out), found) == (text + (matched or ""), matched)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abé", max_size=4), max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_stop_strings_agree_with_a_search_of_all_text_after_each_piece(pieces: list[str], stops: list[str]) -> None:
    expected, matched, whole = "", None, ""
    for piece in pieces:
        whole += piece
        hits = [(whole.find(stop), n) for n, stop in enumerate(stops) if stop in whole]
        if hits:
            at, n = min(hits)
            matched, expected = stops[n], whole[:at]
            break
    else:
        expected = whole
    out, found = stop_text(pieces, stops)
    assert ("".join(out), found) == (expected, matched)
    given_out, seen = "", ""
    for piece, text in zip(pieces, out[:-1], strict=False):
        given_out, seen = given_out + text, seen + piece
        held = len(seen) - len(given_out)
        assert held == min(len(seen), max(map(len, stops)) - 1), "exactly the longest stop less one is held back"
