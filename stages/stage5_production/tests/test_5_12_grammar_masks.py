"""Task 5.12 ★: which tokens may come next, along an answer and along drafts, and what becomes of the logits."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.core.structured.guide import Guide, by_guide, forbid
from stages.course.fixtures.checks import check_equal

xgrammar = pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")

END = 31
"""The token that ends an answer: the highest bit of the first word, which makes it negative."""
SIZE = 70
"""Tokens, of which the last are in a third word."""
WIDTH = 80
"""Columns of the logits. Those behind the tokens pad them to a size that kernels like."""
TEXTS = {0: "a", 1: "b", 30: "c", 32: "ab", 33: "bc", 62: "ca", 63: "abc", 64: "d", 69: "cd"}
VOCABULARY = [TEXTS.get(token, f"<{token}>") for token in range(SIZE)]
CHOICES = ("abcab", "abd", "abcd", "cab", "cd")
A, B, C, AB, BC, CA, ABC, D, CD = TEXTS


@functools.cache
def compiled(choices: tuple[str, ...]) -> Any:
    """The automaton of an answer that is one of these texts."""
    info = xgrammar.TokenizerInfo(VOCABULARY, stop_token_ids=[END])
    grammar = f"root ::= {' | '.join(json.dumps(choice) for choice in choices)}"
    return xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar)


def fits(output: list[int], choices: tuple[str, ...] = CHOICES) -> bool:
    """Whether some choice begins with this output, or is it, where it has ended."""
    text = "".join(VOCABULARY[token] for token in output if token != END)
    if END in output:
        return text in choices and output.index(END) == len(output) - 1
    return any(choice.startswith(text) for choice in choices)


def may_follow(output: list[int], choices: tuple[str, ...] = CHOICES) -> list[int]:
    """The tokens after which a choice is still possible: each is tried. Behind an end, and behind what does not fit, all."""
    if END in output or not fits(output, choices):
        return list(range(SIZE))
    return [token for token in range(SIZE) if fits([*output, token], choices)]


def asked(guide: Guide, *outputs: list[int]) -> list[list[int]]:
    """What the guide allows behind each of these outputs, by its masks."""
    masks = torch.randint(-(2**31), 2**31, (len(outputs), 3), generator=torch.Generator().manual_seed(0)).int()
    given = [list(output) for output in outputs]
    guide.allow(list(outputs), masks)
    check_equal([list(output) for output in outputs], given, "the outputs that were given")
    words = [[word % 2**32 for word in row] for row in masks.tolist()]
    return [[token for token in range(SIZE) if row[token // 32] & 1 << token % 32] for row in words]


def check_allowed(guide: Guide, *outputs: list[int], choices: tuple[str, ...] = CHOICES) -> None:
    """The first output is certain; each other one is the one before and a draft."""
    bad = next((row for row, output in enumerate(outputs) if not fits(output, choices) or END in output), len(outputs))
    for row, (found, output) in enumerate(zip(asked(guide, *outputs), outputs, strict=True)):
        expected = may_follow(output, choices) if row < bad else list(range(SIZE))
        check_equal(found, expected, f"tokens that may follow {output}, row {row} of {len(outputs)}")


@dataclass
class Place:
    """What a step has in a row of its logits: an answer in the making, with or without a form."""

    output_token_ids: list[int]
    guide: Guide | None = None


@pytest.mark.parametrize("answer", [[ABC, AB, END], [AB, C, A, B, END], [A, BC, D, END], [CD, END], [C, A, B, END]])
def test_what_may_follow_is_known_at_every_token(answer: list[int]) -> None:
    """Five texts are allowed. Along an answer, in tokens of one to three letters, each token that keeps one of them possible
    may come, and the end only where a text is whole.

    Why: a token too few and the model cannot say what it would; one too many, and the answer is no JSON.
    """
    guide = Guide(compiled(CHOICES))
    for length in range(len(answer)):
        check_allowed(guide, answer[:length])
    check_equal(guide.has_ended, False, "whether it has ended before its end")
    check_allowed(guide, answer)
    check_equal(guide.has_ended, True, "whether it has ended")


def test_the_same_place_can_be_asked_again() -> None:
    """Several tokens come at once, and the same output twice; then one more.

    Why: accepted drafts arrive together. After a preemption a step is done again. A token that the automaton takes twice puts
    it into another place.
    """
    guide = Guide(compiled(CHOICES))
    for output in ([], [], [A, BC], [A, BC], [A, BC], [A, BC, A, B], [A, BC, A, B]):
        check_allowed(guide, output)


def test_drafts_are_followed_and_forgotten() -> None:
    """Behind `a` the drafts `b`, `c`, `d`: each row has what may follow its own. Then the answer goes on otherwise, with `b`
    and `d`, and with drafts of which none was kept.

    Why: drafts are guesses. An automaton that stays behind one allows what would follow the guess.
    """
    guide = Guide(compiled(CHOICES))
    check_allowed(guide, [A], [A, B], [A, B, C], [A, B, C, D])
    check_allowed(guide, [A], [A, BC])
    check_allowed(guide, [A, B], [A, B, C], [A, B, C, AB])
    check_allowed(guide, [A, B, D])
    check_equal(guide.has_ended, False, "whether it has ended")


def test_behind_a_draft_that_does_not_fit_anything_may_come() -> None:
    """The second of four drafts does not fit; the third would fit behind the first. What comes then is as if none had been.

    Why: that draft is rejected, so nobody reads the rows behind it. But what the automaton took before it must be taken back:
    one token, not two and not none.
    """
    guide = Guide(compiled(CHOICES))
    check_allowed(guide, [A], [A, B], [A, B, B], [A, B, B, C], [A, B, B, C, D])
    check_allowed(guide, [A], [A, C], [A, C, BC])
    check_allowed(guide, [A, BC], [A, BC, D])


def test_a_draft_may_end_the_answer() -> None:
    """A draft is the end of an answer, and more drafts follow. The answer itself has not ended.

    Why: behind its end the automaton has no mask to give, and refuses every token.
    """
    guide = Guide(compiled(CHOICES))
    check_allowed(guide, [C], [C, D], [C, D, END], [C, D, END, A], [C, D, END, A, B])
    check_equal(guide.has_ended, False, "whether it has ended, where only a draft has")
    check_allowed(guide, [C], [C, A])
    check_allowed(guide, [C, D, END], [C, D, END, A])
    check_equal(guide.has_ended, True, "whether it has ended")


def test_two_answers_of_one_form_are_two() -> None:
    """Two guides of one automaton, at different places, asked in turns.

    Why: forms are compiled once for all requests that have them.
    """
    first, second = Guide(compiled(CHOICES)), Guide(compiled(CHOICES))
    check_allowed(first, [A], [A, B])
    check_allowed(second, [], [C])
    check_allowed(first, [A, BC])
    check_allowed(second, [C, D])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_answer_with_any_drafts(data: st.DataObject) -> None:
    """Random texts of three letters are allowed. An answer grows by tokens that may follow, some at a time, with drafts of all
    kinds beside it.

    Why: what is certain and what is a guess come in every mixture.
    """
    choices = tuple(data.draw(st.lists(st.text("abcd", min_size=1, max_size=5), min_size=1, max_size=4, unique=True)))
    guide, output = Guide(compiled(choices)), list[int]()
    for _ in range(data.draw(st.integers(1, 5))):
        rows = [list(output)]
        for _ in range(data.draw(st.integers(0, 3))):
            good = [token for token in may_follow(rows[-1], choices) if token in (*TEXTS, END)]
            rows.append([*rows[-1], data.draw(st.sampled_from([*good, *good, *good, A, D, END]))])
        check_allowed(guide, *rows, choices=choices)
        for _ in range(data.draw(st.integers(0, 2))):
            if END not in output:
                output = [*output, data.draw(st.sampled_from(may_follow(output, choices)))]


def test_guides_are_found_with_their_rows() -> None:
    """Six rows: of a guide, of none, of another guide of the same form, of the first one again.

    Why: an answer and its drafts are rows of one guide, which follows them in one go. Two requests with the same form are two.
    """
    one, two = Guide(compiled(CHOICES)), Guide(compiled(CHOICES))
    places = [Place([]), Place([A], two), Place([A, B], two), Place([]), Place([C], one), Place([A, B, C], two)]
    found = by_guide(places)
    check_equal([[row for row, _ in rows] for _, rows in found], [[1, 2, 5], [4]], "rows of each guide")
    assert [guide for guide, _ in found] == [two, one], "the guides are not in the order of their first rows"
    assert all(place is places[row] for _, rows in found for row, place in rows), "a row has another's sequence"
    check_equal(by_guide([Place([]), Place([])]), [], "guides where no sequence has one")


def logits_of(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_may_not_come_has_no_chance_and_all_else_stays(dtype: torch.dtype) -> None:
    """Six rows: two answers of a form, one of them with a draft, between rows without a form; tokens in words one to three.

    Why: requests share a step. Whoever asked for no form must be answered as if nobody had, to the last bit; and columns behind
    the vocabulary are the kernel's, not the form's.
    """
    one, two = Guide(compiled(CHOICES)), Guide(compiled(("abd", "dab")))
    places = [Place([A]), Place([AB], one), Place([AB, CD], one), Place([]), Place([], two), Place([B])]
    choices = {1: CHOICES, 2: CHOICES, 4: ("abd", "dab")}
    logits = logits_of(len(places), dtype)
    expected = logits.clone()
    for row, form in choices.items():
        for token in set(range(SIZE)) - set(may_follow(places[row].output_token_ids, form)):
            expected[row, token] = -torch.inf
    forbid(logits, by_guide(places), SIZE)
    for row in range(len(places)):
        check_equal(logits[row].float(), expected[row].float(), f"logits of row {row}")


def test_several_guides_have_a_mask_for_each_of_their_rows() -> None:
    """Four answers of four forms, the second of them with two drafts, whose rows lie among the others': every row has what its
    own form allows.

    Why: masks lie one behind the other, guide by guide, and a guide fills as many as it has rows. One row further, or taken in
    the order of rows, it is another's form.
    """
    forms = [("ab",), ("abcd",), ("cd",), ("dab",)]
    guides = [Guide(compiled(form)) for form in forms]
    rows = [(0, []), (1, []), (2, []), (1, [A]), (3, []), (1, [A, B])]
    logits = torch.zeros(len(rows), SIZE)
    forbid(logits, by_guide([Place(output, guides[number]) for number, output in rows]), SIZE)
    for row, (number, output) in enumerate(rows):
        found = (logits[row] == 0).nonzero().flatten().tolist()
        check_equal(found, sorted(may_follow(output, forms[number])), f"tokens with a chance in row {row}")


def test_the_highest_bit_of_a_word_is_a_token() -> None:
    """Token 31, which ends answers: forbidden where the text is not whole, and alone allowed where it is.

    Why: words have a sign, and 31 is where it lies. A shift to the right draws ones behind it.
    """
    guide = Guide(compiled(("cd",)))
    for output, allowed in (([], [C, CD]), ([C], [D]), ([C, D], [END])):
        logits = torch.zeros(1, SIZE)
        forbid(logits, by_guide([Place(output, guide)]), SIZE)
        check_equal((logits[0] == 0).nonzero().flatten().tolist(), allowed, f"tokens with a chance behind {output}")


def test_a_vocabulary_of_whole_words_and_of_one_more() -> None:
    """64 tokens have two words; 65 have three. The logits have as many columns.

    Why: rounded down, the last tokens have no word; rounded up where nothing is over, there is a word that nobody fills.
    """
    for size, allowed in ((64, [A, AB, ABC]), (65, [A, AB, ABC, D])):
        info = xgrammar.TokenizerInfo(VOCABULARY[:size], stop_token_ids=[END])
        grammar = xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar('root ::= "abc" | "dab"')
        logits = torch.zeros(2, size)
        forbid(logits, by_guide([Place([]), Place([], Guide(grammar))]), size)
        found = [(row == 0).nonzero().flatten().tolist() for row in logits]
        check_equal(found[0], list(range(size)), f"tokens with a chance without a form, of {size}")
        check_equal(found[1], allowed, f"tokens with a chance, of {size}")
