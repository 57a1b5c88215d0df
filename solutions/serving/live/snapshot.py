"""What the engine holds at one moment, as plain lists and numbers: its queues, its KV blocks, its last steps."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...attention.block_manager import NULL_BLOCK
from ...batching.scheduler_output import SchedulerOutput
from ...batching.sequence import Sequence

if TYPE_CHECKING:
    from ...core.engine import LLMEngine

MAX_STEPS = 64
"""Most steps that a frame holds; older ones are left out."""
MAX_WAITING = 64
"""Most waiting sequences that a frame holds, from the front of the queue."""


class Snapshots:
    """Makes frames of an engine: full ones, and ones that hold only the blocks that have changed. For the engine's thread.

    A frame is a dictionary:

    - ``full``: true if ``blocks`` are all that are in use or cached; false if they are those changed since the last frame.
    - ``steps``: since the frame before, each ``[number, seconds, rows, preempted]``: the time on the engine's clock, a row
      ``[sequence, tokens, drafted, decodes]`` for each sequence of the batch, and the ids of those that lost their blocks.
    - ``sequences``: those that run or wait, each ``[sequence, request, status, prompt, tokens, computed, cached,
      preemptions]``: lengths in tokens, and how often it was preempted. Running ones come first, in the order of the batch.
    - ``blocks``: ``[block, owners, cached]``: the sequences that hold it, and whether the prefix cache knows its content. A
      block with neither is free.
    - ``swapped``: ``[sequence, blocks]`` of those whose blocks lie in host memory.
    - ``copied``: blocks that are copies made before a write, since the frame before.
    - ``stats``: the fields of `EngineStats`.

    - ``engine``, in a full frame: the model's name and how large everything is.

    Args:
        engine: whose state is shown. model_name: as the API calls it.
    """

    def __init__(self, engine: LLMEngine, model_name: str) -> None:
        self.engine, self.model_name = engine, model_name
        self._steps: deque[list[Any]] = deque(maxlen=MAX_STEPS)
        self._copied: list[int] = []
        # what the last frame said of the blocks: block → owners, sequence → table, blocks whose content is cached
        self._owners: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}
        self._cached: set[int] = set()

    def record(self, decision: SchedulerOutput, now: float) -> None:
        """Remember a step for the next frame."""
        rows = [self._row(seq, count, decision) for seq, count in decision.scheduled.items()]
        number = self.engine.stats().num_steps
        self._steps.append([number, round(now, 4), rows, [seq.seq_id for seq in decision.preempted]])
        self._copied += [target for _, target in decision.copies]

    def forget(self) -> None:
        """Start anew: drop the steps that no frame has shown."""
        self._steps.clear()
        self._copied.clear()

    def frame(self, full: bool) -> dict[str, Any]:
        """The state at this moment. The steps and copies that it holds are forgotten afterwards."""
        changed = self._update_blocks()
        shown = self._owners.keys() | self._cached if full else changed
        blocks = [[block, list(self._owners.get(block, ())), block in self._cached] for block in shown]
        scheduler = self.engine.scheduler
        sequences = [*scheduler.running, *scheduler.waiting[:MAX_WAITING]]
        steps, self._steps = list(self._steps), deque(maxlen=MAX_STEPS)
        copied, self._copied = self._copied, []
        frame = {
            "full": full,
            "steps": steps,
            "sequences": [_describe(seq) for seq in sequences],
            "blocks": blocks,
            "swapped": [[seq_id, list(table)] for seq_id, table in self.engine.block_manager.host_tables.items()],
            "copied": copied,
            "stats": asdict(self.engine.stats()),
        }
        return frame | {"engine": self._sizes()} if full else frame

    def _sizes(self) -> dict[str, Any]:
        manager, config = self.engine.block_manager, self.engine.scheduler.config
        return {
            "model": self.model_name,
            "block_size": manager.block_size,
            "num_blocks": manager.allocator.num_blocks,
            "num_host_blocks": manager.host_allocator.num_blocks if manager.host_allocator else 0,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": config.max_model_len,
        }

    def _update_blocks(self) -> set[int]:
        """Catch up with the block manager, at a cost that grows with what has changed; the blocks that have."""
        manager, changed = self.engine.block_manager, set()
        for seq_id in self._tables.keys() | manager.tables.keys():
            before, now = self._tables.get(seq_id, []), manager.tables.get(seq_id, [])
            if before != now:
                old, new = set(before), set(now)
                for block in (old ^ new) - {NULL_BLOCK}:
                    self._move(block, seq_id, comes=block in new)
                    changed.add(block)
                self._tables[seq_id] = now.copy()
                if not now:
                    del self._tables[seq_id]
        cached = set(manager.prefix_cache.blocks()) if manager.prefix_cache is not None else set()
        changed |= cached ^ self._cached
        self._cached = cached
        return changed

    def _move(self, block: int, seq_id: int, comes: bool) -> None:
        owners = self._owners.setdefault(block, [])
        if comes:
            owners.append(seq_id)
            return
        owners.remove(seq_id)
        if not owners:
            del self._owners[block]

    @staticmethod
    def _row(seq: Sequence, count: int, decision: SchedulerOutput) -> list[Any]:
        draft = decision.drafts.get(seq)
        drafted = 0 if draft is None else len(draft.token_ids)
        return [seq.seq_id, count, drafted, count == 1 + drafted and seq.num_output_tokens > 1]


def _describe(seq: Sequence) -> list[Any]:
    return [
        seq.seq_id, seq.request_id, seq.status.value, seq.num_prompt_tokens, len(seq.tokens), seq.num_computed_tokens,
        seq.num_cached_tokens, seq.num_preemptions,
    ]  # fmt: skip
