"""Quantized weights as LLM Compressor (compressed-tensors) and the makers of FP8 models (DeepSeek, Qwen, AutoFP8) write them.

A linear layer of [out, in] weights is kept as one of

- packed: weight_packed [out, ⌈in · bits / 32⌉] int32, the first code in the lowest bits; weight_scale [out, G]; weight_shape
  [2]; where a code of 0 is not in the middle, weight_zero_point [⌈out · bits / 32⌉, G], packed along the outputs; where
  act-order sorted the inputs, weight_g_idx [in], each input's group;
- int8: weight [out, in] int8, weight_scale [out, 1] or of one element, maybe weight_zero_point of the same shape;
- FP8: weight [out, in] float8, and weight_scale [out, 1], of one element, or [⌈out / 128⌉, ⌈in / 128⌉] for blocks of 128 × 128
  (DeepSeek calls that weight_scale_inv, and it is multiplied, too).

Which of them a layer has, its tensors say. Scales for activations and for a KV cache are passed over: they round what is not
rounded here, or at most to int8 with a scale for each token.
Source: vllm-project/compressed-tensors, `compressors/`; DeepSeek-V3, `inference/kernel.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .checkpoint import column_order
from .float8 import FLOAT8, ScaledFloat8
from .groups import BITS, GroupQuantized, unpack_int32

LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
FP8_METHODS = ("fp8", "fbgemm_fp8")
WEIGHT_KINDS = (("int", 4), ("int", 8), ("float", 8))
FLOAT8_NAMES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class CompressedFormat:
    """What a checkpoint's ``quantization_config`` says, and, from `of_layer`, what one layer has.

    Attributes:
        method: as the description names it. bits, group_size: of packed codes; −1: a scale for each row.
        block: rows and columns that share a scale of FP8. rounds_inputs: activations were meant to be rounded to 8 bits, too.
        act_order: the layer's columns are sorted by group. has_codes, code_type: see `formats.Format`; of FP8, E4M3 has codes.
    """

    method: str
    bits: int = 8
    group_size: int = -1
    block: tuple[int, int] | None = None
    rounds_inputs: bool = False
    act_order: bool = False
    has_codes: bool = True
    code_type: torch.dtype = torch.uint8

    parts = ("weight_packed", "weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape", "weight_g_idx")
    ignored = ("input_scale", "input_zero_point", "activation_scale", "k_scale", "v_scale", "q_scale", "input_scale_ub")
    mark = "weight_scale"

    def of_layer(self, name: str, found: Mapping[str, str]) -> CompressedFormat | None:
        """The format of a layer, by the types of its tensors in the file; None: it is not quantized.

        Raises:
            ValueError: a tensor is missing, or is of a type that no layout has.
        """
        scaled = "weight_scale" in found or "weight_scale_inv" in found
        if "weight_packed" in found:
            missing = [part for part in ("weight_scale", "weight_shape") if part not in found]
            if missing:
                raise ValueError(f"the quantized layer {name} lacks {', '.join(missing)}")
            return self
        if "weight" not in found:
            raise ValueError(f"the quantized layer {name} lacks weight")
        kind = found["weight"]
        if not scaled:
            if kind in FLOAT8_NAMES or kind == "I8":
                raise ValueError(f"the quantized layer {name} lacks weight_scale")
            return None
        if kind in FLOAT8_NAMES:
            size = -1 if self.block is None else self.block[1]
            return replace(self, has_codes=kind == FLOAT8_NAMES[0], code_type=FLOAT8, bits=8, group_size=size)
        if kind == "I8":
            return replace(self, bits=8, group_size=-1)
        raise ValueError(f"the layer {name} has scales, and its weight is {kind}: it is not compressed")

    def columns_in_group(self, columns: int) -> int:
        """Inputs that share a scale in a layer that has `columns` of them."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def unpack(self, parts: dict[str, Tensor]) -> GroupQuantized | ScaledFloat8:
        """The layer's codes.

        Raises:
            ValueError: shapes do not fit each other, or groups are of uneven sizes.
        """
        if self.code_type == FLOAT8:
            scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
            codes = parts["weight"]
            return ScaledFloat8(codes, _spread(scale.float(), codes.shape, self.block), self.columns_in_group(codes.shape[1]))
        if "weight_packed" not in parts:
            rows = parts["weight"].shape[0]
            scales = _per_row(parts["weight_scale"].float(), rows)
            zeros = _per_row(parts["weight_zero_point"].float(), rows) if "weight_zero_point" in parts else 0 * scales
            codes = parts["weight"].view(torch.uint8) ^ 128
            return GroupQuantized(codes, scales, zeros + 128, 8, codes.shape[1])
        rows, columns = parts["weight_shape"].tolist()
        codes = unpack_int32(parts["weight_packed"], self.bits)
        if codes.shape[0] != rows or not columns <= codes.shape[1] < columns + 32 // self.bits:
            raise ValueError(f"weight_packed holds {list(codes.shape)} codes and weight_shape says {[rows, columns]}")
        codes, scales, size = codes[:, :columns], parts["weight_scale"].float(), self.columns_in_group(columns)
        zeros = self._zeros(parts.get("weight_zero_point"), scales)
        expected = [rows, -(-columns // size)]
        if list(scales.shape) != expected or list(zeros.shape) != expected:
            raise ValueError(f"scales {list(scales.shape)} and zeros {list(zeros.shape)} should be {expected}")
        order = column_order(parts["weight_g_idx"], columns, size) if "weight_g_idx" in parts else None
        if order is not None:
            codes = codes[:, order]
        return GroupQuantized(codes.contiguous(), scales.contiguous(), zeros.contiguous(), self.bits, size, order)

    def _zeros(self, stored: Tensor | None, scales: Tensor) -> Tensor:
        """The codes that mean 0: packed along the rows, or in older files as whole numbers around 0."""
        middle = 1 << (self.bits - 1)
        if stored is None:
            return torch.full_like(scales, middle)
        if stored.dtype == torch.int8:
            return stored.float() + middle
        return unpack_int32(stored.t().contiguous(), self.bits).t()[: len(scales)].float()


def _per_row(values: Tensor, rows: int) -> Tensor:
    """[rows, 1] of a value for each row, or of one for all."""
    if values.numel() not in (1, rows):
        raise ValueError(f"{list(values.shape)} scales do not fit {rows} rows")
    return values.reshape(-1, 1).expand(rows, 1).contiguous()


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """[rows, groups] of a scale for each row and group of columns."""
    rows, columns = shape
    groups = 1 if block is None else -(-columns // block[1])
    if scale.numel() == 1 or list(scale.shape) in ([rows], [rows, 1]):
        return scale.reshape(-1, 1).expand(rows, groups).contiguous()
    if block is not None and list(scale.shape) == [-(-rows // block[0]), groups]:
        return scale.repeat_interleave(block[0], 0)[:rows].contiguous()
    raise ValueError(f"{list(scale.shape)} scales do not fit weights {list(shape)} in blocks of {block}")


def read_fp8(config: dict[str, Any]) -> CompressedFormat:
    """Of a description whose method is one of `FP8_METHODS`.

    Raises:
        ValueError: it is of another kind of number, or not understood.
    """
    if config.get("fmt") not in (None, "e4m3", "e5m2", "float8_e4m3fn"):
        raise ValueError(f"quantization_config: fmt {config['fmt']!r} is not supported, e4m3 is")
    return CompressedFormat(config["quant_method"].lower(), block=_block(config.get("weight_block_size")), rounds_inputs=True)


def _block(said: Any) -> tuple[int, int] | None:
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
        raise ValueError(f"quantization_config: blocks must be two whole numbers, got {said!r}")
    return said[0], said[1]


def read_compressed(config: dict[str, Any]) -> CompressedFormat:
    """Of a description whose method is "compressed-tensors".

    Raises:
        ValueError: it has layers of a kind that cannot be read here, or is not understood.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("quantization_config: config_groups must be objects by name")
    for layout in (config.get("format"), *(group.get("format") for group in groups.values())):
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"quantization_config: compressed-tensors layout {layout!r} is not supported, {LAYOUTS[0]} is")
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        raise ValueError(f"quantization_config: sparse weights ({sparsity['format']}) are not supported")
    transforms = config.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise ValueError("quantization_config: a checkpoint with transform_config is not supported; quantize without it")
    schemes = [group["weights"] for group in groups.values() if isinstance(group.get("weights"), dict)]
    for scheme in schemes:
        if (scheme.get("type"), scheme.get("num_bits")) not in WEIGHT_KINDS:
            kind = f"{scheme.get('type')} with {scheme.get('num_bits')} bits"
            raise ValueError(f"quantization_config: compressed-tensors weights of {kind} are not supported")
    packed = {(s["num_bits"], _group_size(s)) for s in schemes if s["type"] == "int"} or {(max(BITS), -1)}
    if len(packed) > 1:
        raise ValueError("quantization_config: layers with different bits or groups in one checkpoint are not supported")
    blocks = [_block(scheme["block_structure"]) for scheme in schemes if scheme.get("block_structure") is not None]
    inputs = [group["input_activations"] for group in groups.values() if isinstance(group.get("input_activations"), dict)]
    rounds = any(each.get("num_bits") == 8 for each in inputs)
    ((bits, size),) = packed
    return CompressedFormat("compressed-tensors", bits, size, blocks[0] if blocks else None, rounds)


def _group_size(scheme: dict[str, Any]) -> int:
    size = scheme.get("group_size") if scheme.get("strategy") in (None, "group") else None
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ValueError(f"quantization_config: groups of {size!r} are not supported")
    return -1 if size is None else size
