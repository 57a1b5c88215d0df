"""GPTQ: round one column of weights at a time, and adjust the columns that are not rounded yet to make up for the error.

Rounding to nearest looks only at weights. What counts is the output: for inputs X the error of a row w is
``(w − q) H (w − q)ᵀ`` with H = X Xᵀ, the same for all rows. The *optimal brain surgeon* says how the other weights should move
when one is fixed at a value: by ``−(w_j − q_j) / [H⁻¹]_jj · H⁻¹_j``. Fixing the columns in one order for all rows, the inverses
of all the shrinking H are the rows of one Cholesky factor, and so a matrix takes K steps of O(N · K).
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, §3.

Run it: ``python -m solutions.quantization.gptq --help``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calibration import LayerInputs
from .layerwise import Recipe, run_command
from .layout.checkpoint import QuantizedFormat
from .layout.groups import GroupQuantized, group_parameters, quantize_columns

BLOCK = 128
"""Columns whose errors are gathered before the columns behind them are updated, in one matrix product."""


def gptq_quantize(
    weight: Tensor, hessian: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = False, act_order: bool = False,
    damping: float = 0.01,
) -> GroupQuantized:  # fmt: skip
    """Quantize a matrix so that its outputs change least.

    Inputs that are always zero cannot change anything: their weights become zero, and their row of H a unit row.
    With `act_order` the columns are fixed in descending order of H's diagonal, while many others can still make up for them.

    Args:
        weight: [N, K], any float type. hessian: [K, K], X Xᵀ of the layer's inputs, up to a factor.
        group_size: columns that share a scale; −1: all.
        damping: share of the mean of H's diagonal that is added to it, so that it can be inverted.

    Raises:
        ValueError: H cannot be inverted even so; take more damping or more calibration text.
    """
    weight, hessian = weight.float().clone(), hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    weight[:, dead] = 0.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    if order is not None:
        weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damping * float(diagonal.mean()))
    factor = inverse_factor(hessian)
    size = weight.shape[1] if group_size == -1 else group_size
    codes, scales, zeros = fix_columns(weight, factor, bits, size, symmetric)
    return GroupQuantized(codes, scales, zeros, bits, size, order)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with Uᵀ U = H⁻¹, [K, K] float32; row j beyond the diagonal, over U_jj, is how the columns behind j
    answer an error in j once those before it are fixed (GPTQ, §3, step 3).

    Raises:
        ValueError: H is not positive definite.
    """
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    except RuntimeError:
        raise ValueError("the Hessian cannot be inverted; use more calibration samples or a larger --damping") from None
    return factor


def fix_columns(weight: Tensor, factor: Tensor, bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ's loop over columns (algorithm 1).

    A group's scale and zero are worked out when its first column is reached, from its weights as they are by then. The error of
    column j, over U_jj, goes to the columns behind it at once within a block, and to those behind the block when that is done:
    a column needs nothing but its own sum of errors before it is fixed.

    Args:
        weight: [N, K] float32, overwritten. factor: U of `inverse_factor`. group_size: at least 1.

    Returns:
        Codes [N, K] uint8, scales and zeros [N, G].
    """
    columns = weight.shape[1]
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scales, zeros = [], []
    block = -(-BLOCK // group_size) * group_size  # whole groups, whose weights must be up to date when their scale is made
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(weight[:, start:stop])
        for j in range(start, stop):
            if j % group_size == 0:
                scale, zero = group_parameters(weight[:, j : j + group_size], bits, symmetric)
                scales.append(scale)
                zeros.append(zero)
            column = weight[:, j]
            code = quantize_columns(column[:, None], scale, zero, bits)[:, 0]
            codes[:, j] = code
            error = (column - (code - zero) * scale) / factor[j, j]
            weight[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1)


def quantize_layer(layer: LayerInputs, recipe: Recipe) -> dict[str, GroupQuantized]:
    """The matrices of a decoder layer that got any input, each with the statistics of its own."""
    return {
        name: gptq_quantize(
            layer.weight(name), layer.inputs[name].covariance, recipe.bits, recipe.group_size, recipe.symmetric,
            recipe.act_order, recipe.damping,
        )
        for name in layer.inputs
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m solutions.quantization.gptq``; exits with 1 and one line on a problem."""

    def form(recipe: Recipe) -> QuantizedFormat:
        return QuantizedFormat("gptq", recipe.bits, recipe.group_size, recipe.act_order, zeros_less_one=True)

    run_command("gptq", __doc__, quantize_layer, form, argv)


if __name__ == "__main__":
    main()
