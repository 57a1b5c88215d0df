"""StarCoder2 (Lozhkov et al., 2024): LLaMA with GPT-2's norms and MLP.

How it differs from ``llama.py``: the norms are LayerNorms, with a bias; the MLP has two matrices and no gate between them, with
GELU; and all projections have biases. The larger ones have a sliding window.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Layer
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .gpt import GPT2MLP
from .layers import LayerNorm
from .llama import LlamaAttention, LlamaForCausalLM


class Starcoder2DecoderLayer(Layer):
    """Attention and MLP, each added to the residual stream after a LayerNorm of its input."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LlamaAttention(config, layer, parallel)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config, parallel)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        hidden = self.self_attn(self.input_layernorm(hidden), rope, metadata, add_to=hidden)
        return self.mlp(self.post_attention_layernorm(hidden), add_to=hidden)


class Starcoder2ForCausalLM(LlamaForCausalLM):
    """StarCoder2 with its head."""

    decoder_layer = Starcoder2DecoderLayer

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        self.model.set_submodule("norm", LayerNorm(config.hidden_size, config.norm_eps))
