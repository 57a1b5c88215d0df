"""A plugin for pytest in graded processes that sees for itself how each test goes, and tells the grader over a signed channel.

The learner's code runs in this process and may ruin it, so nothing that it prints or writes is believed. What counts is what
this plugin saw: it calls the tests itself, weaves canaries between them, sends what was compared so that the grader compares it
again, and looks after each test whether the tools are still what they were. An order comes as JSON on the standard input,
before any of the learner's code is read, and is nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

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
    if type(value) in PLAIN:
        return value
    for kind, exact in ((int, int.__pos__), (float, float.__pos__), (str, str.__str__)):
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, (list, tuple)):
        rows = list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value)
        return [plain(each) for each in rows]
    if isinstance(value, dict):
        return {repr(plain(key)): plain(each) for key, each in dict.items(value)}
    if type(value).__module__.split(".")[0] in ("torch", "numpy") and hasattr(value, "tolist"):
        return plain(value.tolist())
    return None


def sealed(value: Any) -> bytes:
    """A value to send, or its digest where it is long."""
    text = marshal.dumps(plain(value), 0)  # later versions of the format write what is there twice in another way
    return text if len(text) <= LONGEST_VALUE else hashlib.blake2b(text, digest_size=32).digest()


class Witness:
    """See the module's text.

    Args:
        send: the channel. seed: of the canaries. learners: the learner's files. flags: what the guard refused so far.
    """

    def __init__(self, send: Callable[..., None], seed: str, learners: frozenset[str], flags: list[str]) -> None:
        self._send, self._seed, self._flags = send, seed, flags
        self._kept, self._canaries, self._flagged = Kept(learners), Canaries(seed), 0
        self._changed, self._outcome, self._compared = self._kept.changed, "", 0
        checks.check_equal, checks.check_close = self._seen(checks.check_equal, True), self._seen(checks.check_close, False)

    def _seen(self, check: Callable[..., None], sent: bool) -> Callable[..., None]:
        """A check that tells the grader what it compared."""

        def compare(actual: Any, expected: Any, what: str, *more: Any, **others: Any) -> None:
            try:
                check(actual, expected, what, *more, **others)
            except checks.OwnJudgeError:
                self._flag("a value of it answers what it equals")
                raise
            self._compared += 1
            if sent and self._compared <= MOST_COMPARED:
                self._send("compared", sealed(actual), sealed(expected))

        return compare

    @pytest.hookimpl(tryfirst=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> None:
        """Load what a file of tests needs from libraries before it is read, and remember it."""
        if isinstance(collector, pytest.Module):
            load_tools(collector.path.read_text(encoding="utf-8"))
            self._kept.keep_tools()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self._kept.keep_tools()
        modules = dict.fromkeys(item.getparent(pytest.Module) for item in items)
        for module in modules:
            for name in self._kept.borrowed_wrongly(module.obj, module.path.read_text(encoding="utf-8")):
                self._flag(f"it changes {name}")
            self._kept.keep_tests(module.obj)
        items[:] = self._canaries.weave(items)
        self._look()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._send("begin", item.name)
        self._outcome, self._compared = "", 0
        seeds.begin(self._seed, item.nodeid)
        result = yield
        self._look()
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        """Call the test: whether it came back is known here."""
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        self._outcome = "failed"
        pyfuncitem.obj(**arguments)
        self._outcome = "passed"
        return True

    def pytest_course_result(self, record: dict[str, Any]) -> None:
        """A record of `stages/conftest.py`: its words are taken, and "passed" only if it was seen here."""
        words = [str(record[key]) for key in ("test", "what", "text")]
        outcome = str(record["outcome"])
        if record["test"] in self._canaries.words:
            self._send("canary", words[0], self._canaries.words[words[0]], self._outcome, words[2])
        else:
            seen = self._outcome if outcome == "passed" else outcome
            self._send("result", *words, "failed" if seen == "" else seen, self._compared)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self._look()
        self._send("done")

    def _look(self) -> None:
        """Tell of what has changed, and of what the guard refused since the last time."""
        for name in self._changed():
            self._flag(f"it changes {name}")
        new, self._flagged = self._flags[self._flagged :], len(self._flags)
        for told in new:
            self._flag(f"it tries what is refused: {told}")

    def _flag(self, told: str) -> None:
        self._send("flag", told)


def take_the_order() -> Witness:
    """The plugin, by the order on the standard input, of which nothing is left there."""
    order = json.loads(sys.stdin.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    seeds.salt(order["seed"])
    guard = sys.modules.get("sitecustomize")
    learners = frozenset(getattr(guard, "LEARNERS", ()))
    send = signed_writer(order["results"], bytes.fromhex(order["key"]))
    return Witness(send, order["seed"], learners, getattr(guard, "FLAGS", []))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(take_the_order())
