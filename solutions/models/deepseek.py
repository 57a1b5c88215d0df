"""DeepSeek-V2 (2024) and V3 (2025): attention over latents, and many small experts beside one that every token goes through.

How they differ from ``moe.py``: attention is that of ``mla.py``. Experts are chosen out of a few groups of them, so that those
of a token lie on few devices, and their weights are multiplied by a number. V3 scores them by sigmoids and corrects these, for
the choice alone, by a bias that training had moved until all experts got as much work. The first layers have one MLP, and the
shared expert is not weighed.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..parallelism.linear import parameter
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .mla import LatentAttention
from .moe import Experts, mixture_of
from .sparse import SparseDecoderLayer, SparseForCausalLM, SparseMLP

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class GroupedExperts(Experts):
    """Experts that are chosen group by group.

    Attributes:
        e_score_correction_bias: [E] float32, of V3: added to scores for the choice.
        activation: what makes V3's scores of logits.
    """

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        assert self.mixture.routing is not None
        self.routing, self.activation = self.mixture.routing, torch.sigmoid
        corrected = self.routing.corrected
        self.e_score_correction_bias = parameter(self.mixture.count, dtype=torch.float32) if corrected else None

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `Experts.choose`; the shared expert's weight is 1. Of the groups those are kept whose best experts (V2), or best
        two together (V3), have the highest scores."""
        mixture, routing, logits = self.mixture, self.routing, logits.float()
        scores = self.activation(logits) if routing.corrected else logits.softmax(dim=-1)
        ranked = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        by_group = ranked.unflatten(-1, (routing.groups, -1))  # [T, groups, E / groups]
        best = by_group.topk(2 if routing.corrected else 1, dim=-1).values.sum(dim=-1)
        kept = best.topk(routing.chosen_groups, dim=-1).indices
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        chosen = by_group.masked_fill(left_out[..., None], float("-inf")).flatten(1).topk(mixture.chosen, dim=-1).indices
        weights = scores.gather(1, chosen)
        if mixture.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * routing.scale
        if mixture.shared_size:
            weights = torch.cat((weights, torch.ones_like(weights[:, :1])), dim=-1)
            chosen = torch.cat((chosen, torch.full_like(chosen[:, :1], mixture.count)), dim=-1)
        return weights, chosen


class DeepseekMLP(SparseMLP):
    """Router and experts in groups."""

    kind = GroupedExperts


class DeepseekDecoderLayer(SparseDecoderLayer):
    """Attention over latents, and experts in groups."""

    attention = LatentAttention
    sparse = DeepseekMLP


class DeepseekV2ForCausalLM(SparseForCausalLM):
    """DeepSeek-V2 with its head. The shared expert is one more expert here, the last."""

    decoder_layer = DeepseekDecoderLayer

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        layer = _LAYER.search(name)
        if layer is not None and int(layer[1]) >= self.config.num_layers:  # V3's module that predicts one token more
            return None
        name = name.replace(".mlp.shared_experts.", f".mlp.experts.{mixture_of(self.config).count}.")
        placed = super().place(name.replace(".gate.e_score_correction_bias", ".experts.e_score_correction_bias"), tensor)
        if placed is None or ".self_attn.qkv_proj." not in placed[0]:
            return placed
        return placed[0].replace(".qkv_proj.", ".q_proj."), None, placed[2]


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3 with its head: `Routing` says what differs."""
