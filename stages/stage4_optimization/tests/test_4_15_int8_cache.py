"""Task 4.15 ★: keys and values as whole numbers, a scale for each vector, and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.attention.paged_attention import AttentionMetadata
from stages.attention.paged_attention_torch import TorchBackend
from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.operations import Operations
from stages.memory.int8_cache import LARGEST_SCALE, quantize_vectors, read_quantized, write_quantized

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST = 2.0**-14
"""The smallest number that float16 has with all of its digits."""


def some(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """The learner's codes and scales, in the types and shapes that were asked for."""
    codes, scales = quantize_vectors(x)
    check_equal([codes.dtype, scales.dtype], [torch.int8, torch.float16], "types of codes and scales")
    check_equal([[*codes.shape], [*scales.shape]], [[*x.shape], [*x.shape[:-1]]], "shapes of codes and scales")
    return codes, scales


def check_rounding(x: Tensor) -> None:
    """Codes and scales of vectors whose scales have all digits of float16 keep what the docstring promises of them."""
    codes, scales = rounded(x)
    exact, steps = x.double(), scales.double()
    largest = exact.abs().amax(-1)
    assert (steps * 127 >= largest).all(), "the largest magnitude is more than 127 steps of its scale"
    assert (steps * 127 <= largest * 1.003).all(), "a scale is more than 3 in a thousand too large"
    off = (codes.double() * steps[..., None] - exact).abs() / steps[..., None]
    assert (off <= 0.50001).all(), f"a code is {off.max():.4f} steps off; the nearest one never is more than half of one"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_codes_are_the_nearest_ones(dtype: torch.dtype) -> None:
    """Vectors of all sizes from 1/100 to 10,000: the largest magnitude is hardly less than 127 steps, and all are within
    half a step.

    Why: what is lost here is lost for as long as the text goes on. A scale that is twice too large costs a bit, and codes for
    another scale than the one that is stored miss by more than rounding.
    """
    for exponent in range(-2, 5):
        check_rounding(some(40, 3, 64, seed=exponent, size=10.0**exponent).to(dtype))


def test_each_vector_has_a_scale_of_its_own() -> None:
    """Four vectors, each ten times the one before; the second has its largest magnitude below zero.

    Why: keys have outliers. With one scale for a token, or for a block, a head with large keys leaves the others no digits.
    """
    x = torch.tensor([[0.2, -0.1, 0.05, 0.0], [1.0, -2.0, 0.5, 0.0], [20.0, 5.0, -10.0, 0.0], [-200.0, -50.0, -100.0, -20.0]])
    codes, scales = rounded(x.view(2, 2, 4))
    check_close(scales.float().flatten() / torch.tensor([0.2, 2, 20, 200]), torch.full((4,), 1 / 127), "scales / largest", 1e-4)
    check_equal(codes.view(4, 4), [[127, -63, 32, 0], [63, -127, 32, 0], [127, 32, -63, 0], [-127, -32, -63, -13]], "codes")


def test_rounding_a_negated_vector_negates_it() -> None:
    """Codes of −x are those of x with the other sign; none is −128.

    Why: a byte has one number more below zero than above. Kernels take magnitudes of 127 at most for granted.
    """
    x = some(200, 16, seed=3)
    (codes, scales), (others, same) = rounded(x), rounded(-x)
    check_equal(others, -codes, "codes of −x")
    check_equal(same, scales, "scales of −x")
    check_equal(int(codes.abs().max()), 127, "the largest magnitude of a code")
    check_equal(int(codes.min()), -127, "the smallest code")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    """A vector of zeros among others, and vectors that are too small for a scale of float16.

    Why: a cache begins with zeros and padding has nothing else. 0 / 0 is NaN, and one NaN makes NaN of a whole answer.
    """
    x = torch.stack([torch.zeros(8), torch.ones(8), torch.full((8,), 1e-7), -torch.full((8,), 1e-7)]).to(dtype)
    codes, scales = rounded(x)
    check_equal(codes, [[0] * 8, [127] * 8, [0] * 8, [0] * 8], "codes")
    check_equal(scales[[0, 2, 3]], [0.0] * 3, "scales of zeros and of what is next to nothing")


