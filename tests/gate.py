"""The course's gate: what must hold for every stage and task before a learner sees it. ``make check-course`` runs it.

Each rule is a function of the course that gives its complaints, a line each that says what to do; `RULES` lists them all. They
look at a throw-away copy with fresh starters (`tests/classroom.py`); only `starters_are_fresh` looks at the working tree's.
That starters can be made at all, each function being there with a docstring to write it from, comes before all rules.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stages.course.tools.catalog import CourseError, Stage, find_stage, load_course
from stages.course.tools.wrong_versions import Mutant, load_mutants
from tests.classroom import ROOT, Classroom
from tests.gate_runs import earlier_tasks_suffice, reference_passes, stages_pass_together, starters_say_what_is_missing
from tests.gate_texts import (
    files_have_one_owner,
    guide_has_sections,
    starters_are_fresh,
    tasks_are_complete,
    tests_are_explained,
    tests_import_only_stages,
)
from tests.gate_ties import promises_are_tied
from tests.mutants.bank import killer, remember
from tests.warm import Warm

MUTANTS_PER_STAGE = 13
JOBS = 2
"""Parts that are checked at once."""
RULES_COST = 16
"""Mutants that take about as long as all rules together take for one task."""

Rule = Callable[[Classroom, Stage], list[str]]


def enough_mutants(room: Classroom, stage: Stage) -> list[str]:
    """The bank has mutants for every task of a stage, and enough of them, each with a name of its own."""
    mutants = load_mutants(room.root, stage)
    complaints = []
    if len(mutants) < MUTANTS_PER_STAGE:
        complaints.append(f"stage {stage.number} has {len(mutants)} mutants; add to tests/mutants up to {MUTANTS_PER_STAGE}")
    complaints += [
        f"task {task.id} has no mutant; add one to tests/mutants/stage{stage.number}.toml"
        for task in stage.tasks
        if not any(mutant.task == task.id for mutant in mutants)
    ]
    names = [mutant.name for mutant in mutants]
    complaints += [f"two mutants are called {name}; rename one" for name in sorted(set(names)) if names.count(name) > 1]
    return complaints


RULES: tuple[Rule, ...] = (
    starters_are_fresh,
    files_have_one_owner,
    tasks_are_complete,
    guide_has_sections,
    tests_are_explained,
    tests_import_only_stages,
    enough_mutants,
    promises_are_tied,
    reference_passes,
    starters_say_what_is_missing,
    earlier_tasks_suffice,
    stages_pass_together,
)


@dataclass(slots=True)
class Verdict:
    """What one rule says about one stage."""

    rule: str
    stage: int
    complaints: list[str]
    seconds: float


@dataclass(slots=True)
class Kill:
    """A mutant and the test that noticed it, or why none did."""

    mutant: str
    task: str
    killed_by: str | None
    complaint: str = ""


@dataclass(slots=True)
class Report:
    """What the gate found."""

    verdicts: list[Verdict] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    @property
    def complaints(self) -> list[str]:
        """All of them, each a line."""
        found = [complaint for verdict in self.verdicts for complaint in verdict.complaints]
        return found + [kill.complaint for kill in self.kills if kill.complaint]


def check_mutant(room: Classroom, stage: Stage, mutant: Mutant) -> Kill:
    """Whether a test of its task notices a mutant: the last rule, told mutant by mutant."""
    try:
        test = killer(room, stage, mutant)
    except CourseError as error:
        return Kill(mutant.name, mutant.task, None, str(error))
    if test is None:
        text = f"mutant {mutant.name} survives: no test of task {mutant.task} fails; strengthen one ({mutant.why})"
        return Kill(mutant.name, mutant.task, None, text)
    return Kill(mutant.name, mutant.task, test.name)


def check(
    room: Classroom, stages: list[Stage], *, rules: bool = True, mutants: bool = True,
    on_step: Callable[[int, int, str], None] = lambda *_: None,
) -> Report:  # fmt: skip
    """Apply every rule to every stage.

    Args:
        rules, mutants: whether to apply the rules, and the last one, that mutants die.
        on_step: called with (steps done, steps in all, what comes now).
    """
    report = Report()
    todo = [(stage, rule) for stage in stages for rule in RULES] if rules else []
    wrong = [(stage, mutant) for stage in stages for mutant in load_mutants(room.root, stage)] if mutants else []
    total = len(todo) + len(wrong)
    for done, (stage, rule) in enumerate(todo):
        on_step(done, total, f"stage {stage.number}: {title(rule.__name__)}")
        start = time.monotonic()
        try:
            complaints = rule(room, stage)
        except CourseError as error:
            complaints = [str(error)]
        report.verdicts.append(Verdict(title(rule.__name__), stage.number, complaints, time.monotonic() - start))
    for done, (stage, mutant) in enumerate(wrong, len(todo)):
        on_step(done, total, f"stage {stage.number}: mutant {mutant.name}")
        report.kills.append(check_mutant(room, stage, mutant))
    return report


class GateEnded(CourseError):
    """Nothing is wrong with this part, but with another."""


def check_stages(folder: Path, stages: list[Stage], mutants: bool, progress: Progress) -> Report:
    """`check` several stages, `JOBS` parts at a time, each in a classroom of its own: most of the time a gate waits for tests.

    A part is a stage's rules or its mutants. Those that take longest come first, or one would run alone at the end.

    Raises:
        CourseError: starters cannot be made.
    """
    ending = threading.Event()
    servers = [Warm() for _ in range(JOBS)]
    free = SimpleQueue[Warm]()
    for server in servers:
        free.put(server)

    def check_part(number: int, rules: bool) -> Report:
        what = "rules" if rules else "mutants"
        bar = progress.add_task(f"stage {number}: {what}", total=None)

        def show(done: int, total: int, step: str) -> None:
            if ending.is_set():
                raise GateEnded("another part has ended the gate")
            progress.update(bar, completed=done, total=total, description=step)

        server = free.get()
        try:
            show(0, 1, f"stage {number}: copying the course")
            with closing(Classroom(folder / f"{what}-{number}", warm=server)) as room:
                return check(room, [find_stage(room.course, number)], rules=rules, mutants=not rules, on_step=show)
        except BaseException:
            ending.set()
            raise
        finally:
            free.put(server)
            progress.remove_task(bar)

    parts = {(stage.number, True): RULES_COST * len(stage.tasks) for stage in stages}
    parts |= {(stage.number, False): len(load_mutants(ROOT, stage)) for stage in stages if mutants}
    pool = ThreadPoolExecutor(JOBS)
    try:
        futures = {part: pool.submit(check_part, *part) for part in sorted(parts, key=parts.__getitem__, reverse=True)}
        done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        errors = [error for future in done if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, GateEnded)):
            raise error  # it ends the gate
    finally:
        ending.set()
        pool.shutdown(cancel_futures=True)  # waits for the step under way: the folder is about to go
        for server in servers:
            server.close()
    reports = [futures[part].result() for part in parts]
    return Report([v for report in reports for v in report.verdicts], [k for report in reports for k in report.kills])


def title(name: str) -> str:
    """A rule's name as a person reads it."""
    return name.replace("_", " ")


