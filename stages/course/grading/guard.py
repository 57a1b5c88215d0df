"""Becomes `sitecustomize` in graded Python processes: no network but this machine's own, no look at the reference, and no way
for a learner's file to other functions' frames, code and memory.

It refuses with an error that says so, before the namespaces of `isolation` would leave a learner with a puzzling one, and
where there are none. What a learner's file tried stands in `FLAGS`. Code that means harm could get round it, through a program
that is not Python for example; `witness` says how the results are kept from that.
"""

from __future__ import annotations

import builtins
import importlib
import ipaddress
import json
import os
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

NO_NETWORK = "there is no network while grading, only this machine itself: 127.0.0.1, ::1 and localhost"
NO_REFERENCE = "the reference cannot be used while grading"
HIDDEN = tuple(f"{folder}{os.sep}" for folder in json.loads(os.environ.get("GRADING_HIDDEN", "[]")))
LEARNERS = frozenset(json.loads(os.environ.get("GRADING_LEARNERS", "[]")))
OWN_TESTS = "GRADING_OWN_TESTS"
"""Set where a learner's file is one of tests: it may use the tools of tests, and must not read the code that it tests."""
TESTING = OWN_TESTS in os.environ
CLOSED = re.compile(r"[/\\]stages[/\\]stage[^/\\]*[/\\]" + ("" if TESTING else r"tests[/\\]"))
REFUSED = re.compile(
    r"gc\.get_(objects|referrers|referents)|sys\.(settrace|setprofile|addaudithook|_current_frames)|os\.fork(pty)?|ctypes\..*"
    r"|code\.__new__|marshal\.loads|exec|compile"
)
"""Events by which code gets at other code while it runs; nobody's engine needs one."""
ATTRIBUTES = {
    "object.__getattr__": {"tb_frame", "gi_frame", "cr_frame", "ag_frame", "__code__", "gi_code", "cr_code", "ag_code"},
    "object.__setattr__": {"__code__", "__defaults__", "__kwdefaults__"},
}
MODULES = (
    "_pytest", "pytest", "pluggy", "hypothesis", "stages.course", "stages.conftest", "atexit", "posix", "ctypes", "_ctypes",
    "unittest",
)  # fmt: skip
"""What no starter imports: the tests' tools, and ways out of the process."""
WALKERS = {"currentframe", "stack", "walk_stack"}
"""Functions of the standard library that hand out the frames of who calls them."""
READERS = re.compile(r"\b(linecache|tokenize|pathlib|codecs|inspect|fileinput|pkgutil)\b")
"""Modules of the standard library that open files in another's name."""
LOADERS = {"get_data", "get_source", "get_code"}
"""Methods of importlib's loaders that do; what imports a module calls them from a method of another name."""
FLAGS: list[str] = []


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


def asker() -> FrameType | None:
    """The frame of who caused an event, or called what calls this."""
    return sys._getframe(0).f_back.f_back


ASKER = asker.__code__


def is_learner(frame: FrameType | None) -> bool:
    """Whether it is a frame of a learner's file; they make no code at run time, as `exec` and `compile` are refused to them."""
    return frame is not None and frame.f_code.co_filename in LEARNERS


def refuse(what: str, verb: str = "used") -> NoReturn:
    """Note what a learner's file tried, and keep it from it."""
    told = f"{what} cannot be {verb} while grading"
    if told not in FLAGS:
        FLAGS.append(told)
    raise PermissionError(told)


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: raises in the place of what it refuses."""
    if event in ATTRIBUTES:
        if args[1] in ATTRIBUTES[event] and is_learner(asker()):
            refuse(args[1])
    elif event == "sys._getframe":
        if args[0].f_code is ASKER:
            return
        frame = asker()
        if frame is not None and frame.f_code.co_name in WALKERS:
            frame = frame.f_back
        if is_learner(frame):
            refuse("sys._getframe")
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not is_local(address[0]):
            raise PermissionError(NO_NETWORK)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if not is_local(args[0]):
            raise PermissionError(NO_NETWORK)
    elif event == "open":
        if isinstance(args[0], str):
            look_at_file(args[0], asker())
    elif REFUSED.fullmatch(event) and is_learner(asker()):
        refuse(event)


def look_at_file(path: str, frame: FrameType | None) -> None:
    """Refuse the reference to all, the system's own view of processes and texts that are none of theirs to learners' files."""
    if HIDDEN and os.path.realpath(path).startswith(HIDDEN):
        raise PermissionError(NO_REFERENCE)
    if path.startswith("/proc/") and is_learner(frame):
        refuse("/proc")
    if CLOSED.search(path):
        while frame is not None and (READERS.search(frame.f_code.co_filename) or frame.f_code.co_name in LOADERS):
            frame = frame.f_back
        if is_learner(frame):
            refuse("the code under test" if TESTING else "the tests", "read")


def refusing(function: Callable[..., Any], told: Callable[..., tuple[str, str] | None]) -> Callable[..., Any]:
    """A function that learners' files may not call if `told` has an answer to its arguments: what, and what it cannot be."""

    def guarded(*args: Any, **more: Any) -> Any:
        what = told(*args, **more)
        if what is not None and is_learner(asker()):
            refuse(*what)
        return function(*args, **more)

    return guarded


def module_refused(name: str, *args: Any, **more: Any) -> tuple[str, str] | None:
    """Whether a module is none of a learner's business."""
    if name.startswith(MODULES) and any(name == each or name.startswith(f"{each}.") for each in MODULES):
        return name, "imported"
    return None


class Finder:
    """Asked before all others where a module is: the reference's are nowhere when a learner's file imports them."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] != "solutions":
            return
        frame = asker()
        while frame is not None and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        if is_learner(frame):
            FLAGS.append(NO_REFERENCE)
            raise ImportError(NO_REFERENCE)


sys.addaudithook(watch)
sys.meta_path.insert(0, Finder)
if LEARNERS:
    if not TESTING:
        builtins.__import__ = refusing(builtins.__import__, module_refused)
        importlib.import_module = refusing(importlib.import_module, module_refused)
    os._exit = refusing(os._exit, lambda code: ("os._exit", "used"))
