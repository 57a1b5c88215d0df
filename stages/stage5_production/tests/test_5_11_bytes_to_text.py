"""Task 5.11 ★: bytes that are no text yet, no text ever, or that change what the bytes before them were."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from stages.core.text.detokenizer import MAX_HELD, Detokenizer, special_token_ids
from stages.course.fixtures.checks import check_equal

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that stand for themselves in GPT-2's vocabulary; the others are the characters from U+0100 on."""
HOT = "🌶"
YOU, GOOD = "你好"
SEAMS = [YOU.encode()[1:] + GOOD.encode()[:1], HOT.encode()[2:] + GOOD.encode()[:1], YOU.encode()[1:] + b"\x80"]
YOU_GOOD, HOT_GOOD, YOU_STRAY = range(257, 260)
"""Tokens that end one character and begin another, or what is none: such vocabularies have them."""


def byte_level() -> Tokenizer:
    """A vocabulary of GPT-2's kind: a special token, token 1 + n for each byte n, and `SEAMS`."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    letters = [chr(byte if byte in PRINTABLE else 256 + others.index(byte)) for byte in range(256)]
    words = ["<end>", *letters, *("".join(letters[byte] for byte in seam) for seam in SEAMS)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A vocabulary of Llama 2's kind: a special token, token 1 + n for each byte n, and words that begin with ▁. Of bytes in a
    row that are no text each one is U+FFFD, also those that were characters without the others."""
    words = ["<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<end>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


WORDS = ["▁Hello", "▁world", "▁", "A", "é"]
HELLO, WORLD, SPACE, LETTER, ACCENT = range(257, 262)
LEVEL, FALLBACK = byte_level(), byte_fallback()
BOTH = pytest.mark.parametrize("tokenizer", [LEVEL, FALLBACK], ids=["byte level", "byte fallback"])


def of(data: bytes) -> list[int]:
    """Tokens of single bytes, in either vocabulary."""
    return [1 + byte for byte in data]


def letter(tokenizer: Tokenizer) -> int:
    """The token that is the letter A, and part of no run of bytes."""
    return tokenizer.token_to_id("A")


def reader(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> Detokenizer:
    """One that has read a prompt and this much of what follows."""
    detokenizer = Detokenizer(tokenizer, [*prompt, *output], len(prompt), special_token_ids(tokenizer))
    for _ in output:
        detokenizer.step()
    return detokenizer


def read(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """The piece of each token, and what comes at the end."""
    tokens = list(prompt)
    detokenizer = Detokenizer(tokenizer, tokens, len(prompt), special_token_ids(tokenizer))
    pieces = []
    for token in output:
        tokens.append(token)
        pieces.append(detokenizer.step())
        check_equal(detokenizer.offset, len(tokens), "the next token to read")
    return [*pieces, detokenizer.finish(len(tokens))]


# What tokens add


def test_a_token_is_read_behind_what_stands_there() -> None:
    """Words of a vocabulary with ▁, behind a word, a space, and nothing.

    Why: such a vocabulary's decoder takes the space off a text's first word. A word by itself is always a first one.
    """
    words = [WORLD, SPACE, LETTER, ACCENT]
    check_equal(reader(FALLBACK, [HELLO], []).would_add(words), [" world", " ", "A", "é"], "what words add behind a word")
    check_equal(reader(FALLBACK, [HELLO], [SPACE]).would_add(words), [" world", " ", "A", "é"], "what they add behind a space")
    check_equal(reader(FALLBACK, [0], []).would_add([HELLO, LETTER]), ["Hello", "A"], "what they add behind nothing")


@BOTH
@pytest.mark.parametrize("known", [1, 2, 3])
@pytest.mark.parametrize("asked", [0, 1])
def test_who_finishes_a_character_has_all_of_it(tokenizer: Tokenizer, known: int, asked: int) -> None:
    """A prompt ends in some bytes of 🌶. With the rest of them comes 🌶; with a letter instead comes the letter.

    Why: half a character is nobody's text. What the prompt left unfinished is no part of an answer that does not finish it: it
    would begin with U+FFFD.
    """
    a, start, rest = letter(tokenizer), of(HOT.encode()[:known]), of(HOT.encode()[known:])
    prompt, output = [a, *start[: known - asked]], [*start[known - asked :], *rest[:-1]]
    detokenizer = reader(tokenizer, prompt, output)
    check_equal(detokenizer.would_add(rest[-1:]), [HOT], "what the last byte adds")
    check_equal(reader(tokenizer, [a, *start], []).would_add([a]), ["A"], "what a letter adds behind the others")
    check_equal("".join(read(tokenizer, prompt, [*output, rest[-1], a])), f"{HOT}A", "the text")


@BOTH
@pytest.mark.parametrize("known", [1, 2, 3])
def test_what_finishes_the_prompts_character_is_given_once(tokenizer: Tokenizer, known: int) -> None:
    """A prompt ends in some bytes of 🌶 and the answer has the others, then a letter, then two bytes of 你 and no more.

    Why: the stream behind such a prompt gives its first text with what the prompt had. After that it is like any other: nothing
    waits, nothing comes twice, and what is asked is asked behind all of it.
    """
    a, prompt, rest = letter(tokenizer), of(HOT.encode()[:known]), of(HOT.encode()[known:])
    detokenizer = reader(tokenizer, [letter(tokenizer), *prompt], rest[:-1])
    check_equal(detokenizer.holds, known < 3, "whether some are held before the last byte")
    detokenizer.tokens.append(rest[-1])
    check_equal(detokenizer.step(), HOT, "what the last byte adds")
    check_equal((detokenizer.holds, detokenizer.offset), (False, 5), "whether some are held, and the next token")
    check_equal(detokenizer.would_add([a, *of(YOU.encode()[:1])]), ["A", ""], "what others would add then")
    check_equal(detokenizer.finish(5), "", "what comes at the end, if this is it")
    tail = [a, *of(YOU.encode()[:2])]
    whole = tokenizer.decode([a, *of(HOT.encode()), *tail]).removeprefix(f"A{HOT}")
    pieces = read(tokenizer, [a, *prompt], [*rest, *tail])
    check_equal(pieces, [*[""] * (3 - known), HOT, "A", "", "", whole.removeprefix("A")], "the pieces")


@BOTH
def test_garbage_behind_half_a_character_of_the_prompt(tokenizer: Tokenizer) -> None:
    """A prompt ends in a byte of 🌶, and the answer is the first byte of 你, 40 times.

    Why: the stream has begun inside a character and has no text for long. What the prompt left is not the answer's, and what
    cannot be a character goes out all the same.
    """
    a, lead = letter(tokenizer), of(YOU.encode()[:1])
    pieces = read(tokenizer, [a, *of(HOT.encode()[:1])], lead * 40)
    check_equal("".join(pieces), "\ufffd" * 40, "the text")
    check_equal(
        [len(piece) for piece in pieces[: MAX_HELD + 1]], [*[0] * (MAX_HELD - 1), 13, 0], "characters of the first pieces"
    )


def test_behind_the_prompts_character_as_much_is_held_as_ever() -> None:
    """A prompt ends in the first byte of 🌶; the answer finishes it and goes on with the first byte of 你, 40 times.

    Why: what waited for the first character neither counts towards what may wait for the next nor makes room for more.
    """
    hot, lead = HOT.encode(), of(YOU.encode()[:1])
    pieces = read(LEVEL, [letter(LEVEL), *of(hot[:1])], [*of(hot[1:]), *lead * 40])[len(hot) - 1 :]
    check_equal([len(piece) for piece in pieces[: MAX_HELD + 1]], [*[0] * (MAX_HELD - 1), 13, 0], "characters behind the first")


@BOTH
def test_half_a_character_is_nothing_until_the_end(tokenizer: Tokenizer) -> None:
    """Two of the three bytes of 你 behind a letter: no text, and U+FFFD when nothing more comes.

    Why: a stream cannot take U+FFFD back. But at the end a client gets what a decode of all tokens would give.
    """
    a = letter(tokenizer)
    tokens = [a, *of(YOU.encode()[:2])]
    detokenizer = reader(tokenizer, [a], tokens[:2])
    check_equal(detokenizer.would_add(tokens[2:]), [""], "what the second byte adds")
    whole = tokenizer.decode([a, *tokens])
    check_equal(read(tokenizer, [a], tokens), ["A", "", "", whole.removeprefix("AA")], "the pieces")


def test_what_is_out_stays_out() -> None:
    """你, a byte that is never text, a letter; then 你 again. In one run the byte makes U+FFFD of the 你 that is out.

    Why: the run's text is now another one, and the stream of the library gives up ("Invalid prefix"). The client has 你 and
    goes on from there: it gets the byte's U+FFFD once, and all that follows.
    """
    run = of(YOU.encode())
    tokens = [*run, *of(b"\xff"), LETTER, HELLO, *run, LETTER]
    pieces = ["", "", YOU, "", "\ufffdA", " Hello", "", "", YOU, "A", ""]
    check_equal(read(FALLBACK, [HELLO], tokens), pieces, "the pieces")
    letter_as_byte = [*run, *of(b"\xffA")]
    check_equal("".join(read(FALLBACK, [HELLO], letter_as_byte)), f"{YOU}\ufffd\ufffd", "the text where the run goes on")


def test_a_run_that_is_text_again_comes_once() -> None:
    """你好 as bytes: with the first bytes of 好 the run is U+FFFD, with the last one it is text again.

    Why: this is how every character beyond the vocabulary is written. 你 is out by then.
    """
    tokens = of(f"{YOU}{GOOD}".encode())
    detokenizer = reader(FALLBACK, [HELLO], tokens[:-1])
    check_equal(detokenizer.would_add([tokens[-1], LETTER]), [GOOD, "\ufffd\ufffdA"], "what the last byte and a letter add")
    check_equal(read(FALLBACK, [HELLO], tokens), ["", "", YOU, "", "", GOOD, ""], "the pieces")
    prompt = [HELLO, *tokens[:4]]
    check_equal(reader(FALLBACK, prompt, tokens[4:5]).would_add(tokens[5:]), [GOOD], "what it adds where the prompt has a byte")


def test_a_prompt_that_is_no_text_is_no_excuse() -> None:
    """A prompt ends in a letter as a byte and a stray one, which makes U+FFFD of both; then comes a word.

    Why: the prompt's bytes changed each other, not the word. It has its space, and none of the prompt's U+FFFD.
    """
    prompt = of(b"A\x80")
    check_equal(reader(FALLBACK, prompt, []).would_add([WORLD, LETTER]), [" world", "A"], "what words add")
    check_equal(read(FALLBACK, prompt, [WORLD, WORLD]), [" world", " world", ""], "the pieces")


# Asking


@BOTH
def test_a_question_changes_nothing(tokenizer: Tokenizer) -> None:
    """Asked twice in the middle of a character, for a special token, half a character, the rest of it, and a letter.

    Why: log-probabilities show what other tokens would have added. They are asked for between any two steps.
    """
    a, tokens = letter(tokenizer), of(HOT.encode())
    detokenizer = Detokenizer(tokenizer, [a, *tokens], 1, special_token_ids(tokenizer))
    for count in range(3):
        detokenizer.would_add(tokens)
        check_equal(detokenizer.step(), "", f"what byte {count} adds")
    asked, answer = [0, tokens[0], tokens[3], a], ["", "", HOT, tokenizer.decode([*tokens[:3], a])]
    for _ in range(2):
        check_equal(detokenizer.would_add(asked), answer, "what they would add")
        check_equal((detokenizer.offset, detokenizer.holds), (4, True), "the next token, and whether some are held")
    check_equal(detokenizer.step(), HOT, "what the last byte adds")


@BOTH
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_question_says_what_a_step_does(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Any tokens: what the next one would add is what it adds. Only of text that ends in U+FFFD a question says nothing.

    Why: the texts of the tokens, joined, are the text; who looks at alternatives relies on the same for them.
    """
    some = st.sampled_from([*of(f"aé{YOU}{HOT}".encode() + b"\xff\x00"), 0, *range(257, tokenizer.get_vocab_size())])
    tokens = data.draw(st.lists(some, min_size=1, max_size=4))
    detokenizer = Detokenizer(tokenizer, tokens, len(tokens), special_token_ids(tokenizer))
    for token in data.draw(st.lists(some, min_size=1, max_size=30)):
        [asked] = detokenizer.would_add([token])
        tokens.append(token)
        piece = detokenizer.step()
        check_equal(asked, "" if piece.endswith("\ufffd") else piece, f"what token {token} would add behind {tokens[:-1]}")


# What never becomes text


def test_garbage_goes_out_but_for_its_last_three() -> None:
    """The first byte of 你, again and again: nothing for 15 tokens, then 13 U+FFFD, and 13 more every 13 tokens.

    Why: a model that has lost its way writes such bytes for minutes. A client has to see it; and the library's stream would
    decode all that it holds at every token.
    """
    lead = of(YOU.encode()[:1])
    pieces = read(LEVEL, of(b"x"), lead * (MAX_HELD + 14))
    check_equal([len(piece) for piece in pieces], [*[0] * 15, 13, *[0] * 12, 13, 0, 4], "characters of each piece")
    check_equal("".join(pieces), "\ufffd" * (MAX_HELD + 14), "the text")
    check_equal("".join(read(FALLBACK, [LETTER], lead * 40)), "\ufffd" * 40, "the text with byte fallback")


@pytest.mark.parametrize("character", ["é", YOU, HOT])
def test_a_character_after_garbage_is_whole(character: str) -> None:
    """Behind 0 to 40 stray bytes a character, as its bytes.

    Why: wherever garbage is let go, the last bytes of it may be the first ones of a character.
    """
    for count in range(40):
        text = "".join(read(LEVEL, of(b"x"), [*of(b"\xff" * count), *of(character.encode()), *of(b".")]))
        check_equal(text, "\ufffd" * count + f"{character}.", f"the text with {count} stray bytes")


@pytest.mark.parametrize(
    ("begun", "seam", "behind"),
    [(YOU, YOU_GOOD, GOOD.encode()[1:2]), (HOT, HOT_GOOD, GOOD.encode()[1:2]), (YOU, YOU_STRAY, HOT.encode())],
    ids=["three bytes", "four bytes", "garbage at the seam"],
)
def test_the_cut_splits_no_character(begun: str, seam: int, behind: bytes) -> None:
    """Any amount of garbage, then a character whose last token begins something else, then what goes on with that.

    Why: wherever garbage is let go, the cut may lie between those two. Both sides by themselves would be U+FFFD. But no cut may
    lie later than it must: what is behind it can be the beginning of a character.
    """
    data = begun.encode()[: len(begun.encode()) - len(SEAMS[seam - YOU_GOOD]) + 1]
    for count in range(24):
        tokens = [*of(b"\xff" * count), *of(data), seam, *of(behind), *of(b"\xff\xff.")]
        whole = b"\xff" * count + data + SEAMS[seam - YOU_GOOD] + behind + b"\xff\xff."
        text = "".join(read(LEVEL, of(b"x"), tokens))
        check_equal(text, whole.decode("utf-8", errors="replace"), f"the text with {count} stray bytes")


def test_no_more_is_kept_than_can_be_the_beginning_of_a_character() -> None:
    """Twelve stray bytes, 你 in two tokens, of which the second begins 好, a byte more of that, and a stray byte: 16 tokens.
    The last three may not be cut off, nor the last two; the last one may.

    Why: what is kept is kept from the client, and read again. A cut that moves towards the beginning keeps whole characters.
    """
    tokens = [*of(b"\xff" * 12), *of(YOU.encode()[:1]), YOU_GOOD, *of(GOOD.encode()[1:2]), *of(b"\xff")]
    pieces = read(LEVEL, of(b"x"), tokens)
    check_equal(pieces, [*[""] * 15, "\ufffd" * 12 + f"{YOU}\ufffd", "\ufffd"], "the pieces, and what comes at the end")


def test_letting_go_begins_anew() -> None:
    """After garbage was let go the last three tokens are held, and no more; after the stream gave up, none.

    Why: the count of what is held decides when the next garbage goes, and `holds` whether a token's text is known.
    """
    stray = of(b"\xff")
    detokenizer = reader(LEVEL, of(b"x"), stray * MAX_HELD)
    check_equal((detokenizer.holds, detokenizer.offset), (True, 1 + MAX_HELD), "whether some are held, and the next token")
    check_equal(detokenizer.would_add(of(b"A")), ["\ufffd" * 3 + "A"], "what a letter would add")
    check_equal(detokenizer.finish(1 + MAX_HELD), "\ufffd" * 3, "what comes at the end")
    given_up = reader(FALLBACK, [HELLO], [*of(YOU.encode()), *stray, LETTER])
    check_equal(given_up.holds, False, "whether some are held after the stream gave up")
    check_equal(given_up.would_add([WORLD]), [" world"], "what a word would add")
    check_equal(given_up.finish(6), "", "what comes at the end")


@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(
    prompt=st.lists(st.sampled_from(list(f"a{YOU}{HOT}".encode())), min_size=1, max_size=6).map(bytes),
    output=st.lists(st.sampled_from(list(f"a{YOU}{HOT}".encode() + b"\xff")), max_size=60).map(bytes),
)
def test_any_bytes_read_as_python_reads_them(prompt: bytes, output: bytes) -> None:
    """Bytes of some characters in any order, behind a prompt of such bytes: the pieces add up to what Python's decoder makes of
    both, less what it makes of the prompt alone.

    Why: how many U+FFFD stand for bytes that are no text is a rule of Unicode, and a cut at the wrong byte makes two of one.
    """
    before, both = (data.decode("utf-8", errors="replace") for data in (prompt, prompt + output))
    shared = next(n for n in range(len(before), -1, -1) if both.startswith(before[:n]))
    pieces = read(LEVEL, of(prompt), of(output))
    check_equal("".join(pieces), both[shared:], "the text")
    silent = [at for at, piece in enumerate(["-", *pieces[:-1], "-"]) if piece]
    longest = max(after - at for at, after in pairwise(silent)) - 1
    assert longest < MAX_HELD, f"nothing came out for {longest} tokens"
