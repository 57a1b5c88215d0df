"""Draws the random cases of the stages' tests from a seed which only the grader knows.

The tests pin what hypothesis draws by a digest of each test's source, so that a learner sees the same cases every time. The
seed enters that digest. What they draw from PyTorch and from Python's own numbers with seeds of their own, and the order in
which they run, change with it too, unless the reference does not pass with that.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import core

OWN_SEEDS = re.compile(r"(manual_seed|random\.Random)\((?=[^)])")


def offset(seed: str) -> str:
    """What is written in front of each seed in a file of tests."""
    return f"{int(seed[:8], 16) * 1000} + "


def with_other_seeds(text: str, seed: str) -> str:
    """A file of tests that draws other numbers."""
    return OWN_SEEDS.sub(lambda found: f"{found[0]}{offset(seed)}", text)


def move(folder: Path, tests: list[Path], seed: str) -> None:
    """Let a copy of the course draw other numbers: some files of tests, and what makes numbers for them."""
    makers = (*(folder / "stages" / "course" / "fixtures").glob("*.py"), *(folder / "solutions" / "tests").glob("*_cases.py"))
    for path in (*tests, *makers):
        path.write_text(with_other_seeds(path.read_text(encoding="utf-8"), seed), encoding="utf-8")


def salt(seed: str) -> None:
    """Let what hypothesis draws depend on a seed."""
    core.function_digest = salted(core.function_digest, seed)


def salted(digest: Callable[[Any], bytes], seed: str) -> Callable[[Any], bytes]:
    """A digest of a test that the seed is a part of."""
    return lambda function: hashlib.sha384(seed.encode() + digest(function)).digest()


def begin(seed: str, test: str) -> None:
    """Numbers that a test draws without a seed of its own are the same in each run with one salt."""
    random.seed(f"{seed} {test}")
