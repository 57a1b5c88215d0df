"""Weights as whole numbers of a few bits, in groups that share a scale: round to nearest, and the packing of files.

A group is some neighbouring inputs of one output. The smaller it is, the better its scale fits, and the more scales there are:
with 4 bits and groups of 64 a weight takes 4 + 2 · 16 / 64 = 4.5 bits where scale and zero have 16.
Source: Frantar et al., "GPTQ", ICLR 2023, §4 (grouping); Nagel et al., "A White Paper on Neural Network Quantization", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (4, 8)


@dataclass(slots=True)
class GroupQuantized:
    """A matrix [N, K]: ``weight = (codes - zeros) * scales``, with scales and zeros for each group of columns of a row.

    Attributes:
        codes: [N, K] uint8, 0 to 2**bits − 1.
        scales: [N, G] float32 for G = ceil(K / group_size) groups, of which the last may be shorter.
        zeros: [N, G] float32, the code of a weight of 0; whole numbers in the files of GPTQ and AWQ.
        bits: 4 or 8. group_size: columns that share a scale.
        order: [K] int64: column j of `codes` is column ``order[j]`` of the matrix (GPTQ's act-order sorts columns before it
            groups them); None: they are in the matrix's order.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int
    order: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, [N, K] float32, its columns in their own order."""
        raise NotImplementedError(
            "Stage 4 · Task 4.3: GroupQuantized.dequantize, see stages/stage4_optimization/GUIDE.md#task-4-3"
        )


def group_parameters(weight: Tensor, bits: int, symmetric: bool, whole_zeros: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and zero of one group in each row, so that its weights and 0 are within the codes' range.

    Asymmetric: the range from the least to the largest weight is cut into 2**bits − 1 steps, and the zero is the whole number
    that brings the least to code 0, or without `whole_zeros` whatever number does so exactly. Symmetric: the zero is
    2**(bits − 1), and the largest magnitude is 2**(bits − 1) − 1 steps from it. A group of nothing but zeros gets a scale of 1,
    and no other, however small its weights are.

    Args:
        weight: [N, g] float32.

    Returns:
        Scales and zeros, [N] float32 each.
    """
    # Hint: Write down the 16 values that a group with scale s and zero z can say: (0 - z) * s up to (15 - z) * s. Which
    # s and z make the least weight the first and the largest the last?
    raise NotImplementedError("Stage 4 · Task 4.3: group_parameters, see stages/stage4_optimization/GUIDE.md#task-4-3")


def quantize_columns(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, [N, g] float32 whole numbers, of weights [N, g] with one scale and zero [N] a row."""
    raise NotImplementedError("Stage 4 · Task 4.3: quantize_columns, see stages/stage4_optimization/GUIDE.md#task-4-3")


def quantize_groups(
    weight: Tensor, bits: int = 4, group_size: int = 64, symmetric: bool = False, whole_zeros: bool = True
) -> GroupQuantized:
    """Round to nearest (RTN): each weight by itself to the closest value that its group's scale and zero can say.

    Args:
        weight: [N, K], any float type.
        bits: 4 or 8.
        group_size: columns that share a scale; −1: whole rows.
        symmetric: zero in the middle of the codes, instead of where it makes the range fit.
        whole_zeros: zeros are whole numbers, as the files of GPTQ and AWQ have them.

    Raises:
        ValueError: there are no such bits or groups; or the matrix is none, or not finite.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or -1 for whole rows, got {group_size}")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a matrix [N, K] is quantized, got shape {list(weight.shape)}")
    weight = weight.float()
    if not bool(weight.isfinite().all()):
        raise ValueError("the weights hold NaN or infinity, which no code can stand for")
    size = weight.shape[1] if group_size == -1 else group_size
    codes, scales, zeros = torch.empty_like(weight, dtype=torch.uint8), [], []
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size]
        scale, zero = group_parameters(group, bits, symmetric, whole_zeros)
        codes[:, start : start + size] = quantize_columns(group, scale, zero, bits)
        scales.append(scale)
        zeros.append(zero)
    return GroupQuantized(codes, torch.stack(scales, dim=1), torch.stack(zeros, dim=1), bits, size)


def pack_int32(values: Tensor, bits: int) -> Tensor:
    """Codes side by side in 32-bit words, the first in the lowest bits.

    Args:
        values: [..., n] whole numbers below 2**bits, of any integer type and layout in memory, n a multiple of 32 / bits.

    Returns:
        [..., n · bits / 32] int32.

    Raises:
        ValueError: they "do not fill whole 32-bit words".
    """
    raise NotImplementedError("Stage 4 · Task 4.3: pack_int32, see stages/stage4_optimization/GUIDE.md#task-4-3")


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """The codes in words [..., w]: [..., w · 32 / bits] uint8, what `pack_int32` was given."""
    raise NotImplementedError("Stage 4 · Task 4.3: unpack_int32, see stages/stage4_optimization/GUIDE.md#task-4-3")
