"""What a drafting head hears of the steps that the target runs: their hidden states, kept until it drafts.

Where drafts do not pay, the head listens all the same and reads nothing, often for hundreds of steps. So a step that decodes
leaves no more behind than a copy of its hidden states, and whose they are is worked out for all such steps at once, when the
head drafts or when other sequences run. Behind a step that has read all weights the processor's caches hold nothing else, so
one call of PyTorch takes some 40 microseconds there, and a copy of memory hardly any.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...batching.continuous_batch import FlatBatch
from ...batching.sequence import Sequence
from ...batching.tree_rows import kept_rows
from .head_drafts import HeadDrafts

MOST_ALIKE = 64
"""Steps of the same sequences that are kept as they are."""


class HeardSteps:
    """Hidden states on their way from the target's steps to the contexts of a head.

    Args:
        drafts: have the contexts.
    """

    def __init__(self, drafts: HeadDrafts) -> None:
        self._drafts = drafts
        self._last: tuple[FlatBatch, Tensor] | None = None
        self._num_alike = 0
        self._alike = torch.empty(0)
        """[`MOST_ALIKE`, S, hidden], of as many steps in a row, each of one token for each of `_sequences`."""
        self._sequences: list[Sequence] = []
        self._ids: set[int] = set()
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)
        """[S], the positions of the first of these steps."""

    def listen(self, batch: FlatBatch, hidden: Tensor) -> None:
        """A step runs: hidden states [T, hidden], which the next one overwrites."""
        self._last = batch, hidden

    def note(self, gone: Collection[int]) -> None:
        """Keep the step that has run since the last call, if any, before the next one runs. What its sequences have computed
        is known by now, and the sequences `gone` have left, or lost what was computed of them."""
        if self._last is not None:
            (batch, hidden), self._last = self._last, None
            if len(batch.positions) == len(batch.sequences):
                self._keep(batch, hidden)
            else:
                self.hand_over()
                self._hand_out(batch, hidden, gone)
        if gone:
            self.hand_over()
            self._drafts.forget(gone)

    def num_kept(self, seq_id: int) -> int:
        """Positions of a sequence that are here and not in its context."""
        return self._num_alike if seq_id in self._ids else 0

    def hand_over(self) -> None:
        """Add to the contexts what is here."""
        if not self._num_alike:
            return
        features = self._alike[: self._num_alike].transpose(0, 1)  # [S, steps, hidden]
        for seq, start, rows in zip(self._sequences, self._starts.tolist(), features, strict=True):
            self._drafts.take(seq.seq_id, start, rows)
        self._num_alike, self._sequences, self._ids = 0, [], set()

    def _keep(self, batch: FlatBatch, hidden: Tensor) -> None:
        """A step of one token for each of its sequences, which stays, as a draft is never alone. Steps of the same sequences
        follow on one another, for who loses something is `gone`."""
        if self._num_alike == MOST_ALIKE or self._sequences != batch.sequences:
            self.hand_over()
            self._sequences, self._starts = batch.sequences, batch.positions
            self._ids = {seq.seq_id for seq in batch.sequences}
            self._alike = hidden.new_empty(MOST_ALIKE, *hidden.shape)
        assert hidden.is_contiguous()
        size = hidden.nbytes
        ctypes.memmove(self._alike.data_ptr() + self._num_alike * size, hidden.data_ptr(), size)
        self._num_alike += 1

    def _hand_out(self, batch: FlatBatch, hidden: Tensor, gone: Collection[int]) -> None:
        """Features of any step. Who is gone with it gets no context, which another may need."""
        for seq, (row, end) in zip(batch.sequences, pairwise(batch.query_start_loc.tolist()), strict=True):
            start = int(batch.positions[row])
            count = seq.num_computed_tokens - start  # behind it are drafts that were rejected
            if count > 0 and seq.seq_id not in gone:
                rows = kept_rows(batch.decision.drafts.get(seq), row, end)
                features = hidden[rows][:count]  # with a list, of a tree's rows, that is a copy
                self._drafts.take(seq.seq_id, start, features.clone() if isinstance(rows, slice) else features)
