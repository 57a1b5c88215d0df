"""Attention of an encoder: a token sees all tokens of its sequence, those behind it too, and nothing is kept for a later step.

It stands in the place of paged attention, so an encoder's layers are built from the same parts as any other model's. Every
sequence of a step is there as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .paged_attention import AttentionBackend, AttentionMetadata

UNIT = 16
"""Sequences whose lengths, in units of this many tokens, are the same are computed together, padded to the longest."""


@dataclass(frozen=True, slots=True)
class Group:
    """S sequences padded to L tokens; padding repeats a sequence's last token.

    Attributes:
        rows: [S * L], rows of the step's tokens.
        size: S.
        mask: [S, 1, 1, L] bool, True where a key counts; None: all do.
    """

    rows: Tensor
    size: int
    mask: Tensor | None


class FullBackend(AttentionBackend):
    """Attends over the step's own tokens, and leaves the cache alone."""

    name = "full"

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> list[Group]:
        starts = metadata.query_start_loc.cpu().numpy().astype(np.int64)
        lengths, starts = np.diff(starts), starts[:-1]
        units = -(-lengths // UNIT)
        device = metadata.query_start_loc.device
        groups = []
        for unit in np.unique(units):
            members = np.flatnonzero(units == unit)
            counts = lengths[members, None]  # [S, 1]
            places = np.arange(counts.max())  # [L]
            rows = starts[members, None] + np.minimum(places, counts - 1)
            mask = None if counts.min() == counts.max() else torch.from_numpy(places < counts).to(device)[:, None, None]
            groups.append(Group(torch.from_numpy(rows.ravel()).to(device), len(members), mask))
        return groups

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend.attend`; not causal, and without a cache."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in metadata.plan:
            q, k, v = (self._padded(x, group) for x in (query, key, value))  # [S, H, L, D]
            attended = F.scaled_dot_product_attention(q, k, v, group.mask, scale=scale)
            output.index_copy_(0, group.rows, attended.transpose(1, 2).reshape(len(group.rows), *query.shape[1:]))
        return output

    @staticmethod
    def _padded(x: Tensor, group: Group) -> Tensor:
        return x.index_select(0, group.rows).view(group.size, -1, *x.shape[1:]).transpose(1, 2)