def test_what_is_small_is_never_more_than_127_steps() -> None:
    """Magnitudes of which float16 keeps a few digits of the scale only: codes are the nearest ones, and end at ±127.

    Why: below 0.008 / 127 such a scale may be a third too small, and a code of 170 has no place in a byte: it becomes −86.
    """
    x = torch.tensor([1.0, -1.0, 0.5, -0.25]) * torch.logspace(-6, -2, 200)[:, None]
    codes, scales = rounded(x)
    steps = scales.double()[:, None]
    nearest = torch.where(steps == 0, 0.0, (x.double() / steps.masked_fill(steps == 0, 1.0))).clamp(-127, 127)
    off = (codes.double() - nearest).abs()
    assert (off <= 0.50001).all(), f"row {int(off.amax(-1).argmax())}: a code is {off.max():.3f} from the nearest one"


def test_what_is_large_stays_finite() -> None:
    """Magnitudes up to 1e30, beyond what any scale of float16 reaches.

    Why: some models have single keys in the thousands. An infinite scale times a code of 0 is NaN.
    """
    x = torch.tensor([[1e30, 0.0, -1e30], [2e7, -1.0, 8.3e6], [8.0e6, -4.0e6, 65504.0]])
    codes, scales = rounded(x)
    check_equal(scales[:2], [LARGEST_SCALE] * 2, "scales")
    check_equal(codes[:2], [[127, 0, -127], [127, 0, 127]], "codes")
    check_rounding(x[2:])
    read = read_quantized(codes, scales, torch.arange(3), torch.empty(3, 3))
    check_equal(bool(read.isfinite().all()), True, "whether what is read is finite")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_vectors_are_within_half_a_step(rows: list[list[float]]) -> None:
    """Any numbers within a million, zeros and tiny ones among them.

    Why: a rule that holds for what is drawn from a bell curve need not hold for what a model makes.
    """
    x = torch.tensor(rows)
    before = x.clone()
    check_rounding(x[(x.abs().amax(-1) / 127) >= SMALLEST])
    codes, scales = rounded(x)
    check_equal(bool((codes[scales == 0] == 0).all()), True, "whether codes without a scale are zeros")
    check_equal(x, before, "what was given")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_tokens_go_to_their_slots_with_their_scales(dtype: torch.dtype) -> None:
    """Seven tokens of two heads into slots in any order of a cache of 5 blocks of 4; all other slots stay as they were.

    Why: a scale beside another's codes is another vector, and nobody notices: all is finite, and of the right size.
    """
    slots, generator = torch.tensor([6, 0, 19, 7, 3, 12, 8]), torch.Generator().manual_seed(1)
    key, value = some(7, 2, 16, seed=1).to(dtype), some(7, 2, 16, seed=2, size=30.0).to(dtype)
    cache = torch.randint(-127, 128, (2, 5, 4, 2, 16), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, 5, 4, 2, generator=generator).half()
    old_cache, old_scales, given = cache.clone(), scales.clone(), [x.clone() for x in (key, value, slots)]
    write_quantized(key, value, cache, scales, slots)
    for half, x in enumerate((key, value)):
        name, steps = ("keys", "values")[half], scales[half].flatten(0, 1)[slots].double()
        stored = cache[half].flatten(0, 1)[slots].double() * steps[..., None]
        off = (stored - x.double()).abs() / steps[..., None]
        assert (off <= 0.50001).all(), f"{name}: token {int(off.amax((1, 2)).argmax())} is not what its slot holds"
        assert (steps * 127 <= x.double().abs().amax(-1) * 1.003).all(), f"{name}: a scale is larger than its vector needs"
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    check_equal(cache.flatten(1, 2)[:, others].flatten(), old_cache.flatten(1, 2)[:, others].flatten(), "codes of other slots")
    check_equal(scales.flatten(1, 2)[:, others].flatten(), old_scales.flatten(1, 2)[:, others].flatten(), "scales of others")
    for ours, theirs, name in zip((key, value, slots), given, ("keys", "values", "slots"), strict=True):
        check_equal(ours.flatten(), theirs.flatten(), f"{name} that were given")


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_rows_are_read_as_code_times_scale(kind: torch.dtype) -> None:
    """Rows in any order, one of them twice, into memory that holds NaN; scales with all digits of float16.

    Why: the product of two numbers of 8 and 11 bits has 18, which float32 holds and float16 rounds. Scratch memory is never
    clean.
    """
    codes = torch.randint(-127, 128, (50, 12), generator=torch.Generator().manual_seed(4), dtype=torch.int8)
    scales = torch.rand(50, generator=torch.Generator().manual_seed(5)).half()
    rows, out = torch.tensor([49, 3, 3, 0, 17], dtype=kind), torch.full((5, 12), torch.nan)
    before = codes.clone(), scales.clone()
    result = read_quantized(codes, scales, rows, out)
    expected = codes[rows.long()].double() * scales[rows.long()].double()[:, None]
    check_equal(out.double().flatten(), expected.flatten(), "what is in `out`")
    check_equal(result.data_ptr(), out.data_ptr(), "where the result lies")
    check_equal(codes.flatten(), before[0].flatten(), "codes of the cache")
    check_equal(scales, before[1], "scales of the cache")


