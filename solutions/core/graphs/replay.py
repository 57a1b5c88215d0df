"""A function of a step on a CPU, recorded once and replayed: what a CUDA graph is to a GPU, see `decode_graphs.py`."""

from __future__ import annotations

import abc
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from ...attention.paged_attention import AttentionMetadata
from ...attention.paged_attention_cpu import Plan, new_step
from ...models.layers import Attention
from ..platform.native import Recording
from .decode_graphs import Capture

MIN_ROWS = 64
"""Fewest tokens that a CPU's recording has room for; one that needs more is made anew, with room for the next power of two."""

StepInputs = tuple[Many[Tensor], AttentionMetadata]
"""Its tensors, and its state as attention sees it."""


class Replay(Capture[StepInputs]):
    """A function of a step, every operation of which is a native kernel: its first step is recorded, and the others replayed.

    Args:
        inputs: for each of its inputs [T, ...] a tensor of that type and of as many numbers a row; the rows themselves do not
            matter. attention: any of those in it, for the sizes that all share.

    Attributes:
        recording: of the last step, if any. num_recordings: made so far.
    """

    def __init__(self, inputs: Many[Tensor], attention: Attention) -> None:
        self.attention = attention
        self._step = new_step()
        self._inputs = [each[:0] for each in inputs]
        self._out = torch.empty(0)
        self._plan: Plan | None = None
        self.recording: Recording | None = None
        self._kv_caches: list[Tensor] = []
        self.num_recordings = 0

    @abc.abstractmethod
    def compute(self, inputs: Many[Tensor], metadata: AttentionMetadata) -> Tensor:
        """The function, which may overwrite its inputs: [T, hidden]."""
        ...

    def size_for(self, inputs: StepInputs) -> int:
        """As many rows as there are: a recording has room for more, and `run` makes one that has."""
        return len(inputs[0][0])

    def run(self, inputs: StepInputs, size: int) -> Tensor:
        given, metadata = inputs
        if self.recording is None or size > self.recording.max_rows:
            self._make_room(size)
        elif metadata.kv_caches is not self._kv_caches:
            self.recording = None  # it holds the addresses of the cache that it was made with
        for buffer, tensor in zip(self._inputs, given, strict=True):
            buffer[:size] = tensor
        self._plan = metadata.plan  # its arrays are what the step points to
        self._plan.complete(self.attention.num_heads, self.attention.scale, self.attention.soft_cap)
        self._plan.move_to(self._step)
        if self.recording is None:
            self._record(size, metadata)
        else:
            self.recording.replay(size)
        return self._out[:size]

    def _make_room(self, count: int) -> None:
        """Take larger buffers; a recording that reads from the old ones is of no use any more."""
        self.recording = None
        rows = max(MIN_ROWS, 1 << (count - 1).bit_length())
        self._inputs = [each.new_empty(rows, *each.shape[1:]) for each in self._inputs]

    def _record(self, count: int, metadata: AttentionMetadata) -> None:
        """Run a step and note what it does."""
        rows = len(self._inputs[0])
        with Recording(rows) as recording:
            out = self.compute([each[:count] for each in self._inputs], metadata)
        self._out = out.as_strided((rows, out.shape[1]), out.stride())  # the buffer that it is the start of
        self.recording, self._kv_caches = recording, metadata.kv_caches
        self.num_recordings += 1
