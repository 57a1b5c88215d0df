"""Attention over latents that computes each token by itself: what it says of one does not depend on what else is in a step.

How a product of matrices sums depends on their shapes. So each token goes alone, by the absorbed way: the shapes are those of
its own context. That is slow, and only for ``--batch-invariant``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..memory.cache_engine import write_kv
from ..memory.int8_cache import write_quantized
from .latent_attention import LatentBackend, LatentPlan
from .paged_attention import AttentionMetadata


@dataclass(slots=True)
class OrderedPlan(LatentPlan):
    """A step's plan as `LatentBackend` makes it, which heads that draft go by, and each token's.

    Attributes:
        single: the step of each token alone.
    """

    single: list[AttentionMetadata]


class LatentInOrder(LatentBackend):
    """`LatentBackend` for steps of one token, and the plans that make such steps of one of many."""

    batch_invariant = True

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> OrderedPlan:
        starts, contexts = metadata.query_start_loc.tolist(), metadata.context_lens.tolist()
        one = torch.tensor([0, 1], dtype=torch.int32)
        singles = []
        for seq, context in enumerate(contexts):
            for token in range(starts[seq], starts[seq + 1]):
                seen = context - (starts[seq + 1] - 1 - token)
                single = replace(
                    metadata, slot_mapping=metadata.slot_mapping[token : token + 1],
                    block_tables=metadata.block_tables[seq : seq + 1], query_start_loc=one,
                    context_lens=torch.tensor([seen], dtype=torch.int32), max_query_len=1, max_context_len=seen,
                    hidden_keys=None if metadata.hidden_keys is None else metadata.hidden_keys[token : token + 1],
                )  # fmt: skip
                single.plan = super().plan(single, sliding_window)
                singles.append(single)
        whole = super().plan(metadata, sliding_window)
        return OrderedPlan(sliding_window, whole.groups, whole.prompts, whole.absorbed, singles)

    def write(self, layer: int, vectors: Tensor, metadata: AttentionMetadata) -> None:
        """Put the vectors of all tokens [T, 2·D] into the cache, before any token reads those of others."""
        (first, second), cache = vectors[:, None].chunk(2, dim=-1), metadata.kv_caches[layer]
        if metadata.kv_scales is None:
            write_kv(first, second, cache, metadata.slot_mapping)
        else:
            write_quantized(first, second, cache, metadata.kv_scales[layer], metadata.slot_mapping)
