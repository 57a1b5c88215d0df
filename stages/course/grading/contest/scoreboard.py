"""``make scoreboard``: judges what is handed in for the open tasks, keeps a table of it, and prints the table."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.course.grading.contest.contests import CONTESTS, Contest, Measure
from stages.course.grading.contest.referee import read_text
from stages.course.grading.contest.simulator import Foul
from stages.course.grading.submission import find_submissions
from stages.course.tools.catalog import ROOT, Stage, find_stage
from stages.course.tools.state import SCOREBOARD
from stages.make_starters import digest

SEED = "open"


@dataclass(frozen=True, slots=True)
class Entry:
    """A row. `foul` says why it is disqualified; then it has no measures. `rival` marks what everybody is compared with. `text`
    is the digest of what was handed in, where one file has different measures each time."""

    contest: str
    name: str
    date: str
    commit: str
    seed: str
    measures: dict[str, float] = field(default_factory=dict)
    foul: str = ""
    rival: bool = False
    text: str = ""


def ranks(values: Iterable[float], least: bool) -> list[int]:
    """The place of each value, from 1; equal ones share theirs, and the next is further behind by as many."""
    values = [value if least else -value for value in values]
    return [1 + sum(other < value for other in values) for value in values]


def places(entries: list[Entry], contest: Contest) -> list[dict[str, int]]:
    """Measure → rank of each entry; nothing for one that is disqualified."""
    whole = [entry for entry in entries if not entry.foul]
    columns = {each.name: iter(ranks((row.measures[each.name] for row in whole), each.least)) for each in contest.measures}
    return [{} if entry.foul else {name: next(column) for name, column in columns.items()} for entry in entries]


def judge(contest: Contest, name: str, text: str, seed: str, commit: str = "") -> Entry:
    """The row of what somebody has handed in."""
    date, mark = time.strftime("%Y-%m-%d %H:%M"), digest(text) if contest.timed else ""
    try:
        return Entry(contest.id, name, date, commit, seed, contest.judge(text, seed), text=mark)
    except Foul as foul:
        return Entry(contest.id, name, date, commit, seed, foul=str(foul), text=mark)


def rivals(contest: Contest, seed: str) -> list[Entry]:
    """The rows that everybody is compared with. A seed may be too hard for one of them, too."""
    return [_rival(contest, name, seed) for name in contest.rivals]


def _rival(contest: Contest, name: str, seed: str) -> Entry:
    try:
        return Entry(contest.id, name, "", "", seed, contest.judge_rival(name, seed), rival=True)
    except Foul as foul:
        return Entry(contest.id, name, "", "", seed, foul=str(foul), rival=True)


def handed_in(contest: Contest, course: list[Stage], root: Path) -> str | None:
    """What a checkout has for an open task; None if that is nothing, or still the file that the course gives."""
    text = read_text(root / file_of(contest, course))
    return None if text is None or not text.strip() or digest(text) == contest.given else text


def file_of(contest: Contest, course: list[Stage]) -> str:
    """The file that is handed in, from the repository's root."""
    return f"stages/{find_stage(course, contest.stage).folder}/{contest.file}"


def own_scoreboard(
    console: Console, course: list[Stage], name: str, seed: str, path: Path = SCOREBOARD, root: Path = ROOT
) -> int:
    """Judge the learner's files, add a row for each that is new to their table, and print it."""
    kept = [Entry(**each) for each in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    for contest in CONTESTS:
        text = handed_in(contest, course, root)
        if text is None:
            console.print(f"[dim]{contest.id} {contest.title}: nothing handed in; write into {file_of(contest, course)}[/]")
        else:
            kept = entered(kept, judge(contest, name or "you", text, seed, _commit(root)))
        rows = [entry for entry in kept if (entry.contest, entry.seed) == (contest.id, seed)]
        show(console, contest, [*rivals(contest, seed), *rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(entry) for entry in kept], indent=2), encoding="utf-8")
    return 0


def entered(kept: list[Entry], new: Entry) -> list[Entry]:
    """A learner's table with a new row, if it says something new. Where times differ from run to run the last one of a file
    counts."""

    def result(row: Entry) -> tuple[object, ...]:
        return row.contest, row.seed, row.name, *((row.text,) if row.text else (row.measures, row.foul))

    same = [row for row in kept if result(row) == result(new)]
    return kept if same and not new.text else [*(row for row in kept if row not in same), new]


def class_scoreboard(console: Console, course: list[Stage], folder: Path, seed: str, output: Path) -> int:
    """Judge all checkouts in a folder anew, on this machine and by this course, and write and print one table.

    Raises:
        CourseError: there is none.
    """
    report = []
    for contest in CONTESTS:
        rows, missing = rivals(contest, seed), []
        for checkout in find_submissions(folder, course):
            text = handed_in(contest, course, checkout)
            if text is None:
                missing.append(checkout.resolve().name)
            else:
                rows.append(judge(contest, checkout.resolve().name, text, seed, _commit(checkout)))
        show(console, contest, rows)
        if missing:
            console.print(f"[dim]nothing handed in: {escape(', '.join(missing))}[/]")
        report += [asdict(row) | {"ranks": rank} for row, rank in zip(rows, places(rows, contest), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2), encoding="utf-8")
    console.print(f"written to {escape(str(output))}")
    return 0


def show(console: Console, contest: Contest, entries: list[Entry]) -> None:
    """Print a contest's table: the best by the first measure first, who is disqualified last, with the reason below."""
    table = Table(title=f"{contest.id} {contest.title}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for name in ("name", "date", "commit"):
        table.add_column(name, no_wrap=True)
    for each in contest.measures:
        table.add_column(f"{each.name}, {each.unit}" if each.unit else each.name, justify="right", no_wrap=False, min_width=6)
        table.add_column("#", justify="right")
    rows = sorted(zip(entries, places(entries, contest), strict=True), key=lambda row: _place(row[1], contest))
    for entry, rank in rows:
        name = f"[dim]{entry.name}[/]" if entry.rival else escape(entry.name)
        cells = [cell for each in contest.measures for cell in _cells(each, entry, rank)]
        table.add_row(name, entry.date[:10], entry.commit[:7], *cells)
    console.print(table)
    for entry, _ in rows:
        if entry.foul:
            console.print(f"[red]{escape(entry.name)} is disqualified[/]: {escape(entry.foul)}")


def _place(rank: dict[str, int], contest: Contest) -> float:
    return rank.get(contest.measures[0].name, float("inf"))


def _cells(measure: Measure, entry: Entry, rank: dict[str, int]) -> tuple[str, str]:
    if entry.foul:
        return "–", "–"
    return f"{entry.measures[measure.name]:.{measure.digits}f}", str(rank[measure.name])


def _commit(root: Path) -> str:
    """The commit of a checkout; "" if the folder is no repository of its own."""
    if not (root / ".git").exists():
        return ""
    try:
        words = ["git", "-c", "core.fsmonitor=false", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
