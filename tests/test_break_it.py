"""The task at the end of each stage, a learner's tests on wrong and right versions: on the toy course, and the banks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from stages.course.grading import scoring
from stages.course.grading.breaking import POINTS, WRONG, Shot, Version, break_it, exercises, first_failure, points, versions
from stages.course.grading.grader import Grader
from stages.course.grading.sandbox import Limits, Sandbox
from stages.course.grading.submission import Submission, read_submission
from stages.course.grading.task_runs import Runner
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import CourseError, Stage, load_course
from stages.course.tools.wrong_versions import FRESH, RIGHT, load_mutants, load_others, mutate
from tests.classroom import ROOT, Classroom
from tests.toy_course import Toy, make_toy

COURSE = load_course()
IMPORT = "from stages.toys.halves import half\n"
GIVEN = IMPORT + "def test_two() -> None:\n    assert half(-2) == -1\n"
SHARP = IMPORT + "def test_ten() -> None:\n    assert half(10) == 5\n"
ALARM = SHARP + "def test_how() -> None:\n    assert isinstance(half(4.0), float)\n"
FAILING = IMPORT + "def test_nothing() -> None:\n    assert False\n"
SKIPPED = IMPORT + "import pytest\ndef test_ten() -> None:\n    pytest.skip('not today')\n"
PEEKING = (
    SHARP
    + """
import inspect, pathlib, sys
import pytest
from stages.course.fixtures.checks import check_equal

def test_peeking() -> None:
    module = sys.modules[half.__module__]
    peeks = (
        lambda: inspect.getsource(half), lambda: open(module.__file__), lambda: pathlib.Path(module.__file__).read_text(),
        lambda: half.__code__, lambda: module.__loader__.get_source(module.__name__),
        lambda: module.__loader__.get_code(module.__name__), lambda: module.__loader__.get_data(module.__file__),
    )
    for peek in peeks:
        with pytest.raises((OSError, ImportError)):  # a loader turns the one into the other
            peek()
"""
)
FILE = "stages/stage2_halves/break_it.py"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy course with the task at the end of its second stage, and a right version there that looks unusual."""
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    toy.write(FILE, GIVEN)
    right = 'name = "r"\ntask = "2.1"\nfile = "toys/halves.py"\nwhy = ""\nold = "number // 2"\nnew = "int(number / 2)"\n'
    toy.write("tests/mutants/right.toml", f"[[mutant]]\n{right}")
    return toy


@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: f"stage {stage.number}")
def test_wrong_versions_are_of_different_tasks_and_the_seed_draws_them(stage: Stage) -> None:
    workshop = Workshop(ROOT)
    drawn = versions(workshop, stage, "a")
    wrong = [version.wrong for version in drawn if version.wrong is not None]
    assert len({mutant.task for mutant in wrong}) == WRONG
    assert [version.name for version in drawn[:3]] == ["the reference", "right version 1", "right version 2"]
    assert len({tuple(sorted(version.texts.items())) for version in drawn}) == len(drawn)
    assert drawn == versions(workshop, stage, "a") != versions(workshop, stage, "b")
    assert exercises(ROOT, stage)[0].points == POINTS


@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: f"stage {stage.number}")
def test_starred_tasks_are_a_game_of_their_own(stage: Stage) -> None:
    """Who has left a starred task out meets no version of it where there are points; who has not breaks them by themselves."""
    workshop = Workshop(ROOT)
    starred = {task.id for task in stage.tasks if task.starred}
    for seed in map(str, range(20)):
        assert starred.isdisjoint(version.wrong.task for version in versions(workshop, stage, seed) if version.wrong)
    if not starred:
        with pytest.raises(CourseError, match="no starred task"):
            versions(workshop, stage, "a", starred=True)
        return
    drawn = versions(workshop, stage, "a", starred=True)
    tasks = Counter(version.wrong.task for version in drawn if version.wrong is not None)
    assert tasks.total() == WRONG
    assert len({tuple(sorted(version.texts.items())) for version in drawn}) == len(drawn)
    native = {task.id for task in stage.tasks if task.targets[0].file.endswith(".cpp")}
    assert tasks.keys() <= starred - native
    assert len(tasks) == min(WRONG, len(starred - native))
    assert max(tasks.values()) - min(tasks.values()) <= 1
    assert starred - native == {right.task for right in load_others(ROOT, stage, RIGHT)} & starred


def test_versions_beside_the_banks_can_be_made() -> None:
    """Their old texts stand in the reference once; a version of those that were never tried on it proves nothing."""
    others = [each for stage in COURSE for file in (RIGHT, FRESH) for each in load_others(ROOT, stage, file)]
    for each in others:
        mutate(each, (ROOT / "solutions" / each.file).read_text(encoding="utf-8"))
    assert len({each.name for each in others}) == len(others)


