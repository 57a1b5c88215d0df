"""Points for performance: a learner's engine against the reference, in turn, on the machine that grades."""

from __future__ import annotations

import math
import statistics
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from stages.course.grading import scoring
from stages.course.grading.sandbox import Ended, Limits, Sandbox, room
from stages.course.grading.scoring import Grade, MeasureGrade, ratio_points
from stages.course.grading.submission import Submission
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import CourseError

IMPLAUSIBLE = 3.0
"""A ratio above this is for a person to look at: graded code runs in the process that measures it."""
FILE = Path("stages") / "performance.toml"


@dataclass(frozen=True, slots=True)
class Measure:
    """An entry of `performance.toml`, which says what its fields mean."""

    name: str
    title: str
    needs: tuple[int, ...]
    points: int
    unit: str
    pairs: int
    why: str


class Bench:
    """The measurements for some stages.

    Args:
        numbers: of the stages that are graded; what needs another one is left out.

    Raises:
        CourseError: the file that lists them is malformed.
    """

    def __init__(self, workshop: Workshop, sandbox: Sandbox, numbers: list[int], limits: Limits) -> None:
        self.workshop, self.sandbox, self.limits = workshop, sandbox, limits
        try:
            table = tomllib.loads((workshop.root / FILE).read_text(encoding="utf-8"))
            self.full_at, self.none_below = float(table["full_at"]), float(table["none_below"])
            every = [Measure(**(entry | {"needs": tuple(entry["needs"])})) for entry in table["measure"]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CourseError(f"{FILE} cannot be used: {error!r}") from error
        self.measures = [measure for measure in every if set(measure.needs) <= set(numbers)]

    def grade(self, measure: Measure, submission: Submission, grade: Grade) -> MeasureGrade:
        """Measure a submission, if all tests of the stages that it takes pass."""
        result = MeasureGrade(measure.name, measure.title, measure.why, scoring.FAILED, measure.points, unit=measure.unit)
        tasks = [item for number in measure.needs for item in grade.of_stage(number) if not item.task.starred]
        left = [item.task.id for item in tasks if item.status not in (scoring.PASSED, scoring.SKIPPED)]
        if left:
            result.status = scoring.SKIPPED
            result.reason = (
                f"measured when all tests of stage {' and '.join(map(str, measure.needs))} pass; open: {', '.join(left)}"
            )
            return result
        begin = time.monotonic()
        for _ in range(measure.pairs):
            for values, whose in ((result.mine, submission), (result.theirs, None)):
                value, ended = self._value(measure, whose)
                if value is None:
                    return self._without_value(result, whose, ended)
                values.append(value)
        result.ratios = [mine / theirs for mine, theirs in zip(result.mine, result.theirs, strict=True)]
        result.ratio = statistics.median(result.ratios)
        if result.ratio > IMPLAUSIBLE:
            grade.flags.append(
                f"{measure.title}: {result.ratio:.1f} times the reference; see that no file tampers with the measurement"
            )
        result.points = ratio_points(measure.points, result.ratio, self.full_at, self.none_below)
        result.status = (
            scoring.PASSED if result.points == measure.points else scoring.PARTLY if result.points else scoring.FAILED
        )
        result.seconds = round(time.monotonic() - begin, 1)
        return result

    def _without_value(self, result: MeasureGrade, whose: Submission | None, ended: Ended) -> MeasureGrade:
        last = (ended.output.strip().splitlines() or ["it printed nothing"])[-1]
        how = ended.how if ended.code != 0 else "it gave no number"
        if whose is None:  # then nobody can be measured by it
            result.status, result.max_points = scoring.SKIPPED, 0
            result.reason = f"the reference itself cannot be measured here: {how}: {last}"
        else:
            result.reason = f"the measurement failed: {how}: {last}"
        return result

    def _value(self, measure: Measure, submission: Submission | None) -> tuple[float | None, Ended]:
        """Run a measurement once; None for the submission is the reference."""
        with room() as scratch:
            self.workshop.build(scratch / "work", self.workshop.course[0], None)
            learners = []
            if submission is not None:
                for (number, file), text in submission.files.items():
                    if number in measure.needs:
                        stage = next(stage for stage in self.workshop.course if stage.number == number)
                        path = scratch / "work" / "stages" / stage.folder / file
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(text, encoding="utf-8")
                        learners.append(path)
            stages = "" if submission is None else ",".join(map(str, measure.needs))
            command = [sys.executable, "-m", "stages.course.grading.measures", measure.name]
            environment = {"STAGES": stages, "PYTHONHASHSEED": "0"}
            ended = self.sandbox.run(command, scratch, environment, self.limits, tuple(learners))
        try:
            value = float(ended.output.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return None, ended
        return (value if ended.code == 0 and math.isfinite(value) and value > 0 else None), ended
