"""Builds the folder in which a task is tested: the course's own files, and in it the learner's.

The functions that a stage asks for are not in that folder's reference either: a learner's file that imported them there would
find the same placeholders as in its starter.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

from stages.course.tools.catalog import CourseError, Stage, Task, load_course
from stages.course.tools.targets import find_lines, function_source, parse
from stages.make_starters import render

NOT_COPIED = ("__pycache__", ".pytest_cache", ".hypothesis", "mutants")


class Workshop:
    """The course's repository, from which folders for tests are made.

    Args:
        root: the repository.

    Raises:
        CourseError: it is none, or its catalog is malformed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.course = load_course(self.root / "stages" / "course.toml")
        self._own = {self.root / "stages" / stage.folder / file for stage in self.course for file in stage.files}
        self._starters: dict[tuple[int, str], str] = {}
        self._needed_whole = self._modules_of_tools()

    def reference(self, file: str) -> str:
        """The text of a file of the reference."""
        path = self.root / "solutions" / file
        if not path.exists():
            raise CourseError(f"course.toml names {file}, which is not in solutions/")
        return path.read_text(encoding="utf-8")

    def starter(self, stage: Stage, file: str) -> str:
        """The fresh starter of a file."""
        key = stage.number, file
        if key not in self._starters:
            self._starters[key] = render(self.reference(file), file, stage.tasks)
        return self._starters[key]

    def build(self, folder: Path, stage: Stage, texts: dict[str, str] | None) -> None:
        """Fill an empty folder.

        Args:
            texts: the learner's files of the stage by path; those that are not in it are empty starters. None: the folder
                is for tests of the reference, which it holds in full.
        """
        shutil.copyfile(self.root / "pyproject.toml", folder / "pyproject.toml")
        for name in ("stages", "solutions"):
            shutil.copytree(self.root / name, folder / name, ignore=self._skipped)
        if texts is None:
            return
        for file in stage.files:
            target = folder / "stages" / stage.folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(texts.get(file, self.starter(stage, file)), encoding="utf-8")
            if file not in self._needed_whole:
                (folder / "solutions" / file).write_text(self.starter(stage, file), encoding="utf-8")

    def alone(self, stage: Stage, task: Task, texts: dict[str, str]) -> dict[str, str]:
        """A learner's files in which the functions of all other tasks are the reference's, so that mistakes there do not count
        here. Everything else in the files stays the learner's."""
        result = {}
        for file, text in texts.items():
            others = [
                target.name for other in stage.tasks if other.id != task.id for target in other.targets if target.file == file
            ]
            result[file] = with_functions(text, self.reference(file), file, others)
        return result

    def placeholders(self, stage: Stage, task: Task, texts: dict[str, str]) -> list[str]:
        """Functions of a task that are not written yet."""
        missing = []
        for target in task.targets:
            text = texts.get(target.file, self.starter(stage, target.file))
            try:
                source = function_source(text, target.file, target.name)
            except (SyntaxError, ValueError):
                continue  # there is something, and its tests will say what
            if not source or task.marker in source:
                missing.append(target.name)
        return missing

    def _skipped(self, folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in NOT_COPIED or Path(folder, name) in self._own]

    def _modules_of_tools(self) -> set[str]:
        """Files of the reference that the course's tools import by name, such as what starts the ranks of stage 3, and those
        that these import; they stay whole. `guard` keeps learners' files from importing them."""
        todo = []
        for path in (self.root / "stages" / "course").glob("[ft]*/*.py"):
            for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("solutions."):
                    todo += [node.module.replace(".", "/").removeprefix("solutions/") + ".py"]
        found: set[str] = set()
        while todo:
            file = todo.pop()
            if file in found or not (self.root / "solutions" / file).is_file():
                continue
            found.add(file)
            for node in ast.walk(parse(self.reference(file))):
                if isinstance(node, ast.ImportFrom) and node.level and node.module:
                    folder = Path(file).parents[node.level - 1]
                    todo.append((folder / node.module.replace(".", "/")).as_posix() + ".py")
        return found


def with_functions(text: str, source: str, file: str, names: list[str]) -> str:
    """A file's text with some functions taken from another version of it, as far as both have them."""
    try:
        places = [(find_lines(text, file, name), function_source(source, file, name)) for name in names]
    except (SyntaxError, ValueError):
        return text
    lines = text.splitlines()
    for place, function in sorted((pair for pair in places if pair[0] is not None), key=lambda pair: -pair[0].start):
        lines[place] = function.splitlines()
    return "\n".join(lines) + "\n"
