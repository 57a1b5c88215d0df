"""Grades a learner's checkout, or a folder of several: points by task, a report, results for Gradescope.

Run it: ``python benchmarks/grade.py --help``. What it does is in `stages/course/grading/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from stages.course.grading.command import main

if __name__ == "__main__":
    raise SystemExit(main())
