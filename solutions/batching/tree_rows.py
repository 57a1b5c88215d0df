"""Drafts that branch, and where they stand in a step's flat batch: their positions, what is hidden from them, what stays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .continuous_batch import FlatBatch
from .scheduler_output import Draft
from .token_tree import TokenTree


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeDraft(Draft):
    """Tokens proposed for one sequence that are no chain.

    Attributes:
        tree: their shape. kept: the nodes that stay, in the order of the text, entered when they have been checked.
    """

    tree: TokenTree
    kept: list[int] = field(default_factory=list)

    def rows(self, end: int) -> slice:
        """The rows of a batch in which its nodes stand, the root's first, if the sequence's tokens end before row `end`."""
        return slice(end - len(self.tree.parents), end)


def has_trees(batch: FlatBatch) -> bool:
    """Whether any draft of a step is a tree."""
    return any(isinstance(draft, TreeDraft) for draft in batch.decision.drafts.values())


def enter_trees(batch: FlatBatch) -> Tensor | None:
    """Put the nodes of all trees of a step at the positions that their depths say.

    Returns:
        `AttentionMetadata.hidden_keys` of the step, [T]; None: no draft is a tree.
    """
    if not has_trees(batch):
        return None
    hidden = np.zeros(len(batch.positions), np.int64)
    for seq, end in zip(batch.sequences, batch.query_start_loc[1:].tolist(), strict=True):
        if isinstance(draft := batch.decision.drafts.get(seq), TreeDraft):
            rows = draft.rows(end)
            batch.positions[rows] = batch.positions[rows.start] + draft.tree.depths
            hidden[rows] = draft.tree.hidden_keys
    return torch.from_numpy(hidden)


def kept_rows(draft: Draft | None, start: int, end: int) -> list[int] | slice:
    """The rows of the batch, of a sequence's from `start` to `end`, whose tokens stay, in the order of the text; behind a draft
    that is no tree also those that do not."""
    if not isinstance(draft, TreeDraft):
        return slice(start, end)
    root = draft.rows(end).start
    return [*range(start, root + 1), *(root + node for node in draft.kept)]


def moves(batch: FlatBatch) -> tuple[list[int], list[int]]:
    """The rows of a batch whose keys and values must move so that those of all kept nodes follow their roots, and the rows
    whose slots they move to."""
    sources: list[int] = []
    targets: list[int] = []
    for seq, end in zip(batch.sequences, batch.query_start_loc[1:].tolist(), strict=True):
        if isinstance(draft := batch.decision.drafts.get(seq), TreeDraft):
            root = draft.rows(end).start
            moved = [(node, place) for place, node in enumerate(draft.kept, 1) if node != place]
            sources += [root + node for node, _ in moved]
            targets += [root + place for _, place in moved]
    return sources, targets
