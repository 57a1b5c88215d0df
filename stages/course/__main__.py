"""The course on the command line; the Makefile's targets call it: ``python -m stages.course --help``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from stages import parse_stages
from stages.course.grading.breaking import break_it
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import ROOT, CourseError, Stage, Task, find_stage, find_task, load_course, load_warm_up
from stages.course.tools.help import changed_files, reset_stage, reset_task, show_diff, show_hint
from stages.course.tools.page import print_stage, run_with_bar
from stages.course.tools.preflight import inspect_stage
from stages.course.tools.progress import show_progress
from stages.course.tools.run_mine import run_mine
from stages.course.tools.state import remember


def run_tests(console: Console, course: list[Stage], args: argparse.Namespace) -> int:
    """Run a stage's tests and print its page."""
    stage = find_stage(course, args.stage)
    tasks = list(stage.tasks)
    if args.task:
        task = find_task(course, args.task)
        if task.stage != stage.number:
            raise CourseError(f"task {task.id} is of stage {task.stage}: make test-stage-{task.stage} TASK={task.id}")
        tasks = [task]
    if stage.number == 0:
        if args.impl or args.with_stages:
            raise CourseError("the warm-up stands alone; leave IMPL and WITH out")
        stages, whose = "", "your code"
    elif args.impl == "solutions":
        stages, whose = "", "the reference"
    elif args.impl:
        raise CourseError(f"IMPL={args.impl}: it can be solutions, for the reference, or left out, for your own code")
    else:
        numbers = sorted({stage.number, *_numbers(args.with_stages, "WITH")})
        stages = ",".join(map(str, numbers))
        whose = f"your code: stage {' and '.join(map(str, numbers))}; the rest is the reference"
    result = run_with_bar(console, stage, tasks, stages)
    print_stage(console, result, inspect_stage(stage), whose)
    if stages == stage.own and not args.task:
        remember(result)
    return 0 if result.passed else 1


def watch(console: Console, course: list[Stage], args: argparse.Namespace) -> int:
    """Run a stage's tests, and again each time one of its files is saved."""
    from watchfiles import PythonFilter, watch

    stage = find_stage(course, args.stage)
    run_tests(console, course, args)
    console.print(f"[dim]watching stages/{stage.folder}; save a file to run the tests again, Ctrl-C to stop[/]")
    for _ in watch(stage.path, watch_filter=PythonFilter(), raise_interrupt=False):
        console.clear()
        run_tests(console, course, args)
        console.print(f"[dim]watching stages/{stage.folder}; Ctrl-C to stop[/]")
    return 0


def reset(console: Console, course: list[Stage], args: argparse.Namespace) -> int:
    """Start a task or a stage over, if the learner says yes."""
    task = find_task(course, args.task) if args.task else None
    stage = find_stage(course, task.stage if task else args.stage)
    what = (
        f"task {task.id}, {task.title}" if task else f"all of stage {stage.number} ({len(changed_files(stage))} changed files)"
    )
    if not args.yes:
        if not sys.stdin.isatty():
            raise CourseError("reset asks first, and nobody can answer here; say so beforehand: YES=1")
        if console.input(f"Put {what} back to the start? A copy is kept. (y/N) ").strip().lower() not in ("y", "yes"):
            console.print("nothing was changed")
            return 1
    if task:
        reset_task(console, stage, task)
    else:
        reset_stage(console, stage)
    return 0


def scoreboard(console: Console, course: list[Stage], args: argparse.Namespace) -> int:
    """Judge the open tasks of the learner or of a class."""
    from stages.course.grading.contest.scoreboard import SEED, class_scoreboard, own_scoreboard  # imports the engine

    seed = args.seed or SEED
    if args.folder:
        return class_scoreboard(console, course, Path(args.folder), seed, Path(args.output))
    return own_scoreboard(console, course, args.name, seed)


def _numbers(text: str, variable: str) -> list[int]:
    try:
        return parse_stages(text)
    except ValueError as error:
        raise CourseError(str(error).replace("STAGES=", f"{variable}=")) from None


def _task_and_stage(course: list[Stage], task_id: str) -> tuple[Stage, Task]:
    if not task_id:
        raise CourseError("say which task, for example: TASK=1.1")
    task = find_task(course, task_id)
    return find_stage(course, task.stage), task


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m stages.course", description="Test, hints, progress: the tools of the course."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("test", "run a stage's tests"), ("watch", "run them again on every save")):
        command = commands.add_parser(name, help=text)
        command.add_argument("--stage", type=int, required=True)
        command.add_argument("--task", default="", help="this task only, such as 1.3")
        command.add_argument(
            "--with", dest="with_stages", default="", help="further stages that are the learner's own, such as 1,2"
        )
        command.add_argument("--impl", default="", help="solutions: test the reference instead")
    commands.add_parser("progress", help="how far you are, and what to open next")
    command = commands.add_parser("hint", help="a hint for a task")
    command.add_argument("--task", default="")
    command.add_argument("--level", type=int, default=1, help="1: a nudge, 3: nearly the answer")
    command = commands.add_parser("diff", help="the reference beside your version of a task")
    command.add_argument("--task", default="")
    command.add_argument("--force", action="store_true", help="show it although the task does not pass yet")
    command = commands.add_parser("reset", help="start a task or a stage over; keeps a copy")
    command.add_argument("--task", default="")
    command.add_argument("--stage", type=int)
    command.add_argument("--yes", action="store_true", help="do not ask")
    command = commands.add_parser("break-it", help="your own tests on wrong versions that you have not seen")
    command.add_argument("--stage", type=int, required=True)
    command.add_argument("--level", type=int, default=0, help="of a wrong version that lives say 1: its task, 2: what is wrong")
    command.add_argument("--starred", action="store_true", help="wrong versions of the starred tasks, for no points")
    command = commands.add_parser("scoreboard", help="judge what is handed in for the open tasks, beside what the engine has")
    command.add_argument("--name", default="", help="how your rows are called (default: you)")
    command.add_argument("--class", dest="folder", default="", help="a folder of checkouts, to be judged in one table")
    command.add_argument("--output", default="scoreboard.json", help="where a class's table goes, as JSON")
    command.add_argument("--seed", default="", help="a word from which the workloads are drawn; a class's may be secret")
    command = commands.add_parser("run-mine", help="the real model answers through the stages that STAGES names")
    command.add_argument("--prompt", default="What is the capital of France?")
    command.add_argument("--model", default="smollm2-135m")
    return main


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    console = Console()
    try:
        course = load_course()
        with_warm_up = [*load_warm_up(), *course]
        if args.command == "test":
            return run_tests(console, with_warm_up, args)
        if args.command == "watch":
            return watch(console, with_warm_up, args)
        if args.command == "progress":
            show_progress(console, with_warm_up)
            return 0
        if args.command == "hint":
            show_hint(console, *_task_and_stage(with_warm_up, args.task), args.level)
            return 0
        if args.command == "diff":
            show_diff(console, *_task_and_stage(with_warm_up, args.task), args.force)
            return 0
        if args.command == "break-it":
            return break_it(console, Workshop(ROOT), find_stage(course, args.stage), args.level, args.starred)
        if args.command == "scoreboard":
            return scoreboard(console, course, args)
        if args.command == "reset":
            if not args.task and args.stage is None:
                raise CourseError("say what to reset, for example: make reset TASK=1.1, or make reset-stage-1")
            return reset(console, with_warm_up if args.task else course, args)
        chosen = [find_stage(course, number) for number in parse_stages(os.environ.get("STAGES"))]
        return run_mine(console, chosen, args.prompt, args.model)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
