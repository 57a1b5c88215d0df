"""Becomes `sitecustomize` in graded Python processes: no network but this machine's own, no look at the reference, and no way
for a learner's file to other functions' frames, code and memory.

It refuses with an error that says so, before the namespaces of `isolation` would leave a learner with a puzzling one, and
where there are none. What a learner's file tried stands in `FLAGS`. Code that means harm could get round it, through a program
that is not Python for example; `witness` says how the results are kept from that.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import ipaddress
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, NoReturn

NO_NETWORK = "there is no network while grading, only this machine itself: 127.0.0.1, ::1 and localhost"
NO_REFERENCE = "the reference cannot be used while grading"
HIDDEN = tuple(f"{folder}{os.sep}" for folder in json.loads(os.environ.get("GRADING_HIDDEN", "[]")))
LEARNERS = frozenset(json.loads(os.environ.get("GRADING_LEARNERS", "[]")))
OWN_TESTS = "GRADING_OWN_TESTS"
"""Set where a learner's file is one of tests: it may use the tools of tests, and must not read the code that it tests."""
TESTING = OWN_TESTS in os.environ
CLOSED = re.compile(r"[/\\]stages[/\\]stage[^/\\]*[/\\]" + ("" if TESTING else r"tests[/\\]"))
REFUSED = re.compile(r"os\.fork(pty)?|ctypes\..*|code\.__new__|marshal\.loads|exec|compile")
"""Events by which code gets at other code while it runs; nobody's engine needs one."""
WATCHING = re.compile(
    r"gc\.get_(objects|referrers|referents)|sys\.(settrace|setprofile|addaudithook|_current_(frames|exceptions)|monitoring\..*)"
)
"""Events by which code sees all other code."""
INSIDE = frozenset({"tb_frame", "gi_frame", "cr_frame", "ag_frame", "__code__", "gi_code", "cr_code", "ag_code"})
SETTINGS = frozenset({"__code__", "__defaults__", "__kwdefaults__"})
MODULES = (
    "_pytest", "pytest", "pluggy", "hypothesis", "stages.course", "stages.conftest", "atexit", "posix", "ctypes", "_ctypes",
    "unittest", "_signal", "cffi", "_cffi_backend", "greenlet", "_testcapi", "_testinternalcapi",
)  # fmt: skip
"""What no starter imports: the tests' tools, ways out of the process, into its memory and into other frames."""
WALKERS = frozenset(
    {"currentframe", "stack", "trace", "walk_stack", "walk_tb", "getinnerframes", "getouterframes", "_task_get_stack"}
)
"""Functions of the standard library that hand out the frames of who calls them."""
LIBRARY = os.__file__.removesuffix("os.py")
ERRANDS = re.compile(
    re.escape(LIBRARY) + r"(bdb|cProfile|code|codeop|concurrent|copy|ctypes|doctest|functools|pdb|profile|runpy|threading"
    r"|timeit|trace)\b|<(?!frozen )"
)
"""Modules of the standard library that run what they are given, and code without a file, which somebody made while it ran."""
KNOWN = re.compile(r".*[/\\]site-packages[/\\](_pytest|hypothesis|torch)\b")
"""Libraries that look at all code for reasons of their own, also when a learner's file calls them."""
STARTS = re.compile(r"[/\\](?:sitecustomize\.py|usercustomize\.py|conftest\.py|[^/\\]*\.pth)$")
"""Files that Python or pytest run on their own."""
PROGRAMS = re.compile(r"\.(?:py|pyc|so|pyd|zip|whl|egg)$")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
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


# What decides stands in the defaults of functions and not in the module's names: who reaches these finds nothing to change,
# and to change defaults is refused.


def asker(getframe: Callable[[int], FrameType] = sys._getframe) -> FrameType | None:
    """The frame of who caused an event, or called what calls this."""
    caller = getframe(0).f_back
    return caller and caller.f_back


ASKER = asker.__code__


def is_learner(frame: FrameType | None, learners: frozenset[str] = LEARNERS) -> bool:
    """Whether it is a frame of a learner's file."""
    return frame is not None and frame.f_code.co_filename in learners


def behind(
    frame: FrameType | None, walkers: frozenset[str] = WALKERS, errand: Callable[[str], object] = ERRANDS.match,
    library: str = LIBRARY,
) -> FrameType | None:  # fmt: skip
    """The frame for which a frame does something: its own, or that of whoever sends errand boys. None: a thread runs nothing
    but an errand, which is somebody's."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == "<string>" and frame.f_back is None:  # python -c, as multiprocessing starts its processes
            break
        if not errand(code.co_filename) and not (code.co_name in walkers and code.co_filename.startswith(library)):
            break
        frame = frame.f_back
    return frame


def is_for_learner(
    frame: FrameType | None, behind: Callable[..., FrameType | None] = behind, is_learner: Callable[..., bool] = is_learner,
    learners: frozenset[str] = LEARNERS,
) -> bool:  # fmt: skip
    """Whether a learner's file is behind what a frame does. Where there is no frame, Python itself starts."""
    sender = behind(frame)
    return bool(learners) and frame is not None if sender is None else is_learner(sender)


