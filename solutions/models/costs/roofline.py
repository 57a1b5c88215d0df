"""The least time that a step can take: bytes over bandwidth, operations over rate (the roofline, Williams et al., 2009).

A decode step has two parts with different limits. The matrix products read every weight once, whatever the batch, and do two
operations a weight and token. Attention reads each sequence's keys and values for that sequence alone, so its bytes grow with
the batch, and it does a handful of operations a byte. A mixture's experts are a third part: each is read whole for the few
tokens that chose it. The parts run one after the other, so their floors add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...memory.cache_engine import block_bytes
from ..config.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU can do at most.

    Attributes:
        bandwidth: of its memory, bytes a second. rate: of dense bfloat16 products summed in float32, operations a second.
        memory: bytes.
    """

    name: str
    bandwidth: float
    rate: float
    memory: float


CARDS = (
    Card("A100-80 SXM", 2.039e12, 312e12, 80e9),
    Card("H100 SXM", 3.35e12, 989e12, 80e9),
    Card("RTX 4090", 1.008e12, 165e12, 24e9),
)
"""From NVIDIA's data sheets and architecture papers; what a program can reach of them is measured, and less."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes and operations of one step, the matrix products' and attention's; of the products' those of routed experts, too,
    each of which has fewer rows than the other matrices, so that its bytes may take longer where their operations do."""

    weight_bytes: int
    kv_bytes: int
    product_operations: int
    attention_operations: int
    expert_bytes: int = 0
    expert_operations: int = 0

    def floor(self, card: Card) -> float:
        """Seconds that the step takes at least."""
        parts = (
            (self.weight_bytes - self.expert_bytes, self.product_operations - self.expert_operations),
            (self.expert_bytes, self.expert_operations), (self.kv_bytes, self.attention_operations),
        )  # fmt: skip
        return sum(max(moved / card.bandwidth, operations / card.rate) for moved, operations in parts)


def num_product_weights(model: ModelConfig, tokens: int = 1) -> int:
    """Weights that take part in the matrix products of so many tokens: all but the embedding, of which a token reads a row, and
    of experts those that are chosen, each by as many tokens as any other."""
    mlp = _of_columns(model, model.intermediate_size if model.mixture is None else model.mixture.shared_size)
    others = model.num_layers * model.attention_weights + mlp + model.vocab_size * model.hidden_size
    return others + num_expert_weights(model, tokens)


def num_expert_weights(model: ModelConfig, tokens: int = 1) -> int:
    """Of `num_product_weights` those of routed experts."""
    mixture = model.mixture
    if mixture is None:
        return 0
    chosen = mixture.count * (1 - (1 - mixture.chosen / mixture.count) ** tokens)
    return _of_columns(model, round(chosen * mixture.size))


def _of_columns(model: ModelConfig, columns: int) -> int:
    """Weights of so many columns of all layers' MLPs, or of their experts."""
    return model.num_layers * (3 if model.hidden_act == "silu" else 2) * model.hidden_size * columns


def decode_cost(model: ModelConfig, batch: int, context: float, dtype: torch.dtype = torch.bfloat16) -> StepCost:
    """A step that generates one token for each of `batch` sequences of `context` tokens."""
    weights, read = num_product_weights(model), num_product_weights(model, batch)
    kv_per_token = block_bytes(model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype)
    width = model.head_dim if model.latent is None else 2 * model.head_dim  # the absorbed way: whole latents twice
    attention = 4 * model.num_layers * model.num_heads * width  # q·k and p·v, two operations each
    tokens = round(batch * context)
    experts = num_expert_weights(model, batch) * dtype.itemsize, 2 * num_expert_weights(model) * batch
    return StepCost(read * dtype.itemsize, kv_per_token * tokens, 2 * weights * batch, attention * tokens, *experts)


def prefill_cost(model: ModelConfig, length: int, dtype: torch.dtype = torch.bfloat16) -> StepCost:
    """A step that computes a prompt of `length` tokens and the logits of its last one."""
    head = model.vocab_size * model.hidden_size
    layers, read = num_product_weights(model) - head, num_product_weights(model, length)
    kv_per_token = block_bytes(model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype)
    pairs = length * (length + 1) // 2
    widths = 2 * model.head_dim if model.latent is None else model.latent.query_dim + model.latent.value
    attention = 2 * model.num_layers * model.num_heads * widths * pairs
    experts = num_expert_weights(model, length) * dtype.itemsize, 2 * num_expert_weights(model) * length
    return StepCost(read * dtype.itemsize, kv_per_token * length, 2 * (layers * length + head), attention, *experts)
