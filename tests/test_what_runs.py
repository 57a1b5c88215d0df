"""The course teaches what runs: each function that a task asks for is called while the engine and the server do their work.

A program (`tests/counting/serve_all.py`) lets the default model answer in the settings of the stages, as an engine, as a server
and under the benchmarks of stage 6; every process of it notes which of the functions are called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.course.tools.catalog import load_course

ROOT = Path(__file__).parents[1]
COUNTING = ROOT / "tests" / "counting"
CUDA = "attention/paged_attention_kernel.cu:"
SUMS = "parallelism/shared_memory_cpu.cpp:"
STAND_INS = {
    f"{CUDA}attend": "attention/paged_attention_cuda.py:CudaBackend.attend",  # launches it; C++ cannot be noted from Python
    f"{CUDA}sum_over_lanes": "attention/paged_attention_cuda.py:CudaBackend.attend",  # is called by `attend` for each key
    f"{CUDA}merge": "attention/paged_attention_cuda.py:CudaBackend.attend",  # is called by `attend` at its end
    f"{SUMS}meet": "parallelism/shared_memory.py:SharedMemory.call",  # runs all three
    f"{SUMS}exchange_part": "parallelism/shared_memory.py:SharedMemory.call",
    f"{SUMS}add_slots": "parallelism/shared_memory.py:SharedMemory.call",
}
"""Functions whose calls cannot be seen → who calls them."""
TARGETS = [f"{target.file}:{target.name}" for stage in load_course() for task in stage.tasks for target in task.targets]


def called(folder: Path, functions: list[str], *command: str) -> set[str]:
    """Which of `functions` are called while a command of Python runs, in all of its processes."""
    notes = folder / "called"
    notes.touch()
    environment = os.environ | {
        "CALLS_OF": json.dumps(functions), "CALLS_ROOT": str(ROOT / "solutions"), "CALLS_FILE": str(notes),
        "PYTHONPATH": os.pathsep.join([str(COUNTING), str(ROOT)]), "TRITON_INTERPRET": "1",
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return set(notes.read_text().split("\n"))


@pytest.mark.slow
def test_every_function_of_a_task_is_called(tmp_path: Path) -> None:
    functions = sorted({STAND_INS.get(target, target) for target in TARGETS})
    noted = called(tmp_path, functions, str(COUNTING / "serve_all.py"), str(tmp_path))
    assert [target for target in TARGETS if STAND_INS.get(target, target) not in noted] == []


def test_what_stands_in_is_needed() -> None:
    assert set(STAND_INS) <= set(TARGETS)
    assert {target for target in TARGETS if ".py:" not in target} == set(STAND_INS)


@pytest.mark.parametrize("where", ["here", "in a child"])
def test_a_function_that_is_not_called_is_seen(tmp_path: Path, where: str) -> None:
    """Of two functions of a module the one that is called is noted, in whichever process, and the other is not."""
    call = "from solutions.core.config import parse_bytes; parse_bytes('1k')"
    if where == "in a child":
        call = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {call!r}], check=True)"
    functions = ["core/config.py:parse_bytes", "core/config.py:EngineConfig.to_args"]
    assert called(tmp_path, functions, "-c", call) == {"core/config.py:parse_bytes", ""}
