"""The machine as this process sees it: fake /proc and /sys files stand in for containers of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from solutions.core import worker
from solutions.core.platform.machine import (
    available_cores,
    available_memory,
    cpu_flags,
    cpu_has_bf16,
    may_use_amx,
    pick_threads,
    processor_name,
    total_memory,
)

MIB = 1 << 20


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.fixture
def eight_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(total=8192 * MIB, available=6000 * MIB))


CORES = {
    "no cgroup": ({}, 8),
    "v2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "v2, two cores": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v2, another period": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "30000 10000\n"}, 3),
    "v2, a core and a half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1),
    "v2, a tenth of a core": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
    "v2, more than there are": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
    "v2, the parent is tighter": (
        {
            "proc/self/cgroup": "0::/user.slice/job\n",
            "sys/fs/cgroup/user.slice/job/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
        },
        3,
    ),
    "v2, the host's path in a container": (
        {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2,
    ),
    "v1, two cores and a half": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n3:memory:/docker/0123\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1, no limit": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
}


@pytest.mark.parametrize(("files", "expected"), CORES.values(), ids=CORES.keys())
@pytest.mark.usefixtures("eight_cores")
def test_cores_are_the_affinity_cut_by_the_quota(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_cores(fake(tmp_path, files)) == expected


def test_affinity_counts_where_it_is_tighter_than_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    root = fake(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert available_cores(root) == 2


def test_all_cores_count_on_systems_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert available_cores(tmp_path) == 10


@pytest.mark.usefixtures("eight_cores")
def test_threads_are_the_cores_unless_the_environment_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert pick_threads(tmp_path) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert pick_threads(tmp_path) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert pick_threads(tmp_path) == 3


@pytest.mark.parametrize("text", ["0", "-2", "4,2", "many"])
def test_a_wrong_number_of_threads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match=f"OMP_NUM_THREADS must be a positive number, got '{text}'"):
        pick_threads(tmp_path)


MEMORY = {
    "no cgroup": ({}, 6000, 8192),
    "v2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 6000, 8192),
    "v2, half used": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2000 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{1000 * MIB}\n",
        },
        1000,
        2000,
    ),
    "v2, the used half is file cache": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2000 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{1000 * MIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon {100 * MIB}\ninactive_file {900 * MIB}\n",
        },
        1900,
        2000,
    ),
    "v2, the parent is nearly full": (
        {
            "proc/self/cgroup": "0::/pod/main\n",
            "sys/fs/cgroup/pod/main/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": f"{4000 * MIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3990 * MIB}\n",
        },
        10,
        4000,
    ),
    "v2, over its limit": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{2000 * MIB}\n",
            "sys/fs/cgroup/memory.current": f"{2001 * MIB}\n",
        },
        0,
        2000,
    ),
    "v1": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/job\n3:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{3000 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{500 * MIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file {1 * MIB}\ntotal_inactive_file {200 * MIB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
        2700,
        3000,
    ),
}


@pytest.mark.parametrize(("files", "available", "total"), MEMORY.values(), ids=MEMORY.keys())
@pytest.mark.usefixtures("eight_gib")
def test_memory_is_the_machines_cut_by_the_cgroup(tmp_path: Path, files: dict[str, str], available: int, total: int) -> None:
    root = fake(tmp_path, files)
    assert available_memory(root) == available * MIB
    assert total_memory(root) == total * MIB


@pytest.mark.parametrize(
    ("cpuinfo", "bf16"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_tile amx_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\nbugs\t\t: bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_bf16_is_read_from_the_flags(tmp_path: Path, cpuinfo: str, bf16: bool) -> None:
    root = fake(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert cpu_has_bf16(root) is bf16


@pytest.mark.parametrize(
    ("flags", "cpu_kernels", "dtype"),
    [
        ({"avx2"}, True, torch.bfloat16),
        ({"avx2"}, False, torch.float32),
        ({"sse4_2"}, True, torch.float32),
        ({"avx2", "avx512_bf16"}, False, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_or_the_kernels_are_fast_in_it(
    flags: set[str], cpu_kernels: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(worker, "cpu_has_bf16", lambda: "avx512_bf16" in flags)
    assert worker.pick_dtype("auto", torch.device("cpu"), "bfloat16", cpu_kernels) is dtype
    assert worker.pick_dtype("float32", torch.device("cpu"), "bfloat16", cpu_kernels) is torch.float32


@pytest.mark.parametrize("flags", ["", "avx512_bf16", "amx_tile amx_bf16"])
def test_amx_is_not_asked_for_where_a_part_of_it_is_missing(tmp_path: Path, flags: str) -> None:
    assert not may_use_amx(fake(tmp_path, {"proc/cpuinfo": f"flags\t\t: fpu {flags}\n"}))


def test_no_cpuinfo_means_no_known_flags(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path) == frozenset()


def test_the_processor_is_called_what_its_maker_calls_it(tmp_path: Path) -> None:
    root = fake(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Grand Processor 9 @ 3 GHz\n"})
    assert processor_name(root) == "Grand Processor 9 @ 3 GHz"


def test_this_machine_answers_within_reason() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert 0 < available_memory() <= total_memory() <= psutil.virtual_memory().total


def test_a_settled_heap_is_left_alone_and_later_collections_are_rare() -> None:
    program = (
        "import gc; from solutions.core.platform.machine import settle_heap; cycle = []; cycle.append(cycle); del cycle\n"
        "settle_heap(); print(gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 500, gc.get_threshold()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )  # it is for a whole process
    assert run.stdout.split() == ["True", "True", "20000"]
