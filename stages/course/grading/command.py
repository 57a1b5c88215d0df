"""The grader's command: what it takes, what it prints, and where it writes."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from solutions.benchmarks.report import Parser, git_commit, hardware

from ..tools.catalog import GUIDE, ROOT, CourseError, Stage, find_stage
from . import page, report, results
from .breaking import exercises
from .class_page import class_page
from .grader import Grader, hidden_folders
from .journal import Journal, course_digest
from .likeness import alike
from .performance import Bench
from .sandbox import Limits, Sandbox
from .scoring import RULE, Grade
from .submission import Submission, find_submissions, read_submission
from .task_runs import Runner
from .workshop import Workshop

TEXT = f"""\
Grades a learner's checkout, or a folder of several: points by task, a report, results for Gradescope.

Grades the starter files of a learner's checkout. Nothing else of it is used: tests, course and reference are this
repository's own, and what was edited there is reported. Each task's tests run in a closed room with limits on time,
memory, processes, output and disk, and without a network.

{RULE}

Performance: points by the ratio to the reference, measured in turn on this machine (stages/performance.toml).

examples:
  one checkout, all stages; open grades/report.html afterwards
    python benchmarks/grade.py --submission ../ada --output grades
  a class: every folder in submissions/ is a checkout; grades/summary.csv has a row for each
    python benchmarks/grade.py --submission submissions --stage 1 --output grades --salt "spring term"
  tests only, two tasks at once
    python benchmarks/grade.py --submission ../ada --output grades --no-performance --jobs 2
  as Gradescope's autograder, in its run_autograder script
    python benchmarks/grade.py --submission /autograder/submission --output /autograder/results
