"""What tensor parallelism can bring on GPUs that are not here: computed from data sheets, never measured.

A step's weights, keys and operations are divided by the number of ranks; its sums are added by the α–β model (Thakur et al.,
"Optimization of collective communication operations in MPICH", 2005): a message takes a latency α and its bytes over the link's
bandwidth β. A ring sends 2(p − 1) messages of n/p bytes, one after the other. Small sums are made directly instead: every card
says that its vector is there, and reads those of all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config.model_config import ModelConfig
from .roofline import Card, StepCost, decode_cost


@dataclass(frozen=True, slots=True)
class Link:
    """How cards are connected.

    Attributes:
        bandwidth: β, bytes a second that a card sends while it receives as many. latency: α, seconds a message; assumed, for
            no data sheet has it.
    """

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("NVLink 3 (A100)", 300e9, 3e-6),
    Link("NVLink 4 (H100)", 450e9, 3e-6),
    Link("PCIe 4 x16", 32e9, 8e-6),
    Link("two nodes, 400 Gbit/s", 50e9, 15e-6),
)
"""Bandwidths from NVIDIA's data sheets and the PCIe and InfiniBand specifications; latencies assumed."""

LLAMA_70B = ModelConfig(
    "LlamaForCausalLM", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
    num_kv_heads=8, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, hidden_act="silu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prediction:
    """A computed decode step on some ranks.

    Attributes:
        ranks: cards. compute, communication: seconds of the two parts. fits: whether weights and keys fit into their memory.
    """

    ranks: int
    compute: float
    communication: float
    fits: bool

    @property
    def seconds(self) -> float:
        return self.compute + self.communication


def ring_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """An all-reduce of so many bytes around a ring."""
    return 2 * (ranks - 1) * (link.latency + size_bytes / ranks / link.bandwidth)


def direct_seconds(size_bytes: float, ranks: int, link: Link) -> float:
    """An all-reduce in which every card reads all others' vectors: two messages, the second of p − 1 vectors."""
    return (2 * link.latency + (ranks - 1) * size_bytes / link.bandwidth) if ranks > 1 else 0.0


def predict_decode(model: ModelConfig, batch: int, context: int, ranks: int, card: Card, link: Link) -> Prediction:
    """A step that generates one token for each of `batch` sequences in bfloat16.

    The ranks hold a KV head each as long as there are as many, and share them beyond. A layer has two sums of [batch, hidden];
    embedding and logits have one more each, and count as such. Each is made in the way that is faster for its size.
    """
    whole = decode_cost(model, batch, context)
    kv_ranks = min(ranks, model.num_kv_heads)
    part = StepCost(
        whole.weight_bytes // ranks, whole.kv_bytes // kv_ranks, whole.product_operations // ranks,
        whole.attention_operations // ranks, whole.expert_bytes // ranks, whole.expert_operations // ranks,
    )  # fmt: skip
    size = batch * model.hidden_size * torch.bfloat16.itemsize
    sums = (2 * model.num_layers + 2) * min(ring_seconds(size, ranks, link), direct_seconds(size, ranks, link))
    fits = part.weight_bytes + part.kv_bytes < card.memory
    return Prediction(ranks, part.floor(card), sums, fits)


def speedup(predictions: list[Prediction]) -> list[float]:
    """How many times as fast as the first, though the first may not fit into any card."""
    return [predictions[0].seconds / prediction.seconds for prediction in predictions]
