"""Wrong versions of the reference that learners and real engines have written, and right ones that look unusual.

Each ``stageN.toml`` in `tests/mutants/` lists ``[[mutant]]`` tables: `name`, the `task` whose tests must kill it, `file` inside
`solutions/`, `why` somebody writes it and what it does to users, and the `old` text that stands there once, with the `new` one
in its place. `ties`, which may be left out, lists what it shows to be tested: a trap of the guide by its title, or
``function: Error`` or ``function: number`` of what a docstring promises. ``right.toml`` has versions that keep all promises,
``fresh.toml`` wrong ones that were written without a look at the tests.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from stages.course.tools.catalog import CourseError, Stage
from stages.course.tools.targets import is_python

RIGHT, FRESH = "right.toml", "fresh.toml"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong version of one place in the reference."""

    name: str
    task: str
    file: str
    why: str
    old: str
    new: str
    ties: list[str] = field(default_factory=list)


def load_mutants(root: Path, stage: Stage) -> list[Mutant]:
    """The mutants of a stage in the repository at `root`; none if it has no list.

    Raises:
        CourseError: an entry is malformed.
    """
    return _load(root / "tests" / "mutants" / f"stage{stage.number}.toml")


def load_others(root: Path, stage: Stage, file: str) -> list[Mutant]:
    """A stage's versions in `RIGHT` or `FRESH`."""
    return [each for each in _load(root / "tests" / "mutants" / file) if each.task.startswith(f"{stage.number}.")]


def _load(path: Path) -> list[Mutant]:
    if not path.exists():
        return []
    names = {field.name for field in fields(Mutant)}
    mutants = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []):
        if entry.keys() | {"ties"} != names:
            odd = ", ".join(sorted(names.symmetric_difference(entry.keys() | {"ties"})))
            raise CourseError(f"{path.name}, mutant {entry.get('name')!r}: missing or unknown: {odd}")
        mutants.append(Mutant(**entry))
    return mutants


def mutate(mutant: Mutant, text: str) -> str:
    """The wrong version of a file.

    Raises:
        CourseError: the old text is not there exactly once, or the new one is no Python where it should be.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise CourseError(f"mutant {mutant.name}: its old text stands {count} times in solutions/{mutant.file}, not once")
    wrong = text.replace(mutant.old, mutant.new)
    if not is_python(mutant.file):
        return wrong
    try:
        compile(wrong, mutant.file, "exec")
    except SyntaxError as error:
        raise CourseError(f"mutant {mutant.name}: its new text is no Python: {error.msg}") from error
    return wrong
