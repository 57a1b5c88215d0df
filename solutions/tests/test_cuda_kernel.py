"""The CUDA attention kernel: against the oracle on a card, or executed on this CPU; with planted faults, on the CPU; compiled
where nvcc is."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from solutions.attention import cuda_build
from solutions.attention.paged_attention_cuda import CudaBackend, choose_splits, problem
from solutions.core.platform import native
from solutions.memory.cache_engine import write_kv
from solutions.tests.attention_cases import GARBAGE, HEAD_DIMS, AttentionCase, make_case, relative_error
from solutions.tests.cuda_faults import CPU, FAULTS, REPORTS, Fault, few_kernels, is_right, sanitizer_environment
from solutions.tests.cuda_resources import resources

if native.compiler() is None:
    pytest.skip("no C++ compiler here, so the CUDA kernels cannot run on the CPU", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
make = partial(make_case, device=str(DEVICE))

HEADS = ((2, 2), (4, 1), (6, 2), (8, 1))  # one, four, three and eight query heads share a KV head
BLOCK_SIZES = (8, 16, 32, 128)
WINDOWS = (None, 20)
# Every pair of two values of (heads, head size, block size, window).
GRID = [
    (heads, HEAD_DIMS[(i + j) % 4], block_size, WINDOWS[(i // 2 + j) % 2])
    for i, heads in enumerate(HEADS)
    for j, block_size in enumerate(BLOCK_SIZES)
]
VERSIONS = pytest.mark.parametrize("num_splits", [1, 3], ids=["v1", "v2"])
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def batch(block_size: int) -> tuple[list[int], list[int]]:
    """Query and context lengths: decodes at and beside multiples of the block size, and two chunks of a prompt."""
    near = [k * block_size + d for k in (1, 2) for d in (-1, 0, 1)][: 3 if block_size > 32 else 6]
    return [1] * len(near) + [1, 3, 2], [*near, 1, 3, min(block_size, 32) + 1]


def is_close(got: torch.Tensor, case: AttentionCase) -> None:
    torch.testing.assert_close(got.double(), case.expected(), rtol=0, atol=1e-5)


def test_the_grid_has_every_pair() -> None:
    factors = (HEADS, HEAD_DIMS, BLOCK_SIZES, WINDOWS)
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in GRID} == set(itertools.product(factors[a], factors[b]))


@pytest.mark.slow
@VERSIONS
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID)
def test_mixed_batch(heads: tuple, head_dim: int, block_size: int, window: int | None, num_splits: int) -> None:
    query_lens, context_lens = batch(block_size)
    case = make(query_lens, context_lens, heads=heads, head_dim=head_dim, block_size=block_size, window=window)
    is_close(case.run(CudaBackend(DEVICE, num_splits)), case)


@pytest.mark.slow
@VERSIONS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID[:3] + GRID[5:6] + GRID[8:10] + GRID[12:14])
def test_half_precision(
    heads: tuple, head_dim: int, block_size: int, window: int | None, dtype: torch.dtype, num_splits: int
) -> None:
    query_lens, context_lens = batch(block_size)
    case = make(query_lens, context_lens, heads=heads, head_dim=head_dim, block_size=block_size, window=window, dtype=dtype)
    got = case.run(CudaBackend(DEVICE, num_splits))
    assert got.dtype == dtype
    assert relative_error(got, case.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("num_splits", [1, None], ids=["v1", "as many as fill the device"])
def test_long_contexts(num_splits: int | None, window: int | None) -> None:
    case = make([1], [1023], heads=(2, 1), window=window, dtype=torch.float16)
    assert relative_error(case.run(CudaBackend(DEVICE, num_splits)), case.expected()) < TOLERANCE[torch.float16]


@VERSIONS
@pytest.mark.parametrize("num_threads", [32, 128])
def test_any_number_of_warps(num_threads: int, num_splits: int) -> None:
    case = make([1, 2, 1], [33, 5, 64], heads=(3, 1), head_dim=96)
    is_close(case.run(CudaBackend(DEVICE, num_splits, num_threads)), case)


@pytest.mark.slow
@VERSIONS
@pytest.mark.parametrize("heads", [(9, 1), (20, 2)])
def test_more_query_heads_than_a_block_takes(heads: tuple[int, int], num_splits: int) -> None:
    case = make([1, 2], [9, 17], heads=heads)
    is_close(case.run(CudaBackend(DEVICE, num_splits)), case)


@pytest.mark.parametrize("head_dim", [16, 36, 64, 68, 128])
def test_head_sizes_that_leave_lanes_without_work(head_dim: int) -> None:
    case = make([1, 2], [9, 17], head_dim=head_dim)
    is_close(case.run(CudaBackend(DEVICE)), case)


@VERSIONS
def test_more_parts_than_keys(num_splits: int) -> None:
    case = make([1, 1, 2], [1, 2, 2], heads=(2, 1))
    is_close(case.run(CudaBackend(DEVICE, 7 * num_splits)), case)


@VERSIONS
def test_large_scores_keep_their_precision(num_splits: int) -> None:
    case = make([1, 3], [60, 40], heads=(4, 2), dtype=torch.bfloat16)
    case.query *= 20
    assert relative_error(case.run(CudaBackend(DEVICE, num_splits)), case.expected()) < TOLERANCE[torch.bfloat16]


@VERSIONS
def test_padding_is_neither_stored_nor_read_and_gives_zeros(num_splits: int) -> None:
    """As a CUDA graph has it: more sequences than the batch, and more tokens than the sequences."""
    case = make([1, 3], [17, 9])
    backend = CudaBackend(DEVICE, num_splits)
    metadata = case.metadata(backend)
    tokens, pad = len(case.query), 3
    query, key, value = (
        torch.cat([x, x.new_full((pad, *x.shape[1:]), float("nan"))]) for x in (case.query, case.key, case.value)
    )
    metadata.slot_mapping = torch.cat([metadata.slot_mapping, torch.full((pad,), -1, device=DEVICE)])
    garbage = torch.tensor(GARBAGE[:2], device=DEVICE)[:, None].expand(2, metadata.block_tables.shape[1])
    metadata.block_tables = torch.cat([metadata.block_tables, garbage.int()])
    metadata.context_lens = torch.cat([metadata.context_lens, torch.zeros(2, dtype=torch.int32, device=DEVICE)])
    starts = metadata.query_start_loc
    metadata.query_start_loc = torch.cat([starts, starts[-1:] + 1, starts[-1:] + 2])
    got = backend.attend(0, query, key, value, metadata, case.scale)
    is_close(got[:tokens], case)
    assert torch.equal(got[tokens:], torch.zeros_like(got[tokens:]))
    expected = case.kv_cache.clone()
    write_kv(case.key, case.value, expected, case.slot_mapping)
    torch.testing.assert_close(metadata.kv_caches[0], expected, equal_nan=True, rtol=0, atol=0)


@VERSIONS
def test_reads_blocks_that_another_sequence_writes_in_this_step(num_splits: int) -> None:
    case = make([20, 2, 1], [20, 18, 17], block_size=8, readers={1: 0, 2: 0})
    is_close(case.run(CudaBackend(DEVICE, num_splits)), case)


def test_slices_of_one_projection() -> None:
    """Tokens that lie apart are read in place; what does not begin at a multiple of 16 bytes is copied."""
    for gap in (0, 4, 3):
        case = make([3, 1], [20, 9])
        parts = [case.query.flatten(1), case.key.flatten(1), case.value.flatten(1), torch.zeros(4, gap, device=DEVICE)]
        fused = torch.cat(parts, dim=1)
        query, key, value, _ = fused.split([x.shape[1] for x in parts], dim=1)
        case.query, case.key, case.value = query.unflatten(1, (4, 64)), key.unflatten(1, (2, 64)), value.unflatten(1, (2, 64))
        assert not case.query.is_contiguous()
        is_close(case.run(CudaBackend(DEVICE)), case)
    case.query = torch.cat([case.query, case.query], dim=-1)[..., :64]  # heads lie apart
    is_close(case.run(CudaBackend(DEVICE)), case)


def test_memory_for_partial_results_is_kept_for_graphs_that_use_it() -> None:
    backend = CudaBackend(DEVICE, num_splits=2)
    cases = [make([1], [9]), make([1] * 3, [9] * 3), make([1], [9], seed=1)]
    addresses = []
    for case in cases:
        is_close(case.run(backend), case)
        addresses.append([room.data_ptr() for room in backend._partials])
    assert addresses[1][:1] == addresses[0]
    assert addresses[2] == addresses[1]


@pytest.mark.parametrize(
    ("work", "num_sms", "longest", "splits"),
    [(8, 132, 255, 1), (8, 132, 1024, 4), (8, 132, 100_000, 66), (528, 132, 4096, 1), (300, 132, 4096, 1), (2, 1, 4096, 2)],
)
def test_contexts_are_split_until_the_device_is_full(work: int, num_sms: int, longest: int, splits: int) -> None:
    assert choose_splits(work, num_sms, longest) == splits


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "block_size", "text"),
    [
        ("meta", torch.float32, 64, 16, "not on meta"),
        ("cpu", torch.float64, 64, 16, "no code for float64"),
        ("cpu", torch.float16, 68, 16, "multiple of 8 up to 128, the model's is 68"),
        ("cpu", torch.float32, 256, 16, "multiple of 4 up to 128, the model's is 256"),
        ("cpu", torch.float32, 64, 24, "power of two, got 24"),
    ],
)
def test_says_what_it_cannot_do(device: str, dtype: torch.dtype, head_dim: int, block_size: int, text: str) -> None:
    assert text in problem(torch.device(device), dtype, head_dim, block_size)


def test_a_kernel_that_does_not_compile_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problem(CPU, torch.bfloat16, 64, 16) is None
    (tmp_path / "broken.cu").write_text("int broken( {")
    with pytest.raises(native.BuildError, match=r"(?s)could not compile.*broken\.cu"):
        cuda_build.build(CPU, tmp_path, tmp_path / "broken.cu")
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    with pytest.raises(native.BuildError, match="nvcc was found neither on PATH nor in CUDA_HOME"):
        cuda_build.build(torch.device("cuda"), tmp_path)


def test_a_launch_that_fails_and_a_cache_of_another_dtype_are_errors() -> None:
    case = make([1], [9])
    with pytest.raises(RuntimeError, match="could not be launched: invalid argument"):
        case.run(CudaBackend(DEVICE, num_threads=33))
    # a card says the one, its emulation the other
    with pytest.raises(RuntimeError, match=r"could not be launched: invalid (argument|configuration)"):
        case.run(CudaBackend(DEVICE, num_splits=65536))
    case.kv_cache = case.kv_cache.half()
    with pytest.raises(ValueError, match=r"model's dtype torch\.float32, got torch\.float16"):
        case.run(CudaBackend(DEVICE))


# Planted faults


@pytest.fixture
def fast_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")


def test_the_kernels_are_right_where_the_faults_are_planted(fast_build: None, tmp_path: Path) -> None:
    assert is_right(cuda_build.build(CPU, tmp_path, few_kernels(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.found_by == "oracle"], ids=lambda fault: fault.name)
def test_the_oracle_finds(fault: Fault, fast_build: None, tmp_path: Path) -> None:
    assert not is_right(cuda_build.build(CPU, tmp_path, fault.plant(tmp_path)))


Watch = Callable[[str, Path], subprocess.CompletedProcess[str]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Compares a version of the kernels with the oracle under a sanitizer."""

    def compare(kind: str, kernels: Path) -> subprocess.CompletedProcess[str]:
        try:
            environment = sanitizer_environment(kind)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        monkeypatch.setenv("CXX", "g++")  # whose libraries the environment preloads
        monkeypatch.setenv("CXXFLAGS", f"-O0 -g -fsanitize={kind}")  # built out here: a compiler need not run under it
        command = [sys.executable, "-m", "solutions.tests.cuda_faults", str(cuda_build.build(CPU, kernels.parent, kernels))]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread"])  # address: by make test-cuda-on-cpu SANITIZE=address
