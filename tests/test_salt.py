"""A table of the public tests' answers is worth nothing where the salt draws other cases: tried with `tests/memoriser.py`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.course.grading import seeds
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import Stage, Task, load_course
from stages.course.tools.runner import PASSED, TestResult
from stages.course.tools.targets import find_function, is_python, parse
from tests.classroom import PYTEST, ROOT, result
from tests.memoriser import LEARN, RECITE
from tests.warm import Job, Warm

SEED = "0123456789abcdef"
COURSE = load_course()
EXCUSED = {"4.7": "compiled code holds no table of answers", "4.8": "compiled code holds no table of answers"}
"""Tasks that the memoriser cannot even do with the public cases, and why."""
INSTEAD = {"4.6": "TritonLinear.__call__"}
"""Where in the learner's file a table of answers could stand, as the function that is asked for is compiled."""
HYPOTHESIS = ("@given(", "run_state_machine_as_test")


def memorising(text: str, functions: dict[str, str]) -> str:
    """The reference's text with a memoriser on these functions; each has the name of its file of tests beside it."""
    lines = text.splitlines()
    found = [(node, name) for name in functions if (node := find_function(parse(text), name)) is not None]
    for node, name in sorted(found, key=lambda pair: -pair[0].lineno):
        called = f'__import__("memoriser").memorised("{name}", "{functions[name]}")'
        lines.insert(node.lineno - 1, " " * node.col_offset + f"@{called}")
    return "\n".join(lines) + "\n"


class School:
    """Where memorisers of whole stages take their tests.

    Args:
        folder: for what they learn.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.workshop, self.warm = folder, Workshop(ROOT), Warm()

    def take(self, stage: Stage, what: str, seed: str | None) -> list[TestResult]:
        """Run all tests of a stage on its memoriser, who learns or recites; with a seed on other cases."""
        room = self.folder / f"{stage.number}-{what}-{seed}"
        room.mkdir()
        texts = {file: self.workshop.reference(file) for file in stage.files}
        for file in stage.files:
            tests_of = {
                INSTEAD.get(task.id, target.name): Path(task.tests).name
                for task in stage.tasks
                for target in task.targets
                if target.file == file
            }
            if is_python(file):
                texts[file] = memorising(texts[file], tests_of)
        self.workshop.build(room, stage, texts)
        shutil.copyfile(ROOT / "tests" / "memoriser.py", room / "memoriser.py")
        tests = [room / "stages" / stage.folder / task.tests for task in stage.tasks]
        if seed is not None:
            seeds.move(room, tests, seed)
        learnt, log = self.folder / f"{stage.number}-{seed if what == LEARN else None}.txt", room / "results.jsonl"
        environment = {
            "STAGES": str(stage.number), "COURSE_RESULTS": str(log), "MEMORISER": what, "MEMORISER_FILE": str(learnt),
            "MEMORISER_SEED": seed, "MEMORISER_GAPS": str(self.folder / f"{stage.number}-gaps-{seed}.txt"),
        }  # fmt: skip
        ended = self.warm.run(Job(str(room), "pytest", [*PYTEST, "-pmemoriser", *map(str, tests)], environment))
        assert log.exists(), ended.output
        return [result(record) for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if "task" in record]


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[School]:
    one = School(tmp_path_factory.mktemp("school"))
    yield one
    one.warm.close()


def draws(text: str) -> bool:
    """Whether other seeds make other cases of a file's."""
    return any(word in text for word in HYPOTHESIS) or seeds.with_other_seeds(text, SEED) != text


@pytest.mark.parametrize(("stage", "task"), [(stage, task) for stage in COURSE for task in stage.tasks], ids=lambda each: "")
def test_every_task_has_cases_that_the_salt_moves(stage: Stage, task: Task) -> None:
    """Drawn in its own file of tests, or by what makes numbers for it."""
    text = (stage.path / task.tests).read_text(encoding="utf-8")
    makers = re.findall(r"^from stages\.((?:course\.fixtures|tests)\.\w+) import", text, re.MULTILINE)
    folders = {"course": ROOT / "stages", "tests": ROOT / "solutions"}
    files = [folders[name.split(".")[0]] / f"{name.replace('.', '/')}.py" for name in makers]
    moved = [file for file in files if file.parent.name == "fixtures" or file.name.endswith("_cases.py")]
    assert draws(text) or any(draws(file.read_text(encoding="utf-8")) for file in moved), f"{task.tests} draws nothing"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: f"stage {stage.number}")
def test_a_table_of_the_public_answers_fails_every_task(school: School, stage: Stage) -> None:
    """The reference passes with other cases as it does with the public ones, and whoever has learnt these recites them well."""
    could = passed(school.take(stage, LEARN, None))
    assert passed(school.take(stage, LEARN, SEED)) >= could
    recited = passed(school.take(stage, RECITE, None))
    assert len(recited) > 0.9 * len(could), f"it forgets: {sorted(could - recited)}"
    lost = recited - passed(school.take(stage, RECITE, SEED))
    gaps = (school.folder / f"{stage.number}-gaps-{SEED}.txt").read_text(encoding="utf-8").splitlines()
    for task in [each for each in stage.tasks if each.id not in EXCUSED]:
        tests = Path(task.tests).name
        unknown = {line.partition("::")[2].rpartition(" (")[0] for line in gaps if tests in line}
        assert unknown & lost, f"all cases of {tests} are known"


def passed(results: list[TestResult]) -> set[str]:
    """The names of the tests that passed."""
    return {test.name for test in results if test.outcome == PASSED}
