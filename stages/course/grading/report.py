"""The report of a submission in Markdown: points, and for each task that is not green what was expected and where to read."""

from __future__ import annotations

from stages.course.grading import scoring
from stages.course.grading.scoring import Grade, MeasureGrade, TaskGrade

MARKS = {
    scoring.PASSED: "✓", scoring.PARTLY: "◐", scoring.FAILED: "✗", scoring.UNWRITTEN: "☐", scoring.FLAGGED: "⚑",
    scoring.STOPPED: "■", scoring.SKIPPED: "–",
}  # fmt: skip
SHOWN_FAILURES = 3
"""Failed tests of one task that are shown in full; the others are named."""


def markdown(grade: Grade, guide: str, about: dict[str, str]) -> str:
    """The report.

    Args:
        guide: address of a folder that has the course's text at the repository's paths. about: how it was graded.
    """
    lines = [f"# {grade.name}: {grade.points:g} of {grade.max_points} points ({grade.percent:g} %)", ""]
    for title, items in (("Not counted", grade.flags), ("Notes", grade.notes)):
        if items:
            lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
    lines += ["## Tasks", "", "| | task | | tests | points | seconds |", "|---|---|---|--:|--:|--:|"]
    lines += [
        f"| {MARKS[i.status]} {i.status} | [{i.task.id}]({guide}/{i.task.section}) | {i.task.name} | {tests(i)} "
        f"| {scoring.points_of(i)} | {i.seconds:g} |"
        for i in grade.tasks
    ]
    if grade.measures:
        lines += ["", "## Performance", "", "| | | yours | reference | ratio | points |", "|---|---|--:|--:|--:|--:|"]
        lines += [_measure_row(item) for item in grade.measures]
        lines += ["", *(f"- **{i.title}**: {i.reason}" for i in grade.measures if i.reason)]
    open_tasks = scoring.left(grade.tasks)
    if open_tasks:
        lines += ["", "## What to do"]
        for item in open_tasks:
            lines += ["", *_task(item, guide)]
    lines += ["", "## How points are given", "", scoring.RULE, "", *(f"- {name}: {text}" for name, text in about.items()), ""]
    return "\n".join(lines)


def _measure_row(item: MeasureGrade) -> str:
    mine, theirs = (f"{median(values):.4g} {item.unit}" if values else "" for values in (item.mine, item.theirs))
    ratio = f"{item.ratio:.2f}" if item.ratio is not None else ""
    points = f"{item.points:g}/{item.max_points}"
    return f"| {MARKS[item.status]} {item.status} | {item.title} | {mine} | {theirs} | {ratio} | {points} |"


def median(values: list[float]) -> float:
    """The value in the middle."""
    return sorted(values)[len(values) // 2]


def tests(item: TaskGrade) -> str:
    """How many of a task's tests pass; nothing where none was run."""
    return f"{item.passed}/{item.tests}" if item.tests else ""


def shown_failures(item: TaskGrade) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, text) of the failures to show, and the names of the others."""
    shown = [(failure.name, failure.text.strip()) for failure in item.failures[:SHOWN_FAILURES]]
    return shown, [failure.name for failure in item.failures[SHOWN_FAILURES:]]


def _task(item: TaskGrade, guide: str) -> list[str]:
    lines = [f"### Task {item.task.id}: {item.task.name}", ""]
    if item.reason:
        lines += [_quoted(item.reason), ""]
    lines += [f"{item.task.purpose} Read [the guide's section]({guide}/{item.task.section})."]
    shown, others = shown_failures(item)
    for name, text in [*shown, *([("what the process printed last", item.printed)] if item.printed else [])]:
        fence = "`" * max(3, 1 + max((len(run) for run in _backticks(text)), default=0))
        lines += ["", f"**{name}**", "", f"{fence}text", text, fence]
    if others:
        lines += ["", f"And {len(others)} more: {', '.join(others[:20])}{', …' if len(others) > 20 else ''}"]
    return lines


def _quoted(text: str) -> str:
    """Text that Markdown takes as it is, in a quotation."""
    return "\n".join(f"> {line}" for line in text.replace("<", "&lt;").splitlines())


def _backticks(text: str) -> list[str]:
    """Runs of backticks in a text: its fence must be longer than each."""
    runs, current = [], ""
    for character in text + " ":
        if character == "`":
            current += character
        elif current:
            runs.append(current)
            current = ""
    return runs
