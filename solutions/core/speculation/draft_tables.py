"""Where a model that drafts keeps its keys and values: in the blocks that the target's groups of layers have for a sequence.

A block has a place in the draft model's own cache, too. Each of its groups of layers uses the blocks of one of the target's
groups, which must have a window as wide at least, as blocks behind it are freed. If there are groups enough, each gets one to
itself. Else all lie in the blocks of the widest one, and every layer has a tensor of its own: such a cache takes more memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

from ...attention.block_manager import NULL_BLOCK
from ...batching.sequence import Sequence
from ...models.config.model_config import ModelConfig

Windows = tuple[int | None, ...]


def share_blocks(draft: Windows, target: Windows, longest: int) -> tuple[int, ...] | None:
    """For each group of the draft model's layers the target's group whose blocks it uses.

    Args:
        draft, target: the windows of both models' groups. longest: tokens of a sequence at most.

    Returns:
        [groups of the draft model]; equal entries only where there are not enough groups. None: no group is wide enough.
    """

    def by_width(windows: Windows) -> list[tuple[int, int]]:
        widths = (longest if window is None else min(window, longest) for window in windows)
        return sorted(((width, -group) for group, width in enumerate(widths)), reverse=True)

    needed, there = by_width(draft), by_width(target)
    if needed[0][0] > there[0][0]:
        return None
    pairs = list(zip(needed, there, strict=False))
    if len(pairs) < len(needed) or any(width > wide for (width, _), (wide, _) in pairs):
        return (-there[0][1],) * len(draft)
    found = {-group: -other for (_, group), (_, other) in pairs}
    return tuple(found[group] for group in range(len(draft)))


def with_room(draft: ModelConfig, target: ModelConfig, longest: int) -> ModelConfig | None:
    """The draft model as its cache is laid out beside this target; None if it would read blocks that the target frees."""
    groups = share_blocks(draft.windows, target.windows, longest)
    return None if groups is None else replace(draft, layers_apart=len(set(groups)) < len(groups))


class DraftTables:
    """The block tables of a draft model.

    Args:
        draft, target: both models. longest: tokens of a sequence at most.

    Attributes:
        whole: seq_id → blocks of all the target's groups, one behind the other, each as many; the block manager's.
    """

    def __init__(self, draft: ModelConfig, target: ModelConfig, block_size: int, longest: int) -> None:
        groups = share_blocks(draft.windows, target.windows, longest)
        assert groups is not None, "`with_room` was asked"
        self.whole: Mapping[int, list[int]] = {}
        self._groups, self._windows = groups, draft.windows
        self._num_targets, self._block_size = len(target.windows), block_size

    def rows(self, seq: Sequence) -> list[list[int]]:
        """The table of each group of the draft model's layers; `NULL_BLOCK` where the target has none, before or behind."""
        table = self.whole[seq.seq_id]
        length = len(table) // self._num_targets
        return [table[group * length : (group + 1) * length] for group in self._groups]

    def flat(self, seq: Sequence) -> list[int]:
        """The same, one behind the other."""
        return [block for row in self.rows(seq) for block in row]

    def blocks(self, seq: Sequence, start: int, end: int) -> list[list[int]]:
        """The blocks of all groups that hold positions from `start` on and before `end`, block after block of positions."""
        first, last = start // self._block_size, -(-end // self._block_size)
        columns = zip(*(row[first:last] for row in self.rows(seq)), strict=True)
        return [[block for block in column if block != NULL_BLOCK] for column in columns]

    def first_within_windows(self, seq: Sequence) -> int:
        """The first position all of whose windows are in blocks that the sequence still has. Positions before it that were
        missed stay so: drafts that look at them are worse, no more."""
        first = 0
        for window, row in zip(self._windows, self.rows(seq), strict=True):
            if window is not None and (num_expired := sum(1 for _ in takewhile(NULL_BLOCK.__eq__, row))):
                first = max(first, num_expired * self._block_size + window - 1)
        return first
