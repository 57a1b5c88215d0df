"""Grades a learner's checkout, or a folder of several; `stages/course/grading/` is where it does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without an installed package

from stages.course.grading.command import main

if __name__ == "__main__":
    raise SystemExit(main())
