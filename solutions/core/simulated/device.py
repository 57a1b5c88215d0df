"""A device that computes nothing and only waits: shows what a step costs beside one that takes so long, where there is none."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from ...batching.continuous_batch import FlatBatch
from ..overlap.lookahead import Lookahead, Meanwhile
from ..worker import StepResult


@dataclass
class SimulatedDevice:
    """Takes the same time for every step, one after the other. In the place of an executor it is told of steps by `execute`.

    Args:
        seconds: a step. text: token ids, of which every sequence gets the next, each from another place.
    """

    seconds: float
    text: Many[int]
    ahead: Lookahead[float, StepResult] | None = None
    _free: float = 0.0
    """When the last step that was begun has ended, by `time.perf_counter`."""

    def execute(self, batch: FlatBatch) -> StepResult:
        return self.finish(batch, self.begin(batch)) if self.ahead is None else self.ahead.execute(batch)

    def begin(self, batch: FlatBatch, tokens: Tensor | None = None) -> float:
        """When the step will have ended."""
        self._free = max(self._free, time.perf_counter()) + self.seconds
        return self._free

    def finish(self, batch: FlatBatch, end: float, meanwhile: Meanwhile | None = None) -> StepResult:
        """Wait for the step's end."""
        token_ids = [self.text[(7 * seq.seq_id + len(seq.tokens)) % len(self.text)] for seq in batch.sampled]
        if meanwhile is not None:
            meanwhile(torch.tensor(token_ids))
        if (left := end - time.perf_counter()) > 0:
            time.sleep(left)
        return StepResult([[token] for token in token_ids])
