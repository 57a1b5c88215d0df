"""AWQ: before rounding to nearest, enlarge the weights that are multiplied by large activations.

Rounding makes an error of about half a step in every weight, and the largest weight of a group sets the step. Multiply an input
channel's weights by s > 1 and divide its activations by s: the product stays the same, and the rounding error of these weights
shrinks by s. As long as the group's largest weight hardly grows, the other weights lose nothing. The channels to scale are
those with large activations: s = (mean |x|)^α, with the one α of a few that makes the smallest error. The division is folded
into whatever comes before: a norm's weights, or the rows of the matrix that made the activations. Source: Lin et al., "AWQ:
Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024, §3.2; the clipping is in its code.

Run it: ``python -m solutions.quantization.awq --help``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import LayerInputs, Statistics
from .layerwise import Recipe, run_command
from .layout.checkpoint import QuantizedFormat
from .layout.groups import GroupQuantized, group_parameters, quantize_columns, quantize_groups

GRID = 20
"""Exponents that are tried: 0, 1 / 20, ..., 19 / 20."""
SEARCH_ROWS = 512
"""How many outputs, evenly spread, the exponents are compared on. All outputs have the same inputs, so a few are enough."""
SHRINK = tuple(1 - i / 20 for i in range(10))
"""Shares of a group's range that are tried when it is clipped, down to 55 %."""


def output_error(difference: Tensor, covariance: Tensor) -> Tensor:
    """Mean squared change of each output when the weights change by `difference` [N, K]: ``d C dᵀ`` for C the mean of x xᵀ,
    [K, K]. Returns [N]."""
    return ((difference @ covariance) * difference).sum(dim=1)


def search_scale(weight: Tensor, magnitude: Tensor, covariance: Tensor, bits: int, group_size: int, symmetric: bool) -> Tensor:
    """The factor of each input channel with which rounding to nearest changes the outputs least.

    Candidates are ``magnitude ** alpha`` for alpha = step / `GRID`, step from 0 to below `GRID`, each divided by the geometric
    mean of its least and largest so that weights stay where they were; a magnitude below 0.0001 counts as that. A candidate's
    error is that of ``Q(W s) / s`` against W, all outputs' together; of equals the first is taken.

    Args:
        weight: [N, K] float32. magnitude: [K], mean |x| of each channel. covariance: [K, K], mean of x xᵀ.

    Returns:
        s, [K] float32; ones where alpha = 0 is best.
    """
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(GRID):
        scale = magnitude.clamp_min(1e-4) ** (step / GRID)
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = quantize_groups(weight * scale, bits, group_size, symmetric).dequantize() / scale
        error = float(output_error(rounded - weight, covariance).sum())
        if error < least:
            best, least = scale, error
    return best


def quantize_clipped(weight: Tensor, covariance: Tensor, bits: int, group_size: int, symmetric: bool) -> GroupQuantized:
    """Round to nearest within a range that is cut a little where that makes the outputs' error smaller.

    Each group of a row takes the share of its range, out of `SHRINK`, that makes the least error. A group's error is taken by
    itself; with the terms that groups share, they could not be searched one by one.

    Args:
        weight: [N, K] float32. covariance: [K, K] of the inputs.
    """
    size = weight.shape[1] if group_size == -1 else group_size
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.uint8), [], []
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size]
        block = covariance[start : start + size, start : start + size]
        best_scale, best_zero = group_parameters(group, bits, symmetric)
        least = torch.full((len(weight),), float("inf"))
        for share in SHRINK:
            scale, zero = group_parameters(group * share, bits, symmetric)
            code = quantize_columns(group, scale, zero, bits)
            error = output_error((code - zero[:, None]) * scale[:, None] - group, block)
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        codes[:, start : start + size] = quantize_columns(group, best_scale, best_zero, bits)
        scales.append(best_scale)
        zeros.append(best_zero)
    return GroupQuantized(codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1), bits, size)


def quantize_layer(layer: LayerInputs, recipe: Recipe) -> dict[str, GroupQuantized]:
    """Scale and quantize the matrices of a decoder layer; what is folded into norms is noted in ``layer.changed``.

    Matrices with the same inputs have one scale: those of all experts of a layer, and with them its router is scaled.
    """
    arguments = recipe.bits, recipe.group_size, recipe.symmetric
    scaled = dict(layer.inputs)
    for fold in layer.folds():  # with grouped-query attention several inputs of o_proj come from one row of v_proj
        inputs = Statistics.of_all(scaled[name] for name in fold.matrices if name in scaled)
        step = -(-sum(len(layer.weight(name)) for name in fold.matrices) // SEARCH_ROWS)
        some = torch.cat([layer.weight(name)[::step] for name in fold.matrices])
        scale = search_scale(some, inputs.magnitude, inputs.covariance, *arguments)
        layer.fold(fold, scale)
        scaled |= {name: scaled[name].divided_by(scale) for name in fold.matrices if name in scaled}
    return {name: quantize_clipped(layer.weight(name), inputs.covariance, *arguments) for name, inputs in scaled.items()}


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m solutions.quantization.awq``; exits with 1 and one line on a problem."""

    def form(recipe: Recipe) -> QuantizedFormat:
        return QuantizedFormat("awq", recipe.bits, recipe.group_size)

    run_command("awq", __doc__, quantize_layer, form, argv)


if __name__ == "__main__":
    main()
