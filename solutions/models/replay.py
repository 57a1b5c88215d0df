"""A step's layers without Python: recorded once, then run again by one call.

On a small model a step is some hundred kernels of a few microseconds each, and calling them from Python takes nearly as long
as running them. From step to step only the number of tokens changes; where it reads and what the batch holds stands in buffers
that are filled anew, which also spares the memory of all results in between. It is what CUDA graphs do on a GPU;
``--enforce-eager`` switches it off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..attention.paged_attention_cpu import Plan, new_step
from ..core.platform.native import Recording
from .layers import Attention

MIN_ROWS = 64
"""Fewest tokens that a recording has room for; one that needs more is made anew, with room for the next power of two."""


class LayerReplay:
    """Runs ``run_layers(hidden, rope, metadata)`` of a model whose every operation in there is a native kernel.

    Args:
        run_layers: takes hidden states [T, hidden], (cos, signed sin) [T, 1, D] and the step's metadata; returns [T, hidden].
        attention: any of the layers' attention, for the sizes that all share.

    Attributes:
        recording: of the last step, if any. num_recordings: made so far.
    """

    def __init__(self, run_layers: Callable[..., Tensor], attention: Attention, hidden_size: int, dtype: torch.dtype) -> None:
        self._run_layers = run_layers
        self._attention = attention
        self._step = new_step()
        self._hidden = torch.empty(0, hidden_size, dtype=dtype)
        self._rope = torch.empty(2, 0, 1, attention.head_dim, dtype=dtype)
        self._out = self._hidden
        self._plan: Plan | None = None
        self.recording: Recording | None = None
        self._kv_caches: list[Tensor] = []
        self.num_recordings = 0

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        if not isinstance(metadata.plan, Plan):
            return self._run_layers(hidden, rope, metadata)
        count = len(hidden)
        if self.recording is None or count > self.recording.max_rows:
            self._make_room(count)
        elif metadata.kv_caches is not self._kv_caches:
            self.recording = None  # it holds the addresses of the cache that it was made with
        self._hidden[:count] = hidden
        self._rope[0, :count], self._rope[1, :count] = rope
        self._plan = metadata.plan  # its arrays are what the step points to
        self._plan.complete(self._attention.num_heads, self._attention.scale)
        self._plan.move_to(self._step)
        if self.recording is None:
            self._record(count, metadata)
        else:
            self.recording.replay(count)
        return self._out[:count]

    def _make_room(self, count: int) -> None:
        """Take larger buffers; a recording that reads from the old ones is of no use any more."""
        self.recording = None
        rows = max(MIN_ROWS, 1 << (count - 1).bit_length())
        self._hidden = self._hidden.new_empty(rows, self._hidden.shape[1])
        self._rope = self._rope.new_empty(2, rows, *self._rope.shape[2:])

    def _record(self, count: int, metadata: AttentionMetadata) -> None:
        """Run a step and note what it does."""
        rope = self._rope[0, :count], self._rope[1, :count]
        with Recording(len(self._hidden)) as recording:
            out = self._run_layers(self._hidden[:count], rope, metadata)
        self._out = out.as_strided((len(self._hidden), out.shape[1]), out.stride())  # the buffer that it is the start of
        self.recording, self._kv_caches = recording, metadata.kv_caches
        self.num_recordings += 1
