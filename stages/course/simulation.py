"""A scheduler without a model, for the tests of stage 2: sequences, and a KV cache in which one can see what each slot holds.

A real slot holds a key and a value that depend on all tokens up to its own. The simulated one holds just that: the tuple of
these tokens, made from what the slot before it holds, as a model makes keys from what its attention reads. A sequence that
reads a wrong slot, or one that nobody has written, therefore reads wrong tokens and is found out at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from stages.attention.block_manager import BlockManager
from stages.batching.scheduler_config import SchedulerConfig
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import SamplingParams, Sequence, SequenceStatus
from stages.core.scheduler import Scheduler

Prefix = tuple[int, ...]


def make_sequence(
    seq_id: int, prompt: int | list[int], *, max_tokens: int | None = 8, priority: int = 0, eos: tuple[int, ...] = (),
    max_model_len: int = 1 << 20, parent: Sequence | None = None, request_id: str = "", index: int = 0, **params: object,
) -> Sequence:  # fmt: skip
    """A sequence that waits.

    Args:
        prompt: its tokens, or how many; then they are ``100 * seq_id + 1000, …``, which no other sequence has.
        params: further fields of `SamplingParams`.
    """
    tokens = [1000 + 100 * seq_id + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(
        seq_id, tokens, SamplingParams(max_tokens=max_tokens, **params), priority=priority, eos_token_ids=eos,
        max_model_len=max_model_len, parent=parent, request_id=request_id, index=index,
    )  # fmt: skip


def ids(sequences: Iterable[Sequence]) -> list[int]:
    """The ids of sequences, in their order."""
    return [seq.seq_id for seq in sequences]


def counts(output: SchedulerOutput) -> dict[int, int]:
    """How many tokens each sequence of a step computes, by id."""
    return {seq.seq_id: count for seq, count in output.scheduled.items()}


def next_token(prefix: Prefix) -> int:
    """What the "model" answers: any function of all the tokens would do."""
    return (31 * sum((i + 1) * token for i, token in enumerate(prefix)) + len(prefix)) % 997


class Simulation:
    """A scheduler, its block manager, and device and host memory with a prefix in each slot.

    Args:
        num_blocks, block_size, num_host_blocks, watermark, prefix_caching, sliding_window: as of `BlockManager`.
        limits: fields of `SchedulerConfig`.
    """

    def __init__(
        self, num_blocks: int = 64, block_size: int = 4, num_host_blocks: int = 0, *, watermark: float = 0.0,
        prefix_caching: bool = False, sliding_window: int | None = None, **limits: object,
    ) -> None:  # fmt: skip
        self.manager = BlockManager(num_blocks, block_size, num_host_blocks, watermark, prefix_caching, sliding_window)
        limits.setdefault("max_model_len", num_blocks * block_size)
        self.scheduler = Scheduler(SchedulerConfig(**limits), self.manager)
        self.sequences: list[Sequence] = []
        self.device: dict[int, Prefix] = {}
        self.host: dict[int, Prefix] = {}

    def add(self, prompt: int | list[int], **fields: object) -> Sequence:
        """Let a sequence wait, at the place that the policy gives it. This goes round `Scheduler.add`, a task of its own."""
        fields.setdefault("max_model_len", self.scheduler.config.max_model_len)
        seq = make_sequence(len(self.sequences), prompt, **fields)
        self.sequences.append(seq)
        self._enter(self.scheduler.waiting, seq)
        return seq

    def start(self, prompt: int | list[int], computed: int | None = None, **fields: object) -> Sequence:
        """Let a sequence run that has computed its prompt, or `computed` tokens of it, in earlier steps.

        One that has computed its prompt has sampled a token too.
        """
        seq = self.add(prompt, **fields)
        self.scheduler.waiting.remove(seq)
        self.manager.allocate(seq)
        seq.num_computed_tokens = seq.num_prompt_tokens if computed is None else computed
        for position in range(seq.num_computed_tokens):
            self.device[self._slot(seq, position)] = tuple(seq.tokens[: position + 1])
        if seq.num_computed_tokens == seq.num_prompt_tokens:
            seq.tokens.append(next_token(tuple(seq.tokens)))
        seq.status = SequenceStatus.RUNNING
        self._enter(self.scheduler.running, seq)
        return seq

    def step(self) -> SchedulerOutput:
        """One step of an engine: schedule, move blocks, compute and check every read, update."""
        output = self.scheduler.schedule()
        self.scheduler.check_invariants()
        if output.scheduled:
            self.scheduler.update(output, self.compute(output))
            self.scheduler.check_invariants()
        return output

    def run(self, max_steps: int = 2000) -> int:
        """Step until nothing is left, which must leave no block in use; the number of steps."""
        for count in range(max_steps):
            if not self.scheduler.has_unfinished():
                assert self.manager.allocator.num_used == 0, "everything has finished and some blocks are still in use"
                assert not self.manager.host_tables, "everything has finished and some host blocks are still in use"
                return count
            self.step()
        raise AssertionError(f"after {max_steps} steps there are still {self.scheduler.running + self.scheduler.waiting}")

    def compute(self, output: SchedulerOutput) -> list[int]:
        """Carry a decision out: the tokens that the sequences of ``output.sampled`` get.

        Raises:
            AssertionError: the step holds more tokens than the budget, or a token would read something wrong.
        """
        budget = self.scheduler.config.max_num_batched_tokens
        assert sum(output.scheduled.values()) <= budget, f"{counts(output)} are more tokens than the budget of {budget}"
        self._copy(self.device, self.host, output.swap_out)
        self._copy(self.host, self.device, output.swap_in)
        self._copy(self.device, self.device, output.copies)
        read: dict[Sequence, Prefix] = {}
        for seq, count in output.scheduled.items():
            for position in range(seq.num_computed_tokens, seq.num_computed_tokens + count):
                before = self.device.get(self._slot(seq, position - 1), ()) if position else ()
                read[seq] = self.device[self._slot(seq, position)] = (*before, seq.tokens[position])
        for seq, count in output.scheduled.items():
            for position in range(self._first_seen(seq), seq.num_computed_tokens + count):
                found, expected = self.device.get(self._slot(seq, position)), tuple(seq.tokens[: position + 1])
                assert found == expected, (
                    f"sequence {seq.seq_id} reads position {position} in slot {self._slot(seq, position)} and finds the keys "
                    f"of the tokens {found} instead of {expected}"
                )
        return [next_token(read[seq]) for seq in output.sampled]

    def _enter(self, queue: list[Sequence], seq: Sequence) -> None:
        by_priority = self.scheduler.config.policy == "priority"
        queue.append(seq)
        queue.sort(key=lambda each: (each.priority if by_priority else 0, each.seq_id))

    def _first_seen(self, seq: Sequence) -> int:
        """The first position that the next token of a sequence attends to."""
        window = self.manager.sliding_window
        return 0 if window is None else max(0, seq.num_computed_tokens - window + 1)

    def _slot(self, seq: Sequence, position: int) -> int:
        size, table = self.manager.block_size, self.manager.tables.get(seq.seq_id, [])
        assert position < len(table) * size, (
            f"sequence {seq.seq_id} has no slot for position {position}; its blocks are {table}"
        )
        return table[position // size] * size + position % size

    def _copy(self, source: dict[int, Prefix], target: dict[int, Prefix], pairs: list[tuple[int, int]]) -> None:
        size = self.manager.block_size
        slots = [(a * size + i, b * size + i) for a, b in pairs for i in range(size)]
        target.update([(b, source.get(a, ())) for a, b in slots])  # all reads come before all writes
