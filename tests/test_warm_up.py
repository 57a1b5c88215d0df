"""The warm-up: its starter is the answers' file with empty functions, its tests fail for want of these, its tables are live."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from math import log
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from stages.course.__main__ import main
from stages.course.tools import state
from stages.course.tools.catalog import ROOT, load_warm_up
from stages.course.tools.progress import show_progress
from stages.make_starters import render
from tests.warm_up_answers import attend, floor_seconds

FOLDER = ROOT / "stages/stage0_warm_up"
CHAPTER = "stages/stage0_warm_up/README.md"
TEXT = (ROOT / CHAPTER).read_text(encoding="utf-8")
ANSWERS = ROOT / "tests/warm_up_answers.py"
FILE = "warm_up.py"
WARM_UP = load_warm_up()[0]
TASKS = list(WARM_UP.tasks)


def starter() -> str:
    return render(ANSWERS.read_text(encoding="utf-8"), FILE, TASKS)


def failures(text: str) -> list[tuple[str, Exception]]:
    """The warm-up's tests on a version of the learner's file: (name of a test, what it raised) of each case that fails."""
    module, space = ModuleType("tried_version"), dict[str, Any]()
    exec(compile(text, "tried_version.py", "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    try:
        for task in TASKS:
            source = (FOLDER / task.tests).read_text(encoding="utf-8")
            exec(source.replace("stages.stage0_warm_up.warm_up", module.__name__), space)
    finally:
        del sys.modules[module.__name__]
    found: list[tuple[str, Exception]] = []
    for name in [name for name in space if name.startswith("test_")]:
        marks = getattr(space[name], "pytestmark", [])
        names, values = marks[0].args if marks else ((), [()])
        for value in values:
            try:
                space[name](*((value,) if isinstance(names, str) else value))
            except Exception as error:
                found.append((name, error))
    return found


def measure(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """``make warm-up`` with a version of the learner's file."""
    (folder / "tried_version.py").write_text(text, encoding="utf-8")
    script = (FOLDER / "measure.py").read_text(encoding="utf-8").replace("stages.stage0_warm_up.warm_up", "tried_version")
    (folder / "measure.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "measure.py"]
    return subprocess.run(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_the_starter_is_the_answers_with_empty_functions() -> None:
    """A file in which a function is written is a learner's, and this says nothing of it."""
    kept = (FOLDER / FILE).read_text(encoding="utf-8")
    assert kept == starter() or kept.count("raise NotImplementedError(") < len(TASKS)


def test_the_answers_pass_and_the_starter_fails_for_want_of_its_own_task() -> None:
    assert failures(ANSWERS.read_text(encoding="utf-8")) == []
    failed = failures(starter())
    assert {name[5:8] for name, _ in failed} == {"0_1", "0_2", "0_3", "0_4"}
    for name, error in failed:
        assert isinstance(error, NotImplementedError)
        assert str(error).startswith(f"Stage 0 · Task {name[5:8].replace('_', '.')}:")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokens = list(prompt)", "tokens = prompt if isinstance(prompt, list) else list(prompt)"),
        ("return tokens[len(prompt) :]", "return tokens[-num_tokens:]"),
        ("range(num_tokens)", "range(num_tokens + 1)"),
        ("/ len(query) ** 0.5", ""),
        ("    keys.append(key)\n", "    keys.insert(0, key)\n"),
        ("/ len(query) ** 0.5", "/ len(keys) ** 0.5"),
        ("return max(", "return min("),
        ("sum(max(lengths[start", "sum(min(lengths[start"),
        ("range(0, len(lengths), batch_size)", "range(0, len(lengths) - batch_size + 1, batch_size)"),
        ("if steps else 1.0", "if steps else 0.0"),
    ],
)  # fmt: skip
def test_a_wrong_version_is_noticed(old: str, new: str) -> None:
    text = ANSWERS.read_text(encoding="utf-8")
    assert text.count(old) == 1
    assert failures(text.replace(old, new)) != []


def test_the_tables_are_measured_with_the_learners_code(tmp_path: Path) -> None:
    none = measure(tmp_path, starter())
    assert none.returncode == 1
    assert "Stage 0 · Task 0.1: generate" in none.stdout
    ended = measure(tmp_path, ANSWERS.read_text(encoding="utf-8"))
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^ +256 +49,024 +319 +\d", ended.stdout, re.MULTILINE), ended.stdout
    machine = re.search(r"reads ([\d.]+) GB/s and multiplies (\d+) GFLOP/s", ended.stdout)
    assert machine is not None
    assert 0 < float(machine[1]) < 10_000
    assert re.search(r"^ +1 +\d+,?\d+ +100%$", ended.stdout, re.MULTILINE), "one at a time, no seat is empty"


def test_the_examples_of_the_chapter_are_right() -> None:
    keys, values = [torch.tensor([0.0])], [torch.tensor([10.0])]
    assert attend(torch.ones(1), torch.tensor([log(3)]), torch.tensor([20.0]), keys, values).item() == pytest.approx(17.5)
    assert 256 * 64 + 256 * 255 // 2 == 49_024
    assert floor_seconds(4e6, 2e6, 10e9, 100e9) == pytest.approx(400e-6)
    assert [floor_seconds(4e6, rows * 2e6, 10e9, 100e9) > 400.1e-6 for rows in (20, 21)] == [False, True]
    for each in ("17.5", "49,024", "400 µs", "up to 20 rows", "16", "21 of them"):
        assert each in TEXT


def test_every_section_is_where_the_starter_says() -> None:
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in re.findall(r"^## (.*)$", TEXT, re.MULTILINE)}
    assert {task.guide for task in TASKS} <= anchors
    assert [task.id for task in TASKS if f"| {task.id} | `{task.targets[0].name}` |" not in TEXT] == []
    hub = (ROOT / "IMPLEMENTATION_GUIDE.md").read_text(encoding="utf-8")
    assert f"]({CHAPTER})" in hub


def test_there_are_three_hints_a_task_and_they_do_not_repeat() -> None:
    assert [len(set(task.hints)) for task in TASKS] == [3] * 4
    assert all(max(map(len, task.hints[:1])) <= 200 and task.purpose and task.starred and task.points == 0 for task in TASKS)


def test_it_has_a_page_and_hints_and_a_row_without_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the starter in place, or with whatever a learner has written."""
    monkeypatch.setattr(state, "FOLDER", tmp_path)
    monkeypatch.setattr(state, "RESULTS", tmp_path / "results.json")
    monkeypatch.setenv("COLUMNS", "140")
    written = starter() != (FOLDER / FILE).read_text(encoding="utf-8")
    code = main(["test", "--stage", "0"])
    page = capsys.readouterr().out
    assert "Stage 0 · Warm-up (your code)" in page
    if not written:
        assert code == 1
        assert "next: task 0.1, The naive loop" in page
        assert "make hint TASK=0.1 LEVEL=2" in page
    assert main(["hint", "--task", "0.4", "--level", "2"]) == 0
    assert "strides" in capsys.readouterr().out
    assert (main(["test", "--stage", "0", "--impl", "solutions"]), main(["hint", "--task", "0.5"])) == (1, 1)
    console = Console(width=140, record=True)
    show_progress(console, [WARM_UP])
    row = next(line for line in console.export_text().splitlines() if "0 Warm-up" in line)
    assert "0.4" in row
    assert "optional" in row
    assert "★" not in row
