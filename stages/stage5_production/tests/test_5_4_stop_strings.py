"""Task 5.4: a stop string is found wherever pieces are cut, and not a letter of it is given out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.text.detokenizer import StopStrings
from stages.course.fixtures.checks import check_equal

WORDS = st.text(alphabet="ab", min_size=1, max_size=4)


def read(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """All text that comes out, and the stop string."""
    reader, text = StopStrings(stops, include), ""
    for piece in pieces:
        text += reader.push(piece)
        if reader.matched is not None:
            return text, reader.matched
    return text + reader.flush(), None


def test_text_up_to_the_stop_comes_out() -> None:
    """Of "Hello STOP more" with the stop "STOP" it is "Hello ".

    Why: that is what the client asked for.
    """
    check_equal(read(["STOP"], ["Hello STOP more"]), ("Hello ", "STOP"), "text and stop")
    check_equal(read(["STOP"], ["Hello STOP more"], include=True), ("Hello STOP", "STOP"), "text with the stop")
    check_equal(read(["STOP"], ["Hello"]), ("Hello", None), "text without a stop")


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_stop_may_be_cut_anywhere(cut: int) -> None:
    """The text "ab STOP cd" in two pieces, cut at every place.

    Why: tokens end where they like. A stop that lies across two pieces is missed by who looks at each by itself.
    """
    text = "ab STOP cd"
    check_equal(read(["STOP"], [text[:cut], text[cut:]]), ("ab ", "STOP"), "text and stop")


def test_not_a_letter_of_a_stop_is_given_out() -> None:
    """The last 3 characters are held back while "STOP" may follow: "abcdS" gives "ab".

    Why: what a stream has sent nobody can take back. How much is held back may not depend on whether it looks like a stop:
    the tests of the real server compare a stream's pieces.
    """
    reader = StopStrings(["STOP"])
    check_equal([reader.push(piece) for piece in ("abcd", "S", "T", "x")], ["a", "b", "c", "d"], "text given out")
    check_equal(reader.flush(), "STx", "text at the end")


def test_a_stop_of_one_character_holds_nothing_back() -> None:
    """With "\\n" alone each piece goes out as it comes.

    Why: a line break is the stop that most people use. A cut at ``-0`` holds everything back, and the stream is none.
    """
    reader = StopStrings(["\n", "!"])
    check_equal([reader.push(piece) for piece in ("ab", "c", "d\ne")], ["ab", "c", "d"], "text given out")
    check_equal(reader.matched, "\n", "stop")


def test_capitals_are_other_letters() -> None:
    """Of "end END" with the stop "END" it is "end ".

    Why: a stop is a text, and no search engine's query.
    """
    check_equal(read(["END"], ["end ", "END"]), ("end ", "END"), "text and stop")


def test_what_was_held_back_is_given_out_once() -> None:
    """A second `flush` gives nothing; nor does one behind a stop, whatever came behind it in its piece. The stop stays known.

    Why: the end of an answer can be told twice, by a length and by a client that leaves. And what a piece has behind a stop was
    never asked for.
    """
    reader = StopStrings(["STOP"])
    reader.push("ab")
    check_equal([reader.flush(), reader.flush()], ["ab", ""], "text at the end, asked for twice")
    for include in (False, True):
        for pieces in (["STO", "P"], ["STO", "P and more"], ["a STOP and more"]):
            reader = StopStrings(["STOP"], include)
            for piece in pieces:
                reader.push(piece)
            check_equal((reader.flush(), reader.flush()), ("", ""), f"text behind the stop in {pieces}")
            check_equal(reader.matched, "STOP", "stop, after the end")


def test_the_earliest_match_counts() -> None:
    """Of "bc" and "abcd" in "xabcd" it is "abcd", which begins first; of two that begin together the first listed.

    Why: otherwise the text depends on the order of the list, or on which of two stops is longer.
    """
    check_equal(read(["bc", "abcd"], ["xabcd"]), ("x", "abcd"), "the earlier one")
    check_equal(read(["ab", "abc"], ["xabc"]), ("x", "ab"), "the first listed of two at one place")
    check_equal(read(["abc", "ab"], ["xabc"]), ("x", "abc"), "the other way round")


def test_the_piece_that_completes_a_match_decides() -> None:
    """The stops "abc" and "b" in the pieces "ab", "c": "b" is complete with the first piece.

    Why: at that moment nobody knows whether a "c" follows, and a sequence that has met a stop is over.
    """
    check_equal(read(["abc", "b"], ["ab", "c"]), ("a", "b"), "text and stop")


def test_a_piece_before_the_least_number_of_tokens_matches_nothing() -> None:
    """Unarmed, a whole "END" passes; a later one stops, also if it begins in an unarmed piece.

    Why: min_tokens promises so many tokens, whatever they are.
    """
    reader = StopStrings(["END"])
    text = reader.push("END EN", armed=False)
    check_equal(reader.matched, None, "stop in an unarmed piece")
    text += reader.push("D", armed=True)
    check_equal((text, reader.matched), ("END ", "END"), "text and stop")
    reader = StopStrings(["long stop", "b"])
    reader.push("ab", armed=False)
    reader.push("c", armed=True)
    check_equal(reader.matched, None, "a stop that was complete in an unarmed piece and is still held back")


def test_an_empty_piece_changes_nothing() -> None:
    """A token may have no text yet; nothing comes out and nothing is forgotten.

    Why: half a character gives no text, and a stop may stand on both sides of it.
    """
    check_equal(read(["ab"], ["xa", "", "b"]), ("x", "ab"), "text and stop")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    stops=st.lists(WORDS, min_size=1, max_size=3), pieces=st.lists(st.text(alphabet="abc", max_size=3), min_size=1, max_size=8)
)
def test_as_a_search_through_the_whole_text(stops: list[str], pieces: list[str]) -> None:
    """Whole: after each piece the whole text is searched, as nobody can afford to; text and stop are the same.

    Why: a search that goes back less far than a stop is long misses some; one that goes back further is slow, or finds one
    that an earlier piece had complete.
    """
    so_far, expected = "", None
    for piece in pieces:
        so_far += piece
        places = [(so_far.index(stop), number) for number, stop in enumerate(stops) if stop in so_far]
        if places:
            at, number = min(places)
            expected = so_far[:at], stops[number]
            break
    check_equal(read(stops, pieces), expected or (so_far, None), "text and stop")
