"""Attention over latents in Triton: the kernels of paged attention, with a tile's loop over latents.

All query heads share a token's vector, and a tile has as many of them as fit; each tile of heads then counts as a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import paged_attention_triton
from .latent_attention import LatentBackend, LatentPlan
from .paged_attention import AttentionMetadata
from .paged_attention_triton import Cache, Config, TritonBackend


@dataclass(slots=True)
class LatentTritonPlan(LatentPlan):
    """Which way a step's tokens go; there are no groups. step: those alone that go the absorbed way; None: all do."""

    step: AttentionMetadata | None = None


def problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """As of paged attention; vectors may be longer, for a tile has fewer of them."""
    return paged_attention_triton.problem(device, dtype, 2, block_size)


class LatentTritonBackend(TritonBackend, LatentBackend):
    """Writes a step's vectors, then attends over them the absorbed way."""

    decode_configs: tuple[Config, ...] = (Config(16, 16, 4, 2), Config(16, 32, 8, 2), Config(32, 16, 8, 2))
    prefill_configs: tuple[Config, ...] = decode_configs

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> LatentPlan:
        if metadata.max_query_len < self.plain_from or metadata.kv_scales is not None:  # asks the device nothing
            return LatentTritonPlan(sliding_window, [], [], slice(None))
        made = LatentBackend.plan(self, metadata, sliding_window)
        lengths = metadata.query_start_loc.diff()
        rest = (lengths < self.plain_from).nonzero()[:, 0]
        lengths, contexts = lengths[rest], metadata.context_lens[rest]
        step = replace(
            metadata, block_tables=metadata.block_tables[rest], context_lens=contexts,
            query_start_loc=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int(),
            max_query_len=max([0, *lengths.tolist()]), max_context_len=max([0, *contexts.tolist()]),
        )  # fmt: skip
        return LatentTritonPlan(sliding_window, [], made.prompts, made.absorbed, step)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `LatentBackend.attend`, but [T, H, rank]: sums of latents alone."""
        plan, cache = metadata.plan, Cache.of_layer(metadata, layer)
        self._write(query, key.contiguous(), value.contiguous(), cache, metadata)
        if plan.step is None:
            return self._attend(query, cache, metadata, scale, None, None)
        output = query.new_empty(*query.shape[:2], self.rank)
        if len(plan.step.context_lens):
            output[plan.absorbed] = self._attend(query[plan.absorbed], cache, plan.step, scale, None, None)
        return output

    def _shape(self, config: Config, query: Tensor, cache: Cache) -> tuple[int, int, int, int]:
        heads = query.shape[1]
        group = max(size for size in range(1, config.block_m + 1) if heads % size == 0)
        return group, heads // group, self.rank, query.shape[2] - self.rank

    def _bytes(self, config: Config, query: Tensor, cache: Cache) -> int:
        tiles = 2 if cache.key_scales is None else 3  # of both halves, under way, and of int8 what becomes of them
        return (config.block_m + tiles * config.block_n) * query.shape[2] * query.itemsize