The salt decides which random cases the tests draw: the same salt gives the same cases, another one others. Keep it to
yourself. Without --salt or --salt-file a new one is drawn and printed. A grading that was stopped goes on where it was when
the same command is given again.
"""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags; exits with one line if one is wrong."""
    parser = Parser("grade", TEXT, required="--submission DIR --output DIR ", has_results=False)
    parser.add_argument("--submission", type=Path, required=True, metavar="DIR", help="a checkout, or a folder that holds some")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where reports and results go")
    parser.add_argument("--stage", type=int, metavar="N", help="this stage only (default: all)")
    parser.add_argument("--salt", help="secret word from which random cases are drawn (default: a new one, which is printed)")
    text = "file that holds the salt, so that no list of processes shows it"
    parser.add_argument("--salt-file", type=Path, metavar="FILE", help=text)
    parser.add_argument("--no-performance", action="store_true", help="leave out the measurements and their points")
    parser.add_flag("--jobs", 1, "tasks tested at once", metavar="N")
    text = "time for a task's tests; more where the reference takes more than a fifth of it"
    parser.add_flag("--task-seconds", 60, text, type=float, metavar="S")
    parser.add_flag("--memory-gib", 6, "memory for a task's tests", type=float, metavar="G")
    parser.add_argument(
        "--guide-url", metavar="URL",
        help="this repository's root on the web, for reports to link to the course's text (default: a copy beside them)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    if args.salt_file is not None:
        if args.salt is not None:
            parser.error("--salt and --salt-file both name the salt; leave one out")
        try:
            args.salt = args.salt_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            parser.error(f"--salt-file {args.salt_file} cannot be read: {error.strerror}")
    return args


def about(sandbox: Sandbox, salt: str) -> dict[str, str]:
    """How it is graded: what a second grading must have in common to give the same scores."""
    machine = hardware()
    slow = hashlib.scrypt(salt.encode(), salt=b"fingerprint", n=2**14, r=8, p=1, dklen=4).hex()
    return {
        "commit": git_commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{machine['processor']}, {machine['cores_used']} cores, {machine['system']}",
        "salt's fingerprint": slow,
        "kept in by": sandbox.walls,
    }


def write_grade(folder: Path, grade: Grade, guide: str, how: dict[str, str]) -> None:
    """Write one submission's results and reports."""
    contents = results.gradescope(grade, how)
    results.write(folder / "results.json", json.dumps(contents, indent=2, ensure_ascii=False) + "\n")
    results.write(folder / "report.md", report.markdown(grade, guide, how))
    results.write(folder / "report.html", page.html(grade, guide, how))


def show(console: Console, grades: list[Grade], stages: list[Stage]) -> None:
    """Print a row for each submission."""
    table = Table(title="Grades", title_justify="left")
    table.add_column("submission")
    for stage in stages:
        table.add_column(f"stage {stage.number}", justify="right")
    for name in ("performance", "points", "%"):
        table.add_column(name, justify="right")
    table.add_column("flags", justify="right")
    for grade in grades:
        cells = [
            f"{sum(i.points for i in grade.of_stage(s.number))}/{sum(i.max_points for i in grade.of_stage(s.number))}"
            for s in stages
        ]
        speed = (
            f"{sum(i.points for i in grade.measures):g}/{sum(i.max_points for i in grade.measures)}" if grade.measures else ""
        )
        table.add_row(
            escape(grade.name),
            *cells,
            speed,
            f"{grade.points:g}/{grade.max_points}",
            f"{grade.percent:g}",
            str(len(grade.flags) or ""),
        )
    console.print(table)


def grade_all(args: argparse.Namespace, workshop: Workshop, stages: list[Stage], console: Console) -> list[Grade]:
    """Grade all submissions, and write each one's results as soon as it is done.

    Raises:
        CourseError: there is nothing to grade.
    """
    folders = find_submissions(args.submission, workshop.course)
    submissions = [read_submission(folder, workshop.root, workshop.course, stages) for folder in folders]
    args.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.output, course_digest(workshop.root), args.salt)
    secret = () if args.salt_file is None else (args.salt_file.resolve().parent,)
    sandbox = Sandbox((*hidden_folders(workshop.root, folders, args.output), *secret))
    limits = Limits(memory_bytes=int(args.memory_gib * 2**30)).within(args.task_seconds)
    numbers = [stage.number for stage in stages]
    bench = None if args.no_performance else Bench(workshop, sandbox, numbers, limits.within(2 * args.task_seconds))
    tasks = [(stage, task) for stage in stages for task in (*stage.tasks, *exercises(workshop.root, stage))]
    grader = Grader(Runner(workshop, sandbox, journal.salt, limits), tasks, bench, args.jobs, journal)
    how = about(sandbox, journal.salt)
    if args.salt is None:
        console.print(f"salt: {journal.salt}", highlight=False)
    if journal.going_on:
        console.print("going on with the grading that was stopped")
    if not sandbox.isolated:
        console.print(f"[yellow]kept in by {sandbox.walls}[/]")
    grades: list[Grade] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.closing(sandbox), Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("grading", total=grader.steps(submissions))

        def step(what: str) -> None:
            progress.update(bar, advance=1, description=escape(what))

        for task_id, complaint in grader.prepare(submissions, step).items():
            progress.console.print(f"[yellow]task {task_id} is not graded:[/] {escape(complaint)}", soft_wrap=True)
        for submission in submissions:
            grade = grader.grade(submission, step)
            grades.append(grade)
            folder = output_of(args.output, submission, submissions)
            write_grade(folder, grade, args.guide_url or link_to_guide(args.output, folder, workshop.course), how)
    common = [
        text for stage in stages for file in stage.files for text in (workshop.starter(stage, file), workshop.reference(file))
    ]
    pairs = alike({each.name: list(each.files.values()) for each in submissions}, common)
    results.write(args.output / "instructor.html", class_page(grades, pairs, how))
    journal.remove()
    return grades


def link_to_guide(output: Path, folder: Path, course: list[Stage]) -> str:
    """Copy the course's text to the output folder; the copy's address from a report in `folder`."""
    for file in (GUIDE, *(stage.chapter for stage in course)):
        copy = output / "guide" / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy)
    return "guide" if folder == output else "../guide"


def output_of(output: Path, submission: Submission, submissions: list[Submission]) -> Path:
    """Where one submission's files go: a folder of its own where there are several."""
    return output if len(submissions) == 1 else output / submission.name


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        workshop = Workshop(ROOT)
        stages = workshop.course if args.stage is None else [find_stage(workshop.course, args.stage)]
        grades = grade_all(args, workshop, stages, console)
    except CourseError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    show(console, grades, stages)
    if len(grades) > 1:
        results.write_summary(args.output, grades)
    console.print(
        f"written to {args.output}: {'summary.csv and ' if len(grades) > 1 else ''}results.json, report.md, report.html; "
        "instructor.html is for you alone"
    )
    return 0
