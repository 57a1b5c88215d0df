"""The grader is fair and cannot be taken in: what it gives to good, empty, wrong and hostile submissions."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stages.course.grading import class_page, page, report, results, scoring
from stages.course.grading.command import main
from stages.course.grading.grader import Grader
from stages.course.grading.journal import Journal
from stages.course.grading.likeness import Pair, alike
from stages.course.grading.offences import offences, uses_the_reference
from stages.course.grading.performance import Bench
from stages.course.grading.sandbox import Limits, Sandbox, room
from stages.course.grading.scoring import Grade, MeasureGrade, ratio_points
from stages.course.grading.submission import Submission, find_submissions, read_submission
from stages.course.grading.supervise import TOKEN
from stages.course.grading.task_runs import Runner
from stages.course.grading.workshop import Workshop, with_functions
from stages.course.tools import runner
from stages.course.tools.catalog import CourseError, Stage, find_stage
from stages.course.tools.runner import FAILED, PASSED, SKIPPED, TODO, TaskResult, task_points
from stages.course.tools.wrong_versions import mutate
from tests.grade_mutants import find_mutant, mutants, solved
from tests.toy_course import REFERENCE
from tests.toy_grades import SUMS, Toys, doubling, points, silent

ROOT = Path(__file__).parents[1]
HALVES = REFERENCE["toys/halves.py"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def nobody_is_left() -> Iterator[None]:
    """Fails a test after which a graded process is still there."""
    yield
    left = []
    for process in psutil.process_iter():
        try:
            if TOKEN in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.cmdline())
        except (psutil.Error, OSError):
            continue
    assert left == []


# Points


def test_the_reference_has_all_points_and_the_starters_none(toys: Toys) -> None:
    full = toys.grade(SUMS)
    assert (points(full), full.percent) == ({"1.1": 10, "1.2": 10}, 100)
    empty = toys.grade(toys.workshop.starter(toys.workshop.course[0], "toys/sums.py"))
    assert (points(empty), {item.status for item in empty.tasks}) == ({"1.1": 0, "1.2": 0}, {scoring.UNWRITTEN})


def test_points_are_in_proportion_and_a_mistake_costs_its_own_task_alone(toys: Toys) -> None:
    grade = toys.grade(doubling("return number + 2"))  # right for the number 2 alone
    assert points(grade) == {"1.1": 2, "1.2": 10}
    task = grade.tasks[0]
    assert (task.status, task.passed, task.tests) == (scoring.PARTLY, 1, 4)
    assert "double of 1 is 2." in task.failures[0].text
    assert "Why: who counts on it would be wrong." not in task.failures[0].text
    assert "why       who counts on it would be wrong." in task.failures[0].text


def test_a_task_before_which_another_is_left_out_is_graded(toys: Toys) -> None:
    stage = toys.workshop.course[0]
    starter = toys.workshop.starter(stage, "toys/sums.py")
    grade = toys.grade(with_functions(starter, SUMS, "toys/sums.py", ["fourfold"]))
    assert points(grade) == {"1.1": 0, "1.2": 10}
    assert grade.tasks[0].reason == "not written yet: double"


@pytest.mark.slow
def test_functions_that_need_each_other_pass_together(toys: Toys) -> None:
    """The reference's `double` would not do for this `fourfold`; the learner's own does."""
    own = SUMS.replace("def double(number: int)", "def double(number: int, times: int = 1)")
    own = own.replace("return number + number", "return number * 2**times").replace(
        "double(double(number))", "double(number, 2)"
    )
    assert points(toys.grade(own)) == {"1.1": 10, "1.2": 10}


@pytest.mark.slow
def test_the_same_salt_gives_the_same_scores_and_another_one_other_cases(toys: Toys, tmp_path: Path) -> None:
    """A test that draws its numbers, for code that is right for some of them; hypothesis itself pins what it draws."""
    shutil.copytree(toys.workshop.root, tmp_path / "toy")
    tests = tmp_path / "toy" / "stages" / "stage1_sums" / "tests" / "test_1_1.py"
    drawn = [
        "from hypothesis import given, settings, strategies as st", "from stages.toys.sums import double",
        *(
            f"\n@settings(max_examples=2, derandomize=True, database=None)\n@given(st.integers(10, 10**9))\n"
            f"def test_{index}(number):\n    assert double(number) == number + number\n"
            for index in range(12)
        ),
    ]  # fmt: skip
    tests.write_text("\n".join(drawn))
    wrong = doubling("return number + number + (number // 7 % 3 == 0)")
    workshop = Workshop(tmp_path / "toy")
    stage = workshop.course[0]
    passed = []
    for salt in ("a", "a", "b", "c"):
        run = Runner(workshop, Sandbox(), salt, Limits()).run(stage, stage.tasks[0], {"toys/sums.py": wrong})
        assert len(run.records) == 12, run.ended
        passed.append(sorted(run.names("passed")))
    assert passed[0] == passed[1]
    assert passed[1] != passed[2] or passed[2] != passed[3]


@pytest.mark.slow
def test_answers_by_heart_fail_with_a_salt(toys: Toys, tmp_path: Path) -> None:
    """A file that knows the numbers which a test draws with a seed of its own, or counts its calls."""
    shutil.copytree(toys.workshop.root, tmp_path / "toy")
    tests = tmp_path / "toy" / "stages" / "stage1_sums" / "tests" / "test_1_1.py"
    lines = ["import random", "from stages.toys.sums import double"]
    for seed in range(4):
        numbers = [f"\n\ndef test_{name}_{seed}():\n    number = {how}\n" for name, how in (
            ("drawn", f"random.Random({seed}).randrange(10**9)"), ("called", str(seed + 3)),
        )]  # fmt: skip
        lines += [f"{text}    assert double(number) == number + number" for text in numbers]
    tests.write_text("\n".join(lines))
    workshop = Workshop(tmp_path / "toy")
    stage = workshop.course[0]
    draws = {number: 2 * number for number in (random.Random(seed).randrange(10**9) for seed in range(4))}
    known = SUMS + f"\nKNOWN = {draws!r}\nCALLS = iter([6, 8, 10, 12])\n"
    known = known.replace("return number + number", "return KNOWN[number] if number > 99 else next(CALLS)")
    runner = Runner(workshop, Sandbox(), "s", Limits())
    passed = [
        runner.run(stage, stage.tasks[0], {"toys/sums.py": known}, moved).names("passed").total() for moved in (False, True)
    ]
    assert passed[0] == 8
    assert passed[1] < 4


# Hostile submissions

BOMB = "import subprocess\nwhile True:\n    subprocess.Popen(['bash', '-c', 'bomb() { bomb | bomb & }; bomb'])"
HOSTILE = {
    "fork bomb": (BOMB, "more than 64 processes"),
    "fork bomb out of its session": (BOMB.replace("['bash'", "['setsid', 'bash'"), "more than 64 processes"),
    "endless loop": ("while True:\n    pass", "longer than"),
    "10 GB": ("return len(bytearray(10 << 30))", "MemoryError"),
    "exit": ("raise KeyboardInterrupt", "ended before all tests had run"),
    "crash": ("import os\nos.abort()", "SIGABRT"),
    "network": ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "there is no network while grading"),
    "other programs": ("import subprocess\nsubprocess.run(['bash', '-c', 'exec 3<>/dev/tcp/192.0.2.1/80'], check=True)", "1"),
    "flood": ("import os\nwhile True:\n    os.write(1, bytes(100_000))", "printed more than"),
    "the reference, put together": (
        "return __import__('sol' + 'utions.toys.sums').toys.sums.double(1)",
        "cannot be used while grading",
    ),
    "the end of the supervisor": ("import os\nos.kill(os.getppid(), 9)\nos.kill(os.getpid(), 9)", ""),
}
OPEN = ("endless loop", "10 GB", "network", "the end of the supervisor")
"""Those that are tried without namespaces as well. Where root is let through all limits, a bomb needs them."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "walls"), [*((name, True) for name in HOSTILE), *((name, False) for name in OPEN)]
)  # fmt: skip
def test_a_hostile_file_costs_its_own_task_alone(toys: Toys, nobody_is_left: None, name: str, walls: bool) -> None:
    if walls and not toys.graders[True].runner.sandbox.isolated:
        pytest.skip("this system has no namespaces for us")
    code, told = HOSTILE[name]
    grade = toys.grade(doubling(code), walls)
    assert points(grade) == {"1.1": 0, "1.2": 10}
    assert told in "\n".join([grade.tasks[0].reason, *(failure.text for failure in grade.tasks[0].failures)])


