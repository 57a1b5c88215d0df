"""Quantized weights in files: the layouts of GPTQ and AWQ, as AutoGPTQ, GPTQModel and AutoAWQ write them.

A linear layer of [out, in] weights is kept as ``qweight``, ``qzeros`` and ``scales``, all with the inputs first:

- GPTQ packs along the inputs: qweight [in / n, out] for n = 32 / bits codes to a word, the first in the lowest bits; qzeros
  [G, out / n]; scales [G, out] in float16; g_idx [in], each input's group. Files of the first format store each zero less 1.
- AWQ packs along the outputs: qweight [in, out / 8], qzeros [G, out / 8], where a word holds outputs 0, 2, 4, 6, 1, 3, 5, 7.

Act-order sorts the inputs before it groups them, so a group's inputs lie anywhere: then g_idx is not in order.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .description import Override, read_description
from .groups import GroupQuantized, pack_int32, unpack_int32

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """What a checkpoint's ``quantization_config`` says.

    Attributes:
        method: "gptq" or "awq". bits: 4 or 8. group_size: inputs that share a scale; −1: all.
        act_order: GPTQ's inputs were sorted before they were grouped (``desc_act``).
        zeros_less_one: GPTQ's first format.
        overrides: layers with bits and group sizes of their own, the first that fits counts.
    """

    method: str
    bits: int
    group_size: int
    act_order: bool = False
    zeros_less_one: bool = False
    overrides: tuple[Override, ...] = ()

    ignored = ()
    mark = "qweight"
    has_codes = True
    code_type = torch.uint8
    rounds_inputs = False

    @classmethod
    def parse(cls, config: dict[str, Any]) -> QuantizedFormat:
        """From the ``quantization_config`` of a config.json.

        Raises:
            ValueError: it names a method or a layout that cannot be read here.
        """
        said = read_description(config)
        return cls(said.method, said.bits, said.group_size, said.act_order, said.layout == "gptq", said.overrides)

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors that stand for a layer; g_idx may be missing."""
        return PARTS if self.method == "gptq" else PARTS[:3]

    def of_layer(self, name: str, found: Mapping[str, str]) -> QuantizedFormat:
        """The format of the layer of this name, which may be an exception, with the types of its tensors in the file.

        Raises:
            ValueError: a tensor is missing.
        """
        needed = PARTS if self.act_order and self.method == "gptq" else PARTS[:3]
        missing = [part for part in needed if part not in found]
        if missing:
            raise ValueError(f"the quantized layer {name} lacks {', '.join(missing)}")
        own = next((override for override in self.overrides if re.match(override.pattern, name)), self)
        return replace(self, bits=own.bits, group_size=own.group_size, overrides=())

    def columns_in_group(self, columns: int) -> int:
        """Inputs that share a scale in a layer that has `columns` of them."""
        return columns if self.group_size == -1 else min(self.group_size, columns)

    def to_config(self, symmetric: bool) -> dict[str, Any]:
        """The ``quantization_config`` to write."""
        shared = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return shared | {"version": "gemm", "zero_point": not symmetric, "modules_to_not_convert": None}
        layout = "gptq" if self.zeros_less_one else "gptq_v2"
        return shared | {"desc_act": self.act_order, "sym": symmetric, "checkpoint_format": layout, "lm_head": False}

    def pack(self, weight: GroupQuantized) -> dict[str, Tensor]:
        """The tensors that stand for one layer in a file.

        Raises:
            ValueError: codes do not fill whole words, or their columns are sorted and the format has no place to say so.
        """
        scales = weight.scales.t().to(torch.float16).contiguous()
        if self.method == "awq":
            if weight.order is not None:
                raise ValueError("AWQ files have no place for an order of columns")
            return {
                "qweight": pack_awq(weight.codes.t()),
                "qzeros": pack_awq(weight.zeros.t()),
                "scales": scales,
            }
        columns = weight.codes.shape[1]
        codes = weight.codes
        groups = torch.arange(columns, device=codes.device) // weight.group_size
        if weight.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, weight.order, codes)
            groups = torch.empty_like(groups).index_copy_(0, weight.order, groups)
        zeros = weight.zeros.t() - 1 if self.zeros_less_one else weight.zeros.t()
        return {
            "qweight": pack_int32(codes, self.bits).t().contiguous(),
            "qzeros": pack_int32(zeros.to(torch.int64) & (2**self.bits - 1), self.bits),
            "scales": scales,
            "g_idx": groups.to(torch.int32),
        }

    def unpack(self, parts: dict[str, Tensor]) -> GroupQuantized:
        """What `pack` was given.

        Raises:
            ValueError: the tensors are of another type, their shapes do not fit each other, or groups are of uneven sizes.
        """
        for name in ("qweight", "qzeros"):
            if parts[name].dtype != torch.int32 or parts[name].ndim != 2:
                kind = str(parts[name].dtype).removeprefix("torch.")
                raise ValueError(f"{name} is {kind} {list(parts[name].shape)} where a matrix of int32 is supported")
        scales = parts["scales"].t().float().contiguous()
        if self.method == "awq":
            codes, zeros, order = unpack_awq(parts["qweight"]).t(), unpack_awq(parts["qzeros"]).t(), None
        else:
            codes = unpack_int32(parts["qweight"].t().contiguous(), self.bits)
            zeros = unpack_int32(parts["qzeros"], self.bits).t()
            if self.zeros_less_one:  # a zero of 0 was stored as the largest code
                zeros = (zeros + 1) & (2**self.bits - 1)
        size = self.columns_in_group(codes.shape[1])
        expected = [codes.shape[0], -(-codes.shape[1] // size)]
        if list(scales.shape) != expected or list(zeros.shape) != expected:
            raise ValueError(f"scales {list(scales.shape)} and zeros {list(zeros.shape)} should be {expected}")
        if self.method == "gptq":
            order = column_order(parts["g_idx"], codes.shape[1], size) if "g_idx" in parts else None
            if order is not None:
                codes = codes[:, order]
        return GroupQuantized(codes.contiguous(), scales, zeros.float().contiguous(), self.bits, size, order)


def is_in_order(groups: Tensor, size: int) -> bool:
    """Whether `groups` [in], each input's group, says nothing: `size` neighbours are a group."""
    return groups.ndim == 1 and torch.equal(groups.long(), torch.arange(len(groups), device=groups.device) // size)


def column_order(groups: Tensor, columns: int, size: int) -> Tensor | None:
    """The columns sorted by their group, `groups` [in]; None if they are already.

    Raises:
        ValueError: it is not a group for each column, or a group before the last has not `size` columns.
    """
    if list(groups.shape) != [columns]:
        raise ValueError(f"g_idx {list(groups.shape)} should be {[columns]}")
    if is_in_order(groups, size):
        return None
    order = torch.argsort(groups, stable=True)
    if not is_in_order(groups[order], size):
        raise ValueError(f"g_idx does not put {size} columns in each group")
    return order


def pack_awq(values: Tensor) -> Tensor:
    """[r, n] codes below 16 → [r, n / 8] int32 in AWQ's order of nibbles.

    Raises:
        ValueError: n is no multiple of 8.
    """
    if values.shape[1] % 8:
        raise ValueError(f"AWQ packs 8 outputs to a word, and the layer has {values.shape[1]}")
    return pack_int32(values.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1), 4)


def unpack_awq(packed: Tensor) -> Tensor:
    """What `pack_awq` was given, as uint8."""
    words = unpack_int32(packed, 4).unflatten(1, (-1, 8))
    return torch.empty_like(words).index_copy_(2, torch.tensor(AWQ_ORDER, device=packed.device), words).flatten(1)


def write_model(
    folder: Path, source: Path, layers: dict[str, GroupQuantized], form: QuantizedFormat, symmetric: bool,
    changed: Mapping[str, Tensor | None] | None = None, files: Sequence[Path] | None = None,
) -> None:  # fmt: skip
    """Write a model in Hugging Face's format with some of its layers quantized.

    Args:
        folder: to write to. source: the whole model's folder, from which everything else is copied.
        layers: by name, such as "model.layers.0.mlp.up_proj".
        form: the layout. symmetric: how it was quantized, which the file says.
        changed: other tensors that differ from the source's; None: one that is left out.
        files: those of the source that hold its weights; None: all that may.

    Raises:
        ValueError: a layer cannot be packed; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    changed = changed or {}
    for file in sorted(source.glob("*.safetensors")) if files is None else files:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dictionary
                if name.removesuffix(".weight") in layers or changed.get(name, ...) is None:
                    continue
                new = changed.get(name)
                tensors[name] = reader.get_tensor(name) if new is None else new
    for name, weight in layers.items():
        try:
            tensors |= {f"{name}.{part}": tensor for part, tensor in form.pack(weight).items()}
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = form.to_config(symmetric)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in source.iterdir():
        if (
            file.is_file()
            and file.suffix != ".safetensors"
            and file.name not in ("config.json", "model.safetensors.index.json")
        ):
            shutil.copy2(file, folder / file.name)
