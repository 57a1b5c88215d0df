"""MXFP4 (Open Compute Project, "Microscaling Formats", 2023): floats of 4 bits, 32 of which share a power of two.

gpt-oss keeps its experts so: of a matrix for all experts, ``<name>_blocks`` [E, out, in / 32, 16], two numbers in a byte, the
first one in its lower half, and ``<name>_scales`` [E, out, in / 32], exponents with 127 added. Everything else is plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits mean; the highest is the sign."""


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """See `formats.Format`."""

    method: str = "mxfp4"
    bits: int = 4
    act_order: bool = False
    has_codes: bool = False
    code_type: torch.dtype = torch.uint8
    rounds_inputs: bool = False
    parts: tuple[str, ...] = ("blocks", "scales")
    ignored: tuple[str, ...] = ()
    mark: str = "blocks"

    def of_layer(self, name: str, found: Mapping[str, str]) -> Mxfp4Format:
        """The format of a matrix whose tensors are `found`.

        Raises:
            ValueError: one is missing, or is of another type.
        """
        if dict(found) != dict.fromkeys(self.parts, "U8"):
            raise ValueError(f"the quantized layer {name} should have blocks and scales of bytes, and has {dict(found)}")
        return self

    def columns_in_group(self, columns: int) -> int:
        return 32

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """The matrices that it stands for, [E, out, in] bfloat16, which holds them exactly.

        Raises:
            ValueError: shapes do not fit each other.
        """
        blocks, scales = parts["blocks"], parts["scales"]
        if blocks.ndim != 4 or blocks.shape != (*scales.shape, 16):
            raise ValueError(f"blocks {list(blocks.shape)} do not fit scales {list(scales.shape)}")
        table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.bfloat16)
        halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [E, out, in / 32, 32]
        return torch.ldexp(table[halves.int()], scales[..., None].int() - 127).to(torch.bfloat16).flatten(-2)


def read_mxfp4(config: dict[str, Any]) -> Mxfp4Format:
    """Of a description whose method is "mxfp4"."""
    return Mxfp4Format()
