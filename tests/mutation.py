"""Breaks the functions of the course's tasks by machine and sees the stages' tests notice: ``make mutation STAGE=1``.

cosmic-ray's operators make the mutants: another operator or comparison, a number one higher or lower, `break` for `continue`, a
loop that never runs, and so on. Only the functions that a task asks for are broken. A mutant that differs from the original in
nothing but annotations, docstrings and what a `raise` says in its message is none, and neither is one that Python reads as the
same program as an earlier one. Parts of C++ files have operators of their own (`tests/native_mutants.py`).

The mutant stands in the learner's file of a stage that is done otherwise, and the tests of its own task must notice: a later
task's would send a learner to the wrong function. What survives must be explained in `tests/mutants/survivors.toml`, by file,
function and both versions of the line. Each fate is kept (`tests/mutation_record.py`), so a run that was stopped goes on where
it was, and one after a change tries only what the change may have turned.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stages.course.tools.catalog import CourseError, Stage, Target, Task, find_stage, find_task
from stages.course.tools.targets import find_function, find_lines, is_python
from tests.classroom import Classroom
from tests.mutants.bank import TEST_LIMIT
from tests.mutation_record import LEDGERS, UNKNOWN, Ledger, Tally, fingerprint, write_tallies
from tests.native_mutants import native_mutants

SURVIVORS = Path(__file__).parent / "mutants" / "survivors.toml"
KILLED_SHARE = 0.95
NO_PROGRAM = "could not compile the"
"""What `BuildError` says of C++ that is none."""
RUN_LIMIT = 120
"""Seconds for the tests of one task on a mutant."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A mutant made by machine: `text` is the whole file, `old` and `new` are the lines that differ."""

    task: str
    file: str
    function: str
    line: int
    old: str
    new: str
    text: str


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a mutant: the test of its task that killed it, or ""."""

    mutant: Machine
    killed_by: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why nothing can tell a surviving mutant from the original; `old` and `new` as in `Machine`, `new` maybe several."""

    file: str
    function: str
    old: str
    new: tuple[str, ...]
    reason: str

    def fits(self, mutant: Machine) -> bool:
        """Whether it speaks of this mutant."""
        place = (self.file, self.function, self.old)
        return place == (mutant.file, mutant.function, mutant.old) and mutant.new in self.new


# ------------------------------------------------------------------------------------------------------- the mutants
class _Essence(ast.NodeTransformer):
    """Takes away what changes nothing that a caller can rely on."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=0) if node.value else ast.Pass())

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self.visit_FunctionDef(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise(node.exc.func, node.cause) if isinstance(node.exc, ast.Call) else node


def essence(text: str) -> str:
    """A program as far as it matters here; equal for two texts that do the same for trivial reasons.

    Raises:
        SyntaxError: the text is no Python.
    """
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # `x is 1` is what was asked for
        compile(text, "mutant", "exec")  # ast.parse alone takes a `break` outside of a loop
    return ast.dump(_Essence().visit(ast.parse(text)))


def operators() -> Iterator[Operator]:
    """cosmic-ray's operators, but for those that want to know which variable: they are made for models in science."""
    for name in operator_names():
        kind = get_operator(name)
        if not kind.arguments():
            yield kind()


def mutants_of(text: str) -> Iterator[str]:
    """All mutants of a piece of code."""
    nodes = list(ast_nodes(get_ast(text)))
    for operator in operators():
        count = sum(1 for node in nodes for _ in operator.mutation_positions(node))
        for number in range(count):
            try:
                mutant = mutate_code(text, operator, number)
            except AttributeError:  # cosmic-ray cannot replace an exception that is written with a dot
                continue
            yield mutant


def changed_lines(text: str, mutant: str) -> tuple[int, str, str]:
    """Number of the first line that differs, and what stands in the differing lines, before and after."""
    before, after = text.splitlines(), mutant.splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    blocks = [block for block in matcher.get_opcodes() if block[0] != "equal"]
    old = [" ".join(" ".join(before[i:j]).split()) for _, i, j, _, _ in blocks]
    new = [" ".join(" ".join(after[i:j]).split()) for _, _, _, i, j in blocks]
    return blocks[0][1] + 1, " … ".join(old), " … ".join(new)


