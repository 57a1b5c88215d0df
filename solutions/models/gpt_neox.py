"""GPT-NeoX (Black et al., 2022) and Pythia: attention and MLP side by side, and RoPE over a part of each head.

How it differs from ``starcoder2.py``: the MLP reads the same hidden states as attention, through a norm of its own, and both
are added at once (`parallel_residual`; a few models have it off). RoPE turns the first quarter of a head, so rows are put in
order as in ``phi3.py``. Hugging Face's files have names of their own, and one matrix of queries, keys and values, each head's
behind the other. Files that were made of GGUF have the names here, and all queries first, then all keys, then all values.
"""

from __future__ import annotations

import re

from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .phi3 import pairs_across_halves
from .starcoder2 import Starcoder2DecoderLayer, Starcoder2ForCausalLM

NAMES = {
    "gpt_neox.embed_in.": "model.embed_tokens.",
    "gpt_neox.final_layer_norm.": "model.norm.",
    "embed_out.": "lm_head.",
    "gpt_neox.": "model.",
    "attention.dense.": "self_attn.o_proj.",
    "attention.query_key_value.": "self_attn.qkv_proj.",
    "mlp.dense_h_to_4h.": "mlp.c_fc.",
    "mlp.dense_4h_to_h.": "mlp.c_proj.",
}
"""Beginnings of names in Hugging Face's files, or of what is behind the number of a layer, and what they are here."""
COMPUTED = re.compile(r"\.attention\.(masked_bias|bias|rotary_emb\.inv_freq)$")
"""Masks and frequencies that old checkpoints store. (`attention.dense.bias` is a real bias.)"""


class GPTNeoXDecoderLayer(Starcoder2DecoderLayer):
    """Attention and MLP of the same hidden states, both added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.parallel_residual = config.parallel_residual

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        if not self.parallel_residual:
            return super().forward(hidden, rope, metadata)
        beside = self.post_attention_layernorm(hidden)  # before attention is added to it
        hidden = self.self_attn(self.input_layernorm(hidden), rope, metadata, add_to=hidden)
        return self.mlp(beside, add_to=hidden)


class GPTNeoXForCausalLM(Starcoder2ForCausalLM):
    """GPT-NeoX with its head."""

    decoder_layer = GPTNeoXDecoderLayer

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if COMPUTED.search(name):
            return None
        is_by_head = ".query_key_value." in name
        for theirs, ours in NAMES.items():
            if name.startswith(theirs) or f".{theirs}" in name:
                name = name.replace(theirs, ours, 1)
        placed = super().place(name, tensor)
        if placed is None or ".qkv_proj." not in placed[0] or not len(tensor) or placed[0].endswith(".order"):
            return placed
        config, (target, shard, rows) = self.config, placed
        heads = rows.unflatten(0, (-1, config.head_dim))  # [3·H, D, ...]
        if is_by_head:
            heads = heads.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        if config.rotary_dim is not None:
            turned, order = 2 * config.num_heads, pairs_across_halves(config.head_dim, config.rotary_dim)
            heads = heads.clone()
            heads[:turned] = heads[:turned, order]
        return target, shard, heads.flatten(0, 1)
