"""Mixtral (Jiang et al., 2024): Mistral with eight experts in each layer, two for a token.

How it differs from ``moe.py``: in names alone. A checkpoint calls an expert's matrices w1 (gate), w2 (down) and w3 (up).
"""

from __future__ import annotations

from torch import Tensor

from .sparse import SparseForCausalLM

_OTHER_NAMES = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class MixtralForCausalLM(SparseForCausalLM):
    """Mixtral with its head."""

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        return super().place(".".join(_OTHER_NAMES.get(part, part) for part in name.split(".")), tensor)
