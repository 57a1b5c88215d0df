"""Decode steps of a GPU as CUDA graphs: recorded for some batch sizes, and replayed for all.

A step is some hundred kernels of a few microseconds each, and a card waits while Python calls them. A graph holds the calls
with all their arguments, so only what these point to may change: each step's inputs are copied to buffers where the graphs read
them. A batch that has no graph of its size runs in the next larger one, filled up with padding: sequences whose context length
is 0 and whose tokens have no slot. Graphs are captured at start, the largest batch first: all share one pool of memory, in
which the smaller ones then find room. With several ranks every rank captures the same sizes in the same order, after a step
outside of capture that sets up NCCL's connections; inside, collectives are captured like any kernel.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...attention.paged_attention import AttentionBackend, attention_metadata
from ...batching.step_arrays import FlatArrays, HostArrays
from ...models.layers import CausalLM
from ..overlap.lookahead import known_ids
from ..platform.transfer import put_into

MAX_BATCH = 256
"""Largest batch that is captured. Beyond it the card's work takes so much longer than the launches that they hide behind it."""

PADDING_SLOT = -1

Step = Callable[[], Tensor]
"""Runs a step on the buffers as they are; returns hidden states [size, hidden] that the next call overwrites."""


Inputs = TypeVar("Inputs")


class Capture(abc.ABC, Generic[Inputs]):
    """Recordings of a function of the model, which takes a step's inputs and returns hidden states [T, hidden]."""

    @abc.abstractmethod
    def size_for(self, inputs: Inputs) -> int | None:
        """Rows of the recording that these inputs fit; None: they fit none, and the function itself must run."""
        ...

    @abc.abstractmethod
    def run(self, inputs: Inputs, size: int) -> Tensor:
        """Copy the inputs to where the recording of this size reads them, and replay it: hidden states [T, hidden], which the
        next step overwrites."""
        ...


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending and each once: 1, 2, 4, then every multiple of 8, and the largest batch that there can
    be: `max_num_seqs`, or `MAX_BATCH` if that is less. None is larger.

    Args:
        max_num_seqs: 1 or more.
    """
    # Hint: Write down the buffers of a step of four in the graph for 4, and then those of a step of two in the same
    # graph. Which rows does the graph read, and what stands in them?
    raise NotImplementedError("Stage 4 · Task 4.16: graph_sizes, see stages/stage4_optimization/GUIDE.md#task-4-16")


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


class DecodeGraphs(Capture[HostArrays]):
    """Runs decode steps through steps recorded for some batch sizes.

    Args:
        model: whose `forward` is recorded. backend: its attention; must be `capturable`.
        kv_caches, kv_scales: for each layer, as in `AttentionMetadata`.
        sizes: of the batches, ascending. max_model_len, block_size: how long a sequence and its block table can get.
        windows: of each group of layers.
        record: turns a step into its recording; `CudaGraphRecorder()` on a card.
    """

    def __init__(
        self, model: CausalLM, backend: AttentionBackend, kv_caches: list[Tensor], sizes: list[int], max_model_len: int,
        block_size: int, windows: Sequence[int | None], record: Callable[[Step], Step], kv_scales: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        device, largest, groups = kv_caches[0].device, sizes[-1], (len(windows),) if len(windows) > 1 else ()
        self.sizes = sizes
        # a step's inputs where the graphs read them; rows past a step's sequences are padding
        self._buffers = FlatArrays(
            slot_mapping=torch.full((*groups, largest), PADDING_SLOT, dtype=torch.int64, device=device),
            block_tables=torch.zeros((*groups, largest, -(-max_model_len // block_size)), dtype=torch.int32, device=device),
            query_start_loc=torch.arange(largest + 1, dtype=torch.int32, device=device),  # one token each: it never changes
            context_lens=torch.zeros(largest, dtype=torch.int32, device=device),
            input_ids=torch.zeros(largest, dtype=torch.int64, device=device),
            positions=torch.zeros(largest, dtype=torch.int64, device=device),
            adapters=torch.empty(0, dtype=torch.int64, device=device),  # steps with adapters are not recorded
        )
        self._steps: dict[int, Step] = {}
        for size in reversed(sizes):
            step = self._views(size)
            metadata = attention_metadata(step, (1, max_model_len), kv_caches, kv_scales, backend, windows)
            self._steps[size] = record(partial(model, step.input_ids, step.positions, metadata))

    def _views(self, size: int) -> FlatArrays[Tensor, Tensor]:
        """The first rows of the buffers, as a step of this size: one token for each of `size` sequences, `size` + 1 places
        where they begin, and whole rows of the block tables. With groups of layers slots and tables have a first dimension
        more, of which all is taken. Adapters have no rows.

        They are views: a graph that reads them reads what `run` has put into the buffers.
        """
        raise NotImplementedError("Stage 4 · Task 4.16: DecodeGraphs._views, see stages/stage4_optimization/GUIDE.md#task-4-16")

    def size_for(self, batch: HostArrays) -> int | None:
        """The smallest recorded size that has room for the batch's sequences.

        Returns:
            None if there is none: the batch is larger than all, has more than one token of some sequence, or an adapter other
            than 0 computes one of its tokens.
        """
        raise NotImplementedError(
            "Stage 4 · Task 4.16: DecodeGraphs.size_for, see stages/stage4_optimization/GUIDE.md#task-4-16"
        )

    def run(self, batch: HostArrays, size: int, tokens: Tensor | None = None) -> Tensor:
        """Put a step's arrays to where the graph of this size reads them, and replay it.

        Rows behind the batch's are padding, whatever an earlier step has left there: their tokens have `PADDING_SLOT`, in all
        groups, and their contexts are 0, so that nothing is written for them and nothing read. Block tables may have fewer
        columns than the buffers; what is in the others is behind the contexts. The batch is not changed.

        Args:
            size: what `size_for` gave for this batch.
            tokens: [N], on the device; place holders among the ids stand for them, see `known_ids`. None: there are none.

        Returns:
            Hidden states of the batch's tokens alone, [T, hidden], where the graph leaves them; the next step overwrites them.
        """
        raise NotImplementedError("Stage 4 · Task 4.16: DecodeGraphs.run, see stages/stage4_optimization/GUIDE.md#task-4-16")
