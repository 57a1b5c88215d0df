"""What `make mutation` breaks and what it leaves alone, and when it is content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from stages.course.tools.catalog import CourseError, Target, Task, load_course
from stages.course.tools.targets import function_source
from tests import mutation, mutation_record
from tests.classroom import ROOT, Classroom
from tests.mutation import Explanation, Fate, complaints_of, essence, function_mutants, load_explanations, part_mutants
from tests.mutation_record import UNKNOWN, Ledger, Tally, fingerprint, load_tallies, tallies_table
from tests.toy_course import REFERENCE, make_toy, text_of_tests
from tests.warm import Warm

SOURCE = '''
LIMIT = 3 + 4

class Box:
    @staticmethod
    def size(width: int = 1, *rest: int) -> int | None:
        """One + one."""
        depth: int | str = 2
        if width < 0:
            raise ValueError(f"{width + 1} is below 0")
        return width * depth

def other(x):
    return x + 1
'''
TASK = Task("1.1", "t", (), "", "", "", 1, 20, "", ())


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm(("hypothesis.stateful",)) as server:
        yield server


def mutants(name: str, source: str = SOURCE) -> list[mutation.Machine]:
    return function_mutants(source, TASK, Target("box.py", name))


def test_only_the_function_is_broken() -> None:
    made = mutants("Box.size")
    assert {each.line for each in made} == {5, 6, 8, 9, 11}
    for each in made:
        assert each.text.startswith("\nLIMIT = 3 + 4\n\nclass Box:\n    ")
        assert each.text.endswith("\ndef other(x):\n    return x + 1\n")
        compile(each.text, "box.py", "exec")
    assert {each.line for each in mutants("other")} == {14}


def test_each_mutant_is_another_program() -> None:
    made = [essence(each.text) for each in mutants("Box.size")]
    assert len(made) == len(set(made))
    assert essence(SOURCE) not in made


def test_typical_slips_are_among_them() -> None:
    changes = {(each.old, each.new) for each in mutants("Box.size")}
    assert ("return width * depth", "return width + depth") in changes
    assert ("if width < 0:", "if width <= 0:") in changes
    assert ("if width < 0:", "if not width < 0:") in changes
    assert ("depth: int | str = 2", "depth: int | str = 3") in changes
    assert ("@staticmethod", "") in changes


def test_a_function_that_is_gone_is_named() -> None:
    with pytest.raises(CourseError, match=r"task 1\.1: there is no Box\.weight in solutions/box\.py"):
        mutants("Box.weight")


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("int | str = 2", "int & str = 2", True), ("int | None", "int & None", True), ("One + one.", "Two.", True),
        ("{width + 1} is", "{width - 1} is", True), ("ValueError", "TypeError", False), ("width < 0", "width > 0", False),
        ("width: int = 1", "width: str = 1", True), ("width: int = 1", "width: int = 2", False),
    ],
)  # fmt: skip
def test_what_makes_a_difference(old: str, new: str, same: bool) -> None:
    assert old in SOURCE
    assert (essence(SOURCE.replace(old, new)) == essence(SOURCE)) is same


PART = """int before(int x) { return x + 1; }
int count(const int* x, int n) {
    // TASK 1.1 begin: count
    int found = 0;
    for (int i = 0; i < n && !x[i]; ++i) {
        if (x[i] == 2) break;
        note(x[i], found);  // all but 1 + 1
        found += 1;
    }
    return found;
    // TASK 1.1 end
}
"""


def test_parts_of_cpp_are_broken_line_by_line() -> None:
    made = part_mutants(PART, TASK, Target("box.cpp", "count"))
    changes = {(each.line, each.new) for each in made}
    assert changes >= {
        (4, "int found = 1;"), (4, "int found = -1;"), (5, "for (int i = 0; i <= n && !x[i]; ++i) {"),
        (5, "for (int i = 0; i < n || !x[i]; ++i) {"), (5, "for (int i = 0; i < n && x[i]; ++i) {"),
        (6, "if (x[i] != 2) break;"), (6, "if (x[i] == 2) continue;"), (6, "if (x[i] == 3) break;"), (7, ""),
        (8, "found = 1;"), (8, "found -= 1;"), (8, "found += 2;"), (8, ""),
    }  # fmt: skip
    assert {each.line for each in made} == {4, 5, 6, 7, 8}
    assert [each.new for each in made if each.line == 7] == [""], "a comment is no code"
    assert len({each.text for each in made}) == len(made)
    with pytest.raises(CourseError, match=r"task 1\.1: there are no markers for sum in solutions/box\.cpp"):
        part_mutants(PART, TASK, Target("box.cpp", "sum"))


# ------------------------------------------------------------------------------------------------------- explanations
def fates(killed: int, survived: int) -> list[Fate]:
    made = [mutation.Machine("1.1", "f.py", "f", n, "old", f"new {n}", "") for n in range(killed + survived)]
    return [Fate(each, "test_f" if n < killed else "") for n, each in enumerate(made)]


def explain(*new: str) -> Explanation:
    return Explanation("f.py", "f", "old", new, "It is the same.")


def test_nineteen_of_twenty_must_be_killed() -> None:
    for killed, survived, found in ((19, 1, 0), (18, 1, 1), (0, 0, 1)):
        tried = fates(killed, survived)
        explanations = [explain(*(fate.mutant.new for fate in tried if not fate.killed_by))]
        complaints = complaints_of(tried, explanations, [fate.mutant for fate in tried])
        assert len(complaints) == found
        assert len(complaints_of(tried, explanations, [fate.mutant for fate in tried], whole=False)) == (not tried)


def test_what_survives_must_be_explained_and_what_is_explained_must_be_made() -> None:
    tried = fates(19, 1)
    made = [fate.mutant for fate in tried]
    assert complaints_of(tried, [explain("new 19")], made) == []
    (complaint,) = complaints_of(tried, [], made)
    assert complaint.startswith("task 1.1, f: 'new 19' survives; write a test, or explain")
    (complaint,) = complaints_of(tried, [explain("new 19", "new 20")], made)
    assert complaint == "survivors.toml: f: no mutant makes 'new 20' of 'old' any more"


def test_explanations_are_read(tmp_path: Path) -> None:
    path = tmp_path / "survivors.toml"
    assert load_explanations(path) == []
    entry = '[[survivor]]\nfile = "f.py"\nfunction = "f"\nold = "old"\nnew = "a"\nreason = "It is the same."\n'
    path.write_text(entry + entry.replace('"a"', '["a", "b"]'))
    assert load_explanations(path) == [explain("a"), explain("a", "b")]
    path.write_text(entry.replace("reason", "because"))
    with pytest.raises(CourseError, match="an entry for 'f' has no 'reason'"):
        load_explanations(path)


def test_the_explanations_of_the_course_are_well_formed() -> None:
    assert all(len(explanation.reason) > 20 for explanation in load_explanations())


def test_the_explanations_of_the_course_quote_lines_of_their_functions() -> None:
    """A line that was changed since has other mutants; the command would find that out only after minutes."""
    gone = []
    for each in load_explanations():
        source = function_source((ROOT / "solutions" / each.file).read_text(), each.file, each.function)
        if " ".join(each.old.split()) not in " ".join(source.split()):
            gone.append(f"{each.function}: {each.old}")
    assert gone == []


# --------------------------------------------------------------------------------------------------------- what is kept
TESTS = """
LIMIT = 1

