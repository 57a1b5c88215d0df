"""Signed results of a graded process: what is changed on the way is noticed, and the grader compares again for itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.course.fixtures.checks import OwnJudgeError, check_close, check_equal
from stages.course.grading import verdict
from stages.course.grading.channel import FORGED, SIGNATURE, SIZE, read_records, signed_writer
from stages.course.grading.seeds import with_other_seeds
from stages.course.grading.verdict import against, judge
from stages.course.grading.witness import sealed

KEY = bytes(range(32))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Three records."""
    path = tmp_path / "results.bin"
    send = signed_writer(str(path), KEY)
    send("begin", "test_a")
    send("result", "test_a", "what", "", "passed", 2)
    send("done")
    return path


def record_sizes(path: Path) -> list[int]:
    """Bytes of each record of a file."""
    text, sizes = path.read_bytes(), []
    while sum(sizes) < len(text):
        sizes.append(SIZE + SIGNATURE + int.from_bytes(text[sum(sizes) : sum(sizes) + SIZE], "big"))
    return sizes


def test_what_is_written_is_read(written: Path) -> None:
    records, complaint = read_records(written, KEY, True)
    assert records == [("begin", "test_a"), ("result", "test_a", "what", "", "passed", 2), ("done",)]
    assert complaint == ""
    assert read_records(written.with_name("nothing"), KEY, True) == ([], "")


def test_whoever_has_not_the_key_adds_nothing(written: Path) -> None:
    signed_writer(str(written), bytes(32))("result", "test_b", "what", "", "passed", 2)
    records, complaint = read_records(written, KEY, True)
    assert (len(records), complaint) == (3, FORGED)


@pytest.mark.parametrize("order", [(0, 2), (1, 0, 2), (0, 0, 1, 2), (1, 2)])
def test_records_cannot_be_left_out_moved_or_repeated(written: Path, order: tuple[int, ...]) -> None:
    text, sizes = written.read_bytes(), record_sizes(written)
    pieces = [text[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(3)]
    written.write_bytes(b"".join(pieces[k] for k in order))
    assert read_records(written, KEY, True)[1] == FORGED


def test_every_byte_counts(written: Path) -> None:
    text = written.read_bytes()
    for place in range(len(text)):
        written.write_bytes(text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :])
        assert read_records(written, KEY, True)[1] == FORGED, place


def test_a_process_that_was_stopped_may_leave_half_a_record(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    assert [len(read_records(written, KEY, ended)[0]) for ended in (True, False)] == [2, 2]
    assert [read_records(written, KEY, ended)[1] for ended in (True, False)] == [FORGED, ""]


def passing(*more: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """A test that passed, and a canary that failed as it must, with records between."""
    canary = ("canary", "test_c", "its own word", "failed", "... its own word ...")
    return [("begin", "test_a"), *more, ("result", "test_a", "", "", "passed", 1), ("begin", "test_c"), canary]


def test_a_clean_run_has_no_flags() -> None:
    same = ("compared", sealed([1, 2]), sealed([1, 2.0]))
    found = judge([*passing(same), ("done",)], "")
    assert (found.flags, found.running, found.done) == ([], "", True)
    assert against(found, Counter(test_a=1), Counter(test_a=1), frozenset()) == []


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (("compared", sealed(3), sealed(4)), f"test_a {verdict.DIFFERENT}"),
        (("canary", "test_d", "a word", "passed", ""), verdict.CANARY_PASSED),
        (("canary", "test_d", "a word", "failed", "another"), verdict.CANARY_LIED),
        (("flag", "it changes json.dumps"), "it changes json.dumps"),
    ],
)
def test_what_speaks_against_a_run_is_said(record: tuple[Any, ...], told: str) -> None:
    assert judge(passing(record), "").flags == [told]


def test_passed_tests_need_canaries_and_comparisons() -> None:
    assert judge(passing()[:2], "").flags == [verdict.UNSEEN]
    lazy = judge([record if record[0] != "result" else (*record[:-1], 0) for record in passing()], "")
    told = against(lazy, Counter(test_a=1), Counter(test_a=3), frozenset())
    assert told == ["test_a passes with fewer comparisons than it has"]


def test_what_the_reference_does_too_is_no_reason() -> None:
    found = judge(passing(("flag", "it changes torch.manual_seed")), "")
    assert against(found, Counter(test_a=1), Counter(), frozenset(["it changes torch.manual_seed"])) == []


def test_the_test_that_was_running_is_known_and_texts_show_no_paths() -> None:
    text = "FileNotFoundError: /room/here/solutions/x.py, seed 0123abcd"
    records = [("begin", "test_a"), ("result", "test_a", "", text, "failed", 0), ("begin", "test_b")]
    found = judge(records, "")
    for piece in ("/room/here/", "0123abcd"):
        found.replace(piece, "")
    assert found.running == "test_b"
    assert found.records[0].text == "FileNotFoundError: solutions/x.py, seed "


class Yes(int):
    """Equal to everything."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class Tampered(torch.Tensor):
    """A tensor by name."""

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize(("actual", "expected"), [(Yes(1), 2), ([1, Yes(1)], [1, 2]), ({"a": Yes(1)}, {"a": 2})])
def test_a_value_does_not_say_itself_what_it_equals(actual: object, expected: object) -> None:
    with pytest.raises(OwnJudgeError, match="answers what it equals by __eq__"):
        check_equal(actual, expected, "a number")


def test_a_tensor_is_a_tensor() -> None:
    with pytest.raises(OwnJudgeError):
        check_close(torch.zeros(2).as_subclass(Tampered), torch.zeros(2), "zeros")
    check_close(torch.zeros(2), torch.zeros(2), "zeros")
    check_equal(torch.nn.Parameter(torch.zeros(2)), torch.zeros(2), "zeros")
    check_equal(np.arange(3), [0, 1, 2], "a range")


def test_sealed_values_are_read_without_their_classes() -> None:
    assert sealed(Yes(3)) != sealed(2)
    assert sealed(np.arange(3)) == sealed([0, 1, 2]) == sealed((0, 1, 2))
    assert len(sealed(list(range(10_000)))) == 32


def test_seeds_in_tests_change_with_the_salt() -> None:
    text = "random.Random(4)\ntorch.Generator().manual_seed(comm.rank)\nrandom.Random()\n"
    changed = "random.Random(10000 + 4)\ntorch.Generator().manual_seed(10000 + comm.rank)\nrandom.Random()\n"
    assert with_other_seeds(text, "0000000a" + "0" * 8) == changed
