"""Becomes `sitecustomize` in graded Python processes: no network but this machine's own, no look at the reference.

It refuses with an error that says so, before the namespaces of `isolation` would leave a learner with a puzzling one, and
where there are none. Code that means harm could get round it, through a program that is not Python for example.
"""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from typing import Any

NO_NETWORK = "there is no network while grading, only this machine itself: 127.0.0.1, ::1 and localhost"
NO_REFERENCE = "the reference cannot be used while grading"
HIDDEN = tuple(f"{folder}{os.sep}" for folder in json.loads(os.environ.get("GRADING_HIDDEN", "[]")))
LEARNERS = tuple(json.loads(os.environ.get("GRADING_LEARNERS", "[]")))


def is_local(host: Any) -> bool:
    """Whether a host of a socket's address is this machine."""
    text = host.decode(errors="replace") if isinstance(host, bytes) else host
    if text in (None, "", "localhost", os.uname().nodename):
        return True
    try:
        address = ipaddress.ip_address(str(text).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _asks_as_learner() -> bool:
    """Whether the code that is importing now is a learner's file."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename in LEARNERS


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: raises in the place of what it refuses."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not is_local(address[0]):
            raise PermissionError(NO_NETWORK)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if not is_local(args[0]):
            raise PermissionError(NO_NETWORK)
    elif event == "open" and HIDDEN and isinstance(args[0], str) and os.path.realpath(args[0]).startswith(HIDDEN):
        raise PermissionError(NO_REFERENCE)


class Finder:
    """Asked before all others where a module is: the reference's are nowhere when a learner's file imports them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "solutions" and _asks_as_learner():
            raise ImportError(NO_REFERENCE)


sys.addaudithook(watch)
sys.meta_path.insert(0, Finder)
