"""Tasks whose code is no Python, and what this machine cannot run: markers, compilers' errors, crashes, skipped tasks."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from solutions.core.platform import native
from stages.course.fixtures.kernels import KernelError, contained
from tests.classroom import Classroom
from tests.test_course import course
from tests.warm import Warm

KERNELS = "attention/paged_attention_kernel.cu"
needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler here")


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    server = Warm()
    yield server
    server.close()


@pytest.fixture
def room(tmp_path: Path, warm: Warm) -> Classroom:
    return Classroom(tmp_path / "clone", warm=warm)


def line_of(room: Classroom, text: str) -> int:
    return room.read(room.path(4, KERNELS)).splitlines().index(text) + 1


@pytest.mark.slow
def test_a_hint_points_at_the_marked_part(room: Classroom) -> None:
    line = line_of(room, "    // TASK 4.8 begin: sum_over_lanes")
    assert f"{KERNELS}:{line}  sum_over_lanes, merge, attend" in course(room, "hint", "--task", "4.8", COLUMNS="200").output


@pytest.mark.slow
@needs_compiler
def test_a_compilers_error_names_the_learners_line(room: Classroom) -> None:
    room.solve(4)
    path = room.path(4, KERNELS)
    room.edit(path, "    Sum all{LOWEST, 0, 0};\n", "    Sum all{LOWEST, 0, nobody};\n")
    ended = course(room, "test", "--stage", "4", "--task", "4.8", COLUMNS="250")
    assert ended.code == 1
    line = line_of(room, "    Sum all{LOWEST, 0, nobody};")
    assert f"{path}:{line}:" in ended.output.replace("\n", "")
    assert "nobody" in ended.output
    assert "Traceback" not in ended.output


@pytest.mark.slow
def test_resetting_a_marked_part_keeps_the_rest_and_a_copy(room: Classroom) -> None:
    room.solve(4)
    path = room.path(4, KERNELS)
    room.edit(path, "// Merges rows that lie", "// My own words.\n// Merges rows that lie")
    mine = room.read(path)
    assert course(room, "reset", "--task", "4.8", "--yes").code == 0
    text = room.read(path)
    assert text.count('#error "Stage 4 · Task 4.8: ') == 3
    assert "My own words." in text
    assert "Sum all{LOWEST" not in text
    (copy,) = (room.folder / ".course" / "backup").rglob("*.cu")
    assert copy.read_text() == mine


@pytest.mark.slow
def test_the_reference_of_a_marked_part_is_shown(room: Classroom) -> None:
    room.solve(4)
    room.edit(room.path(4, KERNELS), "x += __shfl_xor_sync(0xffffffff, x, distance)", "x += __shfl_xor_sync(~0u, x, distance)")
    shown = course(room, "diff", "--task", "4.8", "--force", COLUMNS="250")
    assert shown.code == 0
    assert "~0u" in shown.output
    assert "0xffffffff" in shown.output
    assert "merge is the same as the reference" in shown.output


@pytest.mark.slow
def test_markers_that_are_gone_are_named(room: Classroom) -> None:
    room.edit(room.path(4, KERNELS), "    // TASK 4.8 begin: merge\n", "")
    output = course(room, "test", "--stage", "4", "--task", "4.8", COLUMNS="200").output
    assert "the markers of merge are gone; make reset-stage-4 brings them back" in output
    assert "the markers of merge are gone" not in course(room, "test", "--stage", "4", "--task", "4.1", COLUMNS="200").output


@pytest.mark.slow
def test_what_cannot_run_here_is_skipped_with_its_reason(room: Classroom) -> None:
    room.solve(1, ["1.1"])
    for name, reason in (("1_3_copy_on_write", "there is no such card"), ("1_4_watermark_and_swap", "nor this one")):
        path = f"stages/stage1_block_management/tests/test_{name}.py"
        room.write(path, f"import pytest\n\npytest.skip({reason!r}, allow_module_level=True)\n")
    ended = course(room, "test", "--stage", "1", "--task", "1.3", COLUMNS="200")
    assert ended.code == 0
    assert "– skipped │ 1.3" in ended.output
    assert "Task 1.3 cannot be tested on this machine: there is no such card" in ended.output
    assert "All 0 tasks that can be tested here pass." in ended.output
    whole = course(room, "test", "--stage", "1", COLUMNS="200")
    assert whole.code == 1
    assert "10/100" in whole.output  # nothing is given for what nobody saw pass
    assert "next: task 1.2" in whole.output


def test_a_kernel_is_computed_in_a_process_of_its_own() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert contained(lambda: x * 2, 2, 3).tolist() == [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]

    def wrapped() -> torch.Tensor:
        try:
            raise NotImplementedError("Stage 4 · Task 4.6: w4a16_kernel, see the guide")
        except NotImplementedError as error:
            raise RuntimeError("the interpreter's own words") from error

    with pytest.raises(KernelError, match=r"^NotImplementedError: Stage 4 · Task 4\.6: w4a16_kernel"):
        contained(wrapped, 1)


def test_a_kernel_that_ends_its_process_ends_no_other() -> None:
    with pytest.raises(KernelError, match=r"the kernel ended its process \(Segmentation fault\)\nit read or wrote where"):
        contained(lambda: ctypes.string_at(0), 1)
    with pytest.raises(KernelError, match=r"Aborted"):
        contained(lambda: ctypes.CDLL(None).abort(), 1)
