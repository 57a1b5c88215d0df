"""What this process may use of the machine: cores, memory, and the instructions that decide which dtype is fast.

A container usually sees every core and all the memory of its host; what it may use stands in the affinity mask and in
the control group (cgroup) files. Who ignores them starts 64 threads on two cores, or is killed for the memory it takes.
Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max, memory.max) and cgroup-v1/memory.html.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path("/")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in /proc/cpuinfo of instructions that multiply bfloat16: x86 AVX-512 and AMX, Arm.

Apple's processors call theirs FEAT_BF16; it is not here, because nobody has shown that PyTorch gains by it on macOS.
"""

AMX_FLAGS = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
"""Names of the instructions that multiply whole tiles of bfloat16 or int8: Intel's Advanced Matrix Extensions."""


def available_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: the affinity mask, cut by the cgroup's CPU quota; at least 1.

    A quota of 1.5 cores counts as one. Threads of a matrix product wait for each other, so a second thread that is
    throttled half of the time would slow the first one down.

    Args:
        root: where /proc and /sys lie; tests put their own there.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _cgroup_folders(root, "cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, int(min([affinity, *quotas])))


def pick_threads(root: Path = ROOT, ranks: int = 1) -> int:
    """Threads for the model on a CPU: what OMP_NUM_THREADS says, else every core that this process may use, divided by the
    number of ranks that do.

    Raises:
        ValueError: OMP_NUM_THREADS is not a positive number.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text:
        return max(1, available_cores(root) // ranks)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"OMP_NUM_THREADS must be a positive number, got {text!r}; set it to one or unset it")
    return int(text)


def settle_heap() -> None:
    """Make Python's garbage collector cheap in a process that lives to serve; called once, when all is loaded.

    Every step makes thousands of small objects that die by themselves. Python's default looks for dead cycles after each
    700 of them, and from time to time through the 200,000 objects of the libraries: at 1,024 running sequences that
    doubled what a step costs the host. What exists now is left alone from here on, dead cycles among it included, so this
    is for programs and not for a library's constructor.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def cache_root() -> Path:
    """Where converted models and built kernels lie: ``$BYOV_CACHE``, or ``byov`` in the user's cache folder."""
    if "BYOV_CACHE" in os.environ:
        return Path(os.environ["BYOV_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "byov"


def available_memory(root: Path = ROOT) -> int:
    """Bytes that this process can still take without swapping: free memory, cut by what its cgroup has left."""
    left = [room for folder in _cgroup_folders(root, "memory") if (room := _memory_left(folder)) is not None]
    return max(0, min([psutil.virtual_memory().available, *left]))


def total_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process could ever have: the machine's, cut by its cgroup's limit."""
    limits = [limit for folder in _cgroup_folders(root, "memory") if (limit := _memory_limit(folder)) is not None]
    return min([psutil.virtual_memory().total, *limits])


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Instruction sets of the processor as the system spells them, such as "avx512_bf16"; empty if unknown."""
    if sys.platform == "darwin" and root == ROOT:
        return _macos_cpu_flags()
    text = _read(root / "proc/cpuinfo") or ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def processor_name(root: Path = ROOT) -> str:
    """The processor's name as its maker writes it."""
    if sys.platform == "darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    match = re.search(r"^model name\s*: (.+)$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def cpu_has_bf16(root: Path = ROOT) -> bool:
    """Whether the processor multiplies bfloat16 natively; where it does not, PyTorch is faster in float32, and more exact."""
    return not BF16_FLAGS.isdisjoint(cpu_flags(root))


def may_use_amx(root: Path = ROOT) -> bool:
    """Ask Linux for this process's permission to use AMX's tiles, and say whether it may.

    Without it the first instruction that touches a tile ends the process. Children of a fork inherit it. A sandbox may refuse.
    Source: https://docs.kernel.org/arch/x86/xstate.html (ARCH_REQ_XCOMP_PERM).
    """
    if not cpu_flags(root) >= AMX_FLAGS:
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def _macos_cpu_flags() -> frozenset[str]:
    """Features of an Apple processor under sysctl's names, such as "feat_bf16"."""
    lines = subprocess.run(["sysctl", "hw.optional"], capture_output=True, text=True, check=True).stdout.splitlines()
    names = (line.partition(":")[0] for line in lines if line.endswith(": 1"))
    return frozenset(name.rsplit(".", 1)[-1].lower() for name in names)


def _read(path: Path) -> str | None:
    """The file's text, or None where there is no such file (or it is not ours to read)."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of its parents, version 2 and version 1: each may set a limit.

    /proc/self/cgroup has lines ``0::/path`` (version 2) and ``4:cpu,cpuacct:/path`` (version 1). In a container the
    path may be the host's, which is not mounted: a missing folder has no limits to read, and the root is always tried.
    """
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = mount / path.strip("/")
        yield folder
        while folder != mount:
            folder = folder.parent
            yield folder


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of CPU time that a cgroup may use: quota over period; None if there is no limit."""
    if text := _read(folder / "cpu.max"):  # version 2: "150000 100000" or "max 100000"
        quota, period = text.split()
    else:  # version 1: a quota of -1 is no limit
        quota, period = _read(folder / "cpu.cfs_quota_us") or "max", _read(folder / "cpu.cfs_period_us") or "100000"
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _memory_limit(folder: Path) -> int | None:
    """Bytes that a cgroup may hold; None if there is no limit (version 1 writes a number near 2^63 for that)."""
    text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes") or "max"
    return None if text == "max" or int(text) >= 1 << 60 else int(text)


def _memory_left(folder: Path) -> int | None:
    """Bytes left under a cgroup's limit; its inactive file cache counts as free, for the kernel drops it first."""
    limit = _memory_limit(folder)
    if limit is None:
        return None
    used = int(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or 0)
    stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    cache = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    return limit - max(0, used - cache)


def format_bytes(count: int) -> str:
    """``1536 MiB`` style, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
