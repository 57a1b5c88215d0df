"""A page for instructors alone: all grades, what was flagged, which submissions are alike, and which tests fail most."""

from __future__ import annotations

from collections import Counter
from html import escape

from stages.course.grading import scoring
from stages.course.grading.likeness import Pair
from stages.course.grading.page import document, facts, section, table
from stages.course.grading.scoring import Grade

MOST = 20
"""Tests that are named."""


def class_page(grades: list[Grade], pairs: list[Pair], about: dict[str, str]) -> str:
    """The page.

    Args:
        pairs: submissions that are alike. about: how it was graded.
    """
    rows = [
        [escape(grade.name), f"{grade.points:g}/{grade.max_points}", f"{grade.percent:g}", str(len(grade.flags) or "")]
        for grade in grades
    ]
    flags = "".join(f"<li><b>{escape(grade.name)}</b>: {escape(told)}</li>" for grade in grades for told in grade.flags)
    likes = [[escape(pair.first), escape(pair.second), f"{100 * pair.share:.0f} %"] for pair in pairs]
    empty = "<p>None.</p>"
    parts = [
        "<h1>For instructors</h1>",
        "<p>Nothing here is a verdict: read the code before you talk to anybody.</p>",
        section("Grades", table("All submissions.", ["name", "points", "%", "flags"], rows, 3)),
        section("Flags", f"<ul>{flags}</ul>" if flags else empty),
        section("Alike", table("Common share of their own code.", ["", "", "share"], likes, 1) if likes else empty),
        section("Tests that fail most", _failing(grades)),
        section("How it was graded", facts(about)),
    ]
    return document("For instructors", parts)


def _failing(grades: list[Grade]) -> str:
    """Each test that failed, by how many of those who wrote its task failed it."""
    written: Counter[str] = Counter()
    failed: Counter[tuple[str, str, str]] = Counter()
    for grade in grades:
        for item in grade.tasks:
            if item.status not in (scoring.UNWRITTEN, scoring.SKIPPED, scoring.FLAGGED):
                written[item.task.id] += 1
                for name, what in {failure.name: failure.what for failure in item.failures}.items():
                    failed[item.task.id, name, what] += 1
    rows = [
        [task, f"{escape(name)}<br><span class='soft'>{escape(what)}</span>", f"{count} of {written[task]}"]
        for (task, name, what), count in failed.most_common(MOST)
    ]
    return table("Of those who wrote the task.", ["task", "test", "fail"], rows, 1) if rows else "<p>None fails.</p>"
