"""Tests in several processes at once, as `make test` runs them: what measures time runs alone."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Each test holds a lock, on this file, that all processes share; one that is marked `alone` holds it for itself."""
    if not hasattr(item.config, "workerinput"):
        return (yield)  # there is one process
    import fcntl  # Windows has none

    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        try:
            return (yield)
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a process that a test left behind has the file open too
