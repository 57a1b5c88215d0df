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

from ..moe import Experts
from .layers_triton import grouped_product, silu_mul


def supports_experts(experts: Experts) -> bool:
    """Whether `TritonExperts` can be used."""
    return all(expert.gate_up_proj.activation is F.silu for expert in experts.own.values())


class TritonExperts:
    """`Experts.multiply` for experts whose activation is SiLU. All matrices of a kind lie in one tensor, which the experts' own
    weights become parts of; the shared expert, whose rows are the last, is a product of its own."""

    def __init__(self, experts: Experts) -> None:
        mine, count = experts.mine, experts.mixture.count
        own = experts.own
        routed = [expert for number, expert in own.items() if number < count]
        self._first, self._last = mine.start, mine.start + len(routed)
        self._shared = own.get(count)
        self._num_chosen = experts.mixture.chosen + (len(experts.load) - count)
        self._gate_up = _stack([expert.gate_up_proj for expert in routed])
        self._down = _stack([expert.down_proj for expert in routed])

    def __call__(self, rows: Tensor, bounds: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        if self._gate_up is not None and self._down is not None:
            bounds = bounds[self._first : self._last + 1]
            inner = grouped_product(rows, self._gate_up, bounds, rows.new_empty(len(rows), self._gate_up.shape[1]))
            grouped_product(silu_mul(inner), self._down, bounds, out)
        if self._shared is not None:
            tokens = len(rows) // self._num_chosen
            out[-tokens:] = self._shared(rows[-tokens:], None)
        return out


def _stack(layers: Sequence[nn.Module]) -> Tensor | None:
    """The weights of layers in one tensor [E, N, K], of which they become parts; None: there are none."""
    if not layers:
        return None
    stacked = torch.stack([layer.get_parameter("weight").data for layer in layers])
    for layer, weight in zip(layers, stacked, strict=True):
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return stacked
