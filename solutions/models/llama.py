"""LLaMA (Touvron et al., 2023) with grouped-query attention; LLaMA 2 and 3, SmolLM2 and many others are this model."""

from __future__ import annotations

from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Layer
from ..parallelism.tensor_parallel import (
    GateUpParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
)
from .config.model_config import ModelConfig
from .layers import Attention, CausalLM, RMSNorm
from .rope import RotaryEmbedding

MERGED_LAYERS = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
}
"""A checkpoint's layer: the merged layer here that holds it, and which piece of that it is."""


class LlamaAttention(Layer):
    """Projections around paged attention, over a window if the model has one, with queries and keys rotated by RoPE; the result
    is added to `add_to` [T, hidden], if that is given. Window and blocks are those of its group of layers."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        heads, kv_heads = parallel.heads(config)
        self.group, place = config.place_of(layer)
        inputs = heads.times(config.head_dim)
        self.qkv_proj = QKVParallelLinear(config, parallel)
        self.o_proj = RowParallelLinear(inputs, config.hidden_size, config.output_bias, parallel)
        self.attn = Attention(len(heads), len(kv_heads), config.head_dim, place, config.windows[self.group])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, metadata: AttentionMetadata, add_to: Tensor | None
    ) -> Tensor:
        return self.o_proj(self.attn(self.project(x), metadata.of(self.group), rope), add_to)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values before they are rotated: [T, hidden] -> [T, (H + 2·H_kv)·D]."""
        return self.qkv_proj(x)


class GatedMLP(Layer):
    """``down(act(gate(x)) · up(x))`` (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.gate_up_proj = GateUpParallelLinear(config, parallel)
        self.down_proj = RowParallelLinear(parallel.mlp(config), config.hidden_size, config.mlp_bias, parallel)

    def forward(self, x: Tensor, add_to: Tensor | None) -> Tensor:
        """The MLP of `x` [T, hidden], added to `add_to` [T, hidden], which is overwritten, if that is given."""
        return self.down_proj(self.gate_up_proj(x), add_to)


class LlamaDecoderLayer(Layer):
    """Attention and MLP, each added to the residual stream after a norm of its input.

    Attributes:
        attention: the class of its attention, for families that differ there.
    """

    attention: type[LlamaAttention] = LlamaAttention

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = self.attention(config, layer, parallel)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = self.make_mlp(config, layer, parallel)

    def make_mlp(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> Layer:
        """What stands behind attention, for families that differ there."""
        return GatedMLP(config, parallel)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        # in place on rank 0, for nobody else holds it; other ranks' sums are elsewhere
        hidden = self.self_attn(self.input_layernorm(hidden), rope, metadata, add_to=hidden)
        return self.mlp(self.post_attention_layernorm(hidden), add_to=hidden)


class LlamaModel(Layer):
    """Embedding, decoder layers of one kind and final norm.

    Attributes:
        rotation: the class of its RoPE, for families that differ there.
    """

    rotation: type[nn.Module] = RotaryEmbedding

    def __init__(self, config: ModelConfig, parallel: TensorParallel, decoder_layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config, parallel)
        self.layers = nn.ModuleList(decoder_layer(config, layer, parallel) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary_emb = self.rotation(config)

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.run_layers(self.embed_tokens(input_ids), self.rotary_emb(positions), metadata)

    def run_layers(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        """All that lies between the embedding and the head: [T, hidden] -> [T, hidden]; overwrites `hidden`."""
        for layer in self.layers:
            hidden = layer(hidden, rope, metadata)
        return self.norm(hidden)


class LlamaForCausalLM(CausalLM):
    """LLaMA with its head; parameters are named as in Hugging Face's checkpoints but for `MERGED_LAYERS`.

    Attributes:
        body, decoder_layer: the classes of what lies below the head, and of its layers, for families that differ there.
    """

    body: type[LlamaModel] = LlamaModel
    decoder_layer: type[nn.Module] = LlamaDecoderLayer

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.config = config
        self.model = self.body(config, parallel, self.decoder_layer)
        self.lm_head = ParallelLMHead(config, self.model.embed_tokens, parallel)

    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.model(input_ids, positions, metadata)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what is computed
            return None
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return None
        if not name.startswith(("model.", "lm_head.")):  # the checkpoint was saved without its head, as embedding models are
            name = f"model.{name}"
        path, _, kind = name.rpartition(".")  # kind is "weight" or "bias"
        parent, _, layer = path.rpartition(".")
        merged, shard_id = MERGED_LAYERS.get(layer, (layer, None))
        return ".".join(filter(None, (parent, merged, kind))), shard_id, tensor
