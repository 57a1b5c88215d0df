"""Quantized layers in weight files: which there are, and their tensors as they are read.

Descriptions name the layers that were quantized in four ways (``modules_to_not_convert``, ``modules_in_block_to_quantize``,
``lm_head``, ``dynamic``), and with names that not every tool spells alike. The files cannot err: a layer that is quantized has
a ``qweight`` or a ``weight_scale``, another one a ``weight`` alone. Whether its columns are sorted is read from its ``g_idx``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint import is_in_order
from .float8 import ScaledFloat8
from .formats import Format


class CheckpointError(ValueError):
    """A file does not hold what its description says."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A quantized layer in files: its own format, and which of its `parts` there are."""

    form: Format
    parts: frozenset[str]


def split_name(name: str) -> tuple[str, str]:
    """A tensor's layer and part. MXFP4 joins them in its own way: "experts.down_proj_blocks"."""
    layer, _, part = name.rpartition("_" if name.endswith(("_blocks", "_scales")) else ".")
    return layer, part


def find_layers(files: Iterable[Path], form: Format) -> dict[str, StoredLayer]:
    """The quantized layers by name, such as "model.layers.0.mlp.up_proj".

    Raises:
        CheckpointError: there are none, or one of their tensors is missing.
        SafetensorError, OSError: a file cannot be read.
    """
    parts: dict[str, dict[str, str]] = {}
    groups: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a dictionary
                layer, part = split_name(name)
                if part not in form.parts:
                    continue
                parts.setdefault(layer, {})[part] = reader.get_slice(name).get_dtype()
                if part.endswith("g_idx"):
                    groups[layer] = reader.get_tensor(name)
    layers = {}
    for layer, found in parts.items():
        try:
            own = form.of_layer(layer, found)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if own is None:
            continue
        order = groups.get(layer)
        is_sorted = order is not None and not is_in_order(order, own.columns_in_group(max(1, order.numel())))
        layers[layer] = StoredLayer(replace(own, act_order=is_sorted), frozenset(found))
    if not layers:
        raise CheckpointError(f"the weights should be quantized with {form.method}, and no layer has a {form.mark}")
    return layers


@dataclass(slots=True)
class Unpacker:
    """Turns the tensors of quantized layers, as they are read, into those of `GroupQuantized`: `<layer>.codes`, `.scales`,
    `.zeros` and, where columns are sorted, `.order`; or of `ScaledFloat8`, which has two; or into the weight that they stand
    for, `<layer>.dense`. Others pass, but those that their format ignores.

    Attributes:
        layers: what `find_layers` has found. dense: those that become a plain weight.
        pending: what is read of layers that are not complete yet, which may go on in another file.
    """

    layers: dict[str, StoredLayer]
    dense: set[str]
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ignored: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ignored = frozenset(part for stored in self.layers.values() for part in stored.form.ignored)

    def __call__(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            layer, part = split_name(name)
            if part in self.ignored:
                continue
            stored = self.layers.get(layer)
            if stored is None or part not in stored.parts:
                yield name, tensor
                continue
            parts = self.pending.setdefault(layer, {})
            parts[part] = tensor
            if len(parts) == len(stored.parts):
                yield from self._convert(layer, stored.form, self.pending.pop(layer))

    def _convert(self, layer: str, form: Format, parts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        try:
            weight = form.unpack(parts)
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the quantized layer {layer} cannot be read: {reason}") from None
        if layer in self.dense or isinstance(weight, Tensor):
            yield f"{layer}.dense", weight if isinstance(weight, Tensor) else weight.dequantize()
            return
        yield f"{layer}.codes", weight.codes
        yield f"{layer}.scales", weight.scales
        if isinstance(weight, ScaledFloat8):
            return
        yield f"{layer}.zeros", weight.zeros
        if form.act_order:
            order = torch.arange(weight.shape[1], device=weight.codes.device) if weight.order is None else weight.order
            yield f"{layer}.order", order
