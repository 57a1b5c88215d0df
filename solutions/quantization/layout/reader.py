"""Quantized layers in weight files: which there are, and their tensors as they are read.

Descriptions name the layers that were quantized in four ways (``modules_to_not_convert``, ``modules_in_block_to_quantize``,
``lm_head``, ``dynamic``), and with names that not every tool spells alike. The files cannot err: a layer that is quantized has
a ``qweight``, another one a ``weight``. Whether its columns are sorted is read from its ``g_idx`` too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import PARTS, QuantizedFormat, is_in_order


class CheckpointError(ValueError):
    """A file does not hold what its description says."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A quantized layer in files: its own format, and which of `QuantizedFormat.parts` there are."""

    form: QuantizedFormat
    parts: frozenset[str]


def find_layers(files: Iterable[Path], form: QuantizedFormat) -> dict[str, StoredLayer]:
    """The quantized layers by name, such as "model.layers.0.mlp.up_proj".

    Raises:
        CheckpointError: there are none, or one of their tensors is missing.
        SafetensorError, OSError: a file cannot be read.
    """
    parts: dict[str, set[str]] = {}
    sorted_layers: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dictionary
                layer, _, part = name.rpartition(".")
                if part not in form.parts:
                    continue
                parts.setdefault(layer, set()).add(part)
                if part == "g_idx":
                    groups = reader.get_tensor(name)
                    if not is_in_order(groups, form.of_layer(layer).columns_in_group(max(1, groups.numel()))):
                        sorted_layers.add(layer)
    if not parts:
        raise CheckpointError(f"the weights should be quantized with {form.method}, and no layer has a qweight")
    layers = {}
    for layer, found in parts.items():
        needed = PARTS if form.act_order and form.method == "gptq" else PARTS[:3]
        missing = [part for part in needed if part not in found]
        if missing:
            raise CheckpointError(f"the quantized layer {layer} lacks {', '.join(missing)}")
        layers[layer] = StoredLayer(replace(form.of_layer(layer), act_order=layer in sorted_layers), frozenset(found))
    return layers


@dataclass(slots=True)
class Unpacker:
    """Turns the tensors of quantized layers, as they are read, into those of `GroupQuantized`: `<layer>.codes`, `.scales`,
    `.zeros` and, where columns are sorted, `.order`; or into the weight that they stand for, `<layer>.dense`. Others pass.

    Attributes:
        layers: what `find_layers` has found. dense: those that become a plain weight.
        pending: what is read of layers that are not complete yet, which may go on in another file.
    """

    layers: dict[str, StoredLayer]
    dense: set[str]
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            layer, _, part = name.rpartition(".")
            stored = self.layers.get(layer)
            if stored is None or part not in stored.parts:
                yield name, tensor
                continue
            parts = self.pending.setdefault(layer, {})
            parts[part] = tensor
            if len(parts) == len(stored.parts):
                yield from self._convert(layer, stored.form, self.pending.pop(layer))

    def _convert(self, layer: str, form: QuantizedFormat, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        try:
            weight = form.unpack(parts)
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the quantized layer {layer} cannot be read: {reason}") from None
        if layer in self.dense:
            yield f"{layer}.dense", weight.dequantize()
            return
        yield f"{layer}.codes", weight.codes
        yield f"{layer}.scales", weight.scales
        yield f"{layer}.zeros", weight.zeros
        if form.act_order:
            order = torch.arange(weight.shape[1], device=weight.codes.device) if weight.order is None else weight.order
            yield f"{layer}.order", order
