"""A scheduler with a simulated KV cache, so that tests can see whose keys and values every slot holds.

The simulated cache stores, in each slot, the whole prefix of tokens that the slot's key and value would depend on. Before a
step's tokens "attend", every slot that they would read must hold exactly the prefix of their own sequence. This one check
finds stale prefix hashes, missed copies, wrong slots, lost swaps and double frees without a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy

import torch

from solutions.attention.block_manager import BlockManager
from solutions.attention.hybrid_manager import HybridBlockManager
from solutions.attention.radix_manager import RadixBlockManager
from solutions.attention.tiered_manager import TieredBlockManager
from solutions.batching.continuous_batch import ContinuousBatch, FlatBatch
from solutions.batching.grouped_batch import GroupedBatch
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_config import SchedulerConfig
from solutions.batching.scheduler_output import SchedulerOutput
from solutions.batching.sequence import Sequence
from solutions.core.overlap.lookahead import Lookahead, Meanwhile, known_ids
from solutions.core.scheduler import Scheduler
from solutions.core.speculation.draft_lengths import DraftLengths
from solutions.core.speculative import Drafter, NoDrafter, Proposer
from solutions.tests.simulated_tiers import make_tiered


class Simulation:
    """Scheduler, block manager and batch builder over a cache of prefixes.

    Args:
        windows: of each group of layers, if they differ; then a `HybridBlockManager` is simulated.
        next_token: chooses the token that a sequence "samples"; with drafts, by its tokens alone.
        proposer: where tokens on trial come from.
        radix: find prefixes of any length.
        clock: says how long steps take, and as many tokens are drafted as pay by it; None: as many as the settings say.
        ahead: decide and begin each step before the tokens of the one before are there; then this is the `Device`.
        tier: blocks that a tier below the prefix cache keeps, which takes `delay` steps to send any; 0: there is no tier.
    """

    def __init__(
        self, num_blocks: int = 16, block_size: int = 4, num_host_blocks: int = 0, sliding_window: int | None = None,
        enable_prefix_caching: bool = True, watermark: float = 0.01, next_token: Callable[[Sequence], int] | None = None,
        proposer: Proposer | None = None, windows: tuple[int | None, ...] = (), ahead: bool = False, radix: bool = False,
        tier: int = 0, delay: int = 0, clock: Callable[[], float] | None = None, **limits: object,
    ) -> None:  # fmt: skip
        self.windows = windows or (sliding_window,)
        limits.setdefault("max_model_len", num_blocks * block_size)
        self.config = SchedulerConfig(**limits)
        self.device: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.host: dict[int, tuple[int, tuple[int, ...]]] = {}
        """slot → the group whose layers it serves, and the prefix that it stands for."""
        settings = (num_blocks, block_size, num_host_blocks, watermark, enable_prefix_caching)
        if windows:
            self.manager = HybridBlockManager(*settings, windows, self.config.max_num_batched_tokens)
        elif radix:
            self.manager = RadixBlockManager(*settings[:4])
        elif tier and enable_prefix_caching:
            self.manager = make_tiered(self.device, settings[:3], watermark, sliding_window, tier, delay)
        else:
            self.manager = BlockManager(*settings, sliding_window)
        self.scheduler = Scheduler(self.config, self.manager)
        budget = self.config.max_num_batched_tokens
        lengths = None if clock is None or proposer is None else DraftLengths(proposer.foretells)
        self.clock = clock or time.monotonic
        self.drafter = NoDrafter() if proposer is None else Drafter(proposer, self.manager, budget, lengths, self.clock)
        sizes = (self.config.max_num_seqs, self.config.max_model_len, block_size)
        self.batch = GroupedBatch(*sizes, len(windows)) if windows else ContinuousBatch(*sizes)
        self.ahead = Lookahead(self.scheduler, self.batch, self) if ahead else None
        self.next_token = next_token or (lambda seq: (seq.seq_id * 7 + len(seq.tokens)) % 5)
        self.next_id = 0
        self.sequences: list[Sequence] = []

    def add(
        self, prompt: list[int], max_tokens: int = 4, n: int = 1, priority: int = 0, salt: str | None = None,
        client: str | None = None, stop_token_ids: list[int] | None = None,
    ) -> list[Sequence]:  # fmt: skip
        """Queue a request of `n` sequences."""
        group: list[Sequence] = []
        params = SamplingParams(max_tokens=max_tokens, n=n, stop_token_ids=stop_token_ids or [])
        for index in range(n):
            group.append(
                Sequence(
                    self.next_id, prompt, params, index=index, priority=priority,
                    cache_salt=salt, parent=group[0] if index else None, max_model_len=self.config.max_model_len,
                    client=client,
                )
            )  # fmt: skip
            self.next_id += 1
        group[0].children = group[1:]
        self.scheduler.add(group[0])
        self.sequences += group
        return group

    def step(self) -> SchedulerOutput:
        """Schedule, draft, move blocks, write, check every read, update; invariants before and after."""
        decision = self.scheduler.schedule()
        self.scheduler.check_invariants()
        if not decision.scheduled:
            return decision
        self.drafter.draft(decision)
        self.scheduler.check_invariants()
        assert sum(decision.scheduled.values()) <= self.config.max_num_batched_tokens
        batch = (self.ahead or self.batch).build(decision, self.manager.tables)
        self.scheduler.update(decision, self.ahead.execute(batch) if self.ahead else self.finish(batch, self.begin(batch)))
        for observer in (self.ahead, self.drafter.observer):
            if observer is not None:
                observer.on_step(decision, self.clock())
        self.scheduler.check_invariants()
        return decision

    def begin(self, batch: FlatBatch, tokens: torch.Tensor | None = None) -> None:
        """Move blocks, check every read, write."""
        if tokens is not None:
            batch.input_ids = known_ids(torch.from_numpy(batch.input_ids), tokens).numpy()
        self._move(batch.decision)
        self._check_and_write(batch)

    def finish(self, batch: FlatBatch, hidden: None, meanwhile: Meanwhile | None = None) -> list[list[int]]:
        """The tokens of those who get one."""
        decision = batch.decision
        sampled = [self._accepted(seq, decision) if decision.drafts else [self.next_token(seq)] for seq in batch.sampled]
        if sampled and meanwhile is not None:
            meanwhile(torch.tensor(sampled)[:, 0])
        return sampled

    def _accepted(self, seq: Sequence, decision: SchedulerOutput) -> list[int]:
        """The drafted tokens that are what the sequence would sample, up to the first other one, and the one sampled there."""
        drafted = decision.drafts[seq].token_ids if seq in decision.drafts else []
        text = copy(seq)
        text.tokens = seq.tokens[: len(seq.tokens) - len(drafted)]
        new = []
        for guess in (*drafted, None):
            new.append(self.next_token(text))
            if new[-1] != guess:
                break
            text.tokens.append(guess)
        return new

    def run(self, max_steps: int = 20_000) -> int:
        """Step until nothing is left; returns the number of steps."""
        for count in range(max_steps):
            if not self.scheduler.has_unfinished():
                self.check_all_free()
                return count
            self.step()
        raise AssertionError(f"not finished after {max_steps} steps: {self.scheduler.running} {self.scheduler.waiting}")

    def check_all_free(self) -> None:
        """Nothing holds a block any more."""
        assert self.manager.allocator.num_used == 0
        if self.manager.host_allocator is not None:
            assert self.manager.host_allocator.num_used == 0
        assert not self.manager.tables
        assert not self.manager.host_tables

    def _move(self, decision: SchedulerOutput) -> None:
        size = self.manager.block_size

        def move(source: dict, target: dict, pairs: list[tuple[int, int]]) -> None:
            read = [(dst, [source.get(src * size + i) for i in range(size)]) for src, dst in pairs]
            for dst, content in read:
                for i, prefix in enumerate(content):
                    target[dst * size + i] = prefix

        if isinstance(self.manager, TieredBlockManager):
            self.manager.move_tiers()
        move(self.device, self.host, decision.swap_out)
        move(self.host, self.device, decision.swap_in)
        move(self.device, self.device, decision.copies)

    def _check_and_write(self, batch: FlatBatch) -> None:
        size, written = self.manager.block_size, set()
        assert batch.slot_mapping.flags.c_contiguous
        assert batch.block_tables.flags.c_contiguous  # kernels know no strides
        managers = getattr(self.manager, "groups", [self.manager])
        slots, tables = (
            batch.slot_mapping.reshape(len(managers), -1),
            batch.block_tables.reshape(len(managers), len(batch.sequences), -1),
        )
        for group, manager in enumerate(managers):
            for i, seq in enumerate(batch.sequences):
                prefix = self._prefix(batch, i)
                for t in range(batch.query_start_loc[i], batch.query_start_loc[i + 1]):
                    position, slot = int(batch.positions[t]), int(slots[group, t])
                    assert batch.input_ids[t] == prefix[position]
                    assert slot == manager.tables[seq.seq_id][position // size] * size + position % size
                    assert slot not in written, f"slot {slot} is written twice in one step"
                    written.add(slot)
                    self.device[slot] = (group, prefix[: position + 1])
        for group, window in enumerate(self.windows):
            for i, seq in enumerate(batch.sequences):
                prefix = self._prefix(batch, i)
                first, end = int(batch.positions[batch.query_start_loc[i]]), int(batch.context_lens[i])
                assert end == first + batch.query_start_loc[i + 1] - batch.query_start_loc[i]
                for position in range(0 if window is None else max(0, first - window + 1), end):
                    slot = int(tables[group, i, position // size]) * size + position % size
                    assert self.device.get(slot) == (group, prefix[: position + 1]), (
                        f"{seq} reads position {position} of group {group} in slot {slot} and finds another prefix"
                    )

    @staticmethod
    def _prefix(batch: FlatBatch, index: int) -> tuple[int, ...]:
        """The tokens of a sequence of the batch; the last one may be known to the device alone."""
        tokens, last = batch.sequences[index].tokens, int(batch.query_start_loc[index + 1]) - 1
        return (*tokens, int(batch.input_ids[last])) if batch.positions[last] == len(tokens) else tuple(tokens)
