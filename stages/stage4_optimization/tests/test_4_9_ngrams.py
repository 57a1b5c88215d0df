"""Task 4.9: drafts from the text itself, by what followed its last few tokens before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.speculative import NgramIndex
from stages.course.fixtures.checks import check_equal


def propose(tokens: list[int], count: int, min_n: int = 1, max_n: int = 3) -> list[int]:
    index = NgramIndex(min_n, max_n)
    index.update(tokens)
    return index.propose(tokens, count)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2], [3, 4, 9]),
        ([1, 2, 3, 1, 2, 4, 8, 8, 1, 2], [4, 8, 8]),  # the later of two occurrences
        ([5, 2, 7, 7, 1, 2, 9, 9, 5, 2], [7, 7, 1]),  # 5 2 says more than 2, though 2 occurred later
        ([7, 1, 2, 3, 5, 6, 6, 8, 2, 3, 9, 9, 1, 2, 3], [5, 6, 6]),  # three tokens that agree
        ([1, 2, 3, 4, 5], []),
        ([1], []),
        ([], []),
    ],
)
def test_the_longest_and_then_the_latest_occurrence(tokens: list[int], expected: list[int]) -> None:
    """What followed the longest run of last tokens that occurred before; of several, the last one.

    Why: a long match seldom errs, and the recent past is the better prophet: a variable was renamed, a list went on.
    """
    check_equal(propose(tokens, 3), expected, f"draft of 3 tokens behind {tokens}")


def test_the_end_does_not_find_itself() -> None:
    """The last tokens are always in the text: at its end. That is no earlier occurrence, and nothing follows it.

    Why: a draft of nothing, each time, is speculation that never happens.
    """
    check_equal(propose([4, 5, 6], 2), [], "draft")
    check_equal(propose([4, 5, 6, 7, 4, 5, 6], 2), [7, 4], "draft behind the second 4 5 6")


@pytest.mark.parametrize(("period", "count"), [(1, 4), (2, 5), (3, 3), (3, 7), (3, 1000)])
def test_a_copy_that_reaches_the_end_goes_on_with_itself(period: int, count: int) -> None:
    """A text that repeats with a short period is continued with that period, as far as is asked.

    Why: in a table or a loop the last occurrence lies only a few tokens back; a draft that ends there wastes most of the step.
    """
    text = [10 + i % period for i in range(3 * period + 3)]
    expected = [10 + i % period for i in range(len(text), len(text) + count)]
    check_equal(propose(text, count), expected, f"{count} tokens of a text of period {period}")


def test_shortest_and_longest_are_kept_to() -> None:
    """n-grams shorter than `min_n` say nothing; those longer than `max_n` are not looked for.

    Why: one token that agrees says little; the settings are what a user has to choose by.
    """
    text = [1, 2, 3, 9, 9, 3]
    check_equal(propose(text, 1, min_n=2), [], "draft when one token alone is too little")
    check_equal(propose(text, 1, min_n=1), [9], "draft from one token")
    later = [1, 2, 3, 5, 2, 3, 6, 1, 2, 3]
    check_equal(propose(later, 1, max_n=2), [6], "draft from two tokens, which occurred later")
    check_equal(propose(later, 1, max_n=3), [5], "draft from three tokens")


def test_reading_in_pieces_is_reading_at_once() -> None:
    """`update` goes on where it stopped, token by token or many at a time, and a repeated call changes nothing.

    Why: the engine reads a prompt at once and then a token or five at a step.
    """
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1, 2]
    whole = NgramIndex(1, 3)
    whole.update(text)
    pieces = NgramIndex(1, 3)
    for end in (1, 2, 2, 5, 6, 11, 12):
        pieces.update(text[:end])
    check_equal(pieces.propose(text, 4), whole.propose(text, 4), "draft")
    check_equal(pieces.propose(text, 4), [4, 1, 2, 3], "draft")


class Text(list[int]):
    """Counts the tokens that are taken out of it."""

    num_taken = 0

    def __getitem__(self, index: Any) -> Any:
        got = super().__getitem__(index)
        self.num_taken += len(got) if isinstance(index, slice) else 1
        return got

    def __iter__(self) -> Iterator[int]:
        self.num_taken += len(self)
        return super().__iter__()

    def copy(self) -> list[int]:
        return list(self)


def test_a_token_costs_what_a_token_costs() -> None:
    """A text of 3,000 tokens is read; then come twenty single ones, with a draft of four behind each: a few looks at each.

    Why: a step that reads all of the text again takes longer than the model's, once the text is long.
    """
    text, index = Text(i * i % 101 for i in range(3000)), NgramIndex(1, 3)
    index.update(text)
    for token in range(20):
        text.append(token)
        text.num_taken = 0
        index.update(text)
        index.propose(text, 4)
        check_equal(text.num_taken < 100, True, f"few tokens of the text are looked at, and not {text.num_taken}")


def test_the_text_stays_as_it_is() -> None:
    """A draft that goes on with itself is written beside the text.

    Why: the text is the sequence's own list of tokens; what is appended to it has been said.
    """
    text = [1, 2, 1, 2]
    check_equal(propose(text, 5), [1, 2, 1, 2, 1], "draft")
    check_equal(text, [1, 2, 1, 2], "text")


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.lists(st.integers(0, 2), max_size=24), count=st.integers(1, 6), min_n=st.integers(1, 2), more=st.integers(0, 2)
)
def test_as_a_search_through_the_whole_text_finds_it(tokens: list[int], count: int, min_n: int, more: int) -> None:
    """Against looking through all of it, from the back, for the longest first.

    Why: the dictionary is there for speed, not for other answers.
    """

    def search() -> list[int]:
        for n in range(min_n + more, min_n - 1, -1):
            for start in range(len(tokens) - n - 1, -1, -1):
                if tokens[start : start + n] == tokens[len(tokens) - n :]:
                    text = list(tokens)
                    for i in range(count):
                        text.append(text[start + n + i])
                    return text[len(tokens) :]
        return []

    check_equal(propose(tokens, count, min_n, min_n + more), search(), f"draft behind {tokens}")
