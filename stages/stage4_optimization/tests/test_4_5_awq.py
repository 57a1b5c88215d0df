"""Task 4.5: which columns are made larger before they are rounded, and by how much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.course.fixtures.checks import check_close, check_equal
from stages.quantization import awq
from stages.quantization.awq import output_error, search_scale
from stages.quantization.layout.groups import quantize_groups
from stages.tests.quantization_cases import random_weight


def inputs(count: int, size: int, seed: int = 0) -> Tensor:
    """[count, size] inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.exp(1.2 * torch.randn(size, generator=generator))
    return torch.randn(count, size, generator=generator) * loud


def candidate(magnitude: Tensor, step: int) -> Tensor:
    scale = magnitude ** (step / 20)
    return scale / (scale.max() * scale.min()).sqrt()


def test_the_error_of_outputs_on_paper() -> None:
    """d = (1, 2), C = [[1, 1], [1, 3]]: d C dT = 1 + 2 + 2 + 12 = 17; a row of zeros makes none.

    Why: the covariance says all about the inputs that this error needs, so they need not be kept.
    """
    difference = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    check_close(output_error(difference, torch.tensor([[1.0, 1.0], [1.0, 3.0]])), torch.tensor([17.0, 0.0, 1.0]), "errors")


def test_the_error_is_the_mean_over_inputs() -> None:
    """For x with mean of x xT = C it is the mean of (d x) squared, for each output by itself.

    Why: a sum over the wrong axis mixes outputs, and the search then pleases the largest of them.
    """
    difference, x = random_weight(5, 12), inputs(200, 12)
    expected = (x @ difference.T).square().mean(dim=0)
    got = output_error(difference, x.T @ x / len(x))
    check_close(got / expected, torch.ones(5), "errors, by those of the inputs themselves", 1e-4)


def test_the_best_of_the_grid_is_taken() -> None:
    """The scale is magnitude ** (step / 20), for the step whose matrix, rounded and scaled back, has the least error.

    Why: rounding is not smooth, so nobody knows beforehand which exponent is best; twenty are tried.
    """
    weight, x = random_weight(8, 64), inputs(300, 64)
    magnitude = x.abs().mean(dim=0)
    errors = []
    for step in range(20):
        scale = candidate(magnitude, step)
        rounded = quantize_groups(weight * scale, 4, 16).dequantize() / scale
        errors.append(float((x @ (rounded - weight).T).square().mean()))
    best = errors.index(min(errors))
    assert best > 0, "these inputs were to need a scale"
    scale = search_scale(weight, magnitude, x.T @ x / len(x), 4, 16, False)
    check_close(scale, candidate(magnitude, best), f"the scale, which is that of step {best}")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "size", "outputs"), [(4, 16, 6), (4, -1, 48), (8, 16, 6), (4, 16, 48)])
def test_rounding_is_that_of_the_recipe(bits: int, size: int, outputs: int, symmetric: bool) -> None:
    """Bits, group size and symmetry are those that the weights will be rounded with; the matrix may be square.

    Why: the best scale for groups of 16 is not the best for whole rows. And a square matrix says nothing if its outputs are
    scaled in place of its inputs.
    """
    weight, x = random_weight(outputs, 48, seed=2), inputs(200, 48, seed=3)
    magnitude, covariance = x.abs().mean(dim=0), x.T @ x / len(x)
    errors = []
    for step in range(20):
        scale = candidate(magnitude, step)
        rounded = quantize_groups(weight * scale, bits, size, symmetric).dequantize() / scale
        errors.append(float((x @ (rounded - weight).T).square().mean()))
    got = search_scale(weight, magnitude, covariance, bits, size, symmetric)
    check_close(got, candidate(magnitude, errors.index(min(errors))), "scale")


