"""Decode steps as CUDA graphs: all kernels of a step launched by one call.

A decode step of a 7-billion model is some 300 kernels of a few microseconds to a few dozen. Launched one by one from Python
they leave the card waiting. A graph holds the launches with all their arguments, so only what these point to may change. Hence
the buffers here: each step's inputs are copied to where the graph reads them. A batch that has no graph of its size runs in the
next larger one, filled up with padding: sequences whose context length is 0 and whose tokens have no slot.

Graphs are captured at start, the largest batch first: all share one pool of memory, in which the smaller ones then find room.
With several ranks every rank captures the same sizes in the same order, after a step outside of capture that sets up NCCL's
connections; inside, collectives are captured like any kernel. `--enforce-eager` switches all of this off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..attention.paged_attention import AttentionBackend, attention_metadata
from ..batching.continuous_batch import FlatBatch
from ..batching.step_arrays import FlatArrays
from ..models.layers import CausalLM

MAX_BATCH = 256
"""Largest batch that is captured. Beyond it the card's work takes so much longer than the launches that they hide behind it."""

PADDING_SLOT = -1

Step = Callable[[], Tensor]
"""Runs a step on the buffers as they are; returns hidden states [size, hidden] that the next call overwrites."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: 1, 2, 4, then every multiple of 8, up to `max_num_seqs` or `MAX_BATCH`."""
    largest = min(max_num_seqs, MAX_BATCH)
    sizes = [size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size <= largest]
    return sizes if sizes[-1] == largest else [*sizes, largest]


class CudaGraphRecorder:
    """Turns a step into a graph. One of them serves all sizes, so that they share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run `step` twice outside (kernels are compiled and tuned, libraries take their workspace), then capture it."""
        side = torch.cuda.Stream()  # capturing needs a stream of its own, and so does what precedes it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = step()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


class DecodeGraphs:
    """Runs decode steps through steps recorded for some batch sizes.

    Args:
        model: whose `forward` is recorded. backend: its attention; must be `capturable`.
        kv_caches, kv_scales: for each layer, as in `AttentionMetadata`.
        sizes: of the batches, ascending. max_model_len, block_size: how long a sequence and its block table can get.
        sliding_window: of the model.
        record: turns a step into its recording; `CudaGraphRecorder()` on a card.
    """

    def __init__(
        self, model: CausalLM, backend: AttentionBackend, kv_caches: list[Tensor], sizes: list[int], max_model_len: int,
        block_size: int, sliding_window: int | None, record: Callable[[Step], Step], kv_scales: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        device, largest = kv_caches[0].device, sizes[-1]
        self.sizes = sizes
        # a step's inputs where the graphs read them; rows past a step's sequences are padding
        self._buffers = FlatArrays(
            slot_mapping=torch.full((largest,), PADDING_SLOT, dtype=torch.int64, device=device),
            block_tables=torch.zeros((largest, -(-max_model_len // block_size)), dtype=torch.int32, device=device),
            query_start_loc=torch.arange(largest + 1, dtype=torch.int32, device=device),  # one token each: it never changes
            context_lens=torch.zeros(largest, dtype=torch.int32, device=device),
            input_ids=torch.zeros(largest, dtype=torch.int64, device=device),
            positions=torch.zeros(largest, dtype=torch.int64, device=device),
        )
        self._steps: dict[int, Step] = {}
        for size in reversed(sizes):
            step = self._views(size)
            metadata = attention_metadata(step, (1, max_model_len), kv_caches, kv_scales, backend, sliding_window)
            self._steps[size] = record(lambda step=step, metadata=metadata: model(step.input_ids, step.positions, metadata))

    def _views(self, size: int) -> FlatArrays[Tensor, Tensor]:
        """The buffers as a step of this size."""
        rows = {each.name: size for each in fields(FlatArrays)} | {"query_start_loc": size + 1}
        return FlatArrays(**{name: getattr(self._buffers, name)[:count] for name, count in rows.items()})

    def size_for(self, batch: FlatBatch) -> int | None:
        """The recorded size that `batch` runs in, or None: it is too large, or more than decoding."""
        count = len(batch.context_lens)
        if len(batch.input_ids) != count:
            return None
        return next((size for size in self.sizes if size >= count), None)

    def run(self, batch: FlatBatch, size: int) -> Tensor:
        """Hidden states [T, hidden] of a step for which `size_for` gave `size`; the next step overwrites them."""
        of, count, width = self._buffers, len(batch.input_ids), batch.block_tables.shape[1]
        of.input_ids[:count].copy_(torch.from_numpy(batch.input_ids))
        of.positions[:count].copy_(torch.from_numpy(batch.positions))
        of.slot_mapping[:count].copy_(torch.from_numpy(batch.slot_mapping))
        of.block_tables[:count, :width].copy_(torch.from_numpy(batch.block_tables))
        of.context_lens[:count].copy_(torch.from_numpy(batch.context_lens))
        of.slot_mapping[count:size] = PADDING_SLOT
        of.context_lens[count:size] = 0
        return self._steps[size]()[:count]