def test_a():
    assert LIMIT

def test_b():
    assert LIMIT

class TestC:
    def test_d(self):
        assert LIMIT
"""


@pytest.mark.parametrize(
    ("killer", "old", "new", "known"),
    [
        ("test_a", "", "", True), ("test_a[1-x]", "", "", True), ("", "", "", True), (None, "", "", True),
        ("test_a", "def test_b", "def test_z", True), ("test_a", "class", "def test_new():\n    pass\n\nclass", True),
        ("test_a", "LIMIT = 1", "LIMIT = 2", False), ("test_a", "test_a():\n    assert", "test_a():\n    assert not", False),
        ("test_a", "test_d", "test_e", False), ("test_d", "test_d", "test_e", False), ("test_d", "test_a", "test_z", False),
        ("", "def test_b", "def test_z", False), ("", "class", "def test_new():\n    pass\n\nclass", False),
        ("the run was stopped", "def test_b", "def test_z", False), ("test_a", "test_b():\n", "test_b():  # a remark\n", True),
    ],
)  # fmt: skip
def test_a_fate_holds_as_long_as_what_decided_it(tmp_path: Path, killer: str | None, old: str, new: str, known: bool) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    Ledger(path).add("mutant", TESTS, killer)
    assert old in TESTS
    again = Ledger(path)
    assert again.fate("mutant", TESTS.replace(old, new) if old else TESTS) == (killer if known else UNKNOWN)
    assert again.fate("another", TESTS) == UNKNOWN


def test_the_last_fate_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for killer in ("", "test_a"):
        ledger.add("one", TESTS, killer)
        assert ledger.fate("one", TESTS) == killer
    ledger.add("two", TESTS, "test_b")
    path.write_text(path.read_text()[:-20])  # the machine stopped meanwhile
    assert [Ledger(path).fate(name, TESTS) for name in ("one", "two")] == ["test_a", UNKNOWN]
    Ledger(path).add("three", TESTS, "")
    assert [Ledger(path).fate(name, TESTS) for name in ("one", "two", "three")] == ["test_a", UNKNOWN, ""]
    assert Ledger(path, anew=True).fate("one", TESTS) == UNKNOWN
    assert not path.exists()


def test_the_table_counts_by_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = "Text.\n\n| stage | mutants made by machine | old |\n|---|\n\nMore.\n"
    for name, text in (("DOCUMENT", document), ("RECORD", "{}")):
        path = tmp_path / name
        path.write_text(text)
        monkeypatch.setattr(mutation_record, name, path)
    mutation_record.write_tallies({"1.2": Tally(900, 890, 10, "a"), "2.10": Tally(3, 1, 1, "b")})
    mutation_record.write_tallies({"1.1": Tally(100, 80, 15, "c")})
    assert {task: each.of for task, each in load_tallies(tmp_path / "RECORD").items()} == {"1.1": "c", "1.2": "a", "2.10": "b"}
    before, head, _, first, second, after = (tmp_path / "DOCUMENT").read_text().replace("\n\n", "\n").splitlines()
    assert (before, after) == ("Text.", "More.")
    assert head.count("|") == first.count("|") == second.count("|")
    assert first == "| 1 | 1,000 | 2 of 8 | 970 | 97.0 % | 25 | 5 |"
    assert second == "| 2 | 3 | 1 of 10 | 1 | 33.3 % | 1 | 1 |"


def test_the_committed_table_is_that_of_the_record() -> None:
    assert mutation_record.TABLE.search((ROOT / "CONTRIBUTING.md").read_text())[0] == tallies_table(
        load_tallies(), load_course()
    )


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("One + one.", "Two.\n\n        Three.", True), ("    depth", "    # a remark\n        depth", True),
        ("return x + 1", "return x + 2", True), ("width * depth", "width + depth", False), ("@staticmethod", "", False),
        ("-> int | None", "-> int", False), ("width * depth", "(\n            width * depth\n        )", False),
        ("rest: int)", "rest:\n             int)", True),
    ],
)  # fmt: skip
def test_numbers_hold_as_long_as_the_functions_do(old: str, new: str, same: bool) -> None:
    task = replace(TASK, targets=(Target("box.py", "Box.size"), Target("box.cpp", "count")))
    assert old in SOURCE
    before, after = (fingerprint(task, {"box.py": text, "box.cpp": PART}.get) for text in (SOURCE, SOURCE.replace(old, new)))
    assert (before == after) is same
    parts = {"found += 1": "found += 2", "all but": "all  but", "if (x": "// a remark\n        if (x", "int before": "int b"}
    changed = [fingerprint(task, {"box.py": SOURCE, "box.cpp": PART.replace(*each)}.get) != before for each in parts.items()]
    assert changed == [True, False, False, False]


def test_the_record_is_of_the_functions_as_they_are() -> None:
    """What it names is to be counted anew: make mutation STAGE=1 ARGS="--task 1.1 --record"."""
    read = partial(Path.read_text, encoding="utf-8")
    tasks, tallies = [task for stage in load_course() for task in stage.tasks], load_tallies()
    now = {task.id: fingerprint(task, lambda file: read(ROOT / "solutions" / file)) for task in tasks}
    assert [task for task, each in tallies.items() if each.of != now[task]] == []


# -------------------------------------------------------------------------------------------------------- the command
@pytest.mark.slow
def test_the_command_counts_and_lists(
    tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy(tmp_path / "toy")
    survivors = tmp_path / "survivors.toml"
    monkeypatch.setattr(mutation, "Classroom", partial(Classroom, root=toy.root, warm=warm))
    monkeypatch.setattr(mutation, "load_explanations", partial(load_explanations, survivors))
    monkeypatch.setattr(mutation, "LEDGERS", tmp_path)
    assert mutation.main(["--stage", "1", "--task", "1.1"]) == 0
    assert "11 of 11 mutants are killed" in capsys.readouterr().out
    monkeypatch.setattr(mutation, "try_mutant", None)  # all are known
    assert mutation.main(["--stage", "1", "--task", "1.1"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(mutation, "Classroom", partial(Classroom, root=toy.root, warm=warm))
    monkeypatch.setattr(mutation, "load_explanations", partial(load_explanations, survivors))
    monkeypatch.setattr(mutation, "LEDGERS", tmp_path)
    assert "11 of 11 mutants are killed" in capsys.readouterr().out
    # 2 + 2 is 2 * 2 and 2 ** 2: one weak test does not tell
    toy.write("stages/stage1_sums/tests/test_1_1.py", text_of_tests("toys/sums.py", "double", {2: 4}))
    toy.write("stages/stage1_sums/tests/test_1_2.py", text_of_tests("toys/sums.py", "double", {2: 4}))
    survivors.write_text(
        '[[survivor]]\nfile = "toys/sums.py"\nfunction = "double"\nold = "return number + number"\n'
        'new = "return number * number"\nreason = "2 + 2 is 2 * 2."\n'
    )
    assert mutation.main(["--stage", "1", "--task", "1.1"]) == 1
    printed = capsys.readouterr().out
    change = "toys/sums.py:6 double\n  - return number + number\n  + return number"
    assert f"{change} * number\n  explained: 2 + 2 is 2 * 2." in printed
    assert f"{change} ** number\n  survives" in printed
    assert "✗ task 1.1, double: 'return number ** number' survives; write a test" in printed


def test_a_later_tasks_tests_do_not_count(tmp_path: Path, warm: Warm) -> None:
    toy = make_toy(tmp_path / "toy")
    toy.write("stages/stage1_sums/tests/test_1_1.py", "def test_nothing() -> None:\n    pass\n")
    room = Classroom(tmp_path / "room", toy.root, warm)
    stage = room.course[0]
    made = function_mutants(REFERENCE["toys/sums.py"], stage.tasks[0], stage.tasks[0].targets[0])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert [fate.killed_by for fate in mutation.run(room, stage, made[:1], ledger, lambda done, mutant: None)] == [""]
    toy_tests = room.read(room.tests(stage.tasks[0]))
    assert ledger.fate(made[0].text, toy_tests) == ""
