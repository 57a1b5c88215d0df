"""Tests in several processes at once, as `make test` runs them: what measures time runs alone."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

ROOM = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Each test holds a lock, on this file, that all processes share; one that is marked `alone` holds it for itself.

    Several of those in a row keep it between them: what the other processes would do there costs more than it gains.
    """
    if not hasattr(item.config, "workerinput"):
        return (yield)  # there is one process
    import fcntl  # Windows has none

    alone = is_alone(item)
    held = item.config.stash.get(ROOM, None)
    if held is None:
        held = item.config.stash[ROOM] = os.open(__file__, os.O_RDONLY)
        door = os.open(Path(__file__).parent, os.O_RDONLY)
        fcntl.flock(door, fcntl.LOCK_EX)  # who waits for the others to leave keeps the door shut, or new ones would come
        fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        os.close(door)
    try:
        return (yield)
    finally:
        if not (alone and nextitem is not None and is_alone(nextitem)):
            fcntl.flock(held, fcntl.LOCK_UN)  # a process that a test left behind has the file open too
            os.close(held)
            del item.config.stash[ROOM]


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None
