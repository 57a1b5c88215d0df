"""The gate passes a sound course, and each of its rules can fail: every test below breaks one thing in a toy course."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stages.course.tools.catalog import CourseError, Stage, load_course
from stages.course.tools.wrong_versions import load_mutants, mutate
from stages.make_starters import render
from tests import gate
from tests.classroom import ROOT, Classroom
from tests.mutants import __main__ as mutants_command
from tests.mutants import bank
from tests.toy_course import HINTS, PURPOSE, REFERENCE, SECTION, TASKS, WHY, Toy, make_toy, mutant_entry
from tests.warm import Warm

FIRST = "stages/stage1_sums/tests/test_1_1.py"
SECOND = "stages/stage1_sums/tests/test_1_2.py"
SUMS, COURSE = "stages/stage1_sums/toys/sums.py", "stages/course.toml"
HINTS_FILE = "stages/stage1_sums/hints.toml"
REFERENCE_SUMS = "solutions/toys/sums.py"
CHAPTER, MUTANTS = "stages/stage1_sums/GUIDE.md", "tests/mutants/stage1.toml"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm(("hypothesis.stateful",)) as server:
        yield server


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy course with nothing wrong."""
    root = tmp_path_factory.mktemp("sound")
    toy = make_toy(root)
    room = Classroom(root / "room", root, Warm(()))
    for stage in room.course:
        for file in stage.files:
            toy.write(room.path(stage.number, file), room.read(room.path(stage.number, file)))
    shutil.rmtree(root / "room")
    return root