def function_mutants(text: str, task: Task, target: Target) -> list[Machine]:
    """All mutants of one function in the text of a file."""
    node = find_function(ast.parse(text), target.name)
    if node is None:
        raise CourseError(f"task {task.id}: there is no {target.name} in solutions/{target.file}")
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    # A method alone is no Python, but is in a class; to mutate the whole file would take seconds.
    head = "class Wrapper:\n" if node.col_offset else ""
    original = head + "".join(lines[first : node.end_lineno])
    seen = {essence(original)}
    mutants = []
    for mutant in mutants_of(original):
        try:
            gist = essence(mutant)
        except SyntaxError:
            continue
        if gist not in seen:
            seen.add(gist)
            whole = "".join([*lines[:first], mutant.removeprefix(head), *lines[node.end_lineno :]])
            mutants.append(Machine(task.id, target.file, target.name, *changed_lines(text, whole), whole))
    return mutants


def part_mutants(text: str, task: Task, target: Target) -> list[Machine]:
    """All mutants of a marked part of a C++ file; a few are no C++, as only the compiler knows."""
    lines, place = text.splitlines(keepends=True), find_lines(text, target.file, target.name)
    if place is None:
        raise CourseError(f"task {task.id}: there are no markers for {target.name} in solutions/{target.file}")
    first, last = place.start + 1, place.stop - 1
    mutants = {}
    for number, new in native_mutants(lines[first:last]):
        whole = "".join([*lines[: first + number], new, *lines[first + number + 1 :]])
        mutants[whole] = Machine(task.id, target.file, target.name, *changed_lines(text, whole), whole)
    return list(mutants.values())


def machine_mutants(room: Classroom, task: Task) -> list[Machine]:
    """All mutants of the functions that a task asks for; parts of CUDA files, slow to compile, have the bank's alone."""
    mutants: list[Machine] = []
    for target in task.targets:
        if is_python(target.file):
            mutants += function_mutants(room.reference(target.file), task, target)
        elif target.file.endswith(".cpp"):
            mutants += part_mutants(room.reference(target.file), task, target)
    return mutants


# ------------------------------------------------------------------------------------------------------------- fates
def try_mutant(room: Classroom, mutant: Machine, task: Task) -> str | None:
    """Run the tests of a task on a mutant: the name of the first that fails, "" if none does. None: it does not compile."""
    path = room.path(task.stage, mutant.file)
    room.write(path, mutant.text)
    try:
        results = room.run(str(task.stage), [room.tests(task)], "-x", limit=RUN_LIMIT, test_limit=TEST_LIMIT)
    finally:
        room.write(path, room.reference(mutant.file))
    if results.failed:
        return None if NO_PROGRAM in results.failed[0].text else results.failed[0].name
    return results.complaint  # the process died or hung in native code: nobody can miss that


def load_explanations(path: Path = SURVIVORS) -> list[Explanation]:
    """The explained survivors.

    Raises:
        CourseError: an entry is malformed.
    """
    if not path.exists():
        return []
    explanations = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("survivor", []):
        try:
            new = (entry["new"],) if isinstance(entry["new"], str) else tuple(entry["new"])
            explanations.append(Explanation(entry["file"], entry["function"], entry["old"], new, entry["reason"]))
        except KeyError as error:
            raise CourseError(f"{path.name}: an entry for {entry.get('function')!r} has no {error}") from error
    return explanations


def stale(explanations: list[Explanation], mutants: list[Machine]) -> list[str]:
    """Complaints about explanations of mutants that are not made any more."""
    complaints = []
    for explanation in explanations:
        made = {mutant.new for mutant in mutants if explanation.fits(mutant)}
        complaints += [
            f"survivors.toml: {explanation.function}: no mutant makes {new!r} of {explanation.old!r} any more"
            for new in explanation.new
            if new not in made
        ]
    return complaints


def complaints_of(fates: list[Fate], explanations: list[Explanation], mutants: list[Machine], whole: bool = True) -> list[str]:
    """What keeps the command from succeeding.

    Args:
        mutants: all of the tasks whose explanations are given, tried or not.
        whole: all mutants of a stage were tried, so that the share of the killed counts; chance rules over a handful.
    """
    complaints = stale(explanations, mutants)
    killed = sum(bool(fate.killed_by) for fate in fates)
    if not fates:
        complaints.append("no mutants were made")
    elif whole and killed < KILLED_SHARE * len(fates):
        complaints.append(f"{killed} of {len(fates)} mutants are killed, fewer than {KILLED_SHARE:.0%}; write more tests")
    for fate in fates:
        explained = any(each.fits(fate.mutant) for each in explanations)
        name = f"task {fate.mutant.task}, {fate.mutant.function}: {fate.mutant.new!r}"
        if not fate.killed_by and not explained:
            complaints.append(f"{name} survives; write a test, or explain in survivors.toml why none can notice")
    return complaints


