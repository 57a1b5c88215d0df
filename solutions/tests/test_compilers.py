"""g++ and clang++ both build the C++ kernels, and a compiler that is not here or lacks something is named.

`make test-cpu-kernels CXX=clang++` runs all tests of the kernels with the other compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solutions.attention import cuda_build
from solutions.core import doctor
from solutions.core.platform import native
from solutions.core.platform.machine import AMX_FLAGS, cpu_flags

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for path in (ROOT / "solutions").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
NO_AMX = "-mno-amx-tile -mno-amx-bf16 -mno-amx-int8"
"""What such a processor does if the system does not let it use AMX; nothing on others."""

LEVELS = {
    "x86-64-v2": {"ssse3", "sse4_2", "popcnt"},
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
"""What tells that a processor has a level of x86-64."""

NORM = """
import torch
from solutions.core.platform.native import set_threads
from solutions.models.kernels.layers_cpu import NativeNorm
set_threads(2)
x, weight = torch.randn(33, 96), torch.rand(96)
torch.testing.assert_close(NativeNorm(weight, 1e-5)(x), torch.nn.functional.rms_norm(x, (96,), weight, 1e-5))
"""


def test_only_one_line_is_for_one_compiler() -> None:
    """`__builtin_shuffle` is GCC's, `__builtin_shufflevector` Clang's: both stand in one function, and nowhere else."""
    lines = [f"{path.name}: {line.strip()}" for path in SOURCES for line in path.read_text().splitlines() if "_shuffle" in line]
    found = [line for line in lines if re.search(r"__builtin_shuffle|__builtin_shufflevector", line)]
    assert found == [
        "native.h: return __builtin_shufflevector(a, b, from(I)...);",
        "native.h: return __builtin_shuffle(a, b, decltype(a < b){from(I)...});",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["g++", "clang++"])
def test_builds_all_kernels_without_a_warning(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they run: one that folds vectors, on two threads."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    monkeypatch.setenv("CXX", name)
    monkeypatch.setenv("CXXFLAGS", "-O0 -Werror -Wno-psabi")
    native.build(tmp_path / "native")
    native.build(tmp_path / "native", "sums", native.SUMS)
    cuda_build.build(torch.device("cpu"), tmp_path / "native")
    environment = os.environ | {"BYOV_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", NORM], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64's levels")
@pytest.mark.parametrize("flags", [*(f"-march={level}" for level in LEVELS), NO_AMX])
def test_kernels_for_lesser_processors_pass_the_same_tests(flags: str, tmp_path: Path) -> None:
    """SSE, AVX2, AVX-512 without and with products of bfloat16: each has tiles of its own."""
    level = flags.removeprefix("-march=")
    if not LEVELS.get(level, set()) <= cpu_flags():
        pytest.skip(f"this processor does not have all of {level}")
    environment = os.environ | {"CXXFLAGS": flags, "BYOV_CACHE": str(tmp_path)}
    files = [f"solutions/tests/test_{name}.py" for name in ("cpu_kernels", "paged_attention", "selection", "shared_memory")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "cpu or selection or shared_memory", *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


REFUSED = """
import torch
from solutions.core.platform import native
native.may_use_amx = lambda: False
from solutions.quantization.kernels.linear_cpu import PackedLinear
x, weight = torch.randn(33, 96).bfloat16(), torch.randn(64, 96).bfloat16()
for quantization in (None, "int8"):
    torch.testing.assert_close(PackedLinear(weight, None, quantization)(x), x @ weight.T, atol=1, rtol=0.1)
"""


@pytest.mark.slow
@pytest.mark.skipif(not cpu_flags() >= AMX_FLAGS, reason="this processor has no AMX")
def test_amx_is_left_alone_where_the_system_refuses_it(tmp_path: Path) -> None:
    """An instruction that touches a tile without permission would end the process."""
    environment = os.environ | {"BYOV_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_each_compiler_has_a_library_of_its_own(tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    programs = [program for name in ("g++", "clang++") if (program := shutil.which(name))]
    copy = tmp_path / "other++"  # another version of a compiler
    copy.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo other 1.0 && exit\nexec {programs[0]} "$@"\n')
    copy.chmod(0o755)
    flags = ["-shared", "-fPIC"]
    libraries = {native.compile_library(tmp_path, "one", program, flags, [source], []) for program in (*programs, str(copy))}
    assert len(libraries) == len(programs) + 1


def test_a_compiler_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX is obeyed or refused: g++ in its place would be a surprise."""
    monkeypatch.setenv("CXX", "no-such-c++")
    assert native.compiler() is None
    with pytest.raises(native.BuildError, match=r"CXX is 'no-such-c\+\+', and there is no such program"):
        native.build(tmp_path)
    with pytest.raises(native.BuildError, match=r"CXX is 'no-such-c\+\+'"):
        cuda_build.build(torch.device("cpu"), tmp_path)
    assert dict(doctor.machine_rows())["C++ compiler"] == "CXX is 'no-such-c++', which was not found"
