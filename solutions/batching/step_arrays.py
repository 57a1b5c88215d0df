"""A step as arrays and nothing else: what every rank needs of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class StepArrays:
    """What a rank needs of a step. The first six are those of `FlatBatch`.

    Attributes:
        swap_out, swap_in, copies: [n, 2] int64, blocks (source, destination).
        logit_rows: [R] int64, rows of the hidden states that rank 0 wants logits of, call after call.
        logit_counts: [C] int64, how many rows each call has.
    """

    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    swap_out: NDArray[np.int64]
    swap_in: NDArray[np.int64]
    copies: NDArray[np.int64]
    logit_rows: NDArray[np.int64]
    logit_counts: NDArray[np.int64]
