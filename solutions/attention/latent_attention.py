"""Attention over latents (multi-head latent attention, MLA): what is cached of a token is one short vector for all heads.

A token's vector is its latent and, behind that, the one key that RoPE has turned. Each half of it lies in the cache where other
models have a key and a value of one head, so whatever sizes, copies or swaps blocks need not know of it.

There are two ways through this cache. The *absorbed* way lets each query attend over the vectors as they are, as if they were
keys and values of one head that all query heads share: it reads little, and is the way to decode. The *plain* way makes each
head's keys and values of the vectors first, and attends as usual: for many queries at once it is fewer operations.
Source: DeepSeek-V2 (2024), section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..memory.int8_cache import read_quantized
from .paged_attention import AttentionMetadata
from .paged_attention_torch import Group, Plan, TorchBackend, cut_into_pieces, make_groups


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence whose tokens of this step, Q, go the plain way over its context of L tokens.

    Attributes:
        tokens: of the step. slots: [L] int64, where its context lies in the cache. seen: [Q, L] bool, what each may see.
    """

    tokens: slice
    slots: Tensor
    seen: Tensor


@dataclass(slots=True)
class LatentPlan(Plan):
    """A step's groups, which go the absorbed way, and the prompts that go the plain one.

    Attributes:
        absorbed: the tokens of the groups, an index for a tensor [T, ...].
    """

    prompts: list[Prompt]
    absorbed: Tensor | slice


class LatentBackend(TorchBackend):
    """The absorbed way in plain PyTorch, and a sequence's vectors for the plain one.

    Attributes:
        rank: length of the latents; a layer puts it here before it attends.
        plain_from: tokens of a sequence in a step from which they go the plain way. With DeepSeek's sizes a token and a cached
            vector cost 2·(576 + 512) operations a head the one way and 2·(192 + 128) the other, where a vector's key and value
            have to be made first, by 2·512·(128 + 128): that is less in all from 171 tokens on. Over int8 all go the absorbed
            way, where vectors are read.
    """

    rank: int
    plain_from = 171

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> LatentPlan:
        starts = metadata.query_start_loc.cpu().numpy().astype(np.int64)
        contexts = metadata.context_lens.cpu().numpy().astype(np.int64)
        is_plain = (np.diff(starts) >= self.plain_from) & (metadata.kv_scales is None)
        pieces = cut_into_pieces(starts, contexts, sliding_window)
        groups = make_groups(metadata, pieces[:, ~is_plain[pieces[0]]], sliding_window)
        numbers = np.flatnonzero(is_plain).tolist()
        if not numbers:
            return LatentPlan(sliding_window, groups, [], slice(None))
        prompts = [_prompt(metadata, seq, int(starts[seq]), int(starts[seq + 1]), int(contexts[seq])) for seq in numbers]
        absorbed = np.flatnonzero(~np.repeat(is_plain, np.diff(starts)))
        return LatentPlan(sliding_window, groups, prompts, torch.from_numpy(absorbed).to(metadata.block_tables.device))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """The absorbed way; see `AttentionBackend.attend`. All tokens' vectors are written.

        Args:
            query: [T, H, 2·D], over whole vectors. key, value: [T, 1, D], the halves of each token's vector.

        Returns:
            [T, H, 2·D], sums of vectors; of tokens that go the plain way, anything.
        """
        return super().attend(layer, query, key, value, metadata, scale, sliding_window, soft_cap)

    def vectors(self, layer: int, metadata: AttentionMetadata, slots: Tensor) -> Tensor:
        """What is cached of a layer in these slots [L], in their order: [L, 2·D], the half that lies with the keys first."""
        first, second = metadata.kv_caches[layer].flatten(1, 3)  # [num_slots, D] each
        return torch.cat((first[slots], second[slots]), dim=-1)

    def _attend_group(
        self, query: Tensor, keys: Tensor, values: Tensor, group: Group, key_scales: Tensor | None,
        value_scales: Tensor | None, soft_cap: float | None,
    ) -> Tensor:  # fmt: skip
        """The outputs of one group, [S * Q, H, 2·D] float32; both halves of a vector are read once for scores and sums."""
        size, _, length = group.rows.shape
        heads, dim = query.shape[1:]
        queries = group.mask.shape[2]
        vectors = self._buffer("vectors", (size * length, dim), torch.float32, query.device)
        for half, cached, scales in zip(vectors.chunk(2, dim=1), (keys, values), (key_scales, value_scales), strict=True):
            if scales is None:
                half.copy_(self._gather("half", cached, group.rows))
            else:
                read_quantized(cached, scales, group.rows.view(-1), half)
        vectors = vectors.view(size, length, dim)
        q = query.index_select(0, group.tokens).view(size, queries * heads, dim)
        scores = torch.bmm(q, vectors.transpose(1, 2)).view(size, queries, heads, length)
        weights = torch.softmax(scores.add_(group.mask[:, 0]), -1)
        return torch.bmm(weights.view(size, queries * heads, length), vectors).view(size * queries, heads, dim)


def _prompt(metadata: AttentionMetadata, seq: int, first: int, end: int, context: int) -> Prompt:
    """Where a sequence's context lies, and what each of its tokens first..end−1 of the step may see of it.

    They are the last of its `context` tokens. Each sees all before it, whichever step computed them, and itself. Of the
    sequence's row of the block tables nothing counts behind its context.
    """
    device, block_size = metadata.block_tables.device, metadata.kv_caches[0].shape[2]
    positions = torch.arange(context, device=device)
    slots = metadata.block_tables[seq].long()[positions // block_size] * block_size + positions % block_size
    return Prompt(slice(first, end), slots, positions <= positions[context - (end - first) :, None])
