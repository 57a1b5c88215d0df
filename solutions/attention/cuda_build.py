"""Builds the CUDA kernels: by nvcc for a card, or by a C++ compiler, to which ``cuda_on_cpu.h`` says what CUDA means."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
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
        program = nvcc()
        if program is None:
            raise native.BuildError("nvcc was found neither on PATH nor in CUDA_HOME; install the CUDA toolkit")
        major, minor = torch.cuda.get_device_capability(device)
        flags = [*NVCC_FLAGS, f"-arch=sm_{major}{minor}"]
        return native.compile_library(folder, "CUDA-kernels", program, flags, [source], [])
    flags = [*CPU_FLAGS, *native.extra_flags()]
    program = native.need_compiler()
    return native.compile_library(folder, "CUDA-kernels-on-CPU", program, flags, [source], [native.find_source(HEADER)])


@functools.cache
def load(device: torch.device) -> ctypes.CDLL:
    """The library for `device`, built at the first call.

    Raises:
        BuildError: it cannot be built.
    """
    return ctypes.CDLL(str(build(device, cache_root() / "native")))
