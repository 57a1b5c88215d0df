"""Products of experts whose weights are float8: rows sorted by expert, each times its own expert's matrix, in one launch.

The numbers are those of `Float8Linear`: activations are rounded with a scale for each group of columns, every group's sum gets
both scales and is added in float32. The launch is that of plain experts, see ``layers_triton.py`` in ``models/kernels/``: the
host need not know how many rows an expert has, and one without rows is not read.
Source: DeepSeek-V3 (2024), section 3.3.2, whose experts are kept so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.platform.triton_mode import cast, tl, triton
from .float8_triton import BLOCK_K, BLOCK_N, Float8Linear, round_inputs, scaled_product

MAX_ROWS = 64
"""Most rows of a tile."""
MAX_SHARES = 8
"""Most programs that share an expert's rows."""


class GroupedFloat8:
    """The matrices [N, K] of some experts.

    Args:
        products: each expert's, such that `fit` says that they can be one. Their tensors become parts of those here.

    Attributes:
        codes: [E, N, K] float8. scales: [E, G, N] float32. biases: [E, N] or None.
    """

    def __init__(self, products: Sequence[Float8Linear]) -> None:
        first = products[0]
        self.group_size, self.rounds_inputs = first.group_size, first.rounds_inputs
        self.codes = torch.stack([product.codes for product in products])
        self.scales = torch.stack([product.scales for product in products])
        biases = [product.bias for product in products if product.bias is not None]
        self.biases = torch.stack(biases) if biases else None
        for number, product in enumerate(products):
            product.codes, product.scales = self.codes[number], self.scales[number]
            product.bias = None if self.biases is None else self.biases[number]

    @staticmethod
    def fit(products: Sequence[object]) -> bool:
        """Whether all are float8, and their groups and activations of one kind."""
        kinds = {(each.group_size, each.rounds_inputs) if isinstance(each, Float8Linear) else None for each in products}
        return len(kinds) == 1 and None not in kinds

    @property
    def num_outputs(self) -> int:
        return self.codes.shape[1]

    def __call__(self, x: Tensor, bounds: Tensor, out: Tensor) -> Tensor:
        """``out[i] = codes[e] · scales[e] · x[i] + biases[e]`` for the rows bounds[e] <= i < bounds[e + 1] of each expert;
        other rows stay as they are.

        Args:
            x: [R, K], dense. bounds: [E + 1] int64. out: [R, N], dense, in the type of `x`.
        """
        count, num_outputs, num_inputs = self.codes.shape
        if len(x):
            inputs, scales = round_inputs(x, self.group_size) if self.rounds_inputs else (x, None)
            block_m = min(MAX_ROWS, max(16, triton.next_power_of_2(triton.cdiv(len(x), count))))
            grid = (count, triton.cdiv(num_outputs, BLOCK_N), min(MAX_SHARES, triton.cdiv(len(x), block_m)))
            grouped_float8_kernel[grid](
                inputs, scales, self.codes, self.scales, self.biases, bounds, out, num_outputs, num_inputs, self.group_size,
                BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            )  # fmt: skip
        return out


@triton.jit
def grouped_float8_kernel(
    x, x_scales, weights, scales, biases, bounds, out, num_outputs, num_inputs, group_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some outputs of one expert, for every so many tiles of its rows.

    Args:
        x: [R, K], float8 with `x_scales` [R, G]; or of another type, with None.
        weights: [E, N, K] float8. scales: [E, G, N]. biases: [E, N] or None.
        group_size: inputs of a group, a multiple of BLOCK_K (or at least K).
    """
    expert = tl.program_id(0).to(tl.int64)
    first, last = tl.load(bounds + expert), tl.load(bounds + expert + 1)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < num_outputs
    num_groups = tl.cdiv(num_inputs, group_size)
    matrix, of_matrix = weights + expert * num_outputs * num_inputs, scales + expert * num_groups * num_outputs
    row = tl.arange(0, BLOCK_M)  # of a tile; what is added to its beginning takes 32 bits, which spares registers
    for start in range(first + tl.program_id(2) * BLOCK_M, last, tl.num_programs(2) * BLOCK_M):
        is_row = row < last - start
        tile, of_tile = x + start * num_inputs, out + start * num_outputs
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for begin in range(0, num_inputs, BLOCK_K):
            place = begin + tl.arange(0, BLOCK_K)
            is_input = place < num_inputs
            of_rows, of_weights = is_row[:, None] & is_input[None, :], is_input[:, None] & is_output[None, :]
            a = tl.load(tile + row[:, None] * num_inputs + place[None, :], of_rows, other=0.0)
            b = tl.load(matrix + output[None, :] * num_inputs + place[:, None], of_weights, other=0.0)
            group = begin // group_size
            of_outputs = tl.load(of_matrix + group * num_outputs + output, is_output, other=0.0)
            total += scaled_product(a, b, of_outputs, x_scales, (start + row) * num_groups + group, is_row)
        if biases is not None:
            total += tl.load(biases + expert * num_outputs + output, is_output, other=0.0).to(tl.float32)[None, :]
        inside = is_row[:, None] & is_output[None, :]
        tl.store(of_tile + row[:, None] * num_outputs + output[None, :], cast(total, out.dtype.element_ty), inside)
