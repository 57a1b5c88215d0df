"""Phi-3 (Abdin et al., 2024) and Phi-4-mini (2025): LLaMA in other files, with a part of each head that does not turn.

How it differs from ``llama.py``: a checkpoint keeps queries, keys and values as one matrix, and gate and up as one, as they are
kept here, too. In Phi-4-mini RoPE turns only the first three quarters of a head (partial rotary), and "longrope" stretches it.
The kernels turn whole heads, pairs (i, i + D/2). So the rows of queries and keys are put in an order in which the pairs that
turn come first in both halves, and the others turn by an angle of 0. A score is a sum over all elements, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .llama import LlamaForCausalLM


def pairs_across_halves(head_dim: int, rotary_dim: int) -> list[int]:
    """The order of a head's elements in which pairs (i, i + R/2) of its first R become pairs (i, i + D/2)."""
    half, still = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [*range(half), *range(rotary_dim, rotary_dim + still)]
    return [*first, *range(half, rotary_dim), *range(rotary_dim + still, head_dim)]


class Phi3ForCausalLM(LlamaForCausalLM):
    """Phi-3 with its head."""

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        placed = super().place(name, tensor)
        if placed is None or self.config.rotary_dim is None or not len(tensor):
            return placed
        target, shard, tensor = placed
        if ".qkv_proj." in target and not target.endswith(".order"):  # which says something of inputs
            tensor = self._in_order(tensor, shard, self.config.rotary_dim)
        return target, shard, tensor

    def _in_order(self, rows: Tensor, shard: str | None, rotary_dim: int) -> Tensor:
        """Rows of queries and keys, of all their heads, as the kernels turn them; those of values stay."""
        config = self.config
        heads = rows.unflatten(0, (-1, config.head_dim))  # [heads, D, ...]
        turned = {None: config.num_heads + config.num_kv_heads, "v": 0}.get(shard, len(heads))
        order = pairs_across_halves(config.head_dim, rotary_dim)
        return torch.cat((heads[:turned, order], heads[turned:])).flatten(0, 1)
