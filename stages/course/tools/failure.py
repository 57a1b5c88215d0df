"""Says what a failed test of a stage checks, why that matters, and where it went wrong, instead of a stack dump."""

from __future__ import annotations

import inspect
import re
import traceback
from types import TracebackType

from stages.course.tools.catalog import STAGES_FOLDER
from stages.course.tools.preflight import relative

TODO = re.compile(r"Stage \d+ · Task (\d+\.\d+):")


def todo_task(error: BaseException) -> str | None:
    """The id of the task whose function is not written yet, if that is what an exception says, or one that it came from.

    In a kernel that is what Triton's interpreter or the compiler reports.
    """
    if isinstance(error, AssertionError):
        return None
    match = TODO.search(str(error))
    if match is None and (error.__cause__ or error.__context__) is not None:
        return todo_task(error.__cause__ or error.__context__)
    return match[1] if match else None


def what_and_why(function: object) -> tuple[str, str]:
    """The two halves of a test's docstring: what it checks, and why that matters."""
    text = inspect.cleandoc(getattr(function, "__doc__", None) or "")
    what, _, why = text.partition("\n\nWhy:")
    return " ".join(what.split()), " ".join(why.split())


def describe(function: object, error: BaseException, trace: TracebackType | None) -> str:
    """The report of one failed test.

    Args:
        function: the test. error, trace: what it raised and where.
    """
    what, why = what_and_why(function)
    lines = [f"checks    {what}"] if what else []
    if why:
        lines.append(f"why       {why}")
    lines += ["", *_message(error)]
    frames = [frame for frame in traceback.extract_tb(trace) if str(STAGES_FOLDER) in frame.filename]
    for label, frame in (("test", _last(frames, tests=True)), ("your code", _last(frames, tests=False))):
        if frame is not None:
            lines.append(f"{label:<9} {relative(frame.filename)}:{frame.lineno}, in {frame.name}: {frame.line}")
    return "\n".join(lines)


def _message(error: BaseException) -> list[str]:
    text = str(error).rstrip()
    if text.startswith("Timeout"):
        text = f"{text.split(' from ')[0]}: it never came back; is there an endless loop?"
    elif type(error) is not AssertionError:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = [line for note in getattr(error, "__notes__", []) for line in note.splitlines()]
    return [*text.splitlines(), *notes, ""]


def _last(frames: list[traceback.FrameSummary], *, tests: bool) -> traceback.FrameSummary | None:
    """The innermost frame in the tests, or in the learner's files."""

    def is_test(frame: traceback.FrameSummary) -> bool:
        return "/tests/" in frame.filename.replace("\\", "/")

    def is_tool(frame: traceback.FrameSummary) -> bool:
        return str(STAGES_FOLDER / "course") in frame.filename

    wanted = [frame for frame in frames if not is_tool(frame) and is_test(frame) == tests]
    return wanted[-1] if wanted else None
