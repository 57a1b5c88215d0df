"""Remembers what was graded, so that a grading that was stopped goes on where it was: a line of JSON for each task.

A line counts for the same course, the same salt and the same files only. The file is removed when all is done.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.course.grading.scoring import Failure, TaskGrade
from stages.course.grading.task_runs import Expected
from stages.course.tools.catalog import Stage, Task

NAME = ".journal.jsonl"
CODE = (".py", ".toml", ".cu", ".cpp", ".h")


class Journal:
    """What is known of a grading that may have begun before.

    Args:
        folder: where the grades go. course: digest of the course's own files.
        salt: the salt; None: the one of the grading that was stopped, or a new one.
    """

    def __init__(self, folder: Path, course: str, salt: str | None) -> None:
        self.path, self._lock = folder / NAME, threading.Lock()
        self._known: dict[str, Any] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        head, entries = _read(lines[0]) if lines else None, filter(None, map(_read, lines[1:]))
        before = head["salt"] if head and head["course"] == course else None
        self.salt = salt if salt is not None else before or secrets.token_hex(8)
        if before == self.salt:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")  # behind what a killed process may have left half written
            self._known = {entry["key"]: entry["value"] for entry in entries}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.path.touch(0o600)
            self.path.write_text(json.dumps({"course": course, "salt": self.salt}) + "\n", encoding="utf-8")

    @property
    def going_on(self) -> bool:
        """Whether something is known from before."""
        return bool(self._known)

    def expected(self, task: Task) -> Expected | None:
        """What the reference did, if it was tried before."""
        value = self._known.get(f"reference {task.id}")
        if value is None:
            return None
        counters = {name: Counter(value[name]) for name in ("tests", "compared")}
        return Expected(**value | counters | {"flags": frozenset(value["flags"])})

    def keep_expected(self, task: Task, expected: Expected) -> None:
        value = {name: getattr(expected, name) for name in Expected.__slots__}
        self._write(f"reference {task.id}", value | {"flags": sorted(expected.flags)})

    def grade(self, stage: Stage, task: Task, texts: dict[str, str]) -> TaskGrade | None:
        """The grade of these files in a task, if they were tested before."""
        value = self._known.get(_key(task, texts))
        if value is None:
            return None
        return TaskGrade(stage, task, **value | {"failures": [Failure(**each) for each in value["failures"]]})

    def keep_grade(self, task: Task, texts: dict[str, str], grade: TaskGrade) -> None:
        value = {name: getattr(grade, name) for name in TaskGrade.__slots__ if name not in ("stage", "task")}
        self._write(_key(task, texts), value | {"failures": [asdict(each) for each in grade.failures]})

    def remove(self) -> None:
        """Forget all: the grading came to its end."""
        self.path.unlink(missing_ok=True)

    def _write(self, key: str, value: dict[str, Any]) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}) + "\n")


def _read(line: str) -> dict[str, Any] | None:
    """An entry; None for the last one of a process that was killed while it wrote."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return entry


def course_digest(root: Path) -> str:
    """Changes with every file of the course or the reference that can change a grade."""
    folders = ("stages", "solutions", "tests/mutants")
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in CODE]
    return digest({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths})


def _key(task: Task, texts: dict[str, str]) -> str:
    return f"{task.id} {digest(texts)}"


def digest(texts: dict[str, str]) -> str:
    """Of files' texts by their names."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()
