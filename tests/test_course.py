"""The course as a learner meets it: what its commands print and do, on starters, on good work and on broken work."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from solutions.tests.slow_cases import slow_after
from stages import conftest
from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.ranks import failure_of_a_rank
from stages.course.tools.catalog import STAGES_FOLDER, load_course
from tests.classroom import Classroom
from tests.warm import Ended, Warm

ALLOCATOR = "memory/block_allocator.py"
FIRST_STAGE = [task.id for task in load_course()[0].tasks]


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def room(tmp_path: Path, warm: Warm) -> Classroom:
    return Classroom(tmp_path / "clone", warm=warm)


def course(room: Classroom, *arguments: str, **environment: str) -> Ended:
    return room.command("stages.course", *arguments, **environment)


def table(ended: Ended) -> dict[str, str]:
    """Task → state, as the printed table says it."""
    return {task: state for state, task in re.findall(r"│ [✓✗☐] (passed|failed|to do) +│ (\d\.\d) ", ended.output)}


# The overlay


def whose(room: Classroom, stages: str | None) -> list[str]:
    """Where two modules of `stages` come from."""
    room.write(
        "look.py", "import stages.core.scheduler as a, stages.memory.block_allocator as b\nprint(a.__file__, b.__file__)\n"
    )
    ended = room.command("look", stages=stages)
    return [str(Path(path).relative_to(room.folder)).split("/")[-3] for path in ended.output.split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("1", ["solutions", "stage1_block_management"]),
        ("2", ["stage2_scheduler", "solutions"]),
        ("2,1", ["stage2_scheduler", "stage1_block_management"]),
        ("", ["solutions", "solutions"]),
        (None, ["stage2_scheduler", "stage1_block_management"]),
    ],
)
def test_the_chosen_stages_lie_over_the_reference(room: Classroom, stages: str | None, expected: list[str]) -> None:
    assert whose(room, stages) == expected


@pytest.mark.parametrize("stages", slow_after(1, ["1,x", "9", "one", "-1", "1.2"]))
def test_a_stage_that_is_not_there_is_named(room: Classroom, stages: str) -> None:
    room.write("look.py", "import stages\n")
    ended = room.command("look", stages=stages)
    assert ended.code == 1
    assert f"STAGES={stages}: there is no stage" in ended.output
    assert "Traceback" not in ended.output


# The page after a run


def test_fresh_starters_have_everything_to_do_and_say_where_to_begin(room: Classroom) -> None:
    ended = course(room, "test", "--stage", "1")
    assert ended.code == 1
    assert table(ended) == dict.fromkeys(FIRST_STAGE, "to do")
    text = room.read(room.path(1, ALLOCATOR)).splitlines()
    line = next(number for number, content in enumerate(text, 1) if "def allocate" in content)
    assert f"stages/stage1_block_management/{ALLOCATOR}:{line}" in ended.output
    for word in ("next: task 1.1", "OrderedDict", "make hint TASK=1.1 LEVEL=2", "stage1_block_management/GUIDE.md#task-1-1"):
        assert word in ended.output
    assert "Traceback" not in ended.output


def test_a_finished_task_is_green_and_the_next_one_is_named(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    ended = course(room, "test", "--stage", "1")
    assert ended.code == 1
    assert table(ended) == dict.fromkeys(FIRST_STAGE, "to do") | {"1.1": "passed"}
    assert "next: task 1.2" in ended.output
    one = course(room, "test", "--stage", "1", "--task", "1.1")
    assert one.code == 0
    assert table(one) == {"1.1": "passed"}
    assert "10/10" in one.output


def test_a_failed_test_says_what_it_checks_and_why_and_shows_the_difference(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    room.edit(room.path(1, ALLOCATOR), "popitem(last=False)", "popitem(last=True)")
    ended = course(room, "test", "--stage", "1", "--task", "1.1")
    assert ended.code == 1
    assert table(ended) == {"1.1": "failed"}
    for word in ("checks ", "why ", "expected", "yours", "test_1_1_block_allocator.py:"):
        assert word in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_the_reference_can_be_tested_in_the_learners_place(room: Classroom) -> None:
    ended = course(room, "test", "--stage", "1", "--task", "1.1", "--impl", "solutions")
    assert ended.code == 0
    assert "the reference" in ended.output


@pytest.mark.slow
def test_stages_can_stand_on_each_other(room: Classroom) -> None:
    room.solve(2)
    alone = course(room, "test", "--stage", "2", "--task", "2.3")
    both = course(room, "test", "--stage", "2", "--task", "2.3", "--with", "1,2")
    assert (alone.code, both.code) == (0, 1)
    assert "Task 1." in both.output or "task 1." in both.output  # it needs stage 1, which is empty


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test", "--stage", "7"), "there is no stage 7"),
        (("test", "--stage", "1", "--task", "9.9"), "there is no task '9.9'"),
        (("test", "--stage", "1", "--task", "2.1"), "make test-stage-2 TASK=2.1"),
        (("test", "--stage", "1", "--impl", "mine"), "IMPL=mine"),
        (("test", "--stage", "1", "--with", "8"), "WITH=8: there is no stage"),
        (("hint",), "say which task"),
        (("hint", "--task", "1.1", "--level", "4"), "level 1 to 3"),
        (("reset",), "say what to reset"),
        (("reset", "--task", "1.1"), "YES=1"),
    ],
)
def test_a_wrong_request_gets_one_clear_line(room: Classroom, arguments: tuple[str, ...], message: str) -> None:
    ended = course(room, *arguments)
    assert ended.code == 1
    assert message in ended.output
    assert len(ended.output.strip().splitlines()) == 1


# Broken work


@pytest.mark.slow
def test_a_syntax_error_is_shown_with_its_line(room: Classroom) -> None:
    path = room.path(1, ALLOCATOR)
    room.solve(1, ["1.1"])
    room.edit(path, "def share(self, block: int) -> None:", "def share(self, block: int) -> None")
    line = next(number for number, text in enumerate(room.read(path).splitlines(), 1) if "def share" in text)
    ended = course(room, "test", "--stage", "1", "--task", "1.1")
    assert ended.code == 1
    assert f"{ALLOCATOR}, line {line}" in ended.output
    assert "expected ':'" in ended.output
    assert "mend this first" in ended.output
    assert "Traceback" not in ended.output
    plain = room.run(None, ["stages/stage1_block_management/tests/test_1_1_block_allocator.py"])
    assert f"{ALLOCATOR}, line {line}" in plain.ended.output
    assert "Traceback" not in plain.ended.output


def test_a_file_that_imports_the_reference_is_reported(room: Classroom) -> None:
    path = room.path(1, ALLOCATOR)
    room.write(path, room.read(path) + "\nfrom solutions.memory.block_allocator import BlockAllocator\n")
    ended = course(room, "test", "--stage", "1", "--task", "1.1")
    assert "imports `solutions`" in ended.output


@pytest.mark.slow
def test_a_changed_signature_is_shown_beside_the_expected_one(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    room.edit(
        room.path(1, ALLOCATOR), "def free(self, block: int, reuse_first: bool = False)", "def free(self, block, first=False)"
    )
    ended = course(room, "test", "--stage", "1", "--task", "1.1")
    assert ended.code == 1
    assert "def free(self, block, reuse_first=False)" in ended.output
    assert "def free(self, block, first=False)" in ended.output


@pytest.mark.slow
def test_a_function_or_file_that_is_gone_is_named(room: Classroom) -> None:
    path = room.path(1, ALLOCATOR)
    room.edit(path, "def share(", "def shares(")
    assert "BlockAllocator.share is gone" in course(room, "test", "--stage", "1", "--task", "1.1").output
    (room.folder / path).unlink()
    assert (
        "the file is gone; make reset TASK=1.1 brings it back" in course(room, "test", "--stage", "1", "--task", "1.1").output
    )


def test_an_endless_loop_is_stopped_and_called_one(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    room.edit(
        room.path(1, ALLOCATOR),
        "        self.ref_counts[block] -= 1",
        "        while True:\n            self.ref_counts[block] += 0",
    )
    tests = ["stages/stage1_block_management/tests/test_1_1_block_allocator.py"]
    room.edit("stages/conftest.py", "TIME_LIMIT = 30", "TIME_LIMIT = 1")
    results = room.run("1", tests, "-x", limit=60)
    assert "endless loop" in results.failed[0].text
    assert "block_allocator.py:" in results.failed[0].text


@pytest.mark.slow
def test_an_endless_loop_that_hypothesis_runs_is_stopped_too(room: Classroom) -> None:
    path = "stages/stage1_block_management/tests/test_1_1_block_allocator.py"
    room.write(
        path,
        """
