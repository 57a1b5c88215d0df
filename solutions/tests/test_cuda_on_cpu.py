"""What `cuda_on_cpu.h` says about CUDA's built-ins: small kernels that show each; mistakes that end with a clear message."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solutions.attention import cuda_build
from solutions.core.platform import native
from solutions.tests.cuda_faults import CPU

if native.compiler() is None:
    pytest.skip("no C++ compiler here, so no CUDA code can run on the CPU", allow_module_level=True)

SOURCE = r"""
#include "attention/cuda_on_cpu.h"

__global__ void shuffles(float* out) {
    const int lane = threadIdx.x % 32;
    const float x = threadIdx.x;
    float* row = out + threadIdx.x * 4;
    row[0] = __shfl_xor_sync(0xffffffff, x, 5);
    row[1] = __shfl_down_sync(0xffffffff, x, 3);
    row[2] = __shfl_sync(0xffffffff, x, 7);
    row[3] = __shfl_xor_sync(0xffffffff, float(lane), 16);
}

__global__ void reverse(float* out, int n) {
    DYNAMIC_SHARED(float, values);
    if (blockIdx.x == 0) values[threadIdx.x] = threadIdx.x;  // the other blocks read what nobody has written
    __syncthreads();
    out[blockIdx.x * n + threadIdx.x] = values[n - 1 - threadIdx.x];
}

__global__ void place(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    ++out[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

__global__ void leaves_early() {
    if (threadIdx.x == 3) return;
    __syncthreads();
}

__global__ void misses_a_shuffle() {
    if (threadIdx.x != 3) __shfl_xor_sync(0xffffffff, 1.0f, 1);
}

__global__ void loads(const float* from, uint4* to) { *to = *reinterpret_cast<const uint4*>(from); }

extern "C" {
void run_shuffles(float* out) { LAUNCH(shuffles, 1, 64, 0, nullptr, out); }
void run_reverse(float* out) { LAUNCH(reverse, 2, 40, 40 * sizeof(float), nullptr, out, 40); }
void run_place(int* out) { LAUNCH(place, dim3(2, 3, 2), dim3(4, 2, 3), 0, nullptr, out); }
void run_leaves_early() { LAUNCH(leaves_early, 1, 64, 0, nullptr); }
void run_misses_a_shuffle() { LAUNCH(misses_a_shuffle, 1, 32, 0, nullptr); }
void run_loads(int offset) {
    alignas(16) float from[8] = {};
    uint4 to;
    LAUNCH(loads, 1, 1, 0, nullptr, from + offset, &to);
}
int run_too_large() {
    LAUNCH(leaves_early, 1, 2048, 0, nullptr);
    const int first = cudaGetLastError();
    return first * 100 + cudaGetLastError();
}
void halves_to_floats(const __half* x, float* y, int n) { for (int i = 0; i < n; ++i) y[i] = __half2float(x[i]); }
void floats_to_halves(const float* x, __half* y, int n) { for (int i = 0; i < n; ++i) y[i] = __float2half(x[i]); }
void bfloats_to_floats(const __nv_bfloat16* x, float* y, int n) { for (int i = 0; i < n; ++i) y[i] = __bfloat162float(x[i]); }
void floats_to_bfloats(const float* x, __nv_bfloat16* y, int n) { for (int i = 0; i < n; ++i) y[i] = __float2bfloat16(x[i]); }
}
"""


STUCK = """
#include "attention/cuda_on_cpu.h"
__global__ void stuck() {
    if (threadIdx.x < 3) __syncthreads();
    else __shfl_xor_sync(0xffffffff, 1.0f, 1);
}
extern "C" void run() { LAUNCH(stuck, 1, 32, 0, nullptr); }
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "small.cu").write_text(SOURCE)
    return cuda_build.build(CPU, folder, folder / "small.cu")


@pytest.fixture(scope="module")
def library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def test_shuffles_exchange_registers_within_a_warp(library: ctypes.CDLL) -> None:
    out = torch.zeros(64, 4)
    library.run_shuffles(pointer(out))
    for thread, row in enumerate(out.int().tolist()):
        warp, lane = thread // 32 * 32, thread % 32
        assert row == [warp + (lane ^ 5), warp + (lane + 3 if lane + 3 < 32 else lane), warp + 7, lane ^ 16]


def test_shared_memory_is_shared_and_starts_each_block_as_nan(library: ctypes.CDLL) -> None:
    out = torch.zeros(2, 40)
    library.run_reverse(pointer(out))
    assert out[0].tolist() == list(range(39, -1, -1))
    assert out[1].isnan().all()


def test_every_thread_of_every_block_runs_once(library: ctypes.CDLL) -> None:
    out = torch.zeros(12 * 24, dtype=torch.int32)
    library.run_place(pointer(out))
    assert out.tolist() == [1] * len(out)


def test_a_launch_beyond_the_limits_is_an_error_that_is_told_once(library: ctypes.CDLL) -> None:
    assert library.run_too_large() == 900


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("run_leaves_early()", r"__syncthreads() in line 29 waits for a thread that has returned from the kernel"),
        ("run_misses_a_shuffle()", r"a warp shuffle in line 33 waits for a thread that has returned from the kernel"),
        ("run_loads(1)", "misaligned address"),
    ],
)
def test_a_mistake_ends_with_a_message(path: Path, call: str, text: str) -> None:
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(path)!r}).{call}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode != 0
    assert text in run.stderr


@pytest.mark.slow
def test_threads_that_wait_at_different_barriers_end_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "stuck.cu").write_text("#define CUDA_ON_CPU_PATIENCE 1\n" + STUCK)
    library = cuda_build.build(CPU, tmp_path, tmp_path / "stuck.cu")
    command = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r}).run()"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode != 0
    assert "block 1 of the grid does not end" in run.stderr


def test_an_aligned_load_is_none(library: ctypes.CDLL) -> None:
    library.run_loads(4)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "halves"), (torch.bfloat16, "bfloats")])
def test_conversions_are_those_of_pytorch(library: ctypes.CDLL, dtype: torch.dtype, name: str) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    wide = torch.zeros(2**16)
    getattr(library, f"{name}_to_floats")(pointer(every), pointer(wide), 2**16)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)

    finite = every[every.isfinite()].float().sort().values
    between = (finite[1:] + finite[:-1]) / 2
    largest = torch.finfo(dtype).max
    ends = torch.tensor([0.0, -0.0, largest, largest * 1.0019, -largest * 1.01, torch.inf, -torch.inf, torch.nan])
    beside = [torch.nextafter(between, between + sign) for sign in (-1, 1)]
    numbers = torch.cat([finite, between, *beside, ends])
    narrow = torch.zeros(len(numbers), dtype=dtype)
    getattr(library, f"floats_to_{name}")(pointer(numbers), pointer(narrow), len(numbers))
    torch.testing.assert_close(narrow, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(narrow.signbit()[:-1], numbers.to(dtype).signbit()[:-1])
