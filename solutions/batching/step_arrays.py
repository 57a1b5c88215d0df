"""The arrays of a step, declared once: for the engine's batch, for other ranks, for the model and for recorded steps.

They are NumPy arrays where a step is laid out and sent, and tensors where the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Int64 = TypeVar("Int64")
"""An array of int64. These two say what an array's elements are; other processes read them off the declarations."""
Int32 = TypeVar("Int32")
"""An array of int32."""


@dataclass(slots=True)
class PagedArrays(Generic[Int64, Int32]):
    """Where the tokens of one step stand and where their keys and values lie.

    S sequences with T tokens in all; sequence i owns the tokens ``query_start_loc[i]:query_start_loc[i + 1]``, which are
    the last ones of its context.

    Attributes:
        slot_mapping: [T], the slot of each token: ``block * block_size + offset``.
        block_tables: [S, M], the blocks of each sequence in order; entries past its context, and entries left of the
            sliding window, are arbitrary and must not be read. Of a model whose layers hold their blocks in G groups these two
            are [G, T] and [G, S, M].
        query_start_loc: [S + 1], where each sequence's tokens begin; starts at 0, ends at T.
        context_lens: [S], tokens of each sequence in the cache once this step's are written.
    """

    slot_mapping: Int64
    block_tables: Int32
    query_start_loc: Int32
    context_lens: Int32


@dataclass(slots=True)
class FlatArrays(PagedArrays[Int64, Int32]):
    """All that a model takes of a step.

    Attributes:
        input_ids, positions: [T], each token's id and its place in its sequence.
        adapters: [T], the slot of each token's adapter, 0 for none; empty in an engine without adapters.
    """

    input_ids: Int64
    positions: Int64
    adapters: Int64


HostArrays = FlatArrays[NDArray[np.int64], NDArray[np.int32]]
"""As a step is laid out and sent."""


@dataclass(slots=True)
class StepArrays(HostArrays):
    """What the other ranks need of a step.

    Attributes:
        swap_out, swap_in, copies: [n, 2] int64, blocks (source, destination).
        logit_rows: [R] int64, rows of the hidden states that rank 0 wants logits of, call after call.
        logit_counts: [C] int64, how many rows each call has.
    """

    swap_out: NDArray[np.int64]
    swap_in: NDArray[np.int64]
    copies: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    logit_counts: NDArray[np.int64]
