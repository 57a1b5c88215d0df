"""The throw-away course and the process that runs its tests: fresh, separate from the working tree, and never stuck."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.course.tools.catalog import CourseError
from stages.course.tools.runner import FAILED, PASSED, TODO
from tests import warm as warm_module
from tests.classroom import Classroom
from tests.toy_course import Toy, make_toy
from tests.warm import Job, Warm

FIRST, SECOND = "stages/stage1_sums/tests/test_1_1.py", "stages/stage1_sums/tests/test_1_2.py"
SUMS = "stages/stage1_sums/toys/sums.py"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm(("hypothesis.stateful",)) as server:
        yield server


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path / "toy")


@pytest.fixture
def room(toy: Toy, tmp_path: Path, warm: Warm) -> Classroom:
    toy.write(SUMS, "a learner's work, not to be seen (")
    return Classroom(tmp_path / "room", toy.root, warm)


def test_tasks_are_written_as_asked(room: Classroom) -> None:
    outcomes = []
    for done in ([], ["1.1"], ["1.2"], None):
        room.solve(1, done)
        results = room.run("1", [FIRST, SECOND])
        outcomes.append([{test.outcome for test in results.of(task)} for task in ("1.1", "1.2")])
        assert results.complaint == ""
        assert results.passed("1.1") == (outcomes[-1][0] == {PASSED})
    assert outcomes == [[{TODO}, {TODO}], [{PASSED}, {TODO}], [{TODO}, {TODO}], [{PASSED}, {PASSED}]]
    with pytest.raises(CourseError, match=r"stage 1 has no task 1\.3"):
        room.solve(1, ["1.1", "1.3"])


def test_results_say_what_failed(room: Classroom) -> None:
    room.solve(1)
    room.edit(SUMS, "return double(double(number))", "return double(number)")
    results = room.run("1", [SECOND], "-x")
    assert [(test.name, test.outcome) for test in results.failed] == [("test_fourfold_0", FAILED)]
    assert "assert 2 == 4" in results.failed[0].text
    assert room.run("", [SECOND]).passed("1.2"), "the reference must not be touched"
    assert not room.run("", [SECOND]).passed("1.1"), "no test is not passed"


def test_the_latest_text_counts(room: Classroom) -> None:
    """Two versions of one size within a second: a cache of compiled code would give the first."""
    room.solve(1)
    assert room.run("1", [FIRST]).passed("1.1")
    room.edit(SUMS, "number + number", "number * number")
    assert not room.run("1", [FIRST]).passed("1.1")
    room.edit(SUMS, "number * number", "number + number")
    assert room.run("1", [FIRST]).passed("1.1")


def test_an_edit_must_hit_one_place(room: Classroom) -> None:
    for old, count in (("nothing like it", 0), ("number: int", 2)):
        with pytest.raises(ValueError, match=f"has {count} places"):
            room.edit(SUMS, old, "")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("import os; os._exit(7)\n", "pytest ended with 7: it printed nothing"), ("x = 1\n", "there were no tests")],
)
def test_a_run_that_says_nothing_is_told_apart(text: str, complaint: str, room: Classroom) -> None:
    room.write(FIRST, text)
    assert room.run("", [FIRST]).complaint == complaint


@pytest.mark.slow
def test_an_endless_run_is_stopped(room: Classroom) -> None:
    room.write(FIRST, "def test_ends() -> None:\n    while True:\n        pass\n")
    assert room.run("", [FIRST], limit=2).complaint == "the run was stopped: it took too long"
    failed = room.run("", [FIRST], test_limit=0.1).failed
    assert [test.name for test in failed] == ["test_ends"]
    assert "TooLong: more than 0.1 seconds of computing" in failed[0].text


def test_commands_run_as_in_a_clone(room: Classroom) -> None:
    ended = room.command("stages.course", "hint", "--task", "1.2", "--level", "1")
    assert ended.code == 0
    assert "Addition is all that you need here." in ended.output
    ended = room.command("stages.course", "hint", "--task", "1.7")
    assert (ended.code, "there is no task '1.7'" in ended.output) == (1, True)


def test_runs_know_nothing_of_each_other(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "job.py").write_text(
        "import os, sys\nprint(os.environ.get('A'), 'toys' in sys.modules, os.getcwd())\n"
        "sys.modules['toys'] = sys\nos.environ['A'] = 'changed'\nsys.exit('bye')\n"
    )
    for value in ("1", "2"):
        ended = warm.run(Job(str(tmp_path), "job", environment={"A": value}))
        assert (ended.code, ended.output, ended.timed_out) == (1, f"{value} False {tmp_path}\nbye\n", False)
    assert "A" not in os.environ


PARENT = "import os\n\ndef test_parent() -> None:\n    assert os.environ.pop('A', '') + str(os.getppid()) == ''\n"


def test_one_pytest_stands_ready_for_tests_of_one_kind(room: Classroom) -> None:
    """As long as no file changes that it has read, and the jobs differ in their tests alone."""

    def parent(file: str, *flags: str) -> str:
        (test,) = room.run("1", [file], *flags).failed
        return next(line for line in test.text.splitlines() if "assert" in line)

    room.write(FIRST, PARENT)
    room.write(SECOND, PARENT)
    first = parent(FIRST)
    assert parent(SECOND) == first != parent(FIRST, "-x")
    conftest = room.read("stages/conftest.py")
    room.write("stages/conftest.py", f"{conftest}\nos.environ['A'] = 'new'\n")
    assert "'new" in (changed := parent(FIRST))
    assert parent(FIRST) == changed, "what one job does to the environment is not the next one's"
    hints = "stages/stage1_sums/hints.toml"
    room.write(hints, room.read(hints) + "\n# another\n")
    assert parent(FIRST) != changed


def test_a_pytest_that_cannot_begin_says_so(room: Classroom) -> None:
    conftest = room.read("stages/conftest.py")
    room.write("stages/conftest.py", "import nothing_of_this_name\n")
    ended = room.run("1", [FIRST]).ended
    assert (ended.code, ended.timed_out) == (4, False)
    assert "nothing_of_this_name" in ended.output
    room.write("stages/conftest.py", conftest)
    assert room.run("", [FIRST]).passed("1.1")


@pytest.mark.parametrize("end", ["", "while True: pass"])
def test_temporary_files_go_with_the_job(tmp_path: Path, warm: Warm, end: str) -> None:
    """However it ended: a job has no time to tidy up."""
    (tmp_path / "job.py").write_text(f"import tempfile\nprint(tempfile.mkdtemp(), flush=True)\n{end}\n")
    ended = warm.run(Job(str(tmp_path), "job", limit=2))
    folder = Path(ended.output.strip())
    assert (ended.timed_out, folder.name[:3], folder.exists()) == (end != "", "tmp", False)


@pytest.mark.slow
def test_without_forks_jobs_run_alone(room: Classroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_module, "CAN_FORK", False)
    room.solve(1)
    assert room.run("1", [FIRST, SECOND]).passed("1.2")
    room.write(FIRST, "while True: pass\n")
    assert room.run("1", [FIRST], limit=3).ended.timed_out