def looks_around(
    frame: FrameType | None, is_for_learner: Callable[..., bool] = is_for_learner, is_learner: Callable[..., bool] = is_learner,
    known: Callable[[str], object] = KNOWN.match,
) -> bool:  # fmt: skip
    """Whether somebody who wants to see all code is called, from however far, by a learner's file."""
    if is_for_learner(frame):
        return True
    if frame is None or known(frame.f_code.co_filename):
        return False
    while frame is not None and not is_learner(frame):
        frame = frame.f_back
    return frame is not None


def refuse(what: str, verb: str = "used", flags: list[str] = FLAGS) -> NoReturn:
    """Note what a learner's file tried, and keep it from it."""
    told = f"{what} cannot be {verb} while grading"
    if told not in flags:
        flags.append(told)
    raise PermissionError(told)


def look_at_file(
    path: str, flags: int, frame: FrameType | None, is_for_learner: Callable[..., bool] = is_for_learner,
    refuse: Callable[..., NoReturn] = refuse,
    closed: Callable[[str], object] = CLOSED.search, reader: Callable[[str], object] = READERS.search,
    hidden: tuple[str, ...] = HIDDEN,
) -> None:  # fmt: skip
    """Refuse the reference to all; to learners' files the system's own view of processes, texts that are none of theirs, and
    programs of their own making.

    Args:
        flags: how it is opened.
    """
    if hidden and os.path.realpath(path).startswith(hidden):
        raise PermissionError(NO_REFERENCE)
    while frame is not None and (reader(frame.f_code.co_filename) or frame.f_code.co_name in LOADERS):
        frame = frame.f_back
    if not is_for_learner(frame):
        return
    if path.startswith("/proc/"):
        refuse("/proc")
    if STARTS.search(path):
        refuse(path.replace("\\", "/").rpartition("/")[2])
    if flags & WRITING and PROGRAMS.search(path):
        refuse("a program", "written")
    if closed(path):
        refuse("the code under test" if TESTING else "the tests", "read")


def watch(
    event: str, args: tuple[Any, ...], asker: Callable[..., FrameType | None] = asker, own: CodeType = ASKER,
    is_for_learner: Callable[..., bool] = is_for_learner, looks_around: Callable[..., bool] = looks_around,
    refuse: Callable[..., NoReturn] = refuse, look_at_file: Callable[..., None] = look_at_file,
    refused: Callable[[str], object] = REFUSED.fullmatch, watching: Callable[[str], object] = WATCHING.fullmatch,
    inside: frozenset[str] = INSIDE, settings: frozenset[str] = SETTINGS,
) -> None:  # fmt: skip
    """An audit hook: raises in the place of what it refuses."""
    if event == "object.__getattr__":
        if args[1] in inside and is_for_learner(asker()):
            refuse(args[1])
    elif event == "object.__setattr__":
        if args[1] in settings and is_for_learner(asker()):
            refuse(args[1])
    elif event == "sys._getframe":
        if args[0].f_code is not own and is_for_learner(asker()):
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
            look_at_file(args[0], args[2], asker())
    elif event in ("os.rename", "os.link", "os.symlink"):
        look_at_file(os.fsdecode(args[1]), WRITING, asker())
    elif watching(event):
        if looks_around(asker()):
            refuse(event)
    elif refused(event) and is_for_learner(asker()):
        refuse(event)


def refusing(function: Callable[..., Any], told: Callable[..., tuple[str, str] | None]) -> Callable[..., Any]:
    """A function that learners' files may not call if `told` has an answer to its arguments: what, and what it cannot be."""

    def guarded(*args: Any, **more: Any) -> Any:
        what = told(*args, **more)
        if what is not None and is_for_learner(asker()):
            refuse(*what)
        return function(*args, **more)

    return guarded


def module_refused(name: str, *args: Any, **more: Any) -> tuple[str, str] | None:
    """Whether a module is none of a learner's business."""
    if name.startswith(MODULES) and any(name == each or name.startswith(f"{each}.") for each in MODULES):
        return name, "imported"
    return None


def handler_refused(number: int, handler: Any) -> tuple[str, str] | None:
    """Whether a signal is to be handled by a function, which would be handed whatever frame runs then."""
    return ("signal.signal", "used") if callable(handler) else None


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
    signal.signal = refusing(signal.signal, handler_refused)
    for name in ("cast", "memmove", "memset"):  # the system is not told of these
        setattr(ctypes, name, refusing(getattr(ctypes, name), lambda *args: ("ctypes", "used")))
