"""Qwen2-MoE (Yang et al., 2024): Qwen2 with experts, and a shared one that every token goes through.

How it differs from ``moe.py``: in names alone. The shared expert is one more expert here, the last, and what weighs it one more
column of the router.
"""

from __future__ import annotations

from torch import Tensor

from .moe import mixture_of
from .sparse import SparseForCausalLM


class Qwen2MoeForCausalLM(SparseForCausalLM):
    """Qwen2-MoE with its head."""

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        placed = super().place(name.replace(".shared_expert.", f".experts.{mixture_of(self.config).count}."), tensor)
        if placed is None:
            return None
        target, shard, tensor = placed
        if ".mlp.shared_expert_gate." in target:  # a GGUF file has it as a vector
            return target.replace("shared_expert_gate", "gate"), "shared", tensor.reshape(1, -1)
        return target, "routed" if ".mlp.gate." in target else shard, tensor