@pytest.fixture
def toy(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(gate, "MUTANTS_PER_STAGE", 2)
    shutil.copytree(sound, tmp_path / "toy")
    return Toy(tmp_path / "toy")


def complaints(toy: Toy, warm: Warm, rule: gate.Rule) -> list[str]:
    """What a rule says about the stages of a toy."""
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    return [complaint for stage in room.course for complaint in rule(room, stage)]


def test_a_sound_course_passes(toy: Toy, warm: Warm) -> None:
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    steps = []
    report = gate.check(room, room.course, on_step=lambda *step: steps.append(step))
    assert report.complaints == []
    assert [(kill.mutant, kill.killed_by) for kill in report.kills] == [
        ("number-+-2", "test_double_0"), ("double(number)", "test_fourfold_0"),
        ("number-//-3", "test_half_0"), ("-number-//-2", "test_half_0"),
    ]  # fmt: skip
    assert len(report.verdicts) == 2 * len(gate.RULES)
    assert [step[0] for step in steps] == list(range(len(steps)))
    assert {step[1] for step in steps} == {len(steps)}


def edit(path: str, old: str, new: str) -> Callable[[Toy], None]:
    return lambda toy: toy.edit(path, old, new)


def remove(path: str) -> Callable[[Toy], None]:
    return lambda toy: toy.remove(path)


def add(path: str, text: str) -> Callable[[Toy], None]:
    return lambda toy: toy.write(path, (toy.root / path).read_text() + text)


def first_test(body: str) -> Callable[[Toy], None]:
    """Give the first test of task 1.1 another body."""
    return edit(FIRST, "    assert double(1) == 2\n", f"    {body}\n")


def needs(module: str, claim: str) -> Callable[[Toy], None]:
    """Let the first test of task 1.1 use another function first."""
    return first_test(f"from stages.toys.{module} import {claim.split('(')[0]}; assert {claim} and double(1) == 2")


def trap_in_the_guide(toy: Toy) -> None:
    """A trap of task 1.1, and a mutant that is tied to another one."""
    toy.edit(
        CHAPTER, "## double", "## double\n\n**Traps.**\n- *Two is not\n  enough.* It is more.\n- *None*: no.\n\n**Test it.**"
    )
    toy.edit(MUTANTS, "why", 'ties = ["None"]\nwhy')


BREAKS: list[tuple[gate.Rule, Callable[[Toy], None], str]] = [
    (gate.starters_are_fresh, add(SUMS, "# mine\n"), "sums.py is not what the reference gives; run: make starters"),
    (gate.starters_are_fresh, remove(SUMS), "sums.py is not what the reference gives"),
    (gate.starters_are_fresh, edit(REFERENCE_SUMS, "Four times", "4 times"), "sums.py is not what the reference gives"),
    (gate.files_have_one_owner, edit(COURSE, "halves.py:half", "sums.py:double"), "sums.py is in stage 1 and in stage 2"),
    (gate.files_have_one_owner, edit(COURSE, ":fourfold", ":double"), "tasks 1.1 and 1.2 share toys/sums.py:double"),
    (gate.files_have_one_owner, edit(COURSE, '"task-2-1"', '"task-1-1"'), "tasks 1.1 and 2.1 share guide"),
    (gate.files_have_one_owner, edit(COURSE, "test_1_2.py", "test_1_1.py"), "tasks 1.1 and 1.2 share tests"),
    (gate.files_have_one_owner, edit(COURSE, 'id = "1.2"', 'id = "1.1"'), "tasks 1.1 and 1.1 share id"),
    (gate.files_have_one_owner, edit(COURSE, 'id = "2.1"', 'id = "3.1"'), "task 3.1 stands in stage 2"),
    (gate.tasks_are_complete, remove("stages/stage1_sums/README.md"), "stage1_sums/README.md is missing"),
    (gate.tasks_are_complete, edit(COURSE, '["toys/halves.py:half"]', "[]"), "task 2.1 asks for no function"),
    (gate.tasks_are_complete, edit(COURSE, "points = 10", "points = 0"), "task 1.1 gives 0 points"),
    (gate.tasks_are_complete, edit(COURSE, "minutes = 20", "minutes = 19"), "task 1.1 takes 19 minutes; cut it to 20 to 60"),
    (gate.tasks_are_complete, edit(COURSE, "minutes = 20", "minutes = 61"), "task 1.1 takes 61 minutes"),
    (gate.tasks_are_complete, edit(COURSE, PURPOSE, "It is."), "task 1.1 does not say what it is for"),
    (gate.tasks_are_complete, edit(HINTS_FILE, f", '{HINTS[2]}'", ""), "task 1.1 has 2 hints; write 3"),
    (gate.tasks_are_complete, remove(HINTS_FILE), "task 1.1 has 0 hints; write 3"),
    (gate.tasks_are_complete, edit(HINTS_FILE, HINTS[2], HINTS[1]), "task 1.1 says a hint twice"),
    (gate.tasks_are_complete, edit(HINTS_FILE, HINTS[1], "x"), "hint 2 of task 1.1 says nothing: 'x'"),
    (gate.tasks_are_complete, edit(HINTS_FILE, HINTS[0], "Add. " * 41), "the first hint of task 1.1 has 204 characters"),
    (gate.guide_has_sections, remove(CHAPTER), "stages/stage1_sums/GUIDE.md is missing"),
    (gate.guide_has_sections, edit(CHAPTER, '"task-1-2"', '"task-1.2"'), "write the section of task 1.2"),
    (gate.guide_has_sections, edit(CHAPTER, SECTION, "See above."), "the section task-1-1 of stages/stage1_sums/GUIDE.md"),
    (gate.guide_has_sections, edit(CHAPTER, "## double", "double"), "stages/stage1_sums/GUIDE.md has no heading"),
    (gate.tests_are_explained, remove(SECOND), "test_1_2.py is missing; write the tests of task 1.2"),
    (gate.tests_are_explained, edit(FIRST, "def test_double_3", "def other"), "test_1_1.py has 3 tests; a task needs 4"),
    (gate.tests_are_explained, edit(FIRST, "Why: ", "Because "), "test_double_0 does not say why it matters"),
    (gate.tests_are_explained, edit(FIRST, WHY, ""), "test_double_0 does not say why it matters"),
    (gate.tests_are_explained, edit(FIRST, "double of 1 is 2.", ""), "test_double_0 does not say what it checks"),
    (gate.tests_import_only_stages, add(FIRST, "from solutions.toys import sums\n"), "imports solutions.toys; import from"),
    (gate.tests_import_only_stages, add(FIRST, "import os, solutions\n"), "imports solutions; import from stages"),
    (gate.tests_import_only_stages, add(FIRST, "from tests import gate\n"), "imports tests; import from stages"),
    (gate.tests_import_only_stages, add(FIRST, "from . import test_1_2\n"), "imports .; import from stages"),
    (gate.tests_import_only_stages, add(FIRST, '__import__("solutions.toys.sums")\n'), "imports solutions.toys.sums"),
    (gate.enough_mutants, remove(MUTANTS), "stage 1 has 0 mutants; add to tests/mutants up to 2"),
    (gate.enough_mutants, edit(MUTANTS, '"1.2"', '"1.1"'), "task 1.2 has no mutant"),
    (gate.enough_mutants, edit(MUTANTS, 'name = "double(number)"', 'name = "number-+-2"'), "two mutants are called number-+-2"),
    (gate.promises_are_tied, edit(MUTANTS, "why", 'ties = ["A fall"]\nwhy'), 'has a tie to "A fall", which nobody promises'),
    (
        gate.promises_are_tied,
        trap_in_the_guide,
        'task 1.1: nothing in tests/mutants/stage1.toml is tied to "Two is not enough"',
    ),
    (gate.promises_are_tied, edit(MUTANTS.replace("1", "2"), "ties", "# ties"), 'is tied to "half: ValueError"; add'),
    (gate.reference_passes, first_test("assert double(1) == 3"), "test_double_0 fails on the reference: assert 2 == 3"),
    (gate.reference_passes, first_test("import pytest; pytest.skip()"), "task 1.1: test_double_0 fails on the reference"),
    (gate.reference_passes, remove(SECOND), "task 1.2: no test ran on the reference"),
    (gate.reference_passes, add(SECOND, "raise SystemError\n"), "task 1.2: (import) fails on the reference"),
    (gate.starters_say_what_is_missing, first_test("assert True"), "test_double_0 passes on a fresh starter; let it call"),
    (gate.starters_say_what_is_missing, first_test("assert 1 == 2"), "fails with something else: assert 1 == 2 on a fresh"),
    (gate.starters_say_what_is_missing, remove(SECOND), "task 1.2: no test ran on a fresh starter"),
    (gate.starters_say_what_is_missing, needs("sums", "fourfold(1) == 4"), "test_double_0 needs task 1.2 on a fresh starter"),
    (
        gate.earlier_tasks_suffice,
        needs("sums", "fourfold(1) == 4"),
        "fails with the tasks up to 1.1 written: Stage 1 · Task 1.2",
    ),
    (gate.earlier_tasks_suffice, edit(SECOND, "fourfold(1) == 4", "1 == 2"), "else: assert 1 == 2 with the tasks up to 1.1"),
    (gate.earlier_tasks_suffice, edit(SECOND, "fourfold(1) == 4", "True"), "test_fourfold_0 passes with the tasks up to 1.1"),
    (gate.earlier_tasks_suffice, remove(SECOND), "task 1.2: no test ran with the tasks up to 1.1 written"),
    (gate.stages_pass_together, needs("halves", "half(4) == 2"), "with the stages up to 1 written: Stage 2 · Task 2.1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "change", "says"), BREAKS, ids=[f"{case[0].__name__}-{case[2][:40]}" for case in BREAKS])
def test_a_rule_can_fail(rule: gate.Rule, change: Callable[[Toy], None], says: str, toy: Toy, warm: Warm) -> None:
    change(toy)
    found = complaints(toy, warm, rule)
    assert [complaint for complaint in found if says in complaint] != [], found
    assert all("\n" not in complaint for complaint in found)


def test_a_stage_may_be_given_a_later_one(toy: Toy, warm: Warm) -> None:
    """What a later stage writes anew is the reference's until then; `course.toml` says so, or else it is a complaint."""
    needs("halves", "half(4) == 2")(toy)
    assert complaints(toy, warm, gate.stages_pass_together) != []
    toy.edit(COURSE, 'folder = "stage1_sums"', 'folder = "stage1_sums"\ngiven = [2]')
    shutil.rmtree(toy.root.parent / "room")
    assert complaints(toy, warm, gate.stages_pass_together) == []


def test_only_what_may_say_something_else_runs_again(toy: Toy, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of 1.2 that meets 1.1 first says something new once that is written; the others still miss their own task."""
    both = "from stages.toys.sums import double; assert double(1) == 2 and fourfold(1) == 4"
    toy.edit(SECOND, "assert fourfold(1) == 4", both)
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    runs: list[list[str]] = []
    run = room.run
    monkeypatch.setattr(room, "run", lambda stages, tests: runs.append([*tests]) or run(stages, tests))
    assert gate.starters_say_what_is_missing(room, room.course[0]) == gate.earlier_tasks_suffice(room, room.course[0]) == []
    assert runs == [[FIRST, SECOND], [FIRST, f"{SECOND}::test_fourfold_0"], [SECOND]]


def test_every_rule_is_shown_to_fail() -> None:
    assert {case[0] for case in BREAKS} == set(gate.RULES)


def test_the_learners_files_concern_one_rule_only(toy: Toy, warm: Warm) -> None:
    toy.write(SUMS, "half a learner's work (")
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    report = gate.check(room, room.course[:1], mutants=False)
    assert [verdict.rule for verdict in report.verdicts if verdict.complaints] == ["starters are fresh"]


# ----------------------------------------------------------------------------------------------------- the mutant bank
WRONG_MUTANTS = {
    "survives": (("1.1", "toys/sums.py", "number + number", "2 * number"), "mutant 2-*-number survives: no test of task 1.1"),
    "is killed by another task's tests only": (
        ("1.1", "toys/sums.py", "double(double(number))", "double(number)"),
        "mutant double(number) survives: no test of task 1.1",
    ),
    "has a text that is gone": (("1.1", "toys/sums.py", "number * 2", "number"), "its old text stands 0 times in"),
    "has a text that is there twice": (
        ("1.1", "toys/sums.py", "(number: int)", "(number)"),
        "times in solutions/toys/sums.py, not once",
    ),
    "is no Python": (("1.1", "toys/sums.py", "return number + number", "return number +"), "is no Python: invalid syntax"),
    "is of an unknown task": (("1.3", "toys/sums.py", "number + number", "number"), "stage 1 has no task 1.3"),
    "is in a file that nobody writes": (("1.1", "toys/halves.py", "number // 2", "0"), "is no file of stage 1"),
    "breaks the import": (("1.1", "toys/sums.py", "def double(", "def duplicate("), "the tests of task 1.1 could not be run"),
}


@pytest.mark.parametrize("name", WRONG_MUTANTS)
def test_a_mutant_that(name: str, toy: Toy, warm: Warm) -> None:
    entry, says = WRONG_MUTANTS[name]
    toy.write(MUTANTS, mutant_entry(*entry))
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    kill = gate.check_mutant(room, room.course[0], load_mutants(room.root, room.course[0])[0])
    assert kill.killed_by is None
    assert says in kill.complaint


def test_an_endless_mutant_is_killed(toy: Toy, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where hypothesis takes every `Exception` of a test for a finding, and runs it again to find a simpler one."""
    monkeypatch.setattr(bank, "TEST_LIMIT", 0.2)
    toy.write(MUTANTS, mutant_entry("1.1", "toys/sums.py", "return number + number", "while number != 1: pass\\n    return 2"))
    random_test = "from hypothesis import given, strategies\n@given(strategies.integers())\ndef test_double_1(number) -> None:"
    toy.edit(FIRST, "def test_double_1() -> None:", random_test)
    toy.edit(FIRST, "assert double(2) == 4", "assert double(number) == number + number")
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    assert gate.check_mutant(room, room.course[0], load_mutants(room.root, room.course[0])[0]).killed_by == "test_double_1"


@pytest.mark.parametrize("remembered", ["test_double_3", "test_double_1", "test_nowhere"])
def test_the_test_that_is_remembered_runs_first_and_all_others_if_it_passes(
    remembered: str, toy: Toy, warm: Warm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that is no more, or that does not notice, costs time and no verdict."""
    monkeypatch.setattr(bank, "KILLERS", tmp_path / "killers.json")
    monkeypatch.setattr(bank, "known_killers", lambda: {"1.1 number-+-2": remembered})
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    kill = gate.check_mutant(room, room.course[0], load_mutants(room.root, room.course[0])[0])
    assert kill.killed_by == ("test_double_3" if remembered == "test_double_3" else "test_double_0")  # double(2) is still 4


def test_the_quickest_of_those_that_notice(toy: Toy, warm: Warm) -> None:
    waits = "import time; end = time.monotonic() + 0.3\n    while time.monotonic() < end: pass\n    assert double(1) == 2"
    toy.edit(FIRST, "assert double(1) == 2", waits)
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    mutant = load_mutants(room.root, room.course[0])[0]
    assert bank.killer(room, room.course[0], mutant).name == "test_double_0"
    assert bank.quickest_killer(room, room.course[0], mutant) == "test_double_2"  # double(2) is still 4


def test_what_is_remembered_of_one_stage_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bank, "KILLERS", tmp_path / "killers.json")
    monkeypatch.setattr(bank, "known_killers", lambda: {"1.1 a": "test_a", "2.1 b": "test_b"})
    bank.remember({"1.1 a": "test_c[0]"})
    assert json.loads((tmp_path / "killers.json").read_text()) == {"1.1 a": "test_c[0]", "2.1 b": "test_b"}


@pytest.mark.parametrize("stage", load_course(), ids=lambda stage: str(stage.number))
def test_every_mutant_of_the_real_bank_can_be_made(stage: Stage) -> None:
    """Whether its text still stands where it says: seconds here, minutes in the gate."""
    wrong = load_mutants(ROOT, stage)
    assert wrong
    for mutant in wrong:
        mutate(mutant, (ROOT / "solutions" / mutant.file).read_text(encoding="utf-8"))


def test_a_malformed_bank_is_named(toy: Toy, warm: Warm) -> None:
    toy.edit(MUTANTS, "why", "because")
    room = Classroom(toy.root.parent / "room", toy.root, warm)
    with pytest.raises(CourseError, match=r"stage1.toml, mutant 'number-[+]-2': missing or unknown: because, why"):
        load_mutants(room.root, room.course[0])


def test_the_list_of_mutants_names_their_killers(
    toy: Toy, warm: Warm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutants_command, "Classroom", partial(Classroom, root=toy.root, warm=warm))
    assert mutants_command.main(["--stage", "1"]) == 0
    printed = capsys.readouterr().out
    assert "test_fourfold_0" in printed
    assert "2 of 2 mutants are killed" in printed
    toy.edit(MUTANTS, "number + 2", "2 * number")
    assert mutants_command.main(["--name", "number-+-2"]) == 1
    printed = capsys.readouterr().out
    assert "nothing: A slip." in printed
    assert "0 of 1 mutants are killed" in printed
    assert mutants_command.main(["--name", "nobody"]) == 1


# --------------------------------------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_the_command_reports_and_fails(
    toy: Toy, warm: Warm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "Classroom", partial(Classroom, root=toy.root, warm=warm))
    file = toy.root / "report.json"
    assert gate.main(["--stage", "1", "--json", str(file)]) == 0
    assert "The course holds" in capsys.readouterr().out
    kills = json.loads(file.read_text())["kills"]
    assert kills[0] == {"mutant": "number-+-2", "task": "1.1", "killed_by": "test_double_0", "complaint": ""}
    toy.remove("stages/stage2_halves/GUIDE.md")
    assert gate.main(["--stage", "2", "--no-mutants"]) == 1
    printed = capsys.readouterr().out
    assert "stages/stage2_halves/GUIDE.md is missing; write it" in printed
    assert "test_half_0" not in printed
    with pytest.raises(SystemExit):
        gate.main(["--stage", "7"])
    assert "there is no stage 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit(COURSE, "sums.py:double", "sums.py:triple"), "task 1.1: there is no triple in solutions/toys/sums.py"),
        (remove("solutions/toys/halves.py"), "course.toml names toys/halves.py, which is not in solutions/"),
        (
            edit(REFERENCE_SUMS, '    """Twice a number."""\n', ""),
            "task 1.1: double in solutions/toys/sums.py has no docstring",
        ),
    ],
)
def test_the_command_wants_what_starters_are_made_of(
    change: Callable[[Toy], None], says: str, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(toy)
    monkeypatch.setattr(gate, "Classroom", partial(Classroom, root=toy.root))
    with pytest.raises(SystemExit) as end:
        gate.main([])
    assert end.value.code == 1
    assert says in capsys.readouterr().err


def test_the_command_ends_when_all_its_stages_have(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage breaks down while the other still copies the course: the folder stays until both have let go of it."""
    begun = threading.Event()
    left: list[str] = []

    class Room(Classroom):
        def __init__(self, folder: Path, warm: Warm) -> None:
            if folder.name == "rules-1":
                begun.wait(10)
                raise CourseError("the first stage breaks down")
            begun.set()
            time.sleep(0.3)
            super().__init__(folder, toy.root, warm)
            left.append(folder.name)

    monkeypatch.setattr(gate, "Classroom", Room)
    monkeypatch.setattr(gate, "ROOT", toy.root)
    with pytest.raises(SystemExit) as end:
        gate.main([])
    assert end.value.code == 1
    assert "the first stage breaks down" in capsys.readouterr().err
    assert left == ["rules-2"]


def test_the_toy_is_what_it_says() -> None:
    """The toy's functions do what its tests ask of them, so that the breaks above are the only thing wrong."""
    for _, file, function, cases in TASKS:
        space: dict = {}
        exec(REFERENCE[file], space)
        assert {number: space[function](number) for number in cases} == cases
        assert "NotImplementedError" not in render(REFERENCE[file], file, [])
