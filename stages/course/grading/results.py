"""Grades as files for other programs: Gradescope's `results.json`, and a summary of several submissions as JSON and CSV.

The format: https://gradescope-autograders.readthedocs.io/en/latest/specs/
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.course.grading import scoring
from stages.course.grading.scoring import Grade, MeasureGrade, TaskGrade

LONGEST_OUTPUT = 4000
"""Characters of a task's output; whoever wants all of it has the report."""


def gradescope(grade: Grade, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of `results.json`.

    Args:
        settings: how it was graded; what only the instructor may see, such as the salt, must not be in it.
    """
    tests = [_task(item) for item in grade.tasks] + [_measure(item) for item in grade.measures]
    lines = [f"{grade.points:g} of {grade.max_points} points.", scoring.RULE, *grade.notes, *grade.flags]
    return {
        "score": grade.points,
        "execution_time": max(1, round(grade.seconds)),
        "output": "\n\n".join(lines),
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
        "extra_data": {"name": grade.name, "max_score": grade.max_points, "percent": grade.percent, **settings},
    }


def _task(item: TaskGrade) -> dict[str, Any]:
    parts = [item.reason, *(f"{failure.name}\n{failure.text}" for failure in item.failures)]
    return {
        "name": f"Task {item.task.id}: {item.task.name}",
        "number": item.task.id,
        "score": item.points,
        "max_score": item.max_points,
        "status": "passed" if item.status in (scoring.PASSED, scoring.SKIPPED) else "failed",
        "output": _cut("\n\n".join(part for part in parts if part)),
        "output_format": "text",
        "tags": [f"stage {item.stage.number}", item.status],
        "visibility": "visible",
        "extra_data": {"tests_passed": item.passed, "tests": item.tests, "seconds": item.seconds},
    }


def _measure(item: MeasureGrade) -> dict[str, Any]:
    ratio = f"{item.ratio:.2f} of the reference." if item.ratio is not None else ""
    return {
        "name": f"Performance: {item.title}",
        "number": f"performance.{item.name}",
        "score": item.points,
        "max_score": item.max_points,
        "status": "passed" if item.status == scoring.PASSED else "failed",
        "output": _cut("\n".join(part for part in (item.reason, ratio, item.why) if part)),
        "output_format": "text",
        "tags": ["performance", item.status],
        "visibility": "visible",
        "extra_data": {"ratio": item.ratio, "mine": item.mine, "reference": item.theirs, "seconds": item.seconds},
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_OUTPUT else text[:LONGEST_OUTPUT] + "\n[cut; the whole text is in the report]"


def summary(grades: list[Grade]) -> list[dict[str, Any]]:
    """A row for each submission: points by task and measurement, and the total."""
    rows = []
    for grade in grades:
        row: dict[str, Any] = {
            "name": grade.name,
            "points": grade.points,
            "max_points": grade.max_points,
            "percent": grade.percent,
        }
        row |= {f"task {item.task.id}": item.points for item in grade.tasks}
        row |= {item.name: item.points for item in grade.measures}
        rows.append(row | {"flags": len(grade.flags), "seconds": grade.seconds})
    return rows


def write_summary(folder: Path, grades: list[Grade]) -> None:
    """Write `summary.json` and `summary.csv`."""
    rows = summary(grades)
    write(folder / "summary.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    with (folder / "summary.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)


def _harmless(value: Any) -> Any:
    """A folder's name that a spreadsheet would take for a formula, as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def everything(grade: Grade) -> dict[str, Any]:
    """All that is known of a grade, in plain types."""
    plain = asdict(grade)
    for item, source in zip(plain["tasks"], grade.tasks, strict=True):
        item["stage"], item["task"] = source.stage.number, source.task.id
    return plain


def write(path: Path, text: str) -> None:
    """Write a text file; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
