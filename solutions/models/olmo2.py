"""OLMo 2 (OLMo team, 2024): LLaMA that normalises what its layers say, not what they hear.

How it differs from ``llama.py``: attention and MLP take the residual stream as it is, and an RMSNorm comes behind each, before
its result is added to the stream. Queries and keys are normalised, too, before they are rotated: over all heads of a token at
once. Of several ranks each holds some of the heads, so the sums of squares are summed over them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import WeightLayer, copy_weight, parameter
from ..parallelism.tensor_parallel import Shard, TensorParallel
from .config.model_config import ModelConfig
from .layers import HeadNorm, RMSNorm
from .llama import GatedMLP, LlamaAttention, LlamaForCausalLM


class SharedNorm(WeightLayer):
    """RMSNorm, in place, over vectors of which each rank holds a part.

    Args:
        part: this rank's elements. copies: ranks that hold each element.
    """

    def __init__(self, part: Shard, copies: int, eps: float, parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = parameter(len(part))
        self.part, self.copies, self.eps, self.parallel = part, copies, eps, parallel

    def forward(self, x: Tensor) -> Tensor:  # [T, 1, len(part)]
        squares = self.parallel.all_reduce(x.float().square().sum(-1, keepdim=True))  # [T, 1, 1]
        factor = torch.rsqrt(squares / (self.copies * self.part.full) + self.eps)
        return x.copy_(x * factor * self.weight)

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        copy_weight(param, self.part.of(loaded))


class Olmo2Attention(LlamaAttention):
    """LLaMA's attention with a norm of all queries of a token, and of all its keys."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        heads, kv_heads = (shard.times(config.head_dim) for shard in parallel.heads(config))
        copies = max(1, parallel.size // config.num_kv_heads)
        self.q_norm = self._norm(heads, 1, config.norm_eps, parallel)
        self.k_norm = self._norm(kv_heads, copies, config.norm_eps, parallel)

    @staticmethod
    def _norm(part: Shard, copies: int, eps: float, parallel: TensorParallel) -> nn.Module:
        """A token's queries are one long head where a rank has them all."""
        return HeadNorm(part.full, eps) if parallel.size == 1 else SharedNorm(part, copies, eps, parallel)

    def project(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, (H + 2·H_kv)·D]"""
        qkv, attn = super().project(x), self.attn
        queries, keys = attn.num_heads * attn.head_dim, attn.num_kv_heads * attn.head_dim
        self.q_norm(qkv[:, None, :queries])
        self.k_norm(qkv[:, None, queries : queries + keys])
        return qkv


class Olmo2DecoderLayer(nn.Module):
    """Attention and MLP, each normalised before it is added to the residual stream.

    Attributes:
        attention: the class of its attention, for families that differ there.
    """

    attention: type[Olmo2Attention] = Olmo2Attention

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.self_attn = self.attention(config, layer, parallel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config, parallel)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        hidden = self.post_attention_layernorm(self.self_attn(hidden, rope, metadata, None), add_to=hidden)
        out: torch.Tensor = self.post_feedforward_layernorm(self.mlp(hidden, None), add_to=hidden)
        return out


class Olmo2ForCausalLM(LlamaForCausalLM):
    """OLMo 2 with its head."""

    decoder_layer = Olmo2DecoderLayer
