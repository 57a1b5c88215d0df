"""Builds the CUDA kernels: by nvcc for a card, or by a C++ compiler, to which ``cuda_on_cpu.h`` says what CUDA means."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.platform import native
from ..core.platform.machine import cache_root

KERNELS = "attention/paged_attention_kernel.cu"
HEADER = "attention/cuda_on_cpu.h"
NVCC_FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")
CPU_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-x", "c++")


def nvcc() -> str | None:
    """CUDA's compiler: on the path, or in the folder that `CUDA_HOME` names; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which(str(Path(home, "bin", "nvcc"))) if home else None)


def build(device: torch.device, folder: Path, source: Path | None = None) -> Path:
    """The shared library of the kernels for `device`, compiled into `folder` unless it is there.

    Args:
        source: another version of the kernels; None: `KERNELS`.

    Raises:
        BuildError: there is no compiler, or it refuses.
    """
    source = source or native.find_source(KERNELS)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        flags = [*NVCC_FLAGS, f"-arch=sm_{major}{minor}"]
        return native.compile_library(folder, "CUDA-kernels", _need_nvcc(), flags, [source], [])
    flags, program = [*CPU_FLAGS, *native.extra_flags()], native.need_compiler()
    return native.compile_library(folder, "CUDA-kernels-on-CPU", program, flags, [source], [native.find_source(HEADER)])


@functools.cache
def load(device: torch.device) -> ctypes.CDLL:
    """The library for `device`, built at the first call.

    Raises:
        BuildError: it cannot be built.
    """
    return ctypes.CDLL(str(build(device, cache_root() / "native")))


def _need_nvcc() -> str:
    program = nvcc()
    if program is None:
        raise native.BuildError("nvcc was found neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
    return program


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes of a card.

    Attributes:
        kernel: name with template arguments. registers: of a thread, at most 255. What finds no room is `spilled`.
        spilled: bytes that a thread stores to and loads from memory for want of registers.
        shared: bytes of a block, besides those that the launch asks for.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int


def resources(arch: str) -> list[Resources]:
    """Compile the kernels for one architecture, "sm_90" say, and read what the assembler reports. Needs no card.

    Raises:
        BuildError: there is no nvcc, or it refuses.
    """
    program = _need_nvcc()
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "-O3", "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
        command += [str(native.find_source(KERNELS)), "-o", str(Path(folder, "kernels.cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise native.BuildError(f"{program} could not compile the CUDA-kernels for {arch}:\n{run.stderr.strip()}")
    return parse_resources(run.stderr)


def parse_resources(report: str) -> list[Resources]:
    """Read what ``ptxas -v`` prints; sorted by name."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        (registers,) = re.findall(r"Used (\d+) registers", part)
        found.append(Resources(demangle(name), int(registers), sum(map(int, spills)), int(shared[1]) if shared else 0))
    return sorted(found, key=lambda kernel: kernel.kernel)


def demangle(symbol: str) -> str:
    """``paged_attention_v1<half, 8, 4>`` from the symbol that the compiler makes of it."""
    name, *_ = re.findall(r"paged_attention_v[12]|merge_splits|write_kv_kernel", symbol)
    (dtype, numbers), *_ = re.findall(r"I(f|6__half|13__nv_bfloat16)((?:Li\d+E)*)E", symbol)
    words = [{"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}[dtype], *re.findall(r"Li(\d+)E", numbers)]
    return f"{name}<{', '.join(words)}>"
