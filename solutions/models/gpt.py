"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, and an MLP without a gate."""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Embedding, Layer
from ..parallelism.tensor_parallel import (
    ACTIVATION_FUNCTIONS,
    ColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from .config.model_config import ModelConfig
from .layers import Attention, CausalLM, LayerNorm

CONV1D_WEIGHT = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""GPT-2's checkpoints keep these weights as [in, out], the transpose of every other linear layer."""

CAUSAL_MASK = re.compile(r"\.attn\.(masked_)?bias$")
"""Masks that old checkpoints store. (`attn.c_attn.bias` is a real bias.)"""


class GPT2Attention(Layer):
    """Projections around paged attention: [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        heads, kv_heads = parallel.heads(config)
        inputs = heads.times(config.head_dim)
        self.c_attn = QKVParallelLinear(config, parallel)
        self.c_proj = RowParallelLinear(inputs, config.hidden_size, config.output_bias, parallel)
        self.attn = Attention(len(heads), len(kv_heads), config.head_dim, layer)

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.c_proj(self.attn(self.c_attn(x), metadata))


class GPT2MLP(Layer):
    """``c_proj(act(c_fc(x)))``: [T, hidden] -> [T, hidden], added to `add_to` if that is given."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        columns = parallel.mlp(config)
        self.c_fc = ColumnParallelLinear(config.hidden_size, {"c_fc": columns}, config.mlp_bias)
        self.c_proj = RowParallelLinear(columns, config.hidden_size, config.mlp_bias, parallel)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)), add_to)


class GPT2Block(Layer):
    """Attention and MLP, each added to the residual stream after a norm of its input."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.attn = GPT2Attention(config, layer, parallel)
        self.ln_2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = GPT2MLP(config, parallel)

    def forward(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden += self.attn(self.ln_1(hidden), metadata)  # in place: nobody else holds it
        hidden += self.mlp(self.ln_2(hidden))
        return hidden


class GPT2Model(Layer):
    """Embeddings of tokens and positions, blocks and final norm."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.wte = VocabParallelEmbedding(config, parallel)
        self.wpe = Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(GPT2Block(config, layer, parallel) for layer in range(config.num_layers))
        self.ln_f = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden = self.wte(input_ids).add_(self.wpe(positions))  # [T, hidden]
        for block in self.h:
            hidden = block(hidden, metadata)
        return self.ln_f(hidden)


class GPT2LMHeadModel(CausalLM):
    """GPT-2 with its head; parameters are named as in Hugging Face's checkpoints."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config, parallel)
        self.lm_head = ParallelLMHead(config, self.transformer.wte, parallel)

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.transformer(input_ids, positions, metadata)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if CAUSAL_MASK.search(name):
            return None
        if name.startswith("lm_head."):
            return None if self.config.tie_word_embeddings else (name, None, tensor)
        if not name.startswith("transformer."):  # the checkpoint on the hub was saved without its head
            name = f"transformer.{name}"
        return name, None, tensor.t() if CONV1D_WEIGHT.search(name) else tensor
