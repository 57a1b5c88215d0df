"""The blocks of a GGUF file, kept as codes with a scale and a zero for each group of columns.

Of a layer there are ``codes<bits>_<group>`` [out, in] bytes, or of 4 bits [out, in / 2], the first code in the lower half; and
``block_scale`` and ``block_zero`` [out, in / group] halves, zeros less the middle of the codes. Scales of K-quants are
products of two numbers, which a half rounds: weights are then those of the file to 11 bits, and bfloat16 would keep 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .groups import GroupQuantized

CODES = ("codes4_32", "codes8_16", "codes8_32")


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """See `formats.Format`. Layers differ in bits and group size, which the name of their codes says."""

    bits: int = 4
    group_size: int = 32
    method: str = "gguf"
    act_order: bool = False
    has_codes: bool = True
    code_type: torch.dtype = torch.uint8
    rounds_inputs: bool = False
    parts: tuple[str, ...] = (*CODES, "block_scale", "block_zero")
    ignored: tuple[str, ...] = ()
    mark: str = "block_scale"

    def of_layer(self, name: str, found: Mapping[str, str]) -> BlockFormat:
        """The format of a layer whose tensors are `found`.

        Raises:
            ValueError: one is missing, or there are codes of two kinds.
        """
        codes = [part for part in found if part in CODES]
        if len(codes) != 1 or len(found) != 3:
            raise ValueError(f"the quantized layer {name} should have codes, scales and zeros, and has {', '.join(found)}")
        bits, size = map(int, re.findall(r"\d+", codes[0]))
        return BlockFormat(bits, size)

    def columns_in_group(self, columns: int) -> int:
        return self.group_size

    def pack(self, weight: GroupQuantized) -> dict[str, Tensor]:
        """The tensors that stand for a layer in a file."""
        codes = weight.codes[:, ::2] | weight.codes[:, 1::2] << 4 if self.bits == 4 else weight.codes
        zeros = weight.zeros - 2 ** (self.bits - 1)
        return {
            f"codes{self.bits}_{self.group_size}": codes.contiguous(),
            "block_scale": weight.scales.half(), "block_zero": zeros.half(),
        }  # fmt: skip

    def unpack(self, parts: dict[str, Tensor]) -> GroupQuantized:
        """What `pack` was given.

        Raises:
            ValueError: shapes do not fit each other.
        """
        codes, scales, zeros = parts[f"codes{self.bits}_{self.group_size}"], parts["block_scale"], parts["block_zero"]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        if codes.shape != (len(scales), scales.shape[1] * self.group_size) or zeros.shape != scales.shape:
            raise ValueError(f"codes {list(codes.shape)} do not fit scales {list(scales.shape)} and zeros {list(zeros.shape)}")
        return GroupQuantized(codes, scales.float(), zeros.float() + 2 ** (self.bits - 1), self.bits, self.group_size)


def read_blocks(config: dict[str, Any]) -> BlockFormat:
    """Of a description whose method is "gguf"."""
    return BlockFormat()
