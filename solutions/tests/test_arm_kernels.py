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
PROCESSORS = {
    "armv8-a": linear_cpu.Layout(panel=8, bfloat16=torch.float32, int8=torch.int16),
    "armv8.2-a+dotprod": linear_cpu.Layout(panel=8, bfloat16=torch.float32, int8=torch.uint8),
    "armv8.6-a+bf16+i8mm": linear_cpu.Layout(panel=8, bfloat16=torch.bfloat16, int8=torch.uint8),
}
"""What `linear_layout` says on such a processor; the program below checks it. The first one multiplies floats, the second
signed bytes (sdot), the third bfloat16s, and unsigned bytes with signed ones (bfdot, usdot)."""
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
    if (layout[0] != 8 || layout[1] != BF16 || layout[2] != INT8) return 2;
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
                   numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], 0};
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


def build(folder: Path, processor: str, text: str, *flags: str) -> Path:
    (folder / "program.cpp").write_text(text)
    command = [COMPILER, "-std=c++17", "-O2", "-fno-math-errno", f"-march={processor}", "-static", "-pthread", f"-I{INCLUDE}"]
    subprocess.run([*command, *flags, str(folder / "program.cpp"), "-o", str(folder / "program")], check=True)
    return folder / "program"


@pytest.fixture(scope="module", params=PROCESSORS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, linear_cpu.Layout]:
    layout = PROCESSORS[request.param]
    sizes = f"-DBF16={layout.bfloat16.itemsize}", f"-DINT8={layout.int8.itemsize}"
    return build(tmp_path_factory.mktemp("arm"), request.param, PROGRAM, *sizes), layout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "columns", "batch"), [(8, 16, 1), (40, 112, 11), (33, 96, 12), (64, 192, 25)])
def test_matrix_products(
    kind: str | None, dtype: torch.dtype, rows: int, columns: int, batch: int, built: tuple[Path, linear_cpu.Layout],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Tiles of up to 12 rows: one, one less, all, one more than two."""
    program, layout = built
    bias = random(rows, dtype=dtype, seed=1)
    weight: Tensor | GroupQuantized = random(rows, columns, dtype=dtype)
    if kind == "of a checkpoint":
        weight = quantize_groups(weight.float(), 4, 32)
    here = PackedLinear(weight, bias, kind, dtype=dtype)
    monkeypatch.setattr(linear_cpu, "layout", lambda: layout)
    there = PackedLinear(weight, bias, kind, dtype=dtype)
    x = random(batch, columns, dtype=dtype, seed=2)
    got = run_on_arm(program, tmp_path, there, x, rows, KINDS.index(kind) * 2 + list(TOLERANCE).index(dtype))
    if kind is None:
        assert error(got, x.double() @ weight.double().T + bias.double()) < TOLERANCE[dtype]
    else:  # the same codes and scales as here, so nearly the same sums
        assert error(got, here(x).double()) < max(TOLERANCE[dtype], 1e-5)


ATTENTION = """
#include <cstdio>
#include <random>
#include "attention/paged_attention_cpu.cpp"

constexpr int64_t HEADS = 6, KV_HEADS = 2, SIZE = 16, SEQUENCES = 3, BLOCKS = 30, TABLE = 10;
constexpr int64_t LENGTHS[] = {1, 130, 70}, QUERIES[] = {1, 1, 40};  // two that decode, and a prompt's last 40

// The largest difference from a plain softmax over all keys, in double.
template <typename T>
double difference(void (*kernel)(const Attend*), T, int64_t dim, int64_t invariant) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](int64_t count) {
        std::vector<T> all(count);
        for (T& x : all) x = from_float<T>(normal(random));
        return all;
    };
    int64_t m = 0;
    std::vector<int64_t> slots;
    std::vector<int32_t> tables(SEQUENCES * TABLE);
    std::vector<Item> items;
    for (int32_t s = 0; s < SEQUENCES; ++s) {
        for (int32_t i = 0; i < TABLE; ++i) tables[s * TABLE + i] = (s * TABLE + i) * 7 % BLOCKS;  // 7 does not divide 30
        const int32_t row = m, queries = QUERIES[s], length = LENGTHS[s], before = length - queries;
        items.push_back({s, row, queries, before, 0, length, -1});
        for (int64_t p = before; p < length; ++p, ++m) slots.push_back(tables[s * TABLE + p / SIZE] * SIZE + p % SIZE);
    }
    const std::vector<T> query = fill(m * HEADS * dim), key = fill(m * KV_HEADS * dim), value = fill(m * KV_HEADS * dim);
    std::vector<T> cache = fill(2 * BLOCKS * SIZE * KV_HEADS * dim), output(m * HEADS * dim);
    Step step{};
    step.slot_mapping = slots.data(), step.block_tables = tables.data(), step.items = items.data();
    step.table_stride = TABLE, step.num_items = SEQUENCES, step.num_heads = HEADS, step.num_kv_heads = KV_HEADS;
    step.head_dim = dim, step.block_size = SIZE, step.num_blocks = BLOCKS, step.scale = 0.125f, step.invariant = invariant;
    const Attend arguments{m, &step, query.data(), key.data(), value.data(), cache.data(), output.data(), nullptr, nullptr,
                           HEADS * dim, KV_HEADS * dim};
    kernel(&arguments);
    double worst = 0;
    for (const Item& item : items)
        for (int64_t q = 0; q < item.queries; ++q)
            for (int64_t h = 0; h < HEADS; ++h) {
                const int64_t at = ((item.row + q) * HEADS + h) * dim;
                std::vector<double> sums(dim);
                double total = 0;
                for (int64_t p = 0; p <= item.position + q; ++p) {
                    const int64_t slot = tables[item.sequence * TABLE + p / SIZE] * SIZE + p % SIZE;
                    const T* k = &cache[(slot * KV_HEADS + h / 3) * dim];
                    const T* v = k + BLOCKS * SIZE * KV_HEADS * dim;
                    double score = 0;
                    for (int64_t d = 0; d < dim; ++d)
                        score += double(to_float(query[at + d])) * to_float(k[d]);
                    const double weight = std::exp(score * 0.125);
                    total += weight;
                    for (int64_t d = 0; d < dim; ++d) sums[d] += weight * to_float(v[d]);
                }
                for (int64_t d = 0; d < dim; ++d)
                    worst = std::max(worst, std::fabs(sums[d] / total - to_float(output[at + d])));
            }
    return worst;
}

int main() {
    threads() = 2;
    for (int64_t dim : {16, 64, 80, 96, 128})
        for (int64_t same : {0, 1})
            std::printf("%g %g\\n", difference(attend_f32, 0.0f, dim, same), difference(attend_bf16, bf16{}, dim, same));
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
def test_attention(processor: str, tmp_path: Path) -> None:
    """Sequences that decode beside a prompt's last chunk, with heads of several sizes, also as batch invariance wants it."""
    program = build(tmp_path, processor, ATTENTION)
    run = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, check=True, timeout=120)
    found = [[float(number) for number in line.split()] for line in run.stdout.splitlines()]
    assert len(found) == 10
    assert max(of_float for of_float, _ in found) < 1e-5
    assert max(of_bfloat16 for _, of_bfloat16 in found) < 2e-2


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
