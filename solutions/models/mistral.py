"""Mistral 7B (Jiang et al., 2023): LLaMA's layers around grouped-query attention over a sliding window.

A token attends to itself and the ``sliding_window - 1`` tokens before it. Information still travels further, one window
a layer, but keys and values left of the window are never read again: the block manager frees their blocks, so a
sequence's KV memory stops growing at the window. (The paper's rolling buffer does the same by overwriting.)
"""

from __future__ import annotations

from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.tensor_parallel import QKVParallelLinear, RowParallelLinear, TensorParallel
from .config.model_config import ModelConfig
from .layers import Attention
from .llama import LlamaDecoderLayer, LlamaForCausalLM


class MistralAttention(nn.Module):
    """Projections around attention over the window, with RoPE; the result is added to `add_to` [T, hidden]."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        heads, kv_heads = parallel.heads(config)
        self.qkv_proj = QKVParallelLinear(config, parallel)
        self.o_proj = RowParallelLinear(heads.times(config.head_dim), config.hidden_size, False, parallel)
        self.attn = Attention(len(heads), len(kv_heads), config.head_dim, layer, config.sliding_window)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata, add_to: Tensor) -> Tensor:
        return self.o_proj(self.attn(self.qkv_proj(x), metadata, rope), add_to)


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with its head; every layer has the same window."""

    def make_layer(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> LlamaDecoderLayer:
        return LlamaDecoderLayer(config, MistralAttention(config, layer, parallel), parallel)
