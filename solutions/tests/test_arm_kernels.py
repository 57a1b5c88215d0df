"""The C++ kernels, cross-compiled for Arm: all build, and the matrix products run under emulation.

On Debian `apt-get install g++-aarch64-linux-gnu qemu-user-static` brings what this needs. Emulation shows whether the results
are right, not how fast they are.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from solutions.core.platform import native
from solutions.quantization.kernels import linear_cpu
from solutions.quantization.kernels.linear_cpu import PackedLinear
from solutions.quantization.layout.groups import GroupQuantized, quantize_groups
from solutions.tests.test_cpu_kernels import TOLERANCE, error, random

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
INCLUDE = native.find_source("core/platform/native.h").parents[2]
PROCESSORS = ["armv8-a", "armv8.2-a+dotprod", "armv8.6-a+bf16+i8mm"]
NEON = linear_cpu.Layout(panel=8, bfloat16=torch.float32, int8=torch.int16)
"""What `linear_layout` says on such a processor; the program below checks it."""
KINDS = (None, "int8", "int4", "of a checkpoint")
ARRAYS = ("x", "w", "scales", "bias", "y", "other_x", "of_groups", "order")

pytestmark = [
    pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason="no cross compiler or emulator for Arm here"),
    pytest.mark.skipif(native.compiler() is None, reason="weights are packed beside this machine's own kernels"),
]

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "quantization/kernels/linear_cpu.cpp"

int main(int, char** argv) {
    int64_t layout[3];
    linear_layout(layout);
    if (layout[0] != 8 || layout[1] != 4 || layout[2] != 2) return 2;
    threads() = 2;
    std::FILE* in = std::fopen(argv[2], "rb");
    int64_t numbers[7], sizes[8];
    if (std::fread(numbers, 8, 7, in) != 7 || std::fread(sizes, 8, 8, in) != 8) return 3;
    void* at[8];
    for (int i = 0; i < 8; ++i) {
        at[i] = sizes[i] ? std::aligned_alloc(64, (sizes[i] + 63) / 64 * 64) : nullptr;
        if (sizes[i] && std::fread(at[i], 1, sizes[i], in) != static_cast<size_t>(sizes[i])) return 4;
    }
    const Linear a{numbers[0], at[0], at[1], (float*)at[2], (float*)at[3], at[4], at[5], (float*)at[6], (int32_t*)at[7],
                   numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
    typedef void (*Kernel)(const Linear*);
    const Kernel kernels[] = {linear_f32, linear_bf16, linear_int8_f32, linear_int8_bf16, linear_w4a8_f32, linear_w4a8_bf16,
                              linear_int4_f32, linear_int4_bf16};
    kernels[std::atoi(argv[1])](&a);
    std::FILE* out = std::fopen(argv[3], "wb");
    return std::fwrite(at[4], 1, sizes[4], out) == static_cast<size_t>(sizes[4]) && !std::fclose(out) ? 0 : 5;
}
"""


def test_the_kernels_are_valid_for_arm() -> None:
    files = [str(native.find_source(name)) for name in (*native.SOURCES, *native.SUMS)]
    command = [COMPILER, "-std=c++17", "-march=armv8-a", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", *files]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_all_kernels_build_without_a_warning(processor: str, tmp_path: Path) -> None:
    flags = [flag for flag in native.FLAGS if flag != "-march=native"]
    command = [COMPILER, *flags, f"-march={processor}", "-Werror", "-O1", f"-I{INCLUDE}"]
    sources = [str(native.find_source(name)) for name in (*native.SOURCES, *native.SUMS)]
    run = subprocess.run([*command, *sources, "-o", str(tmp_path / "kernels.so")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    (folder / "products.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-O2", "-fno-math-errno", "-march=armv8-a", "-static", "-pthread", f"-I{INCLUDE}"]
    subprocess.run([*command, str(folder / "products.cpp"), "-o", str(folder / "products")], check=True)
    return folder / "products"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "columns", "batch"), [(8, 16, 1), (40, 112, 11), (33, 96, 12), (64, 192, 25)])
def test_matrix_products(
    kind: str | None, dtype: torch.dtype, rows: int, columns: int, batch: int, program: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tiles of up to 12 rows: one, one less, all, one more than two."""
    bias = random(rows, dtype=dtype, seed=1)
    weight: Tensor | GroupQuantized = random(rows, columns, dtype=dtype)
    if kind == "of a checkpoint":
        weight = quantize_groups(weight.float(), 4, 32)
    here = PackedLinear(weight, bias, kind, dtype=dtype)
    monkeypatch.setattr(linear_cpu, "layout", lambda: NEON)
    there = PackedLinear(weight, bias, kind, dtype=dtype)
    x = random(batch, columns, dtype=dtype, seed=2)
    got = run_on_arm(program, tmp_path, there, x, rows, KINDS.index(kind) * 2 + list(TOLERANCE).index(dtype))
    if kind is None:
        assert error(got, x.double() @ weight.double().T + bias.double()) < TOLERANCE[dtype]
    else:  # the same codes and scales as here, so nearly the same sums
        assert error(got, here(x).double()) < max(TOLERANCE[dtype], 1e-5)


def run_on_arm(program: Path, folder: Path, packed: PackedLinear, x: Tensor, rows: int, number: int) -> Tensor:
    """``x · weightᵀ + bias`` by the emulated kernel of this number."""
    y = x.new_empty(len(x), rows)
    columns, operand, groups = packed._scratch or (0, torch.float32, 0)
    scratch, of_groups = torch.empty(len(x), columns, dtype=operand), torch.empty(len(x), groups)
    tensors = (x, packed.weight, packed.scales, packed.bias, y, scratch, of_groups, packed.order)
    parts = [b"" if each is None else each.contiguous().view(torch.uint8).numpy().tobytes() for each in tensors]
    numbers = (len(x), x.stride(0), y.stride(0), rows, x.shape[1], linear_cpu.STORE, packed._arguments.group)
    (folder / "in").write_bytes(struct.pack("<15q", *numbers, *map(len, parts)) + b"".join(parts))
    subprocess.run([EMULATOR, str(program), str(number), str(folder / "in"), str(folder / "out")], check=True, timeout=60)
    return torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=x.dtype).view(len(x), rows)