def test_a_part_of_wider_rows_is_filled() -> None:
    """`out` is the right half of rows of 8, as where a vector lies in two halves of the cache.

    Why: models with latents read so. What is beside it is the other half, and no memory to write to.
    """
    codes, scales = torch.tensor([[1, -2, 3, -4], [5, 6, 7, 127]], dtype=torch.int8), torch.tensor([0.5, 2.0]).half()
    whole = torch.full((3, 8), 9.0)
    read_quantized(codes, scales, torch.tensor([1, 0, 1]), whole[:, 4:])
    right = [[10, 12, 14, 254], [0.5, -1, 1.5, -2], [10, 12, 14, 254]]
    check_equal(whole.flatten(), torch.tensor([[9.0] * 4 + row for row in right]).flatten(), "the rows")


def test_reading_a_few_rows_makes_floats_of_a_few() -> None:
    """Three rows of 4,000: nothing larger than three rows comes to be.

    Why: the cache is gigabytes, and a sequence's part of it is read in each layer of each step.
    """
    codes, scales = torch.ones(4000, 16, dtype=torch.int8), torch.ones(4000).half()
    rows, out = torch.tensor([7, 3999, 0]), torch.empty(3, 16)
    with Operations() as operations:
        read_quantized(codes, scales, rows, out)
    assert operations.largest <= out.numel(), f"a tensor of {operations.largest} numbers was made"
    check_equal(out.flatten(), [1.0] * 48, "the rows")


def test_attention_over_bytes_is_nearly_that_over_floats() -> None:
    """A prompt of 21 tokens and then one more, in blocks of 4 that lie in any order, beside attention over the floats.

    Why: this is what it is for. All that you wrote has part in it: the answer is off by one in a hundred, not by a half.
    """
    heads, size, blocks = 3, 16, torch.tensor([[4, 0, 7, 2, 9, 5]], dtype=torch.int32)
    key, value, query = (some(22, heads, size, seed=seed) * torch.tensor([0.1, 1, 10])[:, None] for seed in range(3))
    backend = TorchBackend()
    cache, scales = torch.zeros(2, 10, 4, heads, size, dtype=torch.int8), torch.zeros(2, 10, 4, heads, dtype=torch.float16)
    found = []
    for first, end in ((0, 21), (21, 22)):
        places = torch.arange(first, end)
        metadata = AttentionMetadata(
            blocks[0, places // 4].long() * 4 + places % 4, blocks, torch.tensor([0, end - first], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32), [cache], end - first, end, backend, kv_scales=[scales],
        )  # fmt: skip
        metadata.plan = backend.plan(metadata, None)
        found.append(backend.attend(0, query[first:end], key[first:end], value[first:end], metadata, 0.25))
    q, k, v = (x.transpose(0, 1).double() for x in (query, key, value))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25).transpose(0, 1)
    for head in range(heads):
        off = torch.cat(found)[:, head].double() - expected[:, head]
        error = float(off.norm() / expected[:, head].norm())
        assert error < 0.05, f"head {head}: attention is off by {100 * error:.1f} % of its size"
