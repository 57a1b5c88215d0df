"""A decode step's layers without Python: recorded once for each batch size, then run again by one call.

On a small model a step is some hundred kernels of a few microseconds each, and calling them from Python takes nearly as long as
running them. The kernels of a step depend only on its number of tokens; where it reads and what the batch holds stands in
buffers that are filled anew. It is what CUDA graphs do on a GPU; ``--enforce-eager`` switches it off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..attention.paged_attention_cpu import Plan, new_step
from ..core.native import Recording
from .layers import Attention

MAX_TOKENS = 64
"""Largest step that is recorded: with more, the kernels take far longer than Python does."""


class LayerReplay:
    """Runs ``run_layers(hidden, rope, metadata)`` of a model whose every operation in there is a native kernel.

    Args:
        run_layers: takes hidden states [T, hidden], (cos, signed sin) [T, 1, D] and the step's metadata; returns [T, hidden].
        attention: any of the layers' attention, for the sizes that all share.
    """

    def __init__(self, run_layers: Callable[..., Tensor], attention: Attention, hidden_size: int, dtype: torch.dtype) -> None:
        self._run_layers = run_layers
        self._attention = attention
        self._step = new_step()
        self._hidden = torch.empty(MAX_TOKENS, hidden_size, dtype=dtype)
        self._rope = torch.empty(2, MAX_TOKENS, 1, attention.head_dim, dtype=dtype)
        self._buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._recordings: dict[int, tuple[Recording, Tensor]] = {}
        self._kv_caches: list[Tensor] = []

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        count = len(hidden)
        if count > MAX_TOKENS or not isinstance(metadata.plan, Plan):
            return self._run_layers(hidden, rope, metadata)
        own_hidden, own_rope = self._hidden[:count], (self._rope[0, :count], self._rope[1, :count])
        own_hidden.copy_(hidden)
        for own, given in zip(own_rope, rope, strict=True):
            own.copy_(given)
        metadata.plan.complete(self._attention.num_heads, self._attention.scale)
        metadata.plan.move_to(self._step)
        if metadata.kv_caches is not self._kv_caches:  # recordings hold the addresses of the cache that they were made with
            self._kv_caches = metadata.kv_caches
            self._recordings.clear()
        known = self._recordings.get(count)
        if known is None:
            with Recording(MAX_TOKENS, self._buffers) as recording:
                out = self._run_layers(own_hidden, own_rope, metadata)
            self._recordings[count] = recording, out
            return out
        recording, out = known
        recording.replay()
        return out
