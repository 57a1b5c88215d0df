"""Paged attention for a whole batch with a few large PyTorch calls, on any device that PyTorch runs on.

A step's queries are cut into *pieces*: at most `PIECE` neighbouring queries of one sequence together with the part of its
context that they can see. A decode is a piece of one query. Pieces of similar shape form a *group*, padded to its largest
member, and a group costs the same few calls whatever its size:

    gather K (index_select) -> scores (batched matmul, float32) -> mask -> softmax -> weighted sum of V.

Cutting long prompts skips most of the keys that the causal mask or the sliding window would throw away, and keeps a group's
scores inside the processor's cache. What a piece reads, where and under which mask is the same for every layer: `plan` works it
out once a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory.cache_engine import write_kv
from ..memory.int8_cache import read_quantized, write_quantized
from .paged_attention import AttentionBackend, AttentionMetadata

PIECE = 64
"""Most queries in a piece. Halving it saves keys above the diagonal and doubles the times that the context is gathered."""

GATHER_COST = 8
"""Reading a key and a value costs about as much as this many queries' products with them."""

GROUP_OVERHEAD = 2048
"""Work that takes as long as the calls of one more group. A piece's work is keys * (queries + GATHER_COST)."""

BAG_LIMIT = 4
"""Up to this many query heads to a KV head, `embedding_bag` sums a decode's V straight from the cache: V is read once for each
query head, but never written."""


@dataclass(slots=True)
class Group:
    """S pieces padded to Q queries and L keys; padding repeats a piece's last query or key, so it reads no foreign memory.

    Attributes:
        tokens: [S * Q], rows of the step's flat query and output.
        rows: [S, H_kv, L], rows of K and of V in a cache seen as [num_slots * H_kv, D].
        mask: [S, 1, Q, 1, L] float32, minus infinity where a query must not see a key, else 0. Added, not filled in: that is
            ten times faster on a CPU.
        bags: [S * H, L], `rows` repeated for the query heads; made when `embedding_bag` first wants it.
    """

    tokens: Tensor
    rows: Tensor
    mask: Tensor
    bags: Tensor | None = None


@dataclass(slots=True)
class Plan:
    """All groups of a step; together they hold every query once."""

    sliding_window: int | None
    groups: list[Group]


def problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why it cannot be used: it always can."""
    return None


class TorchBackend(AttentionBackend):
    """Batched paged attention in plain PyTorch. Scores and softmax are float32 whatever the cache holds."""

    name = "torch"

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> Plan:
        query_starts = metadata.query_start_loc.cpu().numpy().astype(np.int64)
        context_lens = metadata.context_lens.cpu().numpy().astype(np.int64)
        pieces = cut_into_pieces(query_starts, context_lens, sliding_window)
        return Plan(sliding_window, make_groups(metadata, pieces, sliding_window))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        kv_cache = metadata.kv_caches[layer]
        scales = None if metadata.kv_scales is None else metadata.kv_scales[layer]
        if scales is None:
            write_kv(key, value, kv_cache, metadata.slot_mapping)
        else:
            write_quantized(key, value, kv_cache, scales, metadata.slot_mapping)
        if metadata.plan is None or metadata.plan.sliding_window != sliding_window:
            metadata.plan = self.plan(metadata, sliding_window)
        keys, values = kv_cache.flatten(1, 3)  # [num_slots * H_kv, D] each
        key_scales, value_scales = (None, None) if scales is None else scales.flatten(1, 3)  # [num_slots * H_kv]
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        query = query.float() * scale
        for group in metadata.plan.groups:
            out = self._attend_group(query, keys, values, group, key_scales, value_scales, soft_cap)
            output.index_copy_(0, group.tokens, out.to(output.dtype))
        return output

    def _attend_group(
        self, query: Tensor, keys: Tensor, values: Tensor, group: Group, key_scales: Tensor | None,
        value_scales: Tensor | None, soft_cap: float | None,
    ) -> Tensor:  # fmt: skip
        """The outputs of one group, [S * Q, H, D], in the dtype of `values`, or float32 where these are int8. `query` is scaled
        float32, [T, H, D]."""
        heads, dim = query.shape[1:]
        size, kv_heads, length = group.rows.shape
        queries = group.mask.shape[2]
        shared = heads // kv_heads  # query heads to a KV head; they become further queries of it
        batch, width = size * kv_heads, queries * shared

        q = query.index_select(0, group.tokens).view(size, queries, kv_heads, shared * dim)
        q = q.transpose(1, 2).reshape(batch, width, dim)
        k = self._floats("k", keys, key_scales, group.rows)
        scores = self._buffer("scores", (batch, width, length), torch.float32, k.device)
        torch.bmm(q, k.view(batch, length, dim).transpose(1, 2), out=scores)
        if soft_cap is not None:
            scores.div_(soft_cap).tanh_().mul_(soft_cap)
        by_head = scores.view(size, kv_heads, queries, shared, length).add_(group.mask)
        share = None if self.sinks is None else _beside_sinks(by_head, self.sinks.float().view(kv_heads, 1, shared, 1))
        weights = torch.softmax(scores, -1, out=scores)
        if share is not None:
            by_head.mul_(share)
        if value_scales is not None:
            v = self._floats("v", values, value_scales, group.rows)
            out = torch.bmm(weights, v.view(batch, length, dim)).view(size, kv_heads, queries, shared * dim)
            return out.transpose(1, 2).reshape(size * queries, heads, dim)
        if values.dtype != torch.float32:
            weights = self._buffer("weights", scores.shape, values.dtype, k.device).copy_(weights)

        if queries == 1 and shared <= BAG_LIMIT:
            if group.bags is None:
                group.bags = group.rows.repeat_interleave(shared, dim=1).view(size * heads, length)
            out = F.embedding_bag(group.bags, values, per_sample_weights=weights.view(size * heads, length), mode="sum")
            return out.view(size, heads, dim)
        v = self._gather("v", values, group.rows).view(batch, length, dim)
        out = torch.bmm(weights, v).view(size, kv_heads, queries, shared * dim)
        return out.transpose(1, 2).reshape(size * queries, heads, dim)

    def _floats(self, name: str, table: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
        """Rows of a table in float32, [R, D]."""
        if table.dtype == torch.float32:
            return self._gather(name, table, rows)
        out = self._buffer(name, (rows.numel(), table.shape[1]), torch.float32, table.device)
        if scales is None:
            return out.copy_(self._gather(name, table, rows))
        return read_quantized(table, scales, rows.view(-1), out)

    def _gather(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        out = self._buffer(name, (rows.numel(), table.shape[1]), table.dtype, table.device)
        return torch.index_select(table, 0, rows.view(-1), out=out)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Scratch memory, kept between calls: fresh memory of this size costs more in page faults than the work done in it."""
        size, key = math.prod(shape), (name, dtype, device)
        if key not in self._buffers or self._buffers[key].numel() < size:
            with torch.inference_mode(False):  # made in inference mode it could be written only there
                self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)


