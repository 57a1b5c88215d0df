"""A plugin for pytest in graded processes that sees for itself how each test goes, and tells the grader over a signed channel.

The learner's code runs in this process and may ruin it, so nothing that it prints or writes is believed. What counts is what
this plugin saw: it calls the tests itself, weaves canaries between them, sends what was compared so that the grader compares it
again, and looks after each test whether the tools are still what they were. An order comes as JSON on the standard input,
before any of the learner's code is read, and is nowhere else.

Whoever reaches pytest reaches its plugins too. So this one has no state: its hooks find the `Witness` in the frame that all of
pytest runs in, where `guard` lets no learner's file look, and do not when one stands between.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import sys
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import pytest
from _pytest.main import pytest_cmdline_main as run_pytest

from stages.course.fixtures import checks
from stages.course.grading import seeds
from stages.course.grading.canaries import Canaries
from stages.course.grading.channel import signed_writer
from stages.course.grading.tampering import Kept, load_tools

MOST_COMPARED, LONGEST_VALUE = 200, 2048
"""Comparisons of one test that are sent whole, and bytes of a value; of longer ones a digest is sent."""
PLAIN = (type(None), bool, int, float, str, bytes)


def plain(value: Any) -> Any:
    """A value in types that the grader reads, without asking the value's own class for anything."""
    kind = type(value)
    if any(kind is each for each in PLAIN):
        return value
    for each, exact in ((int, int.__pos__), (float, float.__pos__), (str, str.__str__)):
        if isinstance(value, each):
            return exact(value)
    if isinstance(value, (list, tuple)):
        rows = list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
        return [plain(each) for each in rows]
    if isinstance(value, dict):
        return {repr(plain(key)): plain(each) for key, each in dict.items(value)}
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch and (kind is torch.Tensor or kind is torch.nn.Parameter):
        return plain(value.tolist())
    for library in (numpy.ndarray, numpy.generic) if numpy else ():
        if isinstance(value, library):
            return plain(library.tolist(value))
    return None


def sealed(value: Any) -> bytes:
    """A value to send, or its digest where it is long."""
    text = marshal.dumps(plain(value), 0)  # later versions of the format write what is there twice in another way
    return text if len(text) <= LONGEST_VALUE else hashlib.blake2b(text, digest_size=32).digest()


class Witness:
    """See the module's text.

    Args:
        send: the channel. seed: of the canaries. shuffled: whether tests run in another order than they stand in.
        learners: the learner's files. flags: what the guard refused so far.
    """

    def __init__(
        self, send: Callable[..., None], seed: str, shuffled: bool, learners: frozenset[str], flags: list[str]
    ) -> None:
        self.send, self.learners = send, learners
        self._seed, self._shuffled, self._flags, self._flagged = seed, shuffled, flags, 0
        self.kept, self._canaries = Kept(learners), Canaries(seed)
        self._functions: dict[pytest.Item, Callable[..., object]] = {}
        self._current: pytest.Item | None = None
        self._outcome, self._compared = "", 0

    def collected(self, items: list[pytest.Item]) -> None:
        """Remember the tests, none of which has run, and weave the canaries between them."""
        self.kept.keep_tools()
        modules = dict.fromkeys(item.getparent(pytest.Module) for item in items)
        for module in modules:
            for name in self.kept.borrowed_wrongly(module.obj, module.path.read_text(encoding="utf-8")):
                self.flag(f"it changes {name}")
            self.kept.keep_tests(module.obj)
        items[:] = self._canaries.weave(items, self._shuffled)
        self._functions = {item: item.obj for item in items if isinstance(item, pytest.Function)}
        self.look()

    def begin(self, item: pytest.Item) -> None:
        """A test's turn has come."""
        self.send("begin", item.name)
        self._current, self._outcome, self._compared = item, "", 0
        seeds.begin(self._seed, item.nodeid)

    def call(self, item: pytest.Function) -> None:
        """Call the test: whether it came back is known here."""
        arguments = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
        self._outcome = "failed"
        if item is self._current:
            self._functions[item](**arguments)
            self._outcome = "passed"

    def compared(self, actual: Any, expected: Any, sent: bool) -> None:
        """Two values were found to be the same."""
        self._compared += 1
        if sent and self._compared <= MOST_COMPARED:
            self.send("compared", sealed(actual), sealed(expected))

    def result(self, record: dict[str, Any]) -> None:
        """A record of `stages/conftest.py`: its words are taken, and "passed" only if it was seen here."""
        words = [str(record[key]) for key in ("test", "what", "text")]
        outcome = str(record["outcome"])
        here = self._current is not None and words[0] == self._current.name
        if here and words[0] in self._canaries.words:
            self.send("canary", words[0], self._canaries.words[words[0]], self._outcome, words[2])
        else:
            seen = self._outcome if outcome == "passed" and here else "failed" if outcome == "passed" else outcome
            self.send("result", *words, "failed" if seen == "" else seen, self._compared)

    def look(self) -> None:
        """Tell of what has changed, and of what the guard refused since the last time."""
        for name in self.kept.changed():
            self.flag(f"it changes {name}")
        new, self._flagged = self._flags[self._flagged :], len(self._flags)
        for told in new:
            self.flag(f"it tries what is refused: {told}")

    def flag(self, told: str) -> None:
        self.send("flag", told)