def test_points_are_for_what_is_noticed_and_none_with_a_false_alarm() -> None:
    wrong = load_mutants(ROOT, COURSE[0])[0]
    right, bad = Version("right", {}), Version("wrong", {}, wrong)
    three = [Shot(bad, "a test")] * 3 + [Shot(bad, "")] * 2
    assert points([Shot(right, ""), *three]) == 6
    assert points([Shot(right, "a test"), *three]) == 0
    assert points([Shot(right, "a test")]) == 0


@pytest.mark.parametrize(
    ("tests", "code", "said"),
    [(SHARP, 0, "notice it: test_ten"), (GIVEN, 1, "all pass (task 2.1: A slip.)"), (ALARM, 1, "false alarm: test_how")],
    ids=["sharp", "blunt", "false alarm"],
)
def test_a_learner_tries_tests_of_their_own(toy: Toy, tests: str, code: int, said: str) -> None:
    toy.write(FILE, tests)
    console = Console(width=100, record=True)
    workshop = Workshop(toy.root)
    assert break_it(console, workshop, workshop.course[1], 2) == code
    assert said in console.export_text()


def test_a_learner_tries_tests_of_a_starred_task(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, starred="2.1")
    workshop = Workshop(toy.root)
    for tests, code, said in ((SHARP, 0, "all told right"), (GIVEN, 1, "not all told right")):
        toy.write(FILE, tests)
        console = Console(width=100, record=True)
        assert break_it(console, workshop, workshop.course[1], 2, starred=True) == code
        assert f"\n{said} (starred tasks give no points)" in console.export_text()
    with pytest.raises(CourseError, match="stage 2 has no task"):
        break_it(Console(quiet=True), workshop, workshop.course[1], 2)


def test_the_first_test_that_failed_is_named() -> None:
    assert first_failure(1, "FAILED stages/x/break_it.py::test_a[two words] - assert 1 == 2\n") == "test_a[two words]"
    assert first_failure(1, "FAILED stages/x/break_it.py::Test::test_a\n") == "Test::test_a"
    assert first_failure(2, "ERROR stages/x/break_it.py - ValueError\n") == first_failure(-9, "") == "the file as a whole"
    assert first_failure(0, ".s\n1 passed, 1 skipped in 0.01s\n") == ""


@pytest.mark.parametrize(("tests", "said"), [(IMPORT, "no test in break_it.py yet"), (SKIPPED, "all are skipped")])
def test_a_file_in_which_no_test_runs_is_said_to_be_one(toy: Toy, tests: str, said: str) -> None:
    toy.write(FILE, tests)
    workshop = Workshop(toy.root)
    with pytest.raises(CourseError, match=said):
        break_it(Console(quiet=True), workshop, workshop.course[1], 0)


def test_it_is_graded_in_a_room_like_all_that_learners_write(toy: Toy, tmp_path: Path) -> None:
    toy.write(FILE, GIVEN)
    workshop = Workshop(toy.root)
    stage = workshop.course[1]
    (task,) = exercises(toy.root, stage)
    sandbox = Sandbox()
    grader = Grader(Runner(workshop, sandbox, "pepper", Limits().within(60)), [(stage, task)])
    found = {}
    files = {
        "sharp": SHARP, "blunt": GIVEN + "\n", "alarm": ALARM, "none": GIVEN, "empty": IMPORT, "skipped": SKIPPED,
        "failing": FAILING, "peeking": PEEKING,
    }  # fmt: skip
    for name, tests in files.items():
        learner = Toy(tmp_path / name)
        learner.write(FILE, tests)
        submission: Submission = read_submission(learner.root, toy.root, workshop.course, [stage])
        assert grader.prepare([submission], lambda what: None) == {}
        (item,) = grader.grade(submission, lambda what: None).tasks
        found[name] = (item.points, item.status, [failure.name for failure in item.failures])
    assert found == {
        "sharp": (10, scoring.PASSED, []),
        "blunt": (0, scoring.FAILED, ["wrong version 1"]),
        "alarm": (0, scoring.FAILED, ["right version 1"]),
        "none": (0, scoring.UNWRITTEN, []),
        "empty": (0, scoring.UNWRITTEN, []),
        "skipped": (0, scoring.UNWRITTEN, []),
        "failing": (0, scoring.FAILED, ["the reference"]),
        "peeking": (10, scoring.PASSED, []),
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: f"stage {stage.number}")
def test_right_versions_pass_all_tests_of_their_stage(tmp_path: Path, stage: Stage) -> None:
    """Also the course's own tests refuse nothing for being unusual, and what learners are given passes on the reference."""
    room = Classroom(tmp_path / "course")
    try:
        for right in load_others(ROOT, stage, RIGHT):
            room.solve(stage.number)
            room.write(room.path(stage.number, right.file), mutate(right, room.reference(right.file)))
            files = [*map(room.tests, stage.tasks), room.path(stage.number, "break_it.py")]
            results = room.run(str(stage.number), files)
            assert (right.name, results.failed, results.ended.code) == (right.name, [], 0)
    finally:
        room.close()
