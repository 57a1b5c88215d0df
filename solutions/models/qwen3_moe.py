"""Qwen3-MoE (Yang et al., 2025): Qwen3 with experts in the place of the MLP.

How it differs from ``moe.py``: in the attention, which is that of ``qwen3.py``.
"""

from __future__ import annotations

from .qwen3 import Qwen3Attention
from .sparse import SparseDecoderLayer, SparseForCausalLM


class Qwen3MoeDecoderLayer(SparseDecoderLayer):
    """A layer with experts around Qwen3's attention."""

    attention = Qwen3Attention


class Qwen3MoeForCausalLM(SparseForCausalLM):
    """Qwen3-MoE with its head."""

    decoder_layer = Qwen3MoeDecoderLayer
