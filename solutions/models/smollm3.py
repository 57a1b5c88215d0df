"""SmolLM3 (Bakouch et al., 2025): LLaMA that gives some of its layers no positions.

How it differs from ``llama.py``: in every fourth layer queries and keys are not rotated, so it attends by content alone over
any distance (NoPE; Kazemnejad et al., 2023; mixed with RoPE as Yang et al., 2025, do). The causal mask still tells such a layer
what came before.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


class SmolLM3Attention(LlamaAttention):
    """LLaMA's attention, without its rotation in the layers of `ModelConfig.layers_without_rope`."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.turns = layer not in config.layers_without_rope

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, metadata: AttentionMetadata, add_to: Tensor | None
    ) -> Tensor:
        return super().forward(x, rope if self.turns else None, metadata, add_to)


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer around it."""

    attention = SmolLM3Attention


class SmolLM3ForCausalLM(LlamaForCausalLM):
    """SmolLM3 with its head."""

    decoder_layer = SmolLM3DecoderLayer
