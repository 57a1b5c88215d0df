"""Qwen3 (Yang et al., 2025): LLaMA whose queries and keys are normalised head by head.

How it differs from ``llama.py``: each head's query and key passes through an RMSNorm over its ``head_dim`` elements before it
is rotated, so that no score grows with the length of a vector. One weight serves all query heads of a layer and another one all
KV heads, so a cut over ranks does not touch them. There are no biases, and heads are wider than hidden / heads.
"""

from __future__ import annotations

from torch import Tensor

from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .layers import HeadNorm
from .llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class Qwen3Attention(LlamaAttention):
    """LLaMA's attention with a norm of each query and key."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.q_norm = HeadNorm(config.head_dim, config.norm_eps)
        self.k_norm = HeadNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, (H + 2·H_kv)·D]"""
        qkv, attn = super().project(x), self.attn
        heads = qkv.view(len(qkv), -1, attn.head_dim)  # [T, H + 2·H_kv, D]
        self.q_norm(heads[:, : attn.num_heads])
        self.k_norm(heads[:, attn.num_heads : attn.num_heads + attn.num_kv_heads])
        return qkv


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer around it."""

    attention = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 with its head."""

    decoder_layer = Qwen3DecoderLayer
