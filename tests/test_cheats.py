"""Ways to points without work, which `cheats.toml` lists: each is named, and none has points, whatever its text looks like."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stages.course.grading import guard
from stages.course.grading.grader import Grader
from stages.course.grading.offences import offences
from stages.course.grading.scoring import Grade
from tests.toy_grades import SUMS, Toys, doubling, points

CHEATS = {entry["name"]: entry for entry in tomllib.loads(Path(__file__).with_name("cheats.toml").read_text())["cheat"]}
TESTS = '''import json

import pytest

from stages.course.fixtures.checks import check_equal
from stages.toys.sums import double


def test_one() -> None:
    """Twice 1 is 2."""
    check_equal(double(1), 2, "twice 1")


def test_row() -> None:
    """A row of numbers, each twice."""
    check_equal([double(k) for k in (3, 5)], [6, 10], "twice 3 and 5")


def test_plain() -> None:
    """Twice 7 is 14."""
    assert double(7) == 14


def test_written() -> None:
    """Twice 9 is 18, also when it is written down."""
    check_equal(json.loads(json.dumps({"twice": double(9)})), {"twice": 18}, "what was written")


def test_no_word() -> None:
    """A word has no double."""
    with pytest.raises(TypeError):
        double(None)
    check_equal(double(4), 8, "twice 4")
'''


class Course(Toys):
    """The toy course with tests of task 1.1 that use all that the stages' tests use."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.tasks = self.tasks[:1]
        self.graders = {False: self.grader(False)}
        (root / "stages" / "stage1_sums" / "tests" / "test_1_1.py").write_text(TESTS)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Course:
    return Course(tmp_path_factory.mktemp("cheats"))


def cheating(entry: dict[str, str]) -> str:
    """The toy's file with a cheat in it."""
    return doubling(entry.get("body", "return 0").strip()) + "\n\n" + entry.get("code", "").strip() + "\n"


def told(grade: Grade) -> str:
    """All that the grade says about task 1.1."""
    task = grade.tasks[0]
    return "\n".join([*grade.flags, task.reason, *(failure.text for failure in task.failures)])


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_named_and_has_no_points(toys: Course, name: str) -> None:
    grade = toys.grade(cheating(CHEATS[name]))
    assert (points(grade)["1.1"], CHEATS[name]["named"] in told(grade)) == (0, True), told(grade)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_whose_text_gives_nothing_away_has_no_points(toys: Course, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grader, "_flags", lambda self, submission: {})
    grade = toys.grade(cheating(CHEATS[name]))
    seen = CHEATS[name].get("seen", CHEATS[name]["named"])
    assert (points(grade)["1.1"], seen in told(grade)) == (0, True), told(grade)


NAMED_BY_TEXT = [name for name, entry in CHEATS.items() if "seen" in entry]


@pytest.mark.parametrize("name", NAMED_BY_TEXT)
def test_what_a_text_gives_away_is_named(name: str) -> None:
    found = offences(cheating(CHEATS[name]), "toys/sums.py", SUMS)
    assert any(f"it {CHEATS[name]['named']}" in offence for offence in found), found


AT_ONCE = ("check_equal replaced, and put back when it is called", "the caller by a generator", "results of its own")
"""One of each kind; all are among the slow tests."""


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_cheat_that_hides_is_named(toys: Course, name: str) -> None:
    grade = toys.grade(cheating(CHEATS[name]))
    assert (points(grade)["1.1"], CHEATS[name]["named"] in told(grade)) == (0, True), told(grade)


def test_the_right_answer_has_all_points(toys: Course) -> None:
    grade = toys.grade(SUMS)
    assert (points(grade), grade.flags) == ({"1.1": 10}, [])
    assert toys.graders[False].runner.expected(*toys.tasks[0]).flags == frozenset()  # which would be nobody's then


def test_a_process_of_ranks_starts_beside_a_learners_file(tmp_path: Path) -> None:
    """`multiprocessing` starts its own by a text, which Python compiles before there is any frame."""
    shutil.copyfile(guard.__file__, tmp_path / "sitecustomize.py")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GRADING_LEARNERS": '["/learner.py"]'}
    command = [sys.executable, "-c", "exec('print(6 * 7)')"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.returncode) == ("42\n", 0), ended.stderr
