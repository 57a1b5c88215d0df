"""Task 4.3: weights to the nearest value that their group can say, and codes packed into words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.course.fixtures.checks import check_close, check_equal
from stages.quantization.layout.groups import (
    GroupQuantized,
    group_parameters,
    pack_int32,
    quantize_columns,
    quantize_groups,
    unpack_int32,
)


@pytest.mark.parametrize(
    ("weights", "bits", "symmetric", "scale", "zero"),
    [
        ([-1.0, 0.0, 2.0], 4, False, 3 / 15, 5),
        ([-1.0, 1.2], 4, False, 2.2 / 15, 7),  # the zero would be 6.8
        ([1.0, 3.0], 4, False, 3 / 15, 0),  # the range is made to hold 0
        ([-3.0, -1.0], 4, False, 3 / 15, 15),
        ([-1.0, 0.5], 4, True, 1 / 7, 8),
        ([-0.5, 1.0], 4, True, 1 / 7, 8),
        ([-1.0, 2.0], 8, False, 3 / 255, 85),
        ([-1.0, 2.0], 8, True, 2 / 127, 128),
        ([-1e-6, 0.0, 2e-6], 4, False, 2e-7, 5),
        ([-1e-30, 0.0, 2e-30], 4, False, 2e-31, 5),
        ([-1e-30, 0.0, 7e-30], 4, True, 1e-30, 8),
        ([0.0, 0.0], 4, False, 1.0, 0),
        ([0.0, 0.0], 4, True, 1.0, 8),
    ],
)
def test_scale_and_zero_of_a_group(weights: list[float], bits: int, symmetric: bool, scale: float, zero: float) -> None:
    """The range from the least to the largest weight, 0 included, in 2^bits - 1 steps; symmetric, the largest magnitude in
    2^(bits-1) - 1.

    Why: a scale too small cuts the large weights off, one too large wastes codes; a zero that is no whole number fits no file.
    """
    scales, zeros = group_parameters(torch.tensor([weights, [9.0] * len(weights)]), bits, symmetric)  # each row by itself
    check_close(scales[:1] / scale, torch.ones(1), f"scale, which should be {scale:g}, by that")
    zeros = zeros[:1]
    check_close(zeros, torch.tensor([float(zero)]), "zero")


def test_zeros_that_need_not_be_whole_fit_the_range_exactly() -> None:
    """Without whole zeros the least weight is code 0 and the largest the last, whether 0 lies between them or not.

    Why: weights that came in 4 bits, as in the default model's file, then stay what they were.
    """
    weight = torch.tensor([[1.0, 1.5, 4.0], [-2.0, -1.0, 1.0]])
    scales, zeros = group_parameters(weight, 4, symmetric=False, whole_zeros=False)
    check_close((0 - zeros) * scales, torch.tensor([1.0, -2.0]), "value of code 0")
    check_close((15 - zeros) * scales, torch.tensor([4.0, 1.0]), "value of code 15")


def test_codes_are_the_nearest_and_never_out_of_range() -> None:
    """Each row has its scale and zero; what lies outside gets the first or the last code.

    A zero that is no whole number is added before rounding.

    Why: a code of 16 does not fit 4 bits, and spills into its neighbour. And what is no whole number fits none.
    """
    codes = quantize_columns(torch.tensor([[0.24, 0.26, -9.0, 9.0], [2.4, 2.6, -90.0, 90.0]]),
                             torch.tensor([0.1, 1.0]), torch.tensor([5.0, 5.0]), 4)  # fmt: skip
    check_equal(codes.tolist(), [[7, 8, 0, 15], [7, 8, 0, 15]], "codes")
    wide = quantize_columns(torch.tensor([[-9.0, 0.5, 20.0, 99.0]]), torch.tensor([0.1]), torch.tensor([5.0]), 8)
    check_equal(wide.tolist(), [[0, 10, 205, 255]], "codes of 8 bits")
    between = quantize_columns(torch.tensor([[2.375, 0.5, -0.125]]), torch.ones(1), torch.tensor([0.25]), 4)
    check_equal(between.tolist(), [[3, 1, 0]], "codes with a zero of a quarter")


def test_dequantizing_undoes_groups_and_order() -> None:
    """(code - zero) * scale with the group's own, a short last group, and columns back where they were.

    Why: a scale that is one group off is a model that speaks, only worse, and nobody sees why.
    """
    codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    weight = GroupQuantized(codes, torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([[0.0, 1.0, 2.0]]), 4, 2)
    check_close(weight.dequantize(), torch.tensor([[1.0, 2.0, 20.0, 30.0, 300.0]]), "weights")
    weight.order = torch.tensor([4, 0, 3, 1, 2])
    check_close(weight.dequantize(), torch.tensor([[2.0, 30.0, 300.0, 20.0, 1.0]]), "weights in their own order")
    check_equal(weight.codes.tolist(), codes.tolist(), "the codes, which stay")
    below = GroupQuantized(codes, torch.tensor([[1.0]]), torch.tensor([[3.0]]), 4, 5)
    check_close(below.dequantize(), torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]]), "weights below zero")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 999), size=st.sampled_from([-1, 1, 3, 8]), columns=st.integers(1, 20), symmetric=st.booleans())
def test_rounding_to_nearest_is_within_half_a_step(seed: int, size: int, columns: int, symmetric: bool) -> None:
    """Whole: quantize and dequantize. No weight is further than half a step from its value, but for the rounded zero.

    Why: this is all that rounding promises; what is worse has a mistake in a scale or a group.
    """
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed))
    quantized = quantize_groups(weight, 4, size, symmetric)
    width = columns if size == -1 else size
    steps = quantized.scales.repeat_interleave(width, dim=1)[:, :columns]
    error = (quantized.dequantize() - weight).abs()
    limit = 0.5 if symmetric else 1.0
    check_equal(bool((error <= limit * steps + 1e-6).all()), True, "all errors within the limit")


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, [0x87654321]),
        ([15, 0, 0, 0, 0, 0, 0, 15], 4, [0xF000000F]),
        ([0] * 8 + [1] + [0] * 7, 4, [0, 1]),
        ([1, 2, 3, 255], 8, [0xFF030201]),
    ],
)
def test_the_first_code_lies_in_the_lowest_bits(codes: list[int], bits: int, words: list[int]) -> None:
    """Words as every reader of the format expects them, bit 31 included.

    Why: a file packed the other way round loads without a word, and the model talks gibberish.
    """
    for kind in (torch.uint8, torch.int64):  # codes come as bytes
        packed = pack_int32(torch.tensor(codes, dtype=kind), bits)
        check_equal(packed.dtype, torch.int32, "type of the words")
        check_equal([word % 2**32 for word in packed.tolist()], words, f"words of codes in {kind}")
    signed = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)
    unpacked = unpack_int32(signed, bits)
    check_equal(unpacked.tolist(), codes, "codes again")
    check_equal(unpacked.dtype, torch.uint8, "type of the codes")


def test_packing_works_along_the_last_dimension() -> None:
    """[2, 3, 16] codes are [2, 3, 2] words, and back.

    Why: files pack matrices, kernels pack panels.
    """
    codes = torch.randint(0, 16, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    packed = pack_int32(codes, 4)
    check_equal(list(packed.shape), [2, 3, 2], "shape")
    check_equal(unpack_int32(packed, 4).tolist(), codes.tolist(), "codes again")
    across = pack_int32(codes.to(torch.uint8).transpose(0, 1).contiguous().transpose(0, 1), 4)
    check_equal(across.tolist(), packed.tolist(), "words of codes that lie in memory in another order")
    matrix = codes[0].to(torch.uint8)
    for columns in (matrix.t().contiguous().t(), matrix.repeat_interleave(2, dim=1)[:, ::2]):
        check_equal(pack_int32(columns, 4).tolist(), packed[0].tolist(), "words of a matrix that lies in memory otherwise")


def test_codes_that_do_not_fill_a_word_are_refused() -> None:
    """9 codes of 4 bits are a ValueError that says so.

    Why: padding without a word would shift every row behind the first.
    """
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack_int32(torch.zeros(9, dtype=torch.int64), 4)
