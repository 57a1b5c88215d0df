"""What a drafting head hears of the steps that the target runs: their hidden states, kept until it drafts.

Where drafts do not pay, the head listens all the same and reads nothing, often for hundreds of steps. So a step that decodes
leaves no more behind than a copy of its hidden states, and whose they are is worked out for all such steps at once, when the
head drafts or when other sequences run.
"""

from __future__ import annotations

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
        self._alike: list[Tensor] = []
        """Hidden states [S, hidden] of steps in a row, each of one token for each of `_sequences`."""
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
                self.hand_over(gone)
                self._hand_out(batch, hidden.clone(), gone)
        if gone:
            self.hand_over(gone)
            self._drafts.forget(gone)

    def num_kept(self, seq_id: int) -> int:
        """Positions of a sequence that are here and not in its context."""
        return len(self._alike) if seq_id in self._ids else 0

    def hand_over(self, gone: Collection[int] = ()) -> None:
        """Add to the contexts what is here, but for that of sequences that are `gone`."""
        if not self._alike:
            return
        features = torch.stack(self._alike, dim=1)  # [S, steps, hidden]
        for seq, start, rows in zip(self._sequences, self._starts.tolist(), features, strict=True):
            if seq.seq_id not in gone:
                self._drafts.take(seq.seq_id, start, rows)
        self._alike, self._sequences, self._ids = [], [], set()

    def _keep(self, batch: FlatBatch, hidden: Tensor) -> None:
        """A step of one token for each of its sequences, which stays, as a draft is never alone."""
        num_steps = len(self._alike)
        if num_steps == MOST_ALIKE or self._sequences != batch.sequences or (self._starts + num_steps != batch.positions).any():
            self.hand_over()
            self._sequences, self._starts = batch.sequences, batch.positions
            self._ids = {seq.seq_id for seq in batch.sequences}
        self._alike.append(hidden.clone())

    def _hand_out(self, batch: FlatBatch, hidden: Tensor, gone: Collection[int]) -> None:
        for seq, (row, end) in zip(batch.sequences, pairwise(batch.query_start_loc.tolist()), strict=True):
            start = int(batch.positions[row])
            count = seq.num_computed_tokens - start  # behind it are drafts that were rejected
            if count > 0 and seq.seq_id not in gone:
                rows = kept_rows(batch.decision.drafts.get(seq), row, end)
                self._drafts.take(seq.seq_id, start, hidden[rows][:count])
