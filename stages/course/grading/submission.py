"""What a learner hands in: the starter files that they wrote, and notes on everything else that they changed."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path

from stages.course.tools.catalog import BREAK_IT, OPEN, CourseError, Stage

LARGEST = 1 << 20
"""Bytes of a learner's file; the largest starter has a fiftieth of that."""
COURSE_FOLDERS = ("stages", "tests", "solutions")
COURSE_FILES = ("pyproject.toml", "conftest.py", "sitecustomize.py")
CODE = (".py", ".toml", ".cu", ".cpp", ".h", ".cuh", ".ini", ".cfg", ".pth")
MOST_NAMED = 10
"""Changed files that a note names; of more it gives the number."""


@dataclass(slots=True)
class Submission:
    """One learner's work.

    Attributes:
        name: of its folder. root: the folder.
        files: (stage's number, path inside the stage's folder) → text of each starter file that is there.
        breaking: stage's number → the learner's own tests for "break it yourself", if there are any.
        notes: what the instructor and the learner should know: missing and unusable files, changes that have no effect.
    """

    name: str
    root: Path
    files: dict[tuple[int, str], str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    breaking: dict[int, str] = field(default_factory=dict)


def find_submissions(folder: Path, course: list[Stage]) -> list[Path]:
    """The checkouts that a folder is or holds.

    Raises:
        CourseError: there is none.
    """
    if not folder.is_dir():
        raise CourseError(f"--submission {folder} is no folder; name a learner's checkout, or a folder of several")
    if _is_checkout(folder, course):
        return [folder]
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and _is_checkout(path, course)]
    if not found:
        example = f"stages/{course[0].folder}/{course[0].files[0]}"
        raise CourseError(f"--submission {folder} holds no checkout: neither it nor a folder in it has {example} or its like")
    return found


def _is_checkout(folder: Path, course: list[Stage]) -> bool:
    return any((folder / "stages" / stage.folder).is_dir() for stage in course)


def read_submission(folder: Path, root: Path, course: list[Stage], stages: list[Stage]) -> Submission:
    """Take a learner's files of some stages, and nothing else, out of a checkout.

    Args:
        root: the course's own repository, with which everything else is compared.
    """
    submission = Submission(folder.resolve().name, folder.resolve())
    for stage in stages:
        for file in stage.files:
            name = f"stages/{stage.folder}/{file}"
            text, complaint = _read(submission.root, name)
            if text is not None:
                submission.files[stage.number, file] = text
            else:
                submission.notes.append(f"{name} {complaint}; the empty starter counts in its place")
        tests, _ = _read(submission.root, f"stages/{stage.folder}/{BREAK_IT}")
        given, _ = _read(root.resolve(), f"stages/{stage.folder}/{BREAK_IT}")
        if tests is not None and tests != given:
            submission.breaking[stage.number] = tests
    own = {f"stages/{stage.folder}/{file}" for stage in course for file in (*stage.files, BREAK_IT)}
    ungraded = (f"stages/*/{OPEN}", "stages/stage0_*/*.py")
    own |= {path.relative_to(root).as_posix() for pattern in ungraded for path in root.glob(pattern)}
    submission.notes += _changes(submission.root, root.resolve(), own)
    return submission


def _read(root: Path, name: str) -> tuple[str | None, str]:
    """A file's text, or why it cannot be taken. Links are not followed: they could lead to files that are not the learner's."""
    path = root
    for part in Path(name).parts:
        path = path / part
        if path.is_symlink():
            return None, "is a link or lies behind one"
    if not path.exists():
        return None, "is missing"
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return None, "is no file"
    if status.st_size > LARGEST:
        return None, f"has {status.st_size} bytes, more than {LARGEST}"
    try:
        return path.read_text(encoding="utf-8"), ""
    except UnicodeDecodeError:
        return None, "is not UTF-8 text"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"


def _changes(submission: Path, root: Path, own: set[str]) -> list[str]:
    """Notes on files that differ from the course's or that it does not have; none of them has any effect."""
    if submission == root:
        return []
    edited, added = [], []
    for path in _code(submission):
        name = path.relative_to(submission).as_posix()
        ours = root / name
        if name in own:
            continue
        if not ours.is_file():
            added.append(name)
        elif path.is_symlink() or path.stat().st_size != ours.stat().st_size or path.read_bytes() != ours.read_bytes():
            edited.append(name)
    notes = []
    if edited:
        notes.append(f"edited and replaced by the course's own: {_names(edited)}")
    if added:
        notes.append(f"no file of the course, and left out: {_names(added)}")
    return notes


def _code(root: Path) -> list[Path]:
    """Files of a checkout that could change a result."""
    found = [root / name for name in COURSE_FILES if (root / name).is_file()]
    for folder in COURSE_FOLDERS:
        if not (root / folder).is_symlink():
            found += (path for path in (root / folder).rglob("*") if path.suffix in CODE and path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
