"""Drafts by a head that reads what the target has computed: features kept, a context for each sequence, chains.

The head has keys and values of its own, one row of a small cache for each sequence that drafts, filled from the sequence's
first feature on. What the target computes after that is what the head reads next, with its own outputs of the last draft
overwritten, so a rejected token leaves nothing behind. Positions whose features were never seen, because the prefix cache
held them or because the sequence was moved to host memory, are missing: the head's context begins behind them. That costs
accepted tokens, and never a right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...attention.paged_attention import AttentionBackend, AttentionMetadata, attention_metadata
from ...batching.sequence import Sequence
from ...batching.step_arrays import PagedArrays
from ...memory.cache_engine import CacheEngine
from ...models.heads.head import DraftHead
from ...parallelism.linear import Layer

Int64s = NDArray[np.int64]

MOST_ROWS = 32
"""Most sequences with a context of the head; who comes while there are so many gets no drafts. With more in a step, drafts
hardly pay on any machine."""
MOST_PENDING = 1024
"""Most features kept of a sequence that nobody drafts for. When there are more, its context begins anew."""


@dataclass(slots=True)
class Context:
    """What the head knows of one sequence.

    Attributes:
        row: of the cache. first: the sequence's position that stands first in it. length: positions from there on whose keys
            and values are in the row.
        pending: features of the positions behind those, [n, hidden] each. num_pending: positions in them.
    """

    row: int
    first: int
    length: int = 0
    pending: list[Tensor] = field(default_factory=list)
    num_pending: int = 0

    @property
    def end(self) -> int:
        """The first position of the sequence that has no feature here."""
        return self.first + self.length + self.num_pending


class HeadDrafts:
    """Drafts for several sequences at once.

    Args:
        head: drafts. embed: the target's embedding, [T] -> [T, hidden]. rotary: the target's positions, [T] -> rope.
        backend: of attention. rows: sequences that may have a context. longest: a sequence, in tokens.
        num_kv_heads, head_dim, dtype: of the head's cache.
    """

    def __init__(
        self, head: DraftHead, embed: Layer, rotary: torch.nn.Module, backend: AttentionBackend, rows: int, longest: int,
        num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.head, self.embed, self.rotary, self.backend = head, embed, rotary, backend
        self.longest = longest
        self.cache = CacheEngine(1, rows, longest, num_kv_heads, head_dim, dtype, torch.device("cpu"))
        self.contexts: dict[int, Context] = {}
        self._free = list(range(rows))[::-1]

    def forget(self, seq_ids: Iterable[int]) -> None:
        """These sequences have left, or lost what was computed of them."""
        for seq_id in seq_ids:
            if (context := self.contexts.pop(seq_id, None)) is not None:
                self._free.append(context.row)

    def take(self, seq_id: int, start: int, features: Tensor) -> None:
        """The target has computed a sequence's positions from `start` on, and they stay: features [n, hidden], n > 0."""
        context = self.contexts.get(seq_id)
        if context is None:
            if not self._free:
                return
            context = self.contexts[seq_id] = Context(self._free.pop(), start)
        elif start != context.end or context.num_pending > MOST_PENDING:
            context.first, context.length, context.pending, context.num_pending = start, 0, [], 0
        context.pending.append(features)
        context.num_pending += len(features)

    def num_missed(self, seq_id: int, num_kept: int = 0) -> int:
        """Positions that the head reads before it drafts, beside the one that it always does. `num_kept`: those whose features
        are elsewhere yet."""
        context = self.contexts.get(seq_id)
        return 0 if context is None else max(0, context.num_pending + num_kept - 1)

    @torch.inference_mode()
    def draft(self, wanted: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """So many tokens for each sequence, but for those of which the last computed position has no feature here."""
        drafting = [seq for seq in wanted if self._is_ready(seq)]
        if not drafting:
            return {}
        hidden = self._read(drafting, [self.contexts[seq.seq_id] for seq in drafting])
        drafts = self._go_on(hidden, drafting, wanted)
        return {seq: draft[: wanted[seq]] for seq, draft in zip(drafting, drafts, strict=True)}

    def _go_on(self, hidden: Tensor, drafting: list[Sequence], wanted: dict[Sequence, int]) -> list[list[int]]:
        """What follows the head's outputs [S, hidden] behind the last tokens of the S sequences: as many tokens for each as one
        of them wants, or more."""
        tokens = self.head.likeliest(hidden)  # [S]
        columns = [tokens]
        rows, lengths, firsts = self._places(drafting)
        starts = np.arange(len(drafting) + 1)
        for place in range(max(wanted[seq] for seq in drafting) - 1):
            at = lengths + place
            hidden = self._run(tokens, hidden, firsts + at, self._metadata(rows * self.longest + at, rows, starts, at + 1))
            tokens = self.head.likeliest(hidden)
            columns.append(tokens)
        return torch.stack(columns, dim=1).tolist()

    def _places(self, sequences: list[Sequence]) -> Int64s:
        """[3, S]: of each sequence's context the row, its length, and the position that stands first in it."""
        contexts = [self.contexts[seq.seq_id] for seq in sequences]
        return np.array([(context.row, context.length, context.first) for context in contexts]).T

    def _is_ready(self, seq: Sequence) -> bool:
        context = self.contexts.get(seq.seq_id)
        return context is not None and context.num_pending > 0 and context.end == len(seq.tokens) - 1

    def _read(self, sequences: list[Sequence], contexts: list[Context]) -> Tensor:
        """Take the pending features of all of them into the cache; the head's output behind the last of each, [S, hidden]."""
        rows, lengths, firsts = self._places(sequences)
        counts = np.array([context.num_pending for context in contexts])
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        begins, ids = firsts + lengths, list[int]()
        for seq, begin, count in zip(sequences, begins.tolist(), counts.tolist(), strict=True):
            ids += seq.tokens[begin + 1 : begin + count + 1]
        positions = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
        slots = positions + np.repeat(rows * self.longest - firsts, counts)
        pending = [each for context in contexts for each in context.pending]
        metadata = self._metadata(slots, rows, starts, lengths + counts)
        out = self._run(torch.tensor(ids), pending[0] if len(pending) == 1 else torch.cat(pending), positions, metadata)
        for context in contexts:
            context.length += context.num_pending
            context.pending, context.num_pending = [], 0
        return out if len(out) == len(counts) else out[torch.from_numpy(starts[1:] - 1)]

    def _run(self, tokens: Tensor, features: Tensor, positions: Int64s, metadata: AttentionMetadata) -> Tensor:
        hidden: Tensor = self.head(self.embed(tokens), features, self.rotary(torch.from_numpy(positions)), metadata)
        return hidden

    def _metadata(
        self, slots: Int64s, rows: Int64s, starts: Int64s, lens: Int64s, hidden_keys: Tensor | None = None
    ) -> AttentionMetadata:
        """Of a pass over T tokens of S sequences: slots [T], rows [S], where each one's tokens start [S + 1], its length with
        them [S]."""
        short = (torch.from_numpy(each.astype(np.int32)) for each in (rows[:, None], starts, lens))
        arrays = PagedArrays[Tensor, Tensor](torch.from_numpy(slots), *short)
        longest = int((starts[1:] - starts[:-1]).max()), int(lens.max())
        return attention_metadata(arrays, longest, self.cache.kv_caches, None, self.backend, (None,), hidden_keys)
