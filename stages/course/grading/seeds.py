"""Draws the random cases of the stages' tests from a seed which only the grader knows.

The tests pin what hypothesis draws by a digest of each test's source, so that a learner sees the same cases every time. The
seed enters that digest, and the seeds that tests give to PyTorch, NumPy and Python's own numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from hypothesis import core


def salt(seed: str) -> None:
    """Let what hypothesis draws depend on a seed."""
    core.function_digest = salted(core.function_digest, seed)


def salted(digest: Callable[[Any], bytes], seed: str) -> Callable[[Any], bytes]:
    """A digest of a test that the seed is a part of."""
    return lambda function: hashlib.sha384(seed.encode() + digest(function)).digest()


def begin(seed: str, test: str) -> None:
    """Numbers that a test draws without a seed of its own are the same in each run with one salt."""
    random.seed(f"{seed} {test}")
