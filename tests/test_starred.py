"""Tasks with a star: extras that are tested, graded and shown like all others, but no points or stage depend on them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.course.grading import scoring
from stages.course.grading.report import markdown
from stages.course.tools.catalog import load_course
from tests.toy_course import REFERENCE, make_toy
from tests.toy_grades import SUMS, Toys, points

FILE = "toys/sums.py"
FOURFOLD = "    return double(double(number))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy course, in which task 1.2 has a star, with the starters that a learner gets."""
    root = tmp_path_factory.mktemp("starred")
    toy = make_toy(root, starred="1.2")
    for stage in load_course(root / "stages" / "course.toml"):
        for file in stage.files:
            toy.write(f"stages/{stage.folder}/{file}", REFERENCE[file])
    return root


def run(folder: Path, sums: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The course's command on a learner's file of the first stage."""
    (folder / "stages/stage1_sums" / FILE).write_text(sums, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "STAGES"} | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "stages.course", *arguments]
    return subprocess.run(command, cwd=folder, env=environment | {"COLUMNS": "140"}, capture_output=True, text=True)


def unwritten(task: str) -> str:
    """The body of a function that nobody has written."""
    return f'    raise NotImplementedError("Stage 1 · Task {task}: write it")\n'


NOT_BEGUN = SUMS.replace(FOURFOLD, unwritten("1.2"))
WRONG = SUMS.replace(FOURFOLD, "    return 4\n")


@pytest.mark.parametrize(
    ("sums", "code", "told"),
    [
        (NOT_BEGUN, 0, "All 1 tasks pass. ★ an extra if you like: task 1.2, The function fourfold: make test-stage-1 TASK=1.2"),
        (WRONG, 1, "task 1.2: 3 of 4 tests failed"),
        (SUMS, 0, "All 2 tasks pass."),
        (NOT_BEGUN.replace("    return number + number\n", unwritten("1.1")), 1, "next: task 1.1, The function double"),
    ],
    ids=["not begun", "wrong", "done", "nothing begun"],
)
def test_a_stage_is_green_without_its_extras(folder: Path, sums: str, code: int, told: str) -> None:
    ended = run(folder, sums, "test", "--stage", "1")
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert told in " ".join(ended.stdout.split())
    assert "The function fourfold ★" in ended.stdout


def test_an_extra_that_is_asked_for_is_not_green_before_it_is_written(folder: Path) -> None:
    ended = run(folder, NOT_BEGUN, "test", "--stage", "1", "--task", "1.2")
    assert (ended.returncode, "next: task 1.2, The function fourfold ★" in ended.stdout) == (1, True), ended.stdout


def test_progress_counts_stages_without_extras_and_names_them_at_the_end(folder: Path) -> None:
    ended = run(folder, NOT_BEGUN, "progress")
    text = " ".join(ended.stdout.split())
    assert (ended.returncode, "10/10" in text, "1.2★" in text) == (0, True, True), ended.stdout
    assert "All stages pass. ★ an extra if you like: task 1.2" in text


def test_a_star_gives_no_points(tmp_path: Path) -> None:
    toys = Toys(tmp_path / "toys", starred="1.2")
    for sums, status in (
        (SUMS, scoring.PASSED),
        (WRONG, scoring.PARTLY),
        (toys.workshop.starter(toys.workshop.course[0], FILE), scoring.UNWRITTEN),
    ):
        grade = toys.grade(sums)
        assert points(grade) == {"1.1": 0 if status == scoring.UNWRITTEN else 10, "1.2": 0}
        assert (grade.max_points, grade.tasks[1].status) == (10, status)
        report = markdown(grade, "https://example.org", {})
        assert "The function fourfold ★ |" in report
        assert ("### Task 1.2" in report) == (status == scoring.PARTLY), "what nobody began is not called a fault"