@pytest.mark.slow
def test_who_stays_behind_is_ended(toys: Toys, nobody_is_left: None) -> None:
    stay = "import subprocess\nsubprocess.Popen(['setsid', 'sh', '-c', 'sleep 600 & exec sleep 600'])"
    for walls in {False, toys.graders[True].runner.sandbox.isolated}:
        assert points(toys.grade(doubling(f"{stay}\nreturn number + number"), walls))["1.1"] == 10


def test_a_room_shows_nothing_that_is_hidden_and_keeps_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTORS_TOKEN", "secret")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "answers.txt").write_text("42")
    sandbox = Sandbox((tmp_path / "hidden",))
    with room() as scratch:
        answers = str(tmp_path / "hidden" / "answers.txt")
        program = f"import os; print('token', os.environ.get('INSTRUCTORS_TOKEN')); open({answers!r})"
        ended = sandbox.run([sys.executable, "-c", program], scratch, {}, Limits())
    assert "token None" in ended.output
    assert "PermissionError: the reference cannot be used while grading" in ended.output
    if sandbox.isolated:
        with room() as scratch:
            ended = sandbox.run(["/bin/sh", "-c", f"ls {tmp_path}/hidden; touch {tmp_path}/mine"], scratch, {}, Limits())
        assert "answers" not in ended.output
        assert not (tmp_path / "mine").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_where_there_are_no_walls_roots_files_are_closed(tmp_path: Path) -> None:
    """As on Gradescope: the salt lies in a folder of mode 700, and graded code is another user's."""
    salt = tmp_path / "source" / "salt"
    salt.parent.mkdir()
    salt.write_text("secret")
    tmp_path.chmod(0o755)
    salt.parent.chmod(0o700)
    sandbox = Sandbox()
    sandbox.__dict__.update(isolated=False, as_nobody=True)
    with room() as scratch:
        ended = sandbox.run(["/bin/sh", "-c", f"id -u; echo mine > file; cat file; cat {salt}"], scratch, {}, Limits())
    assert ended.output.splitlines()[:2] == ["65534", "mine"]
    assert "secret" not in ended.output
    assert "another user" in sandbox.walls


