"""The report of a submission as one page of HTML: no other file, readable by screen readers, in light and in dark."""

from __future__ import annotations

from html import escape

from stages.course.grading import scoring
from stages.course.grading.report import MARKS, median, shown_failures, tests
from stages.course.grading.scoring import Grade, MeasureGrade, TaskGrade

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #595966; --line: #c9c9d3; --panel: #f4f4f7;
  --good: #14692c; --part: #8a5200; --bad: #b3141e; --link: #0b57b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --paper: #16161a; --soft: #a9a9b8; --line: #44444f;
  --panel: #212127; --good: #6fd08c; --part: #f0b45a; --bad: #ff8a8a; --link: #8ab9ff; } }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
a { color: var(--link); } table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); } .number { text-align: right; }
pre { background: var(--panel); padding: .8rem; overflow-x: auto; border: 1px solid var(--line); white-space: pre-wrap; }
.passed { color: var(--good); } .partly { color: var(--part); } .failed { color: var(--bad); } .soft { color: var(--soft); }
svg { width: 100%; max-width: 32rem; height: auto; } svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .all { fill: var(--panel); stroke: var(--line); } svg .got { fill: var(--good); } section { overflow-x: auto; }
@media (max-width: 40rem) { body { margin: .5rem auto; padding: 0 .6rem; } th, td { padding: .2rem .35rem; font-size: .85rem; }
  h1 { font-size: 1.4rem; } pre { font-size: .8rem; } }
"""
CLASSES = {scoring.PASSED: "passed", scoring.PARTLY: "partly", scoring.UNWRITTEN: "soft", scoring.SKIPPED: "soft"}
ROW, WIDTH, POINTS = 44, 380, 90


def html(grade: Grade, guide: str, about: dict[str, str]) -> str:
    """The page.

    Args:
        guide: address of a folder that has the course's text at the repository's paths. about: how it was graded.
    """
    title = f"{escape(grade.name)}: {grade.points:g} of {grade.max_points} points"
    parts = [f"<h1>{title}</h1>", f"<p>{grade.percent:g} % of what could be had.</p>", _stages_plot(grade)]
    for heading, items in (("Not counted", grade.flags), ("Notes", grade.notes)):
        if items:
            parts.append(section(heading, "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"))
    parts.append(section("Tasks", _tasks_table(grade.tasks, guide)))
    if grade.measures:
        parts.append(section("Performance", _measures(grade.measures)))
    open_tasks = scoring.left(grade.tasks)
    if open_tasks:
        parts.append(section("What to do", "".join(_task(item, guide) for item in open_tasks)))
    parts.append(section("How points are given", f"<p>{escape(scoring.RULE)}</p>{facts(about)}"))
    return document(title, parts)


def document(title: str, parts: list[str]) -> str:
    """A page of its own; the title and the parts are HTML."""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def facts(about: dict[str, str]) -> str:
    """How it was graded, as a list."""
    return "<ul>" + "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in about.items()) + "</ul>"


def section(heading: str, content: str) -> str:
    """A part of a page."""
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"


def _status(status: str) -> str:
    return f'<span class="{CLASSES.get(status, "failed")}"><span aria-hidden="true">{MARKS[status]}</span> {status}</span>'


def table(caption: str, columns: list[str], rows: list[list[str]], numbers: int) -> str:
    """A table whose last `numbers` columns are to the right; cells are HTML."""
    first = len(columns) - numbers

    def cells(tag: str, row: list[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        classes = [' class="number"' if index >= first else "" for index in range(len(row))]
        return "".join(f"<{tag}{scope}{name}>{cell}</{tag}>" for name, cell in zip(classes, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    return (
        f'<table>\n<caption class="soft">{caption}</caption>\n<thead><tr>{cells("th", columns)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table>"
    )


def _tasks_table(tasks: list[TaskGrade], guide: str) -> str:
    rows = [
        [
            _status(item.status), f'<a href="{escape(guide)}/{item.task.section}">{item.task.id}</a>', escape(item.task.name),
            tests(item), scoring.points_of(item), f"{item.seconds:g}",
        ]
        for item in tasks
    ]  # fmt: skip
    return table(
        "Each task leads to its section of the guide.", ["state", "task", "title", "tests", "points", "seconds"], rows, 3
    )


def _measures(measures: list[MeasureGrade]) -> str:
    rows = [
        [
            _status(item.status), escape(item.title), *(_median(values, item.unit) for values in (item.mine, item.theirs)),
            "" if item.ratio is None else f"{item.ratio:.2f}", f"{item.points:g}/{item.max_points}",
        ]
        for item in measures
    ]  # fmt: skip
    columns = ["state", "measured", "yours", "reference", "ratio", "points"]
    notes = "".join(f"<li><b>{escape(item.title)}</b>: {escape(item.reason or item.why)}</li>" for item in measures)
    return table("On one machine, in turn with the reference.", columns, rows, 4) + f"<ul>{notes}</ul>"


def _median(values: list[float], unit: str) -> str:
    return f"{median(values):.4g} {escape(unit)}" if values else ""


def _task(item: TaskGrade, guide: str) -> str:
    parts = [f'<h3 id="{item.task.guide}">Task {item.task.id}: {escape(item.task.name)}</h3>']
    if item.reason:
        parts.append(f"<p>{_status(item.status)}: {escape(item.reason)}</p>")
    link = f'<a href="{escape(guide)}/{item.task.section}">section {item.task.id} of the guide</a>'
    parts.append(f"<p>{escape(item.task.purpose)} Read {link}.</p>")
    shown, others = shown_failures(item)
    parts += [f'<h4>{escape(name)}</h4>\n<pre tabindex="0">{escape(text)}</pre>' for name, text in shown]
    if item.printed:
        parts.append(f'<h4>what the process printed last</h4>\n<pre tabindex="0">{escape(item.printed)}</pre>')
    if others:
        parts.append(f"<details><summary>{len(others)} more</summary><p>{escape(', '.join(others))}</p></details>")
    return "\n".join(parts)


def _stages_plot(grade: Grade) -> str:
    """Points by stage as bars, with the numbers beside them."""
    bars = []
    for stage in {item.stage.number: item.stage for item in grade.tasks}.values():
        items = grade.of_stage(stage.number)
        bars.append((f"{stage.number} {stage.title}", sum(i.points for i in items), sum(i.max_points for i in items)))
    if grade.measures:
        bars.append(("Performance", sum(i.points for i in grade.measures), sum(i.max_points for i in grade.measures)))
    words = "; ".join(f"{name}: {got:g} of {most}" for name, got, most in bars)
    shapes, room = [], WIDTH - POINTS
    for row, (name, got, most) in enumerate(bars):
        top = row * ROW + 4
        width = room * got / most if most else 0
        shapes.append(
            f'<text x="0" y="{top + 12}">{escape(name)}</text>'
            f'<rect class="all" x="0" y="{top + 18}" width="{room}" height="14"/>'
            f'<rect class="got" x="0" y="{top + 18}" width="{width:.1f}" height="14"/>'
            f'<text x="{room + 8}" y="{top + 30}">{got:g} of {most}</text>'
        )
    height = len(bars) * ROW + 4
    return (
        f'<figure style="margin:0"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Points: {escape(words)}">'
        + "".join(shapes) + "</svg></figure>"
    )  # fmt: skip