# ------------------------------------------------------------------------------------------------------- the command
def tally(fates: list[Fate], explanations: list[Explanation], of: str = "") -> Tally:
    """The numbers of some fates; `of`: see `Tally`."""
    left = [fate.mutant for fate in fates if not fate.killed_by]
    explained = sum(any(each.fits(mutant) for each in explanations) for mutant in left)
    return Tally(len(fates), len(fates) - len(left), explained, of)


def print_fates(console: Console, fates: list[Fate], explanations: list[Explanation]) -> None:
    """How many were killed, then the survivors."""
    table = Table(title="mutants made by machine", title_justify="left")
    for name in ("task", "mutants", "killed", "explained", "not explained"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task in dict.fromkeys(fate.mutant.task for fate in fates):
        count = tally([fate for fate in fates if fate.mutant.task == task], explanations)
        table.add_row(task, *map(str, (count.tried, count.killed, count.explained, count.left)))
    console.print(table)
    left = [fate.mutant for fate in fates if not fate.killed_by]
    for mutant in left:
        reason = next((each.reason for each in explanations if each.fits(mutant)), "")
        place = f"{mutant.task} {mutant.file}:{mutant.line} {mutant.function}"
        change = f"  - {mutant.old}\n  + {mutant.new}"
        note = f"  explained: {reason}" if reason else "  survives"
        console.print(escape(f"{place}\n{change}\n{note}"), soft_wrap=True)
    console.print(f"{len(fates) - len(left)} of {len(fates)} mutants are killed")


def run(
    room: Classroom, stage: Stage, mutants: list[Machine], ledger: Ledger, on_step: Callable[[int, Machine], None]
) -> list[Fate]:
    """Try the mutants of a stage, but for those whose fate the ledger knows."""
    room.solve(stage.number)
    tasks = {task.id: (task, room.read(room.tests(task))) for task in stage.tasks}
    fates = []
    for done, mutant in enumerate(mutants):
        on_step(done, mutant)
        task, tests = tasks[mutant.task]
        if (killer := ledger.fate(mutant.text, tests)) == UNKNOWN:
            killer = try_mutant(room, mutant, task)
            ledger.add(mutant.text, tests, killer)
        if killer is not None:
            fates.append(Fate(mutant, killer))
    return fates


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--task", help="this task only, such as 1.3")
    parser.add_argument("--max", type=int, metavar="N", help="try about N mutants, spread evenly (default: all)")
    parser.add_argument("--anew", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--record", action="store_true", help="enter the numbers into the table of CONTRIBUTING.md")
    args = parser.parse_args(argv)
    if args.record and args.max:
        parser.error("--record wants all mutants of a task, so not --max")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("making mutants", total=None)
        room = Classroom(Path(folder) / "course")
        try:
            stage = find_stage(room.course, args.stage)
            tasks = [find_task([stage], args.task)] if args.task else list(stage.tasks)
            made = [each for task in tasks for each in machine_mutants(room, task)]
            chosen = made[:: max(1, len(made) // args.max)] if args.max else made
            functions = {(target.file, target.name) for task in tasks for target in task.targets}
            explanations = [each for each in load_explanations() if (each.file, each.function) in functions]
            progress.update(bar, total=len(chosen))
            fates = run(
                room, stage, chosen, Ledger(LEDGERS / f"stage{stage.number}.jsonl", args.anew),
                lambda done, mutant: progress.update(bar, completed=done, description=f"{mutant.task} {mutant.function}"),
            )  # fmt: skip
        except CourseError as error:
            parser.exit(1, f"{error}\n")
        except KeyboardInterrupt:
            parser.exit(130, "stopped; the same command goes on from here\n")
        finally:
            room.close()
    print_fates(console, fates, explanations)
    complaints = complaints_of(fates, explanations, made, whole=not args.task and not args.max)
    for complaint in complaints:
        console.print(f"[red]✗[/] {escape(complaint)}", soft_wrap=True)
    if args.record:
        for task in tasks:
            if of_task := [fate for fate in fates if fate.mutant.task == task.id]:
                write_tallies({task.id: tally(of_task, explanations, fingerprint(task, room.reference))})
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
