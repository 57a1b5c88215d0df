"""Task 4.6: words of eight weights become numbers in registers, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; there is one for Linux: pip install triton")
from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.kernels import DEVICE, contained, guarded
from stages.quantization.kernels.w4a16_triton import TritonLinear
from stages.quantization.layout.groups import GroupQuantized


def quantized(outputs: int, inputs: int, size: int, *, scale: float | None = None, zero: float | None = None) -> GroupQuantized:
    """Random codes; scales and zeros random too, or all the same."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    groups = -(-inputs // size)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.1 + 0.01).half().float()
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator).float()
    scales = scales if scale is None else torch.full_like(scales, scale)
    zeros = zeros if zero is None else torch.full_like(zeros, zero)
    return GroupQuantized(codes.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE), 4, size)


def dense(weight: GroupQuantized) -> Tensor:
    """The matrix in float64, a weight at a time."""
    outputs, inputs = weight.shape
    codes, scales, zeros = weight.codes.tolist(), weight.scales.tolist(), weight.zeros.tolist()
    rows = [
        [(codes[o][k] - zeros[o][k // weight.group_size]) * scales[o][k // weight.group_size] for k in range(inputs)]
        for o in range(outputs)
    ]
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)


def product(weight: GroupQuantized, x: Tensor, splits: int = 1) -> Tensor:
    """What the kernel gives for x, which has to be of x's type. Nothing may be read behind words, scales and zeros."""
    linear = TritonLinear(weight, splits)
    linear.packed, linear.scales, linear.zeros = map(guarded, (linear.packed, linear.scales, linear.zeros))

    def compute() -> Tensor:
        out = linear(x)
        assert out.dtype == x.dtype, f"the outputs are {out.dtype}, the inputs {x.dtype}"
        return out

    return contained(compute, len(x), weight.shape[0], device=DEVICE)


def exact(weight: GroupQuantized, x: Tensor) -> Tensor:
    return (x.double() @ dense(weight).T).float().cpu()


def random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(DEVICE)


def test_every_input_meets_its_own_code() -> None:
    """Inputs that are 1 at one place and 0 elsewhere give the codes back, a column at a time.

    Why: with the eight codes of a word in another order every product is wrong, and no number looks odd.
    """
    weight = quantized(64, 32, 32, scale=1.0, zero=0.0)
    got = product(weight, torch.eye(32, device=DEVICE))
    check_equal(got.long().tolist(), weight.codes.long().t().tolist(), "weights, [K, N]")


@pytest.mark.parametrize("zero", [None, 7.25, -3.5])
def test_a_code_stands_for_a_number(zero: float | None) -> None:
    """(code - zero) * scale, each output with its own scale and zero, also where the number is negative, and where the zero is
    no whole number.

    Why: without the zero all weights are positive, and every output is off by the sum of the inputs. Files whose 4 bits were no
    code of ours have zeros between two codes.
    """
    weight = quantized(64, 32, 32, zero=zero)
    got = product(weight, torch.eye(32, device=DEVICE))
    check_close(got, dense(weight).t().float().cpu(), "weights, [K, N]")


@pytest.mark.parametrize(("inputs", "size"), [(64, 32), (192, 64), (96, 96)])
def test_every_group_has_its_own_scale(inputs: int, size: int) -> None:
    """Groups of one tile, of two, and one for the whole row.

    Why: a group may be larger than a tile: the tile's number is not the group's.
    """
    weight = quantized(72, inputs, size)
    x = random(3, inputs)
    check_close(product(weight, x), exact(weight, x), "outputs")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 35, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (63, 40), (65, 72), (130, 40), (8, 8)])