def print_report(console: Console, report: Report) -> None:
    """Tables of rules and mutants, then all complaints."""
    table = Table(title="rules", title_justify="left")
    for name, justify in (("", "left"), ("stage", "right"), ("rule", "left"), ("seconds", "right")):
        table.add_column(name, justify=justify)
    for verdict in report.verdicts:
        mark = f"[red]✗ {len(verdict.complaints)}[/]" if verdict.complaints else "[green]✓[/]"
        table.add_row(mark, str(verdict.stage), verdict.rule, f"{verdict.seconds:.1f}")
    console.print(table)
    if report.kills:
        table = Table("", "task", title="mutants", title_justify="left")
        table.add_column("mutant", overflow="fold")
        table.add_column("killed by", overflow="fold")
        for kill in report.kills:
            mark = "[red]✗[/]" if kill.killed_by is None else "[green]✓[/]"
            table.add_row(mark, kill.task, kill.mutant, escape(kill.killed_by or "nothing"))
        console.print(table)
    for complaint in report.complaints:
        console.print(f"[red]✗[/] {escape(complaint)}", soft_wrap=True)
    if not report.complaints:
        console.print(f"[green]The course holds: {len(report.verdicts)} checks, {len(report.kills)} mutants killed.[/]")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, help="this stage only (default: all)")
    parser.add_argument("--no-mutants", action="store_true", help="leave out the mutant bank")
    parser.add_argument("--remember", action="store_true", help="keep which test kills which mutant, so that it runs first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    args = parser.parse_args(argv)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, transient=True) as progress:
        try:
            course = load_course(ROOT / "stages" / "course.toml")
            stages = course if args.stage is None else [find_stage(course, args.stage)]
            report = check_stages(Path(folder), stages, not args.no_mutants, progress)
        except CourseError as error:
            parser.exit(1, f"{error}\n")
        except KeyboardInterrupt:
            parser.exit(130, "stopped\n")
    print_report(console, report)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    if args.remember:
        remember({f"{kill.task} {kill.mutant}": kill.killed_by for kill in report.kills if kill.killed_by is not None})
    return 1 if report.complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
