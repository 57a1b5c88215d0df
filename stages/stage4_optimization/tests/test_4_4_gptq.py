"""Task 4.4: a column is rounded, and the columns that are still whole make up for its error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.course.fixtures.checks import check_close, check_equal
from stages.quantization import gptq
from stages.quantization.gptq import fix_columns, gptq_quantize, inverse_factor
from stages.quantization.layout.groups import GroupQuantized, quantize_groups
from stages.tests.quantization_cases import correlated, optimal_brain_quantization, random_weight


def damped(x: Tensor) -> Tensor:
    hessian = (x.T @ x).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def fixed(weight: Tensor, factor: Tensor, size: int, symmetric: bool = False, bits: int = 4) -> GroupQuantized:
    return GroupQuantized(*fix_columns(weight.clone(), factor, bits, size, symmetric), bits, size)


def test_the_factor_of_a_two_by_two() -> None:
    """H = [[2, 1], [1, 1]] has the inverse [[1, -1], [-1, 2]], which is U^T U for U = [[1, -1], [0, 1]].

    Why: its row says what the second column does when the first is off by 1; the lower factor has it the other way round.
    """
    factor = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    check_close(factor, torch.tensor([[1.0, -1.0], [0.0, 1.0]]), "U")
    check_equal(factor.dtype, torch.float32, "type of U")


@pytest.mark.parametrize("size", [1, 5, 24])
def test_the_factor_gives_the_inverse(size: int) -> None:
    """U is upper triangular with a positive diagonal, and U^T U H = 1.

    Why: every step divides by the diagonal and multiplies with a row; with another factor the error goes where it does harm.
    """
    hessian = damped(correlated(4 * size, size))
    factor = inverse_factor(hessian).double()
    check_equal(bool((factor.diagonal() > 0).all() and torch.equal(factor, factor.triu())), True, "upper, diagonal > 0")
    check_close(factor.T @ factor @ hessian, torch.eye(size, dtype=torch.float64), "U^T U H", 1e-4)


def test_inputs_that_go_together_are_inverted_exactly() -> None:
    """H = 10⁶ v vᵀ + 1: the factor agrees with NumPy's in float64 to a ten-thousandth.

    Why: inputs that go together make H nearly singular. In float32 what is left of the ones is off by several percent.
    """
    v = np.linspace(0.5, 1.5, 8)
    hessian = 1e6 * np.outer(v, v) + np.eye(8)
    expected = torch.tensor(np.linalg.cholesky(np.linalg.inv(hessian)).T.copy())
    check_close(inverse_factor(torch.tensor(hessian)).double(), expected, "U", 1e-4)


@pytest.mark.parametrize("hessian", [torch.zeros(3, 3), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.full((2, 2), torch.nan)])
def test_what_cannot_be_inverted_is_one_clear_error(hessian: Tensor) -> None:
    """A Hessian that is not positive definite is a ValueError that says what to do.

    Why: that is what too little calibration text gives, and the person at the terminal has never heard of Cholesky.
    """
    with pytest.raises(ValueError, match="use more calibration samples or a larger --damping"):
        inverse_factor(hessian.double())


def test_the_second_column_takes_back_the_firsts_error() -> None:
    """One row [0.6, 0.6, 15], one scale of 1: 0.6 becomes 1, an error of -0.4 over U_00 = 1; the rest moves by 0.4 of U's row.

    Why: this one line is GPTQ. With U = [[1, -1, 0], ...] the second 0.6 becomes 0.2, and so 0; rounding alone gives 1 again.
    """
    factor = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    codes, scales, zeros = fix_columns(torch.tensor([[0.6, 0.6, 15.0]]), factor, 4, 3, False)
    check_close(scales, torch.tensor([[1.0]]), "scale")
    check_close(zeros, torch.tensor([[0.0]]), "zero")
    check_equal(codes.tolist(), [[1, 0, 15]], "codes")
    check_equal(codes.dtype, torch.uint8, "type of the codes")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "size", "bits"), [(12, 4, 4), (10, 4, 8), (7, 7, 8), (130, 16, 4)])
def test_inputs_that_have_nothing_to_do_with_each_other(columns: int, size: int, bits: int, symmetric: bool) -> None:
    """With a diagonal Hessian no column can help another: the result is rounding to nearest, codes, scales and zeros, in 4 bits
    and in 8.

    Why: GPTQ is worth its time only as far as inputs go together; whatever differs here is a mistake.
    """
    weight = random_weight(3, columns)
    result = fixed(weight, torch.eye(columns), size, symmetric, bits)
    rounded = quantize_groups(weight, bits, size, symmetric)
    check_equal(result.codes.tolist(), rounded.codes.tolist(), "codes")
    check_close(result.scales, rounded.scales, "scales")
    check_close(result.zeros, rounded.zeros, "zeros")


@pytest.mark.parametrize(("columns", "size"), [(16, 16), (24, 8), (20, 8), (127, 127), (128, 32), (129, 64), (300, 50)])
def test_as_the_optimal_brain_surgeon(columns: int, size: int) -> None:
    """The slow algorithm, with an inverse that shrinks column by column, rounds nearly all weights to the same values.

    Why: the Cholesky factor is only a cheaper way to the same numbers, also across groups and across whatever blocks you make.
    """
    weight, x = random_weight(4, columns), correlated(4 * columns, columns)
    expected = optimal_brain_quantization(weight.numpy(), (x.T @ x).numpy(), 4, size, 0.01)
    got = fixed(weight, inverse_factor(damped(x)), size).dequantize().double().numpy()
    step = float(weight.max() - weight.min()) / 15
    same = float((np.abs(got - expected) < 0.05 * step).mean())  # a weight between two codes may fall either way
    assert same > 0.97, f"{same:.0%} of the weights are rounded as by the slow algorithm; at least 97 % should be"


def test_scales_are_made_when_their_group_begins() -> None:
    """The second group's weights have moved when its turn comes, and its scale fits them as they are then.

    Why: with the scale of the weights as they were, those that have grown are cut off.
    """
    factor = torch.eye(4)
    factor[0, 2] = -30.0  # whatever column 0 is off by moves column 2 thirty times as much
    weight = torch.tensor([[0.6, 15.0, 0.5, 1.0]])
    _, scales, _ = fix_columns(weight.clone(), factor, 4, 2, False)
    error = 0.6 - 1.0
    check_close(scales, torch.tensor([[1.0, (1.0 - min(0.5 + 30 * error, 0.0)) / 15]]), "scales")


@pytest.mark.parametrize("size", [16, 96])
def test_the_output_is_nearer_than_with_rounding(size: int) -> None:
    """Whole: on inputs that go together the outputs' squared error is less than 60 % of rounding's.

    Why: that is what the hours of calibration are for. The weights themselves are further off than rounded ones.
    """
    weight, x = random_weight(16, 96), correlated(400, 96)
    errors = [
        float(((quantized.dequantize() - weight) @ x.T).square().sum())
        for quantized in (gptq_quantize(weight, x.T @ x, 4, size), quantize_groups(weight, 4, size))
    ]
    assert errors[0] < 0.6 * errors[1], f"the error is {errors[0] / errors[1]:.0%} of rounding's"


def test_the_number_of_columns_in_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are for speed: with `BLOCK` at 1, 40 or 1000 the weights are the same, up to ties.

    Why: an error that is handed on twice, or not at all at a block's end, is found nowhere else.
    """
    weight, factor = random_weight(4, 96), inverse_factor(damped(correlated(400, 96)))
    expected = fixed(weight, factor, 16).dequantize()
    for block in (1, 40, 1000):
        monkeypatch.setattr(gptq, "BLOCK", block)
        same = float((fixed(weight, factor, 16).dequantize() - expected).abs().lt(1e-4).float().mean())
        assert same > 0.97, f"with BLOCK = {block} only {same:.0%} of the weights are the same"
