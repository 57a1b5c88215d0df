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

MUTANTS_PER_STAGE = 13
JOBS = 2
"""Stages that are checked at once."""

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
    room: Classroom, stages: list[Stage], *, mutants: bool = True, on_step: Callable[[int, int, str], None] = lambda *_: None
) -> Report:
    """Apply every rule to every stage.

    Args:
        on_step: called with (steps done, steps in all, what comes now).
    """
    report = Report()
    todo = [(stage, rule) for stage in stages for rule in RULES]
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


def check_stages(folder: Path, stages: list[Stage], mutants: bool, progress: Progress) -> Report:
    """`check` several stages, `JOBS` at a time, each in a classroom of its own: most of the time a gate waits for tests.

    Raises:
        CourseError: starters cannot be made.
    """
    ending = threading.Event()

    def check_one(number: int) -> Report:
        bar = progress.add_task(f"stage {number}: copying the course", total=None)

        def show(done: int, total: int, what: str) -> None:
            if ending.is_set():
                raise CourseError("another stage has ended the gate")
            progress.update(bar, completed=done, total=total, description=what)

        with closing(Classroom(folder / f"course-{number}")) as room:
            report = check(room, [find_stage(room.course, number)], mutants=mutants, on_step=show)
        progress.remove_task(bar)
        return report

    # first the one with the most mutants, which would else run alone at the end
    longest_first = sorted(stages, key=lambda stage: len(load_mutants(ROOT, stage)), reverse=True)
    pool = ThreadPoolExecutor(JOBS)
    try:
        futures = {stage.number: pool.submit(check_one, stage.number) for stage in longest_first}
        done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()  # an error ends the gate
    finally:
        ending.set()
        pool.shutdown(cancel_futures=True)  # waits for the step under way: the folder is about to go
    parts = [futures[stage.number].result() for stage in stages]
    return Report([v for part in parts for v in part.verdicts], [k for part in parts for k in part.kills])


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