def test_a_sanitizer_has_nothing_to_say_about_the_kernels(kind: str, watched: Watch, tmp_path: Path) -> None:
    run = watched(kind, few_kernels(tmp_path))
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.found_by != "oracle"], ids=lambda fault: fault.name)
def test_a_sanitizer_finds(fault: Fault, watched: Watch, tmp_path: Path) -> None:
    run = watched(fault.found_by, fault.plant(tmp_path))
    assert run.returncode != 0
    assert REPORTS[fault.found_by] in run.stderr
    assert "kernels.cu" in run.stderr  # it names the place


# Compiled for a card


needs_nvcc = pytest.mark.skipif(cuda_build.nvcc() is None, reason="no nvcc here, so nothing can be compiled for a card")


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_needs_no_spills(arch: str) -> None:
    kernels = resources(arch)
    print(f"\n{arch}: kernel, registers, bytes spilled, bytes of shared memory")
    for kernel in kernels:
        print(f"{kernel.kernel:40} {kernel.registers:4} {kernel.spilled:5} {kernel.shared:6}")
    by_name = {kernel.kernel: kernel for kernel in kernels}
    for version, dtype, lanes, heads in itertools.product("12", ("half", "bfloat16"), (8, 16), (1, 4, 8)):
        assert by_name[f"paged_attention_v{version}<{dtype}, {lanes}, {heads}>"].spilled == 0
    assert len(kernels) == 2 * 3 * 2 * 3 + 3 + 3  # v1 and v2 by dtype, lanes and heads; merge_splits and write_kv by dtype


@pytest.mark.slow
@needs_nvcc
def test_nvcc_loads_16_bytes_at_a_time(tmp_path: Path) -> None:
    """A copy of bytes whose alignment the compiler cannot see becomes 16 loads of one byte each."""
    source, ptx = native.find_source(cuda_build.KERNELS), tmp_path / "kernels.ptx"
    subprocess.run([cuda_build.nvcc(), "-O3", "-std=c++17", "-ptx", "-arch=sm_80", source, "-o", ptx], check=True)
    loads = re.findall(r"ld\.global\.[a-z0-9.]+", ptx.read_text())
    assert "ld.global.v4.u32" in loads
    assert not any(load.endswith(("8", "16")) for load in loads)
