"""Group quantization and packing, against arithmetic written out in the test."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.quantization.layout.groups import pack_int32, quantize_groups, unpack_int32


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**16), bits=st.sampled_from([4, 8]), size=st.sampled_from([-1, 1, 7, 8, 9, 32]),
    columns=st.integers(1, 40), symmetric=st.booleans(), shift=st.sampled_from([0.0, 3.0, -3.0]),
)  # fmt: skip
def test_each_weight_becomes_the_nearest_value_that_its_group_can_say(seed, bits, size, columns, symmetric, shift):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) + shift
    quantized = quantize_groups(weight, bits, size, symmetric)
    width = columns if size == -1 else size
    assert quantized.scales.shape == quantized.zeros.shape == (3, math.ceil(columns / width))
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    restored = quantized.dequantize()
    for row in range(3):
        for column in range(columns):
            scale = float(quantized.scales[row, column // width])
            zero = float(quantized.zeros[row, column // width])
            assert zero == round(zero)
            values = [(code - zero) * scale for code in range(2**bits)]
            nearest = min(abs(value - float(weight[row, column])) for value in values)
            assert abs(float(restored[row, column]) - float(weight[row, column])) <= nearest + 1e-6
            group = weight[row, column // width * width :][:width].tolist()
            low, high = min(0.0, *group), max(0.0, *group)
            step = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
            assert scale == pytest.approx(step, rel=1e-5)
            assert abs(float(restored[row, column]) - float(weight[row, column])) <= step * 1.001


def test_groups_of_nothing_but_zeros_stay_zero():
    for symmetric in (False, True):
        assert torch.equal(quantize_groups(torch.zeros(2, 8), 4, 4, symmetric).dequantize(), torch.zeros(2, 8))


def test_a_column_order_is_undone():
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    quantized = quantize_groups(weight[:, order], 8, 8)
    quantized.order = order
    assert (quantized.dequantize() - weight).abs().max() < 0.02


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_packing_puts_the_first_code_in_the_lowest_bits(bits, data):
    in_word = 32 // bits
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=in_word, max_size=3 * in_word))
    codes = codes[: len(codes) // in_word * in_word]
    packed = pack_int32(torch.tensor(codes), bits)
    words = [sum(c << (bits * i) for i, c in enumerate(codes[w : w + in_word])) for w in range(0, len(codes), in_word)]
    assert packed.dtype == torch.int32
    assert [word % 2**32 for word in packed.tolist()] == words
    assert unpack_int32(packed, bits).tolist() == codes


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(2, 8), {"bits": 3}, "bits must be 4 or 8, got 3"),
        (torch.ones(2, 8), {"group_size": 0}, "group_size must be at least 1, or -1 for whole rows, got 0"),
        (torch.ones(8), {}, "a matrix"),
        (torch.full((2, 8), torch.nan), {}, "NaN or infinity"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_groups(weight, **arguments)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="9 codes of 4 bits do not fill whole 32-bit words; 8 fit one"):
        pack_int32(torch.zeros(2, 9, dtype=torch.uint8), 4)
