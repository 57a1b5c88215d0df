"""Weights as floats of 8 bits with scales (FP8, E4M3; Micikevicius et al., 2022): 4 bits of exponent, so small ones stay exact.

A scale may stand for the whole matrix, a row, or a block of 128 × 128. Here a row has a scale for each so many columns, which
says all of these; 4 bytes for 128 weights add 3 % to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The type's largest number; it has no infinity."""
CAPABILITY = (8, 9)
"""The first cards that multiply float8."""


@dataclass(slots=True)
class ScaledFloat8:
    """A matrix [N, K]: ``weight = codes * scales``, with a scale for each group of columns of a row.

    Attributes:
        codes: [N, K] float8 (E4M3). scales: [N, G] float32 for G = ceil(K / group_size). group_size: columns that share one.
    """

    codes: Tensor
    scales: Tensor
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, [N, K] float32."""
        columns = self.codes.shape[1]
        wide = self.scales.repeat_interleave(min(self.group_size, columns), dim=1)[:, :columns]
        return self.codes.float() * wide


def has_float8(device: torch.device) -> bool:
    """Whether kernels for float8 run there: on such a card, or interpreted on a CPU."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= CAPABILITY


def quantize_float8(weight: Tensor) -> ScaledFloat8:
    """Round a matrix [N, K] of any float type, with a scale a row: its largest magnitude becomes 448."""
    whole = weight.float()
    largest = whole.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    return ScaledFloat8((whole / scales).to(FLOAT8), scales, weight.shape[1])
