"""Task 4.8: attention over blocks by hand in CUDA, compiled for this CPU, on which every thread of a block is a real one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.attention.paged_attention_cuda import CudaBackend
from stages.core.platform import native
from stages.course.fixtures.checks import check_close
from stages.course.fixtures.kernels import build_cuda, contained
from stages.tests.attention_cases import AttentionCase, make_case

if native.compiler() is None:
    pytest.skip("there is no C++ compiler here; install g++ or clang++", allow_module_level=True)

KERNELS = r"""
template <int LANES>
__global__ void sums(const float* x, float* out) { out[threadIdx.x] = sum_over_lanes<LANES>(x[threadIdx.x]); }
__global__ void merged(const float* rows, int count, int stride, float* out) {
    const Sum sum = merge(rows, count, stride, threadIdx.x);
    out[threadIdx.x * 3] = sum.largest;
    out[threadIdx.x * 3 + 1] = sum.weights;
    out[threadIdx.x * 3 + 2] = sum.value;
}
extern "C" {
void run_sums_4(const float* x, float* out) { LAUNCH(sums<4>, 1, 64, 0, nullptr, x, out); }
void run_sums_8(const float* x, float* out) { LAUNCH(sums<8>, 1, 64, 0, nullptr, x, out); }
void run_sums_32(const float* x, float* out) { LAUNCH(sums<32>, 1, 64, 0, nullptr, x, out); }
void run_merged(const float* rows, int count, int stride, float* out) {
    LAUNCH(merged, 1, 2, 0, nullptr, rows, count, stride, out);
}
// What the engine calls for bfloat16, with the one kernel that a head of 128 numbers and four heads to a KV head take.
int attend_bf16(const Step* step, void* stream) {
    const size_t bytes = step->num_threads / 16 * 4 * (2 + step->head_dim) * sizeof(float);
    LAUNCH((write_kv_kernel<__nv_bfloat16>), step->num_tokens, step->num_threads, 0, nullptr, *step);
    LAUNCH((paged_attention_v1<__nv_bfloat16, 16, 4>), dim3(step->num_tokens, 1, 1), step->num_threads, bytes, nullptr, *step);
    return 0;
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_cuda(tmp_path_factory.mktemp("kernels"), KERNELS)


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def attend(library: ctypes.CDLL, case: AttentionCase, splits: int = 1) -> Tensor:
    """What the kernels give, [T, H, D]."""
    return contained(lambda: case.run(CudaBackend("cpu", splits, library=library)), *case.query.shape).double()


@pytest.mark.parametrize("lanes", [4, 8, 32])
def test_neighbouring_lanes_add_up(library: ctypes.CDLL, lanes: int) -> None:
    """Each of LANES neighbouring threads gets the sum of all of them, and nothing of another group.

    Why: a score is a sum over a key's numbers, which lie in the registers of a whole group; every lane needs it for its values.
    """
    x = torch.arange(64.0) ** 2

    def compute() -> Tensor:
        out = torch.full((64,), torch.nan)
        getattr(library, f"run_sums_{lanes}")(pointer(x), pointer(out))
        return out

    check_close(contained(compute, 64), x.view(-1, lanes).sum(dim=1).repeat_interleave(lanes), "sums")


def merged(library: ctypes.CDLL, rows: Tensor, count: int, stride: int) -> Tensor:
    """[2, 3]: largest, weights and value of each of two dimensions."""

    def compute() -> Tensor:
        out = torch.full((2, 3), torch.nan)
        library.run_merged(pointer(rows), count, stride, pointer(out))
        return out

    return contained(compute, 2, 3)


def test_rows_are_merged_relative_to_the_largest(library: ctypes.CDLL) -> None:
    """Rows (1; 4; 8, 0) and (3; 1; 1, 1): the first counts 2^-2, so weights 2, values 3 and 1.

    Why: each row's sums are relative to its own largest score, and mean nothing beside another's.
    """
    rows = torch.tensor([1.0, 4.0, 8.0, 0.0, 3.0, 1.0, 1.0, 1.0])
    check_close(merged(library, rows, 2, 4), torch.tensor([[3.0, 2.0, 3.0], [3.0, 2.0, 1.0]]), "largest, weights, value")


def test_rows_lie_a_stride_apart(library: ctypes.CDLL) -> None:
    """Only every `stride`-th number begins a row; what lies between belongs to other heads.

    Why: the rows of all heads of a block share its memory.
    """
    rows = torch.full((20,), torch.nan)
    rows[0:4] = torch.tensor([2.0, 1.0, 5.0, 6.0])
    rows[10:14] = torch.tensor([2.0, 3.0, 1.0, 2.0])
    check_close(merged(library, rows, 2, 10), torch.tensor([[2.0, 4.0, 6.0], [2.0, 4.0, 8.0]]), "largest, weights, value")


def test_rows_without_keys_count_nothing(library: ctypes.CDLL) -> None:
    """A row whose largest is the lowest number has weights of 0; scores of 5,000 do not overflow.

    Why: with few keys most groups of a block have seen none, and 2 to the 5,000 is infinite.
    """
    lowest = torch.finfo(torch.float32).min
    rows = torch.tensor([lowest, 0.0, 0.0, 0.0, 5000.0, 2.0, 3.0, 4.0, lowest, 0.0, 0.0, 0.0])
    check_close(merged(library, rows, 3, 4), torch.tensor([[5000.0, 2.0, 3.0], [5000.0, 2.0, 4.0]]), "one row that counts")
    check_close(merged(library, rows, 1, 4)[:, 1:], torch.zeros(2, 2), "weights and values of nothing")


@pytest.mark.parametrize("block_size", [8, 16])
def test_a_decode_at_every_border(library: ctypes.CDLL, block_size: int) -> None:
    """One query a sequence, contexts at and beside multiples of the block size, blocks in shuffled order, NaN and impossible
    block numbers wherever nothing may be read.

    Why: an attention that sees one key too many or too few writes fluent text that is not the model's.
    """
    near = [n + d for n in (block_size, 2 * block_size) for d in (-1, 0, 1)]
    case = make_case([1] * len(near), near, heads=(4, 1), head_dim=128, block_size=block_size)
    check_close(attend(library, case), case.expected(), "attention")


@pytest.mark.parametrize(("heads", "head_dim"), [((4, 2), 80), ((6, 2), 96), ((8, 1), 128)])
def test_heads_that_do_not_fill_their_lanes(library: ctypes.CDLL, heads: tuple[int, int], head_dim: int) -> None:
    """A head of 80 numbers keeps 20 lanes busy; the other 12 hold zeros, load nothing, and take part in every shuffle.

    Why: a lane that is missing from a shuffle hangs a card; one that loads reads the next head's numbers.
    """
    case = make_case([1, 1], [5, 21], heads=heads, head_dim=head_dim, block_size=8)
    check_close(attend(library, case), case.expected(), "attention")


def test_two_groups_in_a_warp(library: ctypes.CDLL) -> None:
    """A head of 64 numbers takes 16 lanes, so two keys meet in a warp; contexts of 1 to 35 give one of them less to do.

    Why: who has no key left must still take part in the shuffles of its warp. On a card the others would wait for ever.
    """
    lens = [1, 2, 3, 16, 17, 35]
    case = make_case([1] * len(lens), lens, heads=(4, 1), head_dim=64, block_size=8)
    check_close(attend(library, case), case.expected(), "attention")


@pytest.mark.parametrize("window", [None, 5])
def test_prompts_in_chunks(library: ctypes.CDLL, window: int | None) -> None:
    """Every token of a prompt sees what is before it, itself included, and with a window only the last of it.

    Why: the keys that a thread gets begin and end anywhere, not at a block's border.
    """
    case = make_case([1, 4, 3], [1, 4, 20], heads=(4, 2), head_dim=128, block_size=8, window=window)
    check_close(attend(library, case), case.expected(), "attention")


def test_contexts_of_many_turns(library: ctypes.CDLL) -> None:
    """A context that takes every group many turns, with the largest scores at its end.

    Why: each new largest score shrinks all that was summed before; who forgets it keeps sums of two measures.
    """
    case = make_case([1], [150], heads=(4, 1), head_dim=128, block_size=16)
    case.key.mul_(6)
    case.keys[0][-1:].mul_(6)
    check_close(attend(library, case), case.expected(), "attention", 1e-4)


@pytest.mark.parametrize("factor", [500.0, -500.0])
def test_large_scores(library: ctypes.CDLL, factor: float) -> None:
    """Scores in the thousands, of either sign.

    Why: exp of a thousand is infinite, and of minus a thousand all weights are 0. Relative to the largest neither happens.
    """
    case = make_case([1], [20], heads=(4, 1), head_dim=128, block_size=8)
    case.query.abs_().mul_(factor)
    for keys in (case.kv_cache[0], case.key, case.keys[0]):
        keys.abs_()
    check_close(attend(library, case), case.expected(), "attention", 1e-3)


def test_attention_in_bfloat16(library: ctypes.CDLL) -> None:
    """Queries, keys and values of 16 bits, eight of which come with one load; what is summed has 32.

    Why: this is what models come in. Sixteen bytes that are taken for four numbers give fluent noise.
    """
    case = make_case([1, 3], [5, 21], heads=(4, 1), head_dim=128, block_size=8, dtype=torch.bfloat16)
    check_close(attend(library, case), case.expected(), "attention", 1e-2)


@pytest.mark.parametrize("splits", [2, 3])
def test_a_context_in_parts(library: ctypes.CDLL, splits: int) -> None:
    """Contexts cut between blocks of threads, of which some get no key.

    Why: one user with a long context is one block a head on a card that has room for a thousand.
    """
    case = make_case([1, 1, 1], [1, 16, 45], heads=(4, 1), head_dim=128, block_size=8)
    check_close(attend(library, case, splits), case.expected(), "attention")