def _beside_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    """What is left for the tokens of a softmax over scores [..., L] in which the sinks [..., 1] count as well: [..., 1]."""
    return torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)


def cut_into_pieces(query_starts: np.ndarray, context_lens: np.ndarray, sliding_window: int | None) -> np.ndarray:
    """Cut every sequence's queries into equal pieces of at most `PIECE`.

    Args:
        query_starts: [S + 1]; context_lens: [S].

    Returns:
        [5, P] int64: sequence, first token (row of the flat batch), queries, first visible position, end of the context.
    """
    query_lens = np.diff(query_starts)
    counts = -(-query_lens // PIECE)
    seq = np.repeat(np.arange(len(query_lens)), counts)
    nth = np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = query_lens[seq] * nth // counts[seq]  # offsets among the sequence's queries
    end = query_lens[seq] * (nth + 1) // counts[seq]
    position = context_lens[seq] - query_lens[seq]  # of the sequence's first query
    left = np.zeros_like(begin) if sliding_window is None else np.maximum(0, position + begin - sliding_window + 1)
    return np.stack([seq, query_starts[seq] + begin, end - begin, left, position + end])


def group_pieces(pieces: np.ndarray, max_work: int) -> list[np.ndarray]:
    """Put pieces of similar shape together: the columns of `pieces` in each group.

    Pieces come sorted by queries, then keys, largest first. One joins the group while all padding there costs less than a new
    group's calls would, and the group's work stays below `max_work`.
    """
    queries, keys = pieces[2], pieces[4] - pieces[3]
    order = np.lexsort((-keys, -queries))
    groups, first, longest, useful = [], 0, 0, 0
    for i, (q, k) in enumerate(zip(queries[order].tolist(), keys[order].tolist(), strict=True)):
        cost = k * (q + GATHER_COST)
        longest, useful = max(longest, k), useful + cost
        padded = (i - first + 1) * longest * (int(queries[order[first]]) + GATHER_COST)
        if i > first and (padded > max_work or padded - useful > GROUP_OVERHEAD):
            groups.append(order[first:i])
            first, longest, useful = i, k, cost
    return [*groups, order[first:]] if len(order) else []


def make_groups(metadata: AttentionMetadata, pieces: np.ndarray, sliding_window: int | None) -> list[Group]:
    """The groups of a step's pieces, a [5, P] array as `cut_into_pieces` returns it."""
    max_work = 1 << (15 if metadata.block_tables.device.type == "cpu" else 22)  # a CPU keeps a group's keys in its cache
    return [_make_group(metadata, pieces[:, members], sliding_window) for members in group_pieces(pieces, max_work)]


def _make_group(metadata: AttentionMetadata, pieces: np.ndarray, sliding_window: int | None) -> Group:
    """Indices and mask of a group of pieces, a [5, S] array as `cut_into_pieces` returns it."""
    kv_heads, block_size = metadata.kv_caches[0].shape[3], metadata.kv_caches[0].shape[2]
    max_queries, max_keys = int(pieces[2].max()), int((pieces[4] - pieces[3]).max())
    device = metadata.block_tables.device
    seq, token, count, left, right = torch.from_numpy(pieces).to(device)[:, :, None]  # [S, 1] each

    nth_query = torch.arange(max_queries, device=device).minimum(count - 1)  # [S, Q]
    query_pos = right - count + nth_query
    key_pos = left + torch.arange(max_keys, device=device)  # [S, L], running on past the end
    # Keys past a piece's end lie right of all its queries, so the causal mask hides the padding too.
    hidden = key_pos[:, None, :] > query_pos[:, :, None]  # [S, Q, L]
    if sliding_window is not None:
        hidden |= key_pos[:, None, :] <= query_pos[:, :, None] - sliding_window
    if metadata.hidden_keys is not None:
        words = metadata.hidden_keys[token + nth_query]  # [S, Q]
        distance = query_pos[:, :, None] - key_pos[:, None, :]
        hidden |= (words[:, :, None] >> distance.clamp(0, 63)) & 1 == 1  # bit 63 is never set

    key_pos = key_pos.minimum(right - 1)
    slots = metadata.block_tables[seq, key_pos // block_size].long() * block_size + key_pos % block_size
    rows = slots[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[:, None]  # [S, H_kv, L]
    if metadata.kv_caches[0][0].numel() < 2**31:
        rows = rows.int()  # half the index bytes to read in every layer
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -math.inf)
    return Group((token + nth_query).view(-1), rows, mask[:, None, :, None, :])