from hypothesis import given, strategies as st

from stages.memory.block_allocator import BlockAllocator


@given(st.integers(1, 5))
def test_of_any_size(size):
    while True:
        size += len(str(BlockAllocator(size)))
""",
    )
    room.edit("stages/conftest.py", "TIME_LIMIT = 30", "TIME_LIMIT = 1")
    results = room.run("1", [path], limit=60)
    assert not results.ended.timed_out
    assert "endless loop" in results.failed[0].text


def test_a_plain_pytest_takes_the_stage_whose_tests_it_is_given(room: Classroom) -> None:
    room.solve(2, ["2.1"])
    results = room.run(None, ["stages/stage2_scheduler/tests/test_2_1_sequence.py"])
    assert results.passed("2.1")
    assert {test.task for test in results.tests} == {"2.1"}


# Help


@pytest.mark.parametrize(("share", "turns"), [(0.0, 1), (1.0, 1), (0.5, 2), (0.1, conftest.TURNS)])
def test_a_busy_machine_makes_no_test_fail(share: float, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits, or has computed for all of the limit, is out of time at once; who got less of the processor has more turns."""
    limit, clock = 0.02, itertools.count()
    monkeypatch.setattr(conftest.time, "process_time", lambda: next(clock) * share * limit)
    before = signal.getsignal(signal.SIGALRM)

    def wait() -> None:
        conftest.pytest_timeout_set_timer(SimpleNamespace(), SimpleNamespace(timeout=limit))
        while True:
            signal.pause()

    try:
        with pytest.raises(conftest.TimeLimitReached):
            wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert next(clock) == turns + 1  # the clock was read at the start and at the end of each turn


