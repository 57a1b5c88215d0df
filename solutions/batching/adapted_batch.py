"""The flat arrays of a step in an engine with adapters: they also say which adapter computes each token."""

from __future__ import annotations

import numpy as np

from .continuous_batch import ContinuousBatch, FlatBatch
from .scheduler_output import SchedulerOutput


class AdaptedBatch(ContinuousBatch):
    """A `ContinuousBatch` whose steps have `FlatArrays.adapters`."""

    def build(
        self, decision: SchedulerOutput, tables: dict[int, list[int]], progress: dict[int, int] | None = None
    ) -> FlatBatch:
        batch = super().build(decision, tables, progress)
        slots = np.fromiter((seq.adapter for seq in batch.sequences), np.int64, len(batch.sequences))
        batch.adapters = np.repeat(slots, np.diff(batch.query_start_loc))
        return batch
