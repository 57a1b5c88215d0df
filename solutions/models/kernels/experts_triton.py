"""A layer's experts in Triton: all of a rank's in two grouped products, however many tokens each got.

A program of a product takes some outputs of one expert and goes through that expert's rows, a tile at a time; where an expert
has many rows several programs share them. One without rows ends at once, and its weights are not read. The host need not know
how many rows an expert has, so a step with experts can be captured. Source of the idea: Gale et al., "MegaBlocks", MLSys 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...parallelism.linear import Linear
from ...quantization.kernels.float8_triton import Float8Linear
from ...quantization.kernels.grouped_float8_triton import GroupedFloat8
from ..moe import Experts
from .layers_triton import grouped_product, silu_mul


class TritonExperts:
    """`Experts.multiply`. All matrices of a kind lie in one tensor, which the experts' own weights become parts of, and so do
    biases; the shared expert, whose rows are the last, is a product of its own.

    Args:
        experts: their weights are plain, or float8. dtype: of plain ones.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        mine, count = experts.mine, experts.mixture.count
        own = experts.own
        routed = [expert for number, expert in own.items() if number < count]
        self._first, self._last = mine.start, mine.start + len(routed)
        self._shared = own.get(count)
        self._num_chosen = experts.mixture.chosen + (len(experts.load) - count)
        gate_up, down = [expert.gate_up_proj for expert in routed], [expert.down_proj for expert in routed]
        self._gate_up, self._down = _grouped(gate_up, dtype), _grouped(down, dtype)
        is_silu = not gate_up or gate_up[0].activation is F.silu
        self._activate = silu_mul if is_silu else gate_up[0].activate  # which is the same for all experts

    def __call__(self, rows: Tensor, bounds: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        if self._gate_up is not None and self._down is not None:
            bounds = bounds[self._first : self._last + 1]
            inner = self._gate_up(rows, bounds, rows.new_empty(len(rows), self._gate_up.num_outputs))
            self._down(self._activate(inner), bounds, out)
        if self._shared is not None:
            tokens = len(rows) // self._num_chosen
            out[-tokens:] = self._shared(rows[-tokens:], None)
        return out


class GroupedPlain:
    """The plain matrices [N, K] of some experts, called as those in float8 are."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        weights = _stack(layers, "weight")
        assert weights is not None
        self.weights, self.biases = weights, _stack(layers, "bias")

    @property
    def num_outputs(self) -> int:
        return self.weights.shape[1]

    def __call__(self, x: Tensor, bounds: Tensor, out: Tensor) -> Tensor:
        """See `grouped_product`."""
        return grouped_product(x, self.weights, bounds, out, self.biases)


def _grouped(layers: Sequence[Linear], dtype: torch.dtype) -> GroupedPlain | GroupedFloat8 | None:
    """One product for the same layer of all experts; None: there are none. Where not all are in float8, none stays so."""
    if not layers:
        return None
    products = [layer.multiply for layer in layers]
    in_float8 = [product for product in products if isinstance(product, Float8Linear)]
    if GroupedFloat8.fit(products):
        grouped = GroupedFloat8(in_float8)
        for layer, codes, scales in zip(layers, grouped.codes, grouped.scales, strict=True):
            layer.weight, layer.scales = (nn.Parameter(tensor, requires_grad=False) for tensor in (codes, scales))
        return grouped
    for layer, product in zip(layers, products, strict=True):
        if isinstance(product, Float8Linear):
            layer.weight = nn.Parameter(product.dequantize().to(dtype), requires_grad=False)
            del layer.scales, layer.multiply
    return GroupedPlain(layers)


def _stack(layers: Sequence[nn.Module], name: str) -> Tensor | None:
    """The weights [E, N, K] or biases [E, N] of layers in one tensor, of which they become parts; None: there are none."""
    if getattr(layers[0], name) is None:
        return None
    stacked = torch.stack([layer.get_parameter(name).data for layer in layers])
    for layer, part in zip(layers, stacked, strict=True):
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
    return stacked