def test_hints_come_one_level_at_a_time(room: Classroom) -> None:
    first, third = course(room, "hint", "--task", "1.1"), course(room, "hint", "--task", "1.1", "--level", "3")
    assert first.code == third.code == 0
    assert "hint 1" in first.output
    assert "hint 2" not in first.output
    assert all(f"hint {level}" in third.output for level in (1, 2, 3))


@pytest.mark.slow
def test_the_reference_is_shown_once_the_task_passes(room: Classroom) -> None:
    refused = course(room, "diff", "--task", "1.1")
    assert refused.code == 1
    assert "does not pass yet" in refused.output
    assert "popitem" not in refused.output
    assert "popitem" in course(room, "diff", "--task", "1.1", "--force").output
    room.solve(1, ["1.1"])
    room.edit(room.path(1, ALLOCATOR), "self.ref_counts[block] += 1", "self.ref_counts[block] = self.ref_counts[block] + 1")
    shown = course(room, "diff", "--task", "1.1", COLUMNS="200")
    assert shown.code == 0
    assert "self.ref_counts[block] + 1" in shown.output
    assert "+= 1" in shown.output
    assert "BlockAllocator.free is the same as the reference" in shown.output


def test_resetting_a_task_keeps_the_others_and_a_copy(room: Classroom) -> None:
    path = room.path(1, "attention/block_manager.py")
    room.solve(1, ["1.2", "1.3"])
    room.edit(path, "            copies.append(", "            # my own words\n            copies.append(")
    mine = room.read(path)
    ended = course(room, "reset", "--task", "1.3", "--yes")
    assert ended.code == 0
    text = room.read(path)
    assert "Task 1.3: BlockManager.fork" in text
    assert "Task 1.2" not in text
    assert "my own words" in text
    (copy,) = (room.folder / ".course" / "backup").rglob("block_manager.py")
    assert copy.read_text() == mine


