"""No test takes a sleep for an event: on a busy machine the event comes later, and a right solution fails.

A test waits for what it needs: an `Event`, a `join` with a time limit, a loop that looks again and again (`until`), turns of
the event loop. Where the time itself is what a test is about, the sleep stands in `ABOUT_TIME` with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for pattern in (
        "tests/**/*.py",
        "solutions/tests/**/*.py",
        "stages/course/fixtures/*.py",
        "stages/*/tests/**/*.py",
        "conftest.py",
    )
    for path in ROOT.glob(pattern)
)

ABOUT_TIME = {
    "stages/stage6_benchmark/tests/test_6_2_load.py:test_a_closed_loop_begins_now": "time is simulated: nobody waits",
    "solutions/tests/fake_engine.py:step": "a step takes time",
    "solutions/tests/test_async_engine.py:test_an_idle_engine_sleeps": "how often it looks for work within a time",
    "solutions/tests/test_lookahead.py:test_a_step_takes_what_the_host_or_the_device_takes": "time is simulated: nobody waits",
    "solutions/tests/test_communication.py:fail_on_one": "a rank that hangs",
    "solutions/tests/test_communication.py:nap": "a process that stays until it is killed",
    "solutions/tests/test_step_control.py:test_a_paused_engine_takes_requests_and_steps_when_told": "within that time nothing "
    "happens",
    "solutions/tests/test_ray_app.py:test_the_service_survives_a_replica": "gives requests time to reach the replica; one that "
    "comes later is answered as well",
    "solutions/tests/test_real_faults.py:leave": "clients that leave after a random time",
    "solutions/tests/test_server_limits.py:test_a_second_request_has_the_same_limit_and_a_pause_between_them_has_none": "the "
    "pause between requests",
    "solutions/tests/test_server_limits.py:test_a_long_wait_is_no_stall": "the wait",
    "solutions/tests/test_shared_memory.py:many_rounds": "ranks that come at different times",
    "solutions/tests/test_shared_memory.py:without_one": "a rank that stays away for longer than the others wait",
    "stages/stage6_benchmark/tests/test_6_2_load.py:send": "seconds of a clock that the test winds",
    "stages/stage6_benchmark/tests/test_6_2_load.py:test_an_open_loop_begins_now": "seconds of a clock that the test winds",
    "tests/test_gate.py:test_the_command_ends_when_all_its_stages_have": "lets a gate that does not wait take the folder away",
    "tests/fuzz/driver.py:_answer": "gives a case that hangs the time to write where; if it does not, the report says less",
    "tests/warm.py:_wait": "looks until a process has ended or its time is over",
    "tests/test_load_benchmarks.py:test_a_closed_loop_keeps_its_number_under_way": "a step takes time",
}
"""File and function that sleep → why."""


def sleeps(source: str) -> Iterator[tuple[str, int]]:
    """Sleeps that nothing ends but time: the outermost function around each, and its line.

    A `while` looks again after each sleep, so it waits for its condition; a sleep of 0 s is a turn of the event loop.
    """

    def visit(node: ast.AST, function: str, polls: bool) -> Iterator[tuple[str, int]]:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                function, polls = function or name, False
            case ast.While(test=condition):
                polls = not isinstance(condition, ast.Constant)
            case ast.For() | ast.AsyncFor():
                polls = False
            case ast.Call(func=ast.Name(id="sleep") | ast.Attribute(attr="sleep"), args=[*args]) if not polls:
                if [getattr(arg, "value", None) for arg in args] != [0]:
                    yield function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, polls)

    return visit(ast.parse(source), "", polls=False)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_sleep_stands_for_an_event(path: Path) -> None:
    name = path.relative_to(ROOT)
    found = [f"{name}:{line}" for function, line in sleeps(path.read_text()) if f"{name}:{function}" not in ABOUT_TIME]
    assert found == [], "wait for the event itself, or say in ABOUT_TIME why time is the subject"


def test_every_reason_is_of_a_sleep_that_is_there() -> None:
    there = {f"{path.relative_to(ROOT)}:{function}" for path in FILES for function, _ in sleeps(path.read_text())}
    assert sorted(ABOUT_TIME.keys() - there) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    time.sleep(0.2)", [2]),
        ("async def f():\n    await asyncio.sleep(0.01)", [2]),
        ("from time import sleep\nsleep(seconds)", [2]),
        ("async def f():\n    await asyncio.sleep(0)", []),
        ("while not done():\n    time.sleep(0.01)", []),
        ("while True:\n    time.sleep(0.01)", [2]),
        ("for _ in range(9):\n    time.sleep(0.01)", [2]),
        ("while not done():\n    for _ in range(3):\n        time.sleep(1)", [3]),
        ("while not done():\n    def f():\n        time.sleep(1)", [3]),
    ],
)
def test_the_check_sees_each_kind(source: str, lines: list[int]) -> None:
    assert [line for _, line in sleeps(source)] == lines
