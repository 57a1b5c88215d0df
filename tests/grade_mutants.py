"""Grades every mutant of the bank and sees that it loses points in its own task and in no other: takes hours for all stages.

Run it: ``python -m tests.grade_mutants --stage 1 --every 5``.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from rich.console import Console
from rich.progress import track

from stages.course.grading.grader import Grader
from stages.course.grading.sandbox import Limits, Sandbox
from stages.course.grading.submission import Submission
from stages.course.grading.task_runs import Runner
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import CourseError, Stage
from stages.course.tools.wrong_versions import Mutant, mutate

ROOT = Path(__file__).resolve().parents[1]


def mutants(workshop: Workshop) -> list[tuple[Stage, Mutant]]:
    """All mutants, each with its stage."""
    found = []
    for stage in workshop.course:
        path = workshop.root / "tests" / "mutants" / f"stage{stage.number}.toml"
        if path.exists():
            found += [(stage, Mutant(**entry)) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]]
    return found


def find_mutant(workshop: Workshop, name: str) -> tuple[Stage, Mutant]:
    """A mutant by its name."""
    return next((stage, mutant) for stage, mutant in mutants(workshop) if mutant.name == name)


def solved(workshop: Workshop, stage: Stage) -> dict[str, str]:
    """The files of a learner who did all of a stage as the reference does."""
    return {file: workshop.reference(file) for file in stage.files}


def complaint(grader: Grader, stage: Stage, mutant: Mutant, workshop: Workshop) -> str | None:
    """What is wrong with the grade of a mutant, if anything is."""
    texts = solved(workshop, stage)
    texts[mutant.file] = mutate(mutant, texts[mutant.file])
    submission = Submission(mutant.name, ROOT, {(stage.number, file): text for file, text in texts.items()})
    grade = grader.grade(submission, lambda what: None)
    lost = [item.task.id for item in grade.tasks if item.points < item.max_points]
    return (
        None if lost == [mutant.task] else f"{mutant.name}, of task {mutant.task}, loses points in: {', '.join(lost) or 'none'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.grade_mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, help="this stage only (default: all)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th mutant only (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="tasks tested at once (default: 2)")
    args = parser.parse_args(argv)
    console, workshop = Console(), Workshop(ROOT)
    runner, wrong, count = Runner(workshop, Sandbox(), "mutants", Limits().within(60)), [], 0
    try:
        for stage in workshop.course:
            chosen = [mutant for owner, mutant in mutants(workshop) if owner is stage][:: args.every]
            if args.stage not in (None, stage.number):
                continue
            grader = Grader(runner, [(stage, task) for task in stage.tasks], jobs=args.jobs)
            right = Submission("reference", ROOT, {(stage.number, f): text for f, text in solved(workshop, stage).items()})
            grader.prepare([right], lambda what: None)
            for mutant in track(chosen, f"stage {stage.number}", console=console, transient=True):
                count += 1
                found = complaint(grader, stage, mutant, workshop)
                if found:
                    wrong.append(found)
                    console.print(f"[red]✗[/] {found}")
    except CourseError as error:
        parser.exit(1, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    console.print(f"{count - len(wrong)} of {count} mutants lose points in their own task alone")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    raise SystemExit(main())
