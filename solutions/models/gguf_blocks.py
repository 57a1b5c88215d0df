"""Quantized tensors of a GGUF file as codes, scales and zeros, so that products can be computed without whole weights.

Every type that is read here has weights ``scale · code + offset`` in groups of 16 or 32 columns: of Q4_0, Q5_0, Q6_K and Q8_0
the offset puts zero in the middle of the codes, of Q4_1 and Q5_1 a block names it, and of Q4_K and Q5_K eight groups share a
scale for their scales and another one for their offsets. Source: ggml's ``ggml-common.h``, structures ``block_q4_0`` to
``block_q8_K``. The codes are found by the numbers that `gguf` reads: they are ``(weight − offset) / scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType

from ..quantization.layout.blocks import BlockFormat
from ..quantization.layout.groups import GroupQuantized

Groups = tuple[np.ndarray, np.ndarray]
"""Scales and offsets of the groups of some blocks, [blocks, groups] float32."""

FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"), ("ffn_gate_exps", "ffn_up_exps"))
"""Matrices that the engine lays into one, which needs codes of one kind."""
FURTHEST = 60_000.0
"""A zero further from the codes is more than a half can say. The weights of such a group differ by less than their rounding."""


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """One half-precision number of each block, [blocks, 1] float32."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _with_minimum(blocks: np.ndarray) -> Groups:
    return _halves(blocks, 0), _halves(blocks, 2)


def _around_zero(codes: int, start: int = 0) -> Callable[[np.ndarray], Groups]:
    def read(blocks: np.ndarray) -> Groups:
        scales = _halves(blocks, start)
        return scales, scales * np.float32(-codes / 2)

    return read


def _in_eights(blocks: np.ndarray) -> Groups:
    scales, minima = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16].copy())
    return _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minima)


def _in_sixteens(blocks: np.ndarray) -> Groups:
    scales = _halves(blocks, 208) * blocks[:, 192:208].copy().view(np.int8)
    return scales, scales * np.float32(-32)


@dataclass(frozen=True, slots=True)
class BlockType:
    """How many codes a type of GGUF has, how many columns share a scale, and how a block says so."""

    codes: int
    group_size: int
    groups: Callable[[np.ndarray], Groups]

    @property
    def form(self) -> BlockFormat:
        return BlockFormat(4 if self.codes == 16 else 8, self.group_size)


TYPES = {
    GGMLType.Q4_0: BlockType(16, 32, _around_zero(16)),
    GGMLType.Q4_1: BlockType(16, 32, _with_minimum),
    GGMLType.Q4_K: BlockType(16, 32, _in_eights),
    GGMLType.Q5_0: BlockType(32, 32, _around_zero(32)),
    GGMLType.Q5_1: BlockType(32, 32, _with_minimum),
    GGMLType.Q5_K: BlockType(32, 32, _in_eights),
    GGMLType.Q6_K: BlockType(64, 16, _in_sixteens),
    GGMLType.Q8_0: BlockType(256, 32, _around_zero(256)),
}


def formats(tensors: Iterable[gguf.ReaderTensor]) -> dict[str, BlockFormat]:
    """Tensor → how its codes are kept, of the matrices of layers whose type is one of `TYPES`.

    Where matrices that become one are of several types, all are kept as the widest codes and the smallest groups say.
    """
    kept = {
        each.name: TYPES[each.tensor_type].form
        for each in tensors
        if each.name.startswith("blk.") and each.name.endswith(".weight") and each.tensor_type in TYPES and len(each.shape) > 1
    }
    for name, form in list(kept.items()):
        _, layer, part, *rest = name.split(".")  # the rest is "weight", or the number of an expert before it
        parts = next((parts for parts in FUSED if part in parts), (part,))
        others = [kept[other] for each in parts if (other := ".".join(("blk", layer, each, *rest))) in kept]
        kept[name] = replace(form, bits=max(o.bits for o in others), group_size=min(o.group_size for o in others))
    return kept


def read_groups(tensor: gguf.ReaderTensor, form: BlockFormat) -> GroupQuantized:
    """A tensor's codes.

    Args:
        tensor: [..., N, K] of one of `TYPES`. form: how the codes are to be kept, at least as wide as the type has them.

    Returns:
        [..., N, K], scales and zeros [..., N, G].
    """
    kind = TYPES[tensor.tensor_type]
    weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    scales, offsets = kind.groups(np.asarray(tensor.data).reshape(-1, block_bytes))
    shape = (*weight.shape[:-1], -1)
    scales, offsets = scales.reshape(shape), np.broadcast_to(offsets, scales.shape).reshape(shape)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zeros = -offsets / scales
        flat = ~(np.abs(zeros) < FURTHEST)  # all weights of the group are the same, or nearly
        steps = np.where(flat, 1, scales)[..., None]
        codes = np.rint((weight.reshape(*scales.shape, kind.group_size) - offsets[..., None]) / steps)
    codes = np.where(flat[..., None], 0, codes).clip(0, kind.codes - 1).astype(np.uint8)
    scales, zeros = np.where(flat, offsets, scales), np.where(flat, np.float32(-1), zeros)
    shift = 2 ** (form.bits - 1) - kind.codes // 2  # where 8 bits are more than there are codes, the middle is their middle
    times = kind.group_size // form.group_size
    return GroupQuantized(
        torch.from_numpy(codes.reshape(weight.shape) + np.uint8(shift)),
        torch.from_numpy(scales.repeat(times, axis=-1)), torch.from_numpy((zeros + shift).repeat(times, axis=-1)),
        form.bits, form.group_size,
    )  # fmt: skip
