"""BERT (Devlin et al., 2019) as an encoder of texts: MiniLM, bge, e5 and gte are this model.

How it differs from ``llama.py``: a token sees the tokens behind it, too, which is the attention backend's affair
(``full_attention.py``). Positions are learned, as in GPT-2, and added to the embedding with one vector for the kind of text,
which is the first here, always. Norms stand behind attention and MLP and take in the residual stream. There is no head: what a
text becomes is made of its hidden states (``batching/pooling.py``).
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Embedding, Layer
from ..parallelism.tensor_parallel import (
    ACTIVATION_FUNCTIONS,
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from .config.model_config import ModelConfig
from .layers import Attention, CausalLM, LayerNorm

PARTS = {"query": ("qkv", "q"), "key": ("qkv", "k"), "value": ("qkv", "v")}
"""A checkpoint's layer: the merged layer here that holds it, and which piece of that it is."""
UNUSED = re.compile(r"(^|\.)(pooler|cls)\.|position_ids$")
"""What only BERT's training tasks need, and numbers from 0 up that old checkpoints store."""


class BertEmbeddings(Layer):
    """Tokens, positions and the kind of text, added and normalised."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(config, parallel)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.token_types, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:  # [T], [T] -> [T, hidden]
        hidden = self.word_embeddings(input_ids)
        hidden = hidden + self.token_type_embeddings.weight[0] + self.position_embeddings(positions)
        return self.LayerNorm(hidden)


class BertAttention(Layer):
    """Projections around attention: [T, hidden] -> [T, hidden], added to `add_to`."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        heads, kv_heads = parallel.heads(config)
        self.qkv = QKVParallelLinear(config, parallel)
        self.attn = Attention(len(heads), len(kv_heads), config.head_dim, layer)
        self.dense = RowParallelLinear(heads.times(config.head_dim), config.hidden_size, config.output_bias, parallel)

    def forward(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.dense(self.attn(self.qkv(hidden), metadata), add_to=hidden)


class BertMLP(Layer):
    """``output(act(intermediate(x)))``: [T, hidden] -> [T, hidden], added to `x`."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        columns = parallel.mlp(config)
        self.intermediate = ColumnParallelLinear(config.hidden_size, {"intermediate": columns}, config.mlp_bias)
        self.output = RowParallelLinear(columns, config.hidden_size, config.mlp_bias, parallel)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.activation(self.intermediate(hidden)), add_to=hidden)


class BertLayer(Layer):
    """Attention and MLP, each with the residual stream normalised behind it."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer, parallel)
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = BertMLP(config, parallel)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden = self.attention_norm(self.attention(hidden, metadata))
        return self.mlp_norm(self.mlp(hidden))


class BertModel(CausalLM):
    """BERT behind the interface of all models, with nothing to say."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config, parallel)
        self.layer = nn.ModuleList(BertLayer(config, layer, parallel) for layer in range(config.num_layers))

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        hidden = self.embeddings(input_ids, positions)
        for layer in self.layer:
            hidden = layer(hidden, metadata)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, 1]: the only token there is, which nobody reads."""
        return hidden[:, :1]

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if UNUSED.search(name):
            return None
        name = name.removeprefix("bert.").removeprefix("encoder.")
        path, _, kind = name.rpartition(".")
        merged, shard = PARTS.get(path.rpartition(".")[2], (None, None))
        if merged is not None:
            return f"{path.partition('.attention.')[0]}.attention.{merged}.{kind}", shard, tensor
        for theirs, ours in (
            ("attention.output.dense", "attention.dense"), ("attention.output.LayerNorm", "attention_norm"),
            ("intermediate.dense", "mlp.intermediate"), ("output.dense", "mlp.output"), ("output.LayerNorm", "mlp_norm"),
        ):  # fmt: skip
            if path.endswith(f".{theirs}"):
                return f"{path.removesuffix(theirs)}{ours}.{kind}", None, tensor
        return name, None, tensor
