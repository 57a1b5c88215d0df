"""A course of two stages and three one-line functions, on which the gate and the mutation runs are tried out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.classroom import ROOT

TOOLS = ("__init__.py", "conftest.py", "make_starters.py", "course")
REFERENCE = {
    "toys/sums.py": '''"""Sums."""


def double(number: int) -> int:
    """Twice a number."""
    return number + number


def fourfold(number: int) -> int:
    """Four times a number."""
    return double(double(number))
''',
    "toys/halves.py": '''"""Halves."""


def half(number: int) -> int:
    """Half of an even number.

    Raises:
        ValueError: it is odd.
    """
    if number % 2 == 1:
        raise ValueError(f"{number + 0} is odd")
    return number // 2
''',
}
TASKS = (
    ("1.1", "toys/sums.py", "double", {1: 2, 2: 4, 5: 10, 7: 14}),
    ("1.2", "toys/sums.py", "fourfold", {1: 4, 2: 8, 5: 20, 7: 28}),
    ("2.1", "toys/halves.py", "half", {2: 1, 4: 2, 10: 5, -6: -3}),
)
FOLDERS = {"1": "stage1_sums", "2": "stage2_halves"}
HINTS = (
    "Addition is all that you need here.",
    "Think of the number as being there more than once.",
    "The answer is one line, which begins with return and uses the number.",
)
PURPOSE = "Everything else in this toy stands on it."
SECTION = "How it is done. " * 30
WHY = "Why: who counts on it would be wrong."
PYPROJECT = """[tool.pytest.ini_options]
addopts = ["--import-mode=importlib"]
pythonpath = ["."]
"""


def task_entry(task_id: str, file: str, function: str, worth: str = "points = 10") -> str:
    """The entry of a task in course.toml; `worth` is its points or its star."""
    name = task_id.replace(".", "_")
    return f"""
[[stage.task]]
id = "{task_id}"
title = "The function {function}"
targets = ["{file}:{function}"]
tests = "tests/test_{name}.py"
guide = "task-{task_id.replace(".", "-")}"
{worth}
minutes = 20
purpose = "{PURPOSE}"
"""


def text_of_tests(file: str, function: str, cases: dict[int, int]) -> str:
    """A file of tests: one for each number and what becomes of it."""
    lines = [f"from stages.{file.removesuffix('.py').replace('/', '.')} import {function}"]
    for index, (number, expected) in enumerate(cases.items()):
        lines += ["", "", f"def test_{function}_{index}() -> None:", f'    """{function} of {number} is {expected}.', ""]
        lines += [f"    {WHY}", '    """', f"    assert {function}({number}) == {expected}"]
    return "\n".join(lines) + "\n"


def mutant_entry(task_id: str, file: str, old: str, new: str) -> str:
    """The entry of a mutant in the bank, named after its new text."""
    name = new.replace(" ", "-")
    return f'[[mutant]]\nname = "{name}"\ntask = "{task_id}"\nfile = "{file}"\nwhy = "A slip."\nold = "{old}"\nnew = "{new}"\n'


@dataclass(frozen=True, slots=True)
class Toy:
    """The toy course in a folder of its own, to break at will."""

    root: Path

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace a text that stands at least once in a file."""
        text = (self.root / path).read_text(encoding="utf-8")
        assert old in text, f"{path} has no {old!r}"
        self.write(path, text.replace(old, new))

    def remove(self, path: str) -> None:
        (self.root / path).unlink()


def make_toy(root: Path, starred: str = "") -> Toy:
    """Build the toy course, sound in every respect but its starters, which a learner or `fresh_starters` writes.

    Args:
        starred: the task that is an extra, if one is.
    """
    toy = Toy(root)
    for name in TOOLS:
        copy = shutil.copytree if (ROOT / "stages" / name).is_dir() else shutil.copyfile
        (root / "stages").mkdir(parents=True, exist_ok=True)
        copy(ROOT / "stages" / name, root / "stages" / name)
    shutil.rmtree(root / "stages" / "course" / "__pycache__", ignore_errors=True)
    toy.write("pyproject.toml", PYPROJECT)
    for file, text in REFERENCE.items():
        toy.write(f"solutions/{file}", text)
    course = ""
    for number, folder in FOLDERS.items():
        course += f'\n[[stage]]\nnumber = {number}\ntitle = "Toys"\nfolder = "{folder}"\n'
        toy.write(f"stages/{folder}/README.md", "# A toy\n")
        bank, chapter, hints = "", "# Toys\n", ""
        for task_id, file, function, cases in TASKS:
            if task_id.startswith(number):
                course += task_entry(task_id, file, function, "starred = true" if task_id == starred else "points = 10")
                hints += f'"{task_id}" = {list(HINTS)}\n'
                chapter += f'\n<a id="task-{task_id.replace(".", "-")}"></a>\n## {function}\n\n{SECTION}\n'
                toy.write(f"stages/{folder}/tests/test_{task_id.replace('.', '_')}.py", text_of_tests(file, function, cases))
        toy.write(f"stages/{folder}/GUIDE.md", chapter)
        toy.write(f"stages/{folder}/hints.toml", hints)
        if number == "1":
            bank += mutant_entry("1.1", "toys/sums.py", "number + number", "number + 2")
            bank += mutant_entry("1.2", "toys/sums.py", "double(double(number))", "double(number)")
        else:
            bank += mutant_entry("2.1", "toys/halves.py", "number // 2", "number // 3") + 'ties = ["half: ValueError"]\n'
            bank += mutant_entry("2.1", "toys/halves.py", "number // 2", "-number // 2")
        toy.write(f"tests/mutants/stage{number}.toml", bank)
    toy.write("stages/course.toml", course)
    return toy