def test_resetting_a_stage_gives_fresh_starters_and_keeps_a_copy(room: Classroom) -> None:
    fresh = {file: room.read(room.path(1, file)) for file in room.course[0].files}
    room.solve(1)
    mine = room.read(room.path(1, ALLOCATOR))
    assert course(room, "reset", "--stage", "1", "--yes").code == 0
    assert {file: room.read(room.path(1, file)) for file in room.course[0].files} == fresh
    (copy,) = (room.folder / ".course" / "backup").rglob("block_allocator.py")
    assert copy.read_text() == mine


def test_starters_are_made_again_only_where_nobody_has_written(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    mine = room.read(room.path(1, ALLOCATOR))
    (room.folder / room.path(1, "memory/cache_engine.py")).unlink()
    ended = room.command("stages.make_starters", "--stage", "1")
    assert f"kept  stages/stage1_block_management/{ALLOCATOR}" in ended.output
    assert room.read(room.path(1, ALLOCATOR)) == mine
    assert "Task 1.5" in room.read(room.path(1, "memory/cache_engine.py"))
    assert room.command("stages.make_starters", "--stage", "1", "--check").code == 1
    assert room.command("stages.make_starters", "--stage", "1", "--force").code == 0
    assert room.command("stages.make_starters", "--stage", "1", "--check").code == 0


@pytest.mark.slow
def test_progress_counts_points_and_names_the_next_file(room: Classroom) -> None:
    whole = room.read("stages/course.toml")
    room.write("stages/course.toml", whole[: whole.index("[[stage]]\nnumber = 2")])  # the other stages' tests take their time
    room.solve(1, ["1.1"])
    first = course(room, "progress")
    assert first.code == 0
    assert "10/100" in first.output
    assert "next: task 1.2" in first.output
    assert "stages/stage1_block_management/attention/block_manager.py:" in first.output
    # What was found out is kept while the files stay as they are, and found out again when one changes.
    kept = room.read(".course/results.json")
    assert course(room, "progress").output.strip() == first.output.strip()
    assert room.read(".course/results.json") == kept
    room.solve(1, ["1.1", "1.2"])
    assert "30/100" in course(room, "progress").output


# The real model


def test_the_model_does_not_answer_through_an_unfinished_stage(room: Classroom) -> None:
    room.solve(1, ["1.1", "1.2"])
    ended = course(room, "run-mine", STAGES="1")
    assert ended.code == 1
    assert "task 1.3" in ended.output
    assert "is not done yet" in ended.output
    assert "Traceback" not in ended.output


OFFLINE = {"quantization/gptq.py", "quantization/awq.py"}
"""Files that no answer needs, as those of the server; and of kernels, this machine's alone."""


@pytest.mark.slow
@pytest.mark.parametrize("stages", ["1", "2", "3", "4", "1,2,3,4,5,6"])
def test_the_model_answers_through_the_learners_stages(room: Classroom, stages: str) -> None:
    numbers = [int(number) for number in stages.split(",")]
    for number in numbers:
        room.solve(number)
    ended = course(room, "run-mine", STAGES=stages)
    assert ended.code == 0, ended.output
    assert "Paris" in ended.output
    for stage in room.course:
        for file in stage.files:
            row = f"yours, stage {stage.number}" if stage.number in numbers else "the reference"
            if file in OFFLINE or file.startswith(("serving/", "benchmarks/")) or file.endswith((".cu", "triton.py")):
                if stage.number not in numbers:
                    continue
                row = "yours, not needed for this answer"
            folder = f"stages/{stage.folder}" if stage.number in numbers else "solutions"
            assert re.search(rf"{folder}/{re.escape(file)} +│ {row} ", ended.output)
    assert re.search(r"Contiguous caching would reserve .* [\d.]+ times that", ended.output)


@pytest.mark.slow
def test_other_ranks_run_the_learners_files_too(room: Classroom) -> None:
    room.solve(3)
    forward = "        hidden = self.forward(step)\n"
    room.edit(room.path(3, "core/worker.py"), forward, forward.replace("step)", "step / 0)"))
    ended = course(room, "run-mine", STAGES="3")
    assert ended.code == 1
    assert "stages/stage3_parallelism/core/worker.py" in ended.output
    assert "in execute_without_sampling" in ended.output
    assert "the worker of rank 1 has ended, with exit code 1" in ended.output


@pytest.mark.slow
def test_an_error_in_the_learners_code_stops_the_model_with_a_pointer(room: Classroom) -> None:
    room.solve(1)
    room.edit(room.path(1, ALLOCATOR), "self.ref_counts[block] = 1", "self.ref_counts[block] = 1 / 0")
    ended = course(room, "run-mine", STAGES="1")
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.output
    assert "block_allocator.py:" in ended.output
    assert "Traceback" not in ended.output


# The comparisons that the stages' tests use


def test_check_equal_takes_no_answer_that_judges_itself() -> None:
    text = "class Yes(float):\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
    space: dict[str, type] = {}
    exec(compile(text, str(STAGES_FOLDER / "stage6_benchmark" / "benchmarks" / "latency.py"), "exec"), space)
    for answer in (space["Yes"](1), [space["Yes"](1)], {"ttft": space["Yes"](1)}):
        expected = [2.0] if isinstance(answer, list) else {"ttft": 2.0} if isinstance(answer, dict) else 2.0
        with pytest.raises(AssertionError, match="Yes, that answers what it equals by __eq__"):
            check_equal(answer, expected, "value")


def test_check_equal_shows_the_first_differing_entries() -> None:
    check_equal([1, 2], [1, 2], "row")
    with pytest.raises(AssertionError, match=r"(?s)row: 2 of 4 entries differ.*1 +7 +2\n.*3 +9 +4"):
        check_equal([1, 2, 3, 4], [1, 7, 3, 9], "row")
    with pytest.raises(AssertionError, match="row: 2 entries expected, yours has 1"):
        check_equal([1], [1, 2], "row")
    with pytest.raises(AssertionError, match=r"(?s)count:.*expected 3.*yours +4"):
        check_equal(4, 3, "count")
    with pytest.raises(AssertionError, match="flag"):
        check_equal(1, True, "flag")
    with pytest.raises(AssertionError, match="nothing"):
        check_equal({1: 2}, {1: 2, 3: 4}, "map")


def test_check_close_takes_rounding_and_no_nan() -> None:
    import torch

    check_close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7]), "sum")
    with pytest.raises(AssertionError, match=r"(?s)sum: 1 of 2 entries differ.*\[1\]"):
        check_close(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "sum")
    with pytest.raises(AssertionError, match="shape"):
        check_close(torch.zeros(2), torch.zeros(3), "sum")


def test_the_failure_of_a_rank_reads_as_if_it_had_failed_here() -> None:
    text = "rank 0 failed:\nTraceback\nNotImplementedError: Stage 3 · Task 3.2: ring_all_reduce, see ...\n"
    with pytest.raises(NotImplementedError, match=r"^Stage 3 · Task 3.2: ring_all_reduce"):
        raise failure_of_a_rank(text)
    file = STAGES_FOLDER / "stage3_parallelism/parallelism/communication.py"
    text = f'rank 1 failed:\nTraceback\n  File "{file}", line 7, in ring_all_reduce\n    x\nIndexError: planted\n'
    expected = (
        "rank 1 failed:\nIndexError: planted\nyour code stages/stage3_parallelism/parallelism/communication.py:7, in ring_"
    )
    assert str(failure_of_a_rank(text)).startswith(expected)
    assert str(failure_of_a_rank("rank 1 died with exit code 7")) == "rank 1 died with exit code 7"
