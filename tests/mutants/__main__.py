"""Lists the mutants of the course and the test that kills each: ``python -m tests.mutants --stage 1``."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from stages.course.tools.catalog import CourseError, find_stage
from stages.course.tools.wrong_versions import FRESH, load_mutants, load_others
from tests.classroom import Classroom
from tests.mutants.bank import killer, quickest_killer, remember


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--stage", type=int, help="this stage only (default: all)")
    parser.add_argument("--task", help="this task only, such as 5.1")
    parser.add_argument("--name", help="this mutant only")
    parser.add_argument("--fresh", action="store_true", help="those that were written without a look at the tests")
    parser.add_argument(
        "--quickest", action="store_true", help="find the test that notices soonest, and let the gate begin with it"
    )
    args = parser.parse_args(argv)
    console = Console()
    survivors, found = 0, dict[str, str]()
    table = Table("task", title="mutants", title_justify="left")
    table.add_column("mutant", overflow="fold")
    table.add_column("killed by", overflow="fold")
    with tempfile.TemporaryDirectory() as folder:
        room = Classroom(Path(folder) / "course")
        try:
            stages = room.course if args.stage is None else [find_stage(room.course, args.stage)]
            load = partial(load_others, file=FRESH) if args.fresh else load_mutants
            jobs = [(stage, mutant) for stage in stages for mutant in load(room.root, stage)]
            jobs = [job for job in jobs if args.name in (None, job[1].name) and args.task in (None, job[1].task)]
            for stage, mutant in track(jobs, "mutants", console=console, transient=True):
                try:
                    test = killer(room, stage, mutant)
                    if args.quickest and (quickest := quickest_killer(room, stage, mutant)) is not None:
                        found[f"{mutant.task} {mutant.name}"] = quickest
                    killed = f"[red]nothing: {escape(mutant.why)}[/]" if test is None else escape(test.name)
                except CourseError as error:
                    test, killed = None, f"[red]{escape(str(error))}[/]"
                survivors += test is None
                table.add_row(mutant.task, mutant.name, killed)
        except CourseError as error:
            parser.exit(1, f"{error}\n")
        except KeyboardInterrupt:
            parser.exit(130, "stopped\n")
        finally:
            room.close()
    if found:
        remember(found)
    console.print(table)
    console.print(f"{len(jobs) - survivors} of {len(jobs)} mutants are killed")
    return 1 if survivors or not jobs else 0


if __name__ == "__main__":
    raise SystemExit(main())