def test_rows_outputs_and_inputs_end_where_they_like(rows: int, outputs: int, inputs: int) -> None:
    """No size is a multiple of its tile; what lies beside a row of x is NaN, and behind its last one, as behind words, scales
    and zeros, there is no memory.

    Why: a load without its mask brings in a stranger's numbers, and a store without its mask overwrites them. Behind the last
    tensor of a card's memory a load ends everything.
    """
    weight = quantized(outputs, inputs, inputs)
    stride = inputs + 40
    memory = guarded(torch.full(((rows - 1) * stride + inputs,), torch.nan, device=DEVICE))
    x = memory.as_strided((rows, inputs), (stride, 1)).copy_(random(rows, inputs))
    check_close(product(weight, x), exact(weight, x), "outputs", 1e-4)


@pytest.mark.parametrize(("inputs", "splits"), [(128, 2), (128, 4), (96, 2), (104, 3), (64, 4)])
def test_parts_of_the_inputs_add_up(inputs: int, splits: int) -> None:
    """Each part is a program's own; the last may be short, or have no inputs at all.

    Why: a decode step has one row, too few tiles of outputs to keep a card busy; parts of the inputs do.
    """
    weight = quantized(72, inputs, 32)
    x = random(3, inputs)
    check_close(product(weight, x, splits), exact(weight, x), "outputs", 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Inputs and outputs in 16 bits, sums in 32.

    Why: a sum of a thousand products in 16 bits stops growing, because what is added is smaller than its last bit.
    """
    weight = quantized(64, 256, 64)
    x = random(4, 256).to(dtype)
    expected = exact(weight, x)
    largest = expected.abs().max()
    check_close(product(weight, x) / largest, expected / largest, "outputs, by the largest", tolerance)


def test_sums_are_float32() -> None:
    """4,096 products of 1 and 1 are 4,096 in bfloat16 too.

    Why: kept in bfloat16 the sum stands still at 256.
    """
    weight = quantized(16, 4096, 4096, scale=1.0, zero=0.0)
    weight.codes.fill_(1)
    got = product(weight, torch.ones(1, 4096, dtype=torch.bfloat16, device=DEVICE))
    check_equal(got.tolist(), [[4096.0] * 16], "outputs")


def test_small_products_count_beside_a_large_sum() -> None:
    """1,024 and then 64 times 1, far apart, are 1,088 in bfloat16 too, whose neighbours of 1,024 are 1,020 and 1,032.

    Why: a kernel adds up tile by tile. Kept in bfloat16 between two tiles, the sum stands still however many come.
    """
    weight = quantized(16, 65 * 64, 65 * 64, scale=1.0, zero=0.0)
    weight.codes.fill_(1)
    x = torch.zeros(1, 65 * 64, dtype=torch.bfloat16, device=DEVICE)
    x[0, ::64] = 1.0
    x[0, 0] = 1024.0
    check_equal(product(weight, x).tolist(), [[1088.0] * 16], "outputs")


def test_a_small_product_counts_in_its_own_tile() -> None:
    """256 and 1 in the first tile, -256 in the second: the sum is 1 in bfloat16 too, in which 257 is none.

    Why: a tile's sum that is rounded to the inputs' type on its way loses what the next tile does not give back.
    """
    weight = quantized(16, 64, 64, scale=1.0, zero=0.0)
    weight.codes.fill_(1)
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0], x[0, 1], x[0, 32] = 256.0, 1.0, -256.0
    check_equal(product(weight, x).tolist(), [[1.0] * 16], "outputs")


def test_rows_that_lie_further_apart_than_32_bits_count() -> None:
    """Three rows in bfloat16, 2^30 numbers apart, of which nobody touches what lies between.

    Why: a prompt of 70,000 tokens has more than 2^31 inputs in a wide layer. A place in 32 bits is then one before the
    beginning.
    """
    weight = quantized(16, 64, 64)
    memory = torch.empty(2 * 2**30 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((3, 64), (2**30, 1)).copy_(random(3, 64))
    expected = exact(weight, x)
    largest = expected.abs().max()
    check_close(product(weight, x) / largest, expected / largest, "outputs, by the largest", 2e-2)
