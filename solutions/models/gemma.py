"""Gemma 2 (Gemma team, 2024) and Gemma 3 (2025), the text models: LLaMA between twice as many norms, most layers with a window.

How they differ from ``llama.py``: attention and MLP are normalised before and behind, and a norm's factor is 1 + its weight.
Embeddings are multiplied by √hidden, rounded to the model's precision. The factor on scores is a number of its own. In Gemma 2
every other layer sees a window alone, and soft caps, ``cap · tanh(x / cap)``, keep scores and logits small. Gemma 3 normalises
queries and keys head by head instead. Five of six layers have a window; they turn by a RoPE base of their own, and the others,
which see far, by a larger one.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Layer
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .layers import HeadNorm, RMSNorm
from .llama import GatedMLP, LlamaAttention, LlamaForCausalLM, LlamaModel
from .qwen3 import Qwen3Attention
from .rope import RotaryEmbedding


class Gemma2Attention(LlamaAttention):
    """LLaMA's attention with another factor on its scores, and a soft cap."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.attn.scale = config.attention_scale or self.attn.scale
        self.attn.soft_cap = config.attention_soft_cap


class Gemma3Attention(Gemma2Attention, Qwen3Attention):
    """The same with Qwen 3's norms; `rope` is (cos, signed sin) of layers with a window and of the others, joined."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.q_norm = HeadNorm(config.head_dim, config.norm_eps, offset=1.0)
        self.k_norm = HeadNorm(config.head_dim, config.norm_eps, offset=1.0)

    def forward(self, x: Tensor, rope: tuple[Tensor, ...] | None, metadata: AttentionMetadata, add_to: Tensor | None) -> Tensor:
        assert rope is not None
        local, far = (rope[0], rope[1]), (rope[2], rope[3])
        return super().forward(x, far if self.attn.sliding_window is None else local, metadata, add_to)


class Gemma2DecoderLayer(Layer):
    """Attention and MLP, each normalised before it and again before it is added to the residual stream."""

    attention: type[Gemma2Attention] = Gemma2Attention

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.input_layernorm = RMSNorm(size, eps, offset=1.0)
        self.self_attn = self.attention(config, layer, parallel)
        self.post_attention_layernorm = RMSNorm(size, eps, offset=1.0)
        self.pre_feedforward_layernorm = RMSNorm(size, eps, offset=1.0)
        self.mlp = GatedMLP(config, parallel)
        self.post_feedforward_layernorm = RMSNorm(size, eps, offset=1.0)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), rope, metadata, None)
        hidden = self.post_attention_layernorm(attended, add_to=hidden)
        return self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden), None), add_to=hidden)


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    """The same layer around it."""

    attention = Gemma3Attention


class Gemma2Model(LlamaModel):
    """Scaled embedding, decoder layers and final norm."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel, decoder_layer: type[Layer]) -> None:
        super().__init__(config, parallel, decoder_layer)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, offset=1.0)
        self.scale = config.hidden_size**0.5

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        hidden *= hidden.new_tensor(self.scale)  # rounded as the weights are, as transformers does
        return self.run_layers(hidden, self.rotary_emb(positions), metadata)


class TwoRotations(Layer):
    """RoPE for layers with a window, and for the others: (cos, signed sin) of both, joined."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.local_rope_theta is not None
        self.local = RotaryEmbedding(replace(config, rope_theta=config.local_rope_theta, rope_scaling=None))
        self.far = RotaryEmbedding(config)

    def forward(self, positions: Tensor) -> tuple[Tensor, ...]:
        return *self.local(positions), *self.far(positions)


class Gemma3Model(Gemma2Model):
    """The same with two RoPE bases."""

    rotation = TwoRotations


class Gemma2ForCausalLM(LlamaForCausalLM):
    """Gemma 2 with its head."""

    body = Gemma2Model
    decoder_layer = Gemma2DecoderLayer

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits, cap = super().compute_logits(hidden), self.config.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """Gemma 3's text model with its head."""

    body = Gemma3Model
    decoder_layer = Gemma3DecoderLayer