def test_a_closed_sandbox_ends_what_runs(tmp_path: Path, nobody_is_left: None) -> None:
    sandbox = Sandbox()
    with room() as scratch:
        threading.Timer(1, sandbox.close).start()
        begin = time.monotonic()
        ended = sandbox.run(["/bin/sleep", "60"], scratch, {}, Limits())
        assert ended.lost
        assert sandbox.run(["/bin/sleep", "60"], scratch, {}, Limits()).lost
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("import solutions.toys.sums", "imports the reference: solutions.toys.sums"),
        ("from solutions.toys import sums", "imports the reference: solutions.toys"),
        ("load('solutions.toys.sums')", "names the reference: 'solutions.toys.sums'"),
        ("__import__('solutions.toys.sums')", "names the reference"),
        ("open('../../solutions/toys/sums.py')", "names the reference"),
        ("root = 'solutions'", "names the reference"),
        ("VARIABLE = 'COURSE_RESULTS'", "names a variable of the grader"),
        ("import _pytest.runner", "imports _pytest.runner"),
        ("from ..course import catalog", "imports the course's course"),
    ],
)
def test_reaching_for_the_reference_is_found(line: str, told: str) -> None:
    (found,) = offences(f"{SUMS}\n\n{line}\n", "toys/sums.py", SUMS)
    assert told in found
    assert uses_the_reference(found) == ("the reference" in told)


def test_what_honest_code_does_is_no_offence() -> None:
    honest = "import os\nimport sys\nimport torch\ntorch.zeros(1)[0] = os.cpu_count() + sys.maxsize\nsetattr(object(), 'x', 1)"
    assert offences(f"{SUMS}\n{honest}\n", "toys/sums.py", SUMS) == []


@pytest.mark.slow
def test_wrong_versions_are_not_flagged(workshop: Workshop) -> None:
    starters: dict[str, str] = {}
    for stage, mutant in mutants(workshop):
        starter = starters.setdefault(mutant.file, "") or workshop.starter(stage, mutant.file)
        starters[mutant.file] = starter
        assert offences(mutate(mutant, workshop.reference(mutant.file)), mutant.file, starter) == [], mutant.name


