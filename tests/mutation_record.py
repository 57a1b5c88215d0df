"""What `make mutation` has found: fate by fate on this machine, so that a run goes on where it was, and task by task for all.

The fates lie in `.cache/mutation`. One holds for as long as the mutant's file reads as it did, and so do the tests that decided
it: of what was killed the test that killed it and all that is no test, of a survivor all tests of its task. So a new test costs
a run on the survivors alone. What the tests import is not looked at; `ARGS=--anew` forgets everything.

`ARGS=--record` enters the numbers into `tests/mutants/machine.json` and writes the table of CONTRIBUTING.md from it. They hold
for a task's functions as they were; a test names the tasks whose functions have changed since.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import re
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.course.tools.catalog import Stage, Task, load_course
from stages.course.tools.targets import find_function, function_source, is_python

ROOT = Path(__file__).parents[1]
LEDGERS = ROOT / ".cache" / "mutation"
RECORD = ROOT / "tests" / "mutants" / "machine.json"
DOCUMENT = ROOT / "CONTRIBUTING.md"
TABLE = re.compile(r"(?<=\n\n)\| stage \| mutants made by machine \|.*?(?=\n\n)", re.DOTALL)
UNKNOWN = "?"
"""The fate of a mutant that is not in the ledger."""


class Ledger:
    """The fates that earlier runs found, in a file with a line for each.

    Args:
        anew: begin with an empty one.
    """

    def __init__(self, path: Path, anew: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            path.unlink(missing_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._fates: dict[str, tuple[str | None, str]] = {}
        for line in lines:
            with contextlib.suppress(ValueError):  # a run that was killed leaves half a line
                mutant, killer, tests = json.loads(line)
                self._fates[mutant] = (killer, tests)

    def fate(self, mutant: str, tests: str) -> str | None:
        """The test that killed a mutant, "" for a survivor, None for no program; `UNKNOWN` if it is to be tried.

        Args:
            mutant: the text of its file. tests: the text of its task's tests as it is now.
        """
        killer, decided = self._fates.get(digest(mutant), (UNKNOWN, ""))
        return killer if killer == UNKNOWN or decided == digest(deciding(tests, killer)) else UNKNOWN

    def add(self, mutant: str, tests: str, killer: str | None) -> None:
        """Keep a fate at once; a run may be stopped any time."""
        entry = digest(mutant), killer, digest(deciding(tests, killer))
        self._fates[entry[0]] = entry[1:]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@functools.cache
def deciding(tests: str, killer: str | None) -> str:
    """What of a file of tests decides a fate: without the other tests if one of them killed, all of it if none did."""
    module, name = ast.parse(tests), (killer or "").partition("[")[0]
    names = [each.name for each in module.body if isinstance(each, ast.FunctionDef) and each.name.startswith("test_")]
    if name in names:
        module.body = [each for each in module.body if getattr(each, "name", "") not in set(names) - {name}]
    return ast.dump(module)


# -------------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True, slots=True)
class Tally:
    """How many mutants of a task were tried, how many its tests killed, and how many of the others are explained.

    Attributes:
        of: the `fingerprint` of the functions that were broken.
    """

    tried: int
    killed: int
    explained: int
    of: str

    @property
    def left(self) -> int:
        """Survivors that nobody has explained."""
        return self.tried - self.killed - self.explained


def fingerprint(task: Task, read: Callable[[str], str]) -> str:
    """Tells whether the functions of a task are what they were; white space, docstrings and lines of comments do not count.

    Args:
        read: gives a file's text by its place under `solutions/`.
    """
    code = []
    for target in task.targets:
        source = textwrap.dedent(function_source(read(target.file), target.file, target.name))
        lines = source.splitlines()
        if is_python(target.file) and (node := find_function(ast.parse(source), target.name.rpartition(".")[2])):
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                del lines[first.lineno - 1 : first.end_lineno]
        code += [line for line in lines if not line.lstrip().startswith(("#", "//"))]
    return digest("".join("".join(code).split()))[:12]


def load_tallies(path: Path = RECORD) -> dict[str, Tally]:
    """Task → its numbers, in the order of the course."""
    tallies = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {task: Tally(**numbers) for task, numbers in tallies.items()}


def write_tallies(new: dict[str, Tally]) -> None:
    """Enter the numbers of some tasks, and renew the table."""
    tallies = load_tallies(RECORD) | new
    ordered = {task: asdict(tallies[task]) for task in sorted(tallies, key=lambda task: [*map(int, task.split("."))])}
    rows = [f"  {json.dumps(task)}: {json.dumps(numbers)}" for task, numbers in ordered.items()]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(TABLE.sub(lambda _: tallies_table(load_tallies(RECORD), load_course()), text), encoding="utf-8")


def tallies_table(tallies: dict[str, Tally], course: list[Stage]) -> str:
    """A row for each stage of which all of some tasks' mutants were tried."""
    rows = [
        "| stage | mutants made by machine | tasks | killed by their task's tests | share | explained | neither |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in course:
        some = [tallies[task.id] for task in stage.tasks if task.id in tallies]
        tried, killed, explained = (sum(getattr(each, name) for each in some) for name in ("tried", "killed", "explained"))
        if tried:
            cells = f"{tried:,} | {len(some)} of {len(stage.tasks)} | {killed:,} | {100 * killed / tried:.1f} % | {explained:,}"
            rows.append(f"| {stage.number} | {cells} | {tried - killed - explained:,} |")
    return "\n".join(rows)
