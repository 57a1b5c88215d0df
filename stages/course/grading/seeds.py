"""A plugin for pytest that draws the random cases of the stages' tests from a seed which only the grader knows.

The tests pin what hypothesis draws by a digest of each test's source, so that a learner sees the same cases every time. The
seed enters that digest. The variable `GRADING_SEED` holds it.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import core

SEED = os.environ["GRADING_SEED"]


def salted(digest: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A digest of a test that the seed is a part of."""
    return lambda function: hashlib.sha384(SEED.encode() + digest(function)).digest()


core.function_digest = salted(core.function_digest)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Numbers that a test draws without a seed of its own are the same in each run with one salt."""
    random.seed(f"{SEED} {item.nodeid}")