def test_words_about_the_reference_are_no_offence() -> None:
    text = (
        SUMS.replace("Sums.", "Sums, as in solutions/toys.") + "# like solutions/toys/sums.py\nSOLUTIONS = 'my solutions'[3:]\n"
    )
    assert offences(text.replace("'my solutions'", "'all of them'"), "toys/sums.py", SUMS) == []
    assert offences(f"{SUMS}\nimport solutions\n", "toys/sums.py", f"{SUMS}\nimport solutions\n") == []
    assert offences('#include "solutions/attention/x.cu"\n// solutions/', "x.cu", "")[0].startswith("line 1: it names")


def test_a_file_that_uses_the_reference_gives_nothing_to_its_tasks(toys: Toys) -> None:
    grade = toys.grade(f"from solutions.toys.sums import double as theirs\n{SUMS}")
    assert points(grade) == {"1.1": 0, "1.2": 0}
    assert grade.tasks[0].reason == "toys/sums.py, line 1: it imports the reference: solutions.toys.sums"
    assert grade.flags == ["stages/stage1_sums/toys/sums.py, line 1: it imports the reference: solutions.toys.sums"]


# A grading that was stopped


def test_a_stopped_grading_goes_on_where_it_was(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = Submission("ada", toys.workshop.root, {(1, "toys/sums.py"): doubling("return number + 2")})
    grades = []
    for tried in range(2):
        journal = Journal(tmp_path, "this course", None)
        grader = Grader(Runner(toys.workshop, Sandbox(), journal.salt, Limits()), toys.tasks[:1], journal=journal)
        assert (grader.prepare([submission], silent), journal.going_on) == ({}, tried == 1)
        tasks = grader.grade(submission, silent).tasks
        grades.append([(item.task.id, item.points, item.reason, item.failures, item.seconds) for item in tasks])
        monkeypatch.setattr(Runner, "run", None)  # whoever runs a test now fails
    assert grades[0] == grades[1]
    journal.path.write_text(journal.path.read_text()[:-10])  # killed while it wrote
    assert Journal(tmp_path, "this course", None).salt == journal.salt
    assert not Journal(tmp_path, "another course", None).going_on
    assert Journal(tmp_path, "another course", None).salt != journal.salt
    assert journal.path.stat().st_mode & 0o077 == 0
    journal.remove()
    assert not Journal(tmp_path, "another course", "salt").going_on


# What is taken from a checkout


@pytest.fixture
def checkout(toys: Toys, tmp_path: Path) -> Path:
    """A learner's clone of the toy course with everything written."""
    clone = tmp_path / "ada"
    shutil.copytree(toys.workshop.root, clone, ignore=shutil.ignore_patterns("__pycache__"))
    for stage, file, text in ((0, "toys/sums.py", SUMS), (1, "toys/halves.py", HALVES)):
        path = clone / "stages" / toys.workshop.course[stage].folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return clone


def read(toys: Toys, folder: Path) -> Submission:
    return read_submission(folder, toys.workshop.root, toys.workshop.course, toys.workshop.course)


def test_edited_tests_have_no_effect_and_are_reported(toys: Toys, checkout: Path) -> None:
    assert read(toys, checkout).notes == []
    (checkout / "stages/stage1_sums/tests/test_1_1.py").write_text("def test_double_0() -> None:\n    pass\n")
    (checkout / "stages/conftest.py").write_text("")
    (checkout / "conftest.py").write_text("raise SystemExit(0)\n")
    sums = checkout / "stages/stage1_sums/toys/sums.py"
    sums.write_text(doubling("return 0"))
    submission = read(toys, checkout)
    assert submission.notes == [
        "edited and replaced by the course's own: stages/conftest.py, stages/stage1_sums/tests/test_1_1.py",
        "no file of the course, and left out: conftest.py",
    ]
    assert points(toys.grade(submission.files[1, "toys/sums.py"])) == {"1.1": 0, "1.2": 10}


def test_files_that_cannot_be_taken_are_named(toys: Toys, checkout: Path) -> None:
    sums, halves = (checkout / name for name in ("stages/stage1_sums/toys/sums.py", "stages/stage2_halves/toys/halves.py"))
    halves.unlink()
    sums.unlink()
    sums.symlink_to(toys.workshop.root / "solutions" / "toys" / "sums.py")
    submission = read(toys, checkout)
    assert submission.files == {}
    assert submission.notes[0] == (
        "stages/stage1_sums/toys/sums.py is a link or lies behind one; the empty starter counts in its place"
    )
    assert submission.notes[1].startswith("stages/stage2_halves/toys/halves.py is missing")
    sums.unlink()
    sums.write_bytes(b"\xff\xfe")
    halves.write_text("#" * (1 << 20) + "\n")
    assert [note.split(" ", 1)[1].split(";")[0] for note in read(toys, checkout).notes] == [
        "is not UTF-8 text", "has 1048577 bytes, more than 1048576",
    ]  # fmt: skip


def test_one_checkout_or_a_folder_of_several(toys: Toys, checkout: Path) -> None:
    course = toys.workshop.course
    assert find_submissions(checkout, course) == [checkout]
    shutil.copytree(checkout, checkout.parent / "bob")
    (checkout.parent / "empty").mkdir()
    assert find_submissions(checkout.parent, course) == [checkout, checkout.parent / "bob"]
    with pytest.raises(
        CourseError, match=r"holds no checkout: neither it nor a folder in it has stages/stage1_sums/toys/sums\.py"
    ):
        find_submissions(checkout.parent / "empty", course)
    with pytest.raises(CourseError, match="is no folder"):
        find_submissions(checkout.parent / "nothing", course)


# Points for performance


def test_points_for_a_share() -> None:
    assert [task_points(10, passed, 3) for passed in range(4)] == [0, 3, 6, 10]
    assert task_points(10, 0, 0) == 0
    assert [ratio_points(10, ratio, 0.8, 0.3) for ratio in (0.1, 0.3, 0.55, 0.8, 2.0)] == [0, 0, 5, 10, 10]


@pytest.mark.parametrize(
    ("outcomes", "missing", "points"),
    [([PASSED] * 4 + [FAILED], "", 8), ([PASSED] * 4 + [TODO], "1.1", 0), ([PASSED] * 2 + [SKIPPED], "", 10), ([], "", 0)],
)
def test_points_at_home_are_the_grade(toys: Toys, outcomes: list[str], missing: str, points: int) -> None:
    task = toys.workshop.course[0].tasks[0]
    tests = [runner.TestResult(f"test_{k}", task.id, "", outcome, missing=missing) for k, outcome in enumerate(outcomes)]
    assert TaskResult(task, tests).points == points


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(ROOT)


def test_measurements_need_their_stages(workshop: Workshop) -> None:
    limits = Limits()
    names = [[m.name for m in Bench(workshop, Sandbox(), numbers, limits).measures] for numbers in ([1], [2], [1, 2], [3, 4])]
    assert names == [["memory"], ["overhead"], ["memory", "overhead", "throughput"], ["prefix_hits"]]
    bench = Bench(workshop, Sandbox(), [1], limits)
    stage = find_stage(workshop.course, 1)
    grade = Grade("ada", [scoring.TaskGrade(stage, stage.tasks[0], scoring.FAILED, 10)])
    result = bench.grade(bench.measures[0], Submission("ada", ROOT), grade)
    assert (result.points, result.reason) == (0, "measured when all tests of stage 1 pass; open: 1.1")


@pytest.mark.slow
def test_memory_that_is_wasted_costs_points(workshop: Workshop) -> None:
    """One block more than needed for each sequence passes for a working allocator, and wastes memory."""
    stage = find_stage(workshop.course, 1)
    texts = solved(workshop, stage)
    file = "attention/block_manager.py"
    wasteful = texts | {
        file: texts[file].replace("-(-num_tokens // self.block_size)", "-(-num_tokens // self.block_size) + 24")
    }
    assert wasteful != texts
    bench = Bench(workshop, Sandbox(), [1], Limits())
    for files, worth in ((texts, 10), (wasteful, 0)):
        submission = Submission("ada", ROOT, {(1, name): text for name, text in files.items()})
        grade = Grade("ada", [scoring.TaskGrade(stage, task, scoring.PASSED, 10, 10) for task in stage.tasks])
        result = bench.grade(bench.measures[0], submission, grade)
        assert result.reason == ""
        assert result.ratio is not None
        assert (result.points == worth) if worth else (result.points < 10)


# The real course


def test_empty_starters_of_the_course_have_no_points(workshop: Workshop) -> None:
    tasks = [(stage, task) for stage in workshop.course for task in stage.tasks]
    grader = Grader(Runner(workshop, Sandbox(), "salt", Limits()), tasks)
    submission = Submission(
        "ada", ROOT, {(s.number, file): workshop.starter(s, file) for s in workshop.course for file in s.files}
    )
    assert grader.prepare([submission], silent) == {}
    grade = grader.grade(submission, silent)
    assert (grade.points, grade.flags) == (0, [])
    assert grade.max_points == sum(stage.points for stage in workshop.course)


def test_files_of_the_reference_are_not_flagged(workshop: Workshop) -> None:
    for stage in workshop.course:
        for file in stage.files:
            assert offences(workshop.reference(file), file, workshop.starter(stage, file)) == []


MUTANTS = (
    ("last-freed-first-reused", ("1.1", "1.2")),
    ("min-tokens-off-by-one", ("2.1", "2.2")),
    ("hash-without-parent", ("4.1", "4.2")),
)
"""Wrong versions, and the tasks that are graded: the mutant's own and a neighbour."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ids"), MUTANTS, ids=[name for name, _ in MUTANTS])
def test_a_mutant_loses_points_in_its_own_task_alone(workshop: Workshop, name: str, ids: tuple[str, ...]) -> None:
    """And the reference, in which it stands, loses none. The whole bank: ``python -m tests.grade_mutants``."""
    stage, mutant = find_mutant(workshop, name)
    tasks = [(stage, task) for task in stage.tasks if task.id in ids]
    grader = Grader(Runner(workshop, Sandbox(), "salt", Limits()), tasks, jobs=2)
    texts = solved(workshop, stage)
    wrong = texts | {mutant.file: mutate(mutant, texts[mutant.file])}
    right, lost = (
        Submission("ada", ROOT, {(stage.number, file): text for file, text in files.items()}) for files in (texts, wrong)
    )
    assert grader.prepare([right], silent) == {}
    if stage.number == 1:  # once is enough: a mutant's neighbours are the reference's text too
        assert grader.grade(right, silent).percent == 100
    got = {item.task.id: item.points == item.max_points for item in grader.grade(lost, silent).tasks}
    assert got == {task_id: task_id != mutant.task for task_id in ids}


def test_the_reference_of_a_task_is_not_in_its_folder(workshop: Workshop, tmp_path: Path) -> None:
    stage = find_stage(workshop.course, 1)
    workshop.build(tmp_path, stage, solved(workshop, stage))
    for file in stage.files:
        assert "raise NotImplementedError" in (tmp_path / "solutions" / file).read_text()
        assert "raise NotImplementedError" not in (tmp_path / "stages" / stage.folder / file).read_text()


# Results and reports


def example(stage: Stage) -> Grade:
    """A grade with one of each."""
    bad = scoring.TaskGrade(stage, stage.tasks[1], scoring.PARTLY, 10, 5, 2, 4, "2 of 4 tests pass")
    bad.failures = [scoring.Failure("test_<b>", "it", "checks it\n\n1 < 2 & ```fence```")]
    good = scoring.TaskGrade(stage, stage.tasks[0], scoring.PASSED, 10, 10, 4, 4)
    measure = MeasureGrade("memory", "KV memory", "why", scoring.PARTLY, 10, 5.5, 0.6, [0.6], [60.0], [100.0], "%")
    return Grade("=ada<script>", [good, bad], [measure], ["a note"], ["a flag"], 1.5)


def test_gradescope_gets_what_it_asks_for(toys: Toys) -> None:
    contents = json.loads(json.dumps(results.gradescope(example(toys.workshop.course[0]), {"isolation": "none"})))
    assert (contents["score"], contents["stdout_visibility"]) == (20.5, "hidden")
    assert sum(test["score"] for test in contents["tests"]) == contents["score"]
    assert {test["status"] for test in contents["tests"]} <= {"passed", "failed"}
    assert [test["number"] for test in contents["tests"]] == ["1.1", "1.2", "performance.memory"]
    assert all(0 <= test["score"] <= test["max_score"] for test in contents["tests"])
    assert "1 < 2" in contents["tests"][1]["output"]


def test_reports_say_what_was_expected_and_where_to_read_on(toys: Toys) -> None:
    grade = example(toys.workshop.course[0])
    text = report.markdown(grade, "guide", {"commit": "abc"})
    for piece in (
        "20.5 of 30 points",
        "guide/stages/stage1_sums/GUIDE.md#task-1-2",
        "a flag",
        "````text\nchecks it",
        "| KV memory | 60 % | 100 % | 0.60 |",
    ):
        assert piece in text
    html = page.html(grade, "guide", {"commit": "abc"})
    for piece in (
        'lang="en"',
        "prefers-color-scheme: dark",
        'role="img" aria-label="Points: ',
        'href="guide/stages/stage1_sums/GUIDE.md#task-1-2"',
        "1 &lt; 2",
    ):
        assert piece in html
    assert "<script" not in html
    assert "http" not in html


def test_an_instructors_page_has_what_learners_do_not_see(toys: Toys) -> None:
    grades = [example(toys.workshop.course[0]) for _ in range(2)]
    text = class_page.class_page(grades, [Pair("ada", "bob", 0.75)], {"commit": "abc"})
    for piece in ("a flag", "75 %", "test_&lt;b&gt;", "2 of 2", "commit: abc", "width=device-width"):
        assert piece in text
    assert "<script" not in text


COPIED = """def count(values):
    total = 0
    for index, value in enumerate(values):
        if value % 2 and index > 3:
            total += value * index - len(values)
        elif value in (3, 5, 7):
            total -= sum(values[:index]) // (value + 1)
        while total > 100:
            total = total // 2 + min(values)
    return {"total": total, "most": max(values), "rest": [each for each in values if each < total]}
"""


def test_copies_are_alike_under_other_names_and_the_common_part_does_not_count() -> None:
    renamed = COPIED.replace("total", "t").replace("value", "v").replace("    ", "  ") + "# mine\n"
    own = "def count(values):\n" + "".join(f"    x{k} = values[{k}] if values else -{k}\n" for k in range(20))
    found = alike({"ada": [COPIED], "bob": [renamed], "eve": [own]}, [SUMS])
    assert [(pair.first, pair.second) for pair in found] == [("ada", "bob")]
    assert found[0].share > 0.9
    assert alike({"ada": [COPIED], "bob": [renamed]}, [COPIED]) == []
    assert alike({"ada": ["def ("], "bob": ["def ("]}, []) == []


def test_a_summary_has_a_row_for_each(toys: Toys, tmp_path: Path) -> None:
    results.write_summary(tmp_path, [example(toys.workshop.course[0])] * 2)
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [row["points"] for row in rows] == ["20.5", "20.5"]
    assert rows[0]["name"].startswith("'=")  # no formula for a spreadsheet
    assert json.loads((tmp_path / "summary.json").read_text())[0]["task 1.2"] == 5


# The command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/grade.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"COLUMNS": "150"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_checkouts_from_the_command_line(workshop: Workshop, tmp_path: Path) -> None:
    stage = find_stage(workshop.course, 1)
    allocator = "memory/block_allocator.py"
    for name, text in (("ada", workshop.reference(allocator)), ("bob", workshop.starter(stage, allocator))):
        path = tmp_path / "class" / name / "stages" / stage.folder / allocator
        path.parent.mkdir(parents=True)
        path.write_text(text)
    out = tmp_path / "grades"
    run = command("--submission", str(tmp_path / "class"), "--stage", "1", "--output", str(out), "--salt", "s")
    assert run.returncode == 0, run.stderr
    rows = json.loads((out / "summary.json").read_text())
    assert [(row["name"], row["points"], row["max_points"]) for row in rows] == [("ada", 10, 110), ("bob", 0, 110)]
    assert "missing; the empty starter counts" in (out / "ada" / "report.md").read_text()
    assert "ada" in (out / "instructor.html").read_text()
    assert not list(out.glob(".journal*"))
    assert {path.name for path in (out / "bob").iterdir()} == {"results.json", "report.md", "report.html"}
    (link,) = set(re.findall(r"\((\S+)#task-1-1\)", (out / "bob" / "report.md").read_text()))
    assert '<a id="task-1-1">' in (out / "bob" / link).read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--submission", "/nowhere"), "error: --submission /nowhere is no folder; name a learner's checkout"),
        (("--submission", "docs"), "error: --submission docs holds no checkout"),
        (("--submission", ".", "--stage", "9"), "error: there is no stage 9; there are 1, 2"),
        (("--submission", ".", "--jobs", "0"), "error: --jobs must be at least 1, got 0"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--output", str(tmp_path / "grades")])
    said = capsys.readouterr().err if isinstance(ended.value.code, int) else f"{ended.value.code}\n"
    assert said.startswith(told)
    assert said.count("\n") == 1
    assert not (tmp_path / "grades").exists()