def test_inputs_that_are_alike_need_no_scale() -> None:
    """Where all magnitudes are the same every exponent gives ones, and ones come out.

    Why: a scale that is not needed is folded into a norm all the same, and rounds that.
    """
    check_equal(search_scale(random_weight(8, 32), torch.ones(32), torch.eye(32), 4, 16, False).tolist(), [1.0] * 32, "scale")


def test_no_scale_is_among_the_candidates() -> None:
    """A matrix that rounding does not change is left alone: the error of step 0 is 0, and nothing is less.

    Why: AWQ must never make a layer worse than rounding does.
    """
    weight = torch.arange(16.0).repeat(2, 1)  # the sixteen codes themselves
    magnitude = torch.linspace(0.1, 9.0, 16)
    check_equal(search_scale(weight, magnitude, torch.eye(16), 4, 16, False).tolist(), [1.0] * 16, "scale")


def test_of_equally_good_scales_the_first_is_taken() -> None:
    """A matrix of zeros is rounded without an error whatever the scale: ones come out.

    Why: the more a scale spreads, the more the 16 bits of the norm that takes it in are rounded; for nothing here.
    """
    scale = search_scale(torch.zeros(2, 16), torch.linspace(0.1, 9.0, 16), torch.eye(16), 4, 16, False)
    check_equal(scale.tolist(), [1.0] * 16, "scale")


def test_inputs_that_are_never_there_do_no_harm() -> None:
    """A channel whose magnitude is 0 counts as 0.0001: all scales are finite and greater than 0.

    Why: 0 to any power would make its weights 0 and divide by it; one dead channel ruins the layer.
    """
    weight, x = random_weight(8, 32), inputs(200, 32)
    x[:, 5] = 0
    scale = search_scale(weight, x.abs().mean(dim=0), x.T @ x / len(x), 4, 16, False)
    check_equal(bool((scale.isfinite() & (scale > 0)).all()), True, "all scales finite and positive")
    step = next(step for step in range(20) if torch.allclose(scale, candidate(x.abs().mean(dim=0).clamp_min(1e-4), step)))
    assert step > 0, "the loud channels were to get a scale"


def test_least_and_largest_are_each_others_inverse() -> None:
    """The scale is divided by the geometric mean of its least and largest.

    Why: the division ends up in 16-bit weights of a norm, which would overflow with a scale that grows without a limit.
    """
    weight, x = random_weight(8, 64), inputs(300, 64)
    scale = search_scale(weight, 1000 * x.abs().mean(dim=0), x.T @ x / len(x), 4, 16, False)
    assert scale.max() > 1.01, "these inputs were to need a scale"
    check_close(scale.max() * scale.min(), torch.tensor(1.0), "largest times least")


def test_the_weight_stays_as_it_is() -> None:
    """Candidates are tried on copies; the magnitudes stay too, those of dead channels as well.

    Why: the weight is scaled by whoever asked, once, with the scale that won. And the next matrix is given the same statistics.
    """
    weight, x = random_weight(4, 32), inputs(100, 32)
    x[:, 3] = 0
    magnitude = x.abs().mean(dim=0)
    before = weight.clone(), magnitude.clone()
    search_scale(weight, magnitude, x.T @ x / len(x), 4, 16, False)
    check_equal(weight.tolist(), before[0].tolist(), "weight")
    check_equal(magnitude.tolist(), before[1].tolist(), "magnitudes")


def test_the_grid_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `GRID` at 1 only step 0 is tried, with 2 the exponents 0 and a half.

    Why: who wants a finer search changes one number. And the last step counts like the others.
    """
    weight, x = random_weight(8, 64), inputs(300, 64)
    magnitude = x.abs().mean(dim=0)
    for grid, best in ((1, 0), (2, 10)):
        monkeypatch.setattr(awq, "GRID", grid)
        scale = search_scale(weight, magnitude, x.T @ x / len(x), 4, 16, False)
        check_close(scale, candidate(magnitude, best), f"scale with {grid} steps, which is magnitude to the {best / 20:g}")