def take_the_order() -> Witness:
    """A witness by the order on the standard input, of which nothing is left there."""
    order = json.loads(sys.stdin.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    seeds.salt(order["seed"])
    guard = sys.modules.get("sitecustomize")
    learners = frozenset(getattr(guard, "LEARNERS", ()))
    send = signed_writer(order["results"], bytes.fromhex(order["key"]))
    return Witness(send, order["seed"], order["shuffled"], learners, getattr(guard, "FLAGS", []))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode:
    """Run all of pytest within this frame, the only place where the witness is."""
    witness = take_the_order()
    checks.check_equal, checks.check_close = seen(checks.check_equal, True), seen(checks.check_close, False)
    code = run_pytest(config)
    witness.send("done")
    return code


MAIN = pytest_cmdline_main.__code__


def the_witness() -> Witness:
    """The one in the frame that all runs in.

    Raises:
        RuntimeError: there is none in this thread, or a learner's file stands between.
    """
    frame: FrameType | None = sys._getframe(1)
    files = set()
    while frame is not None and frame.f_code is not MAIN:
        files.add(frame.f_code.co_filename)
        frame = frame.f_back
    witness: Witness | None = frame.f_locals["witness"] if frame is not None else None
    if witness is None:
        raise RuntimeError("pytest is called beside itself")
    if not witness.learners.isdisjoint(files):
        witness.flag("it calls pytest")
        raise RuntimeError("pytest is called by what it tests")
    return witness


def seen(check: Callable[..., None], sent: bool) -> Callable[..., None]:
    """A check that tells the witness what it compared; code that is tested may call it, through a test's stand-in."""

    def compare(actual: Any, expected: Any, what: str, *more: Any, **others: Any) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not MAIN:
            frame = frame.f_back
        witness: Witness | None = frame.f_locals["witness"] if frame is not None else None
        try:
            check(actual, expected, what, *more, **others)
        except checks.OwnJudgeError:
            if witness is not None:
                witness.flag("a value of it answers what it equals")
            raise
        if witness is not None:
            witness.compared(actual, expected, sent)

    return compare


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> None:
    """Load what a file of tests needs from libraries before it is read, and remember it."""
    if isinstance(collector, pytest.Module):
        load_tools(collector.path.read_text(encoding="utf-8"))
        the_witness().kept.keep_tools()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    the_witness().collected(items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    the_witness().begin(item)
    result = yield
    the_witness().look()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    the_witness().call(pyfuncitem)
    return True


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    the_witness().look()


@pytest.hookimpl(optionalhook=True)
def pytest_course_result(record: dict[str, Any]) -> None:
    the_witness().result(record)
