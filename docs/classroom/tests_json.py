"""Prints a stage's tasks as a list of tests for Classroom 50: ``python docs/classroom/tests_json.py --stage 1``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without an installed package

from stages.course.tools.catalog import CourseError, Stage, find_stage, load_course

SECONDS = 600
"""The most that Classroom 50 gives a command."""


def tests(stage: Stage) -> list[dict[str, Any]]:
    """One test for each task, with its points, behind the set-up, which has none."""
    entries = [("set-up", "make setup", 0)]
    entries += [(f"{t.id} {t.title}", f"make test-stage-{stage.number} TASK={t.id}", t.points) for t in stage.core]
    return [
        {"name": name, "type": "run", "run": command, "timeout": SECONDS, "points": points} for name, command, points in entries
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/classroom/tests_json.py", description=__doc__)
    parser.add_argument("--stage", type=int, required=True)
    args = parser.parse_args(argv)
    try:
        print(json.dumps(tests(find_stage(load_course(), args.stage)), indent=2))
    except CourseError as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
