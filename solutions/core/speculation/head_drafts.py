"""Drafts by a head that reads what the target has computed: features kept, a context for each sequence, chains and trees.

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
from .head_passes import HeadPasses, Pass
from .tree_drafts import DraftShape, Level

Int32s = NDArray[np.int32]
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
        passes: of the head. shape: of the drafts. backend: of attention. rows: sequences that may have a context.
        longest: a sequence, in tokens. num_kv_heads, head_dim, dtype: of the head's cache.
    """

    def __init__(
        self, passes: HeadPasses, shape: DraftShape, backend: AttentionBackend, rows: int, longest: int, num_kv_heads: int,
        head_dim: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.passes, self.shape, self.backend = passes, shape, backend
        self._last = longest - 1
        self.longest = longest + sum(len(level.nodes) for level in shape.levels)  # behind a sequence that is as long as can be
        self.cache = CacheEngine(1, rows, self.longest, num_kv_heads, head_dim, dtype, torch.device("cpu"))
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
        contexts, shape = [self.contexts[seq.seq_id] for seq in drafting], self.shape
        levels = shape.levels[: shape.deepest[max(wanted[seq] for seq in drafting)]]
        rows = np.array([(each.row, each.first, each.length + each.num_pending) for each in contexts], np.int32)
        passes = [self._reading(drafting, contexts, rows), *(self._going_on(level, rows) for level in levels[1:])]
        tokens = np.empty((len(drafting), len(shape.deepest)), np.int64)
        for level, step in zip(levels, passes, strict=True):
            best = self.passes.run(step).reshape(len(drafting), len(level.nodes), -1)
            tokens[:, level.children] = best[:, level.places, level.ranks]
        for context in contexts:
            context.length += context.num_pending
            context.pending, context.num_pending = [], 0
        return {seq: draft[: wanted[seq]] for seq, draft in zip(drafting, tokens[:, 1:].tolist(), strict=True)}

    def _is_ready(self, seq: Sequence) -> bool:
        context = self.contexts.get(seq.seq_id)
        return context is not None and context.num_pending > 0 and context.end == len(seq.tokens) - 1

    def _reading(self, sequences: list[Sequence], contexts: list[Context], places: Int32s) -> Pass:
        """The pass that takes the pending features of all S sequences into the cache; wanted is the last output of each. For
        `places` see `_going_on`."""
        ids, positions, slots, starts = list[int](), list[int](), list[int](), [0]
        for seq, context in zip(sequences, contexts, strict=True):
            begin, end = context.first + context.length, context.end
            ids += seq.tokens[begin + 1 : end + 1]
            positions += range(begin, end)
            slot = context.row * self.longest - context.first
            slots += range(slot + begin, slot + end)
            starts.append(len(ids))
        self.passes.begin(ids, [each for context in contexts for each in context.pending])
        metadata = self._metadata(np.array(slots), np.array(starts, np.int32), places[:, 2], places)
        given = np.arange(len(ids))
        return Pass(given, given, np.array(positions), metadata, np.array(starts[1:]) - 1)

    def _going_on(self, level: Level, places: Int32s) -> Pass:
        """The pass over a level's nodes, for S sequences of which `places` [S, 3] are the contexts' rows, their first positions
        and their lengths with all that is pending."""
        rows, firsts, lengths = places.T
        count, begins = len(level.nodes), lengths + level.num_before
        slots = (rows.astype(np.int64) * self.longest + begins)[:, None] + level.each
        positions = np.minimum(firsts + (lengths + (level.depth - 1)), self._last).astype(np.int64)
        tokens, features, starts, hidden_keys = level.indices(len(places), self.shape.most)
        metadata = self._metadata(slots.ravel(), starts, begins + count, places, hidden_keys)
        return Pass(tokens, features, positions.repeat(count), metadata)

    def _metadata(
        self, slots: Int64s, starts: Int32s, lens: Int32s, places: Int32s, hidden_keys: Tensor | None = None
    ) -> AttentionMetadata:
        """Of a pass over T tokens of S sequences: slots [T]; where each one's tokens start [S + 1]; its length with them [S];
        `places` as in `_going_on`."""
        tables, short = torch.from_numpy(places[:, :1]), (torch.from_numpy(starts), torch.from_numpy(lens))
        arrays = PagedArrays[Tensor, Tensor](torch.from_numpy(slots), tables, *short)
        longest = int((starts[1:] - starts[:-1]).max()), int(lens.max())
        return attention_metadata(arrays, longest, self.cache.kv_caches, None, self.backend, (None,), hidden_keys)
