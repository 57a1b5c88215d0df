"""What a model's blocks, activations and adapters take in memory."""

from __future__ import annotations

import torch

from ...memory.cache_engine import block_bytes, scale_bytes
from ..config.model_config import ModelConfig


def kv_bytes_per_block(block_size: int, model: ModelConfig, cache_dtype: torch.dtype) -> int:
    """Bytes of one block in all layers of a model, scales included."""
    sizes = model.num_cached_layers, block_size, model.num_kv_heads
    return block_bytes(*sizes, model.head_dim, cache_dtype) + scale_bytes(*sizes, cache_dtype)


def activation_bytes(model: ModelConfig, num_tokens: int, num_seqs: int, dtype: torch.dtype) -> int:
    """What a step needs beside weights and cache: the widest layer's tensors, and logits in the dtype and in float32."""
    widest = 3 * model.hidden_size + max(model.mlp_elements, 2 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim)
    return num_tokens * widest * dtype.itemsize + min(num_seqs, num_tokens) * model.vocab_size * (dtype.itemsize + 4)


def adapter_bytes(model: ModelConfig, ranks: int, dtype: torch.dtype) -> int:
    """What adapters take that have so many ranks together: A and B of four products a layer, those merged of three and two; of
    two for each expert, and of the router."""
    hidden, heads, mixture = model.hidden_size, model.num_heads * model.head_dim, model.mixture
    attention = 3 * hidden + heads + 2 * model.num_kv_heads * model.head_dim + (heads + hidden)
    mlps, dense = 3 * (hidden + model.intermediate_size), model.num_layers
    elements = model.num_layers * attention
    if mixture is not None:
        dense = len(mixture.dense_layers)
        experts = mixture.count * 3 * (hidden + mixture.size) + hidden + mixture.count
        if mixture.shared_size:
            weighed = hidden + 1 if mixture.routing is None else 0
            experts += 3 * (hidden + mixture.shared_size) + weighed
        elements += (model.num_layers - dense) * experts
    return ranks * (elements + dense * mlps) * dtype.itemsize
