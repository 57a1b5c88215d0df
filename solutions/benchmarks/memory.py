"""How much of the memory that is set aside for keys and values holds any: paged against reserved in advance.

No model runs. Sequences of given lengths come from an endless queue into a memory of so many token slots, one token each a
step, first come first served. The paged side is the engine's own `Scheduler` and `BlockManager`. The contiguous side reserves
one unbroken piece when a sequence is admitted: its outcome depends on how much it reserves and on how pieces are found.

Source: Kwon et al., SOSP 2023, §3.1, Fig. 2 (the three kinds of waste) and §6.1 (Orca's three ways to reserve, with a
buddy allocator).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from ..attention.block_manager import BlockManager
from ..batching.sampling_params import SamplingParams
from ..batching.scheduler_config import SchedulerConfig
from ..batching.sequence import Sequence
from ..core.scheduler import Scheduler

Lengths = Many[tuple[int, int]]
"""(input, output) tokens of each request."""

SETTLED_SHARE = 0.1
"""Share of the requests that finish before the averages begin: an empty memory is not yet fragmented."""


@dataclass(slots=True)
class Usage:
    """Averages over the steps of a saturated run. The four shares are of the whole memory and sum to 1.

    Attributes:
        running: sequences at once. tokens: slots that hold a token's keys and values.
        later: reserved slots that their sequence will fill before it ends.
        never: reserved slots that it will not (internal fragmentation).
        free: slots outside every reservation; with requests waiting, they are too few or too scattered for the next one
            (external fragmentation), or kept as a watermark.
        preemptions: sequences that lost their memory on the way and were computed again. steps: that the averages are over.
    """

    system: str
    running: float = 0.0
    tokens: float = 0.0
    later: float = 0.0
    never: float = 0.0
    free: float = 0.0
    preemptions: int = 0
    steps: int = 0

    @property
    def waste(self) -> float:
        """Share of the reserved slots that hold no token."""
        return 1.0 - self.tokens / (self.tokens + self.later + self.never)


class UsageMeter:
    """Averages snapshots of a memory of `capacity` slots; `system` is the name for the result."""

    def __init__(self, system: str, capacity: int) -> None:
        self.capacity = capacity
        self._usage = Usage(system)

    def add(self, sequences: Iterable[tuple[int, int, int]]) -> None:
        """Take one snapshot: (tokens held, slots reserved, tokens when it ends) of every running sequence, from any iterable. A
        sequence may end with more tokens than it has slots so far."""
        usage, reserved = self._usage, 0
        for tokens, slots, final in sequences:
            filled = min(slots, final)
            usage.tokens += tokens
            usage.later += filled - tokens
            usage.never += slots - filled
            usage.running += 1
            reserved += slots
        usage.free += self.capacity - reserved
        usage.steps += 1

    def result(self, preemptions: int = 0) -> Usage:
        """The averages. Raises ValueError if the run was too short to settle."""
        usage = self._usage
        if usage.steps == 0:
            raise ValueError("too few requests to fill the memory; use more of them or less memory")
        usage.running /= usage.steps
        for name in ("tokens", "later", "never", "free"):
            setattr(usage, name, getattr(usage, name) / (usage.steps * self.capacity))
        usage.preemptions = preemptions
        return usage


class FirstFit:
    """Pieces of exactly the size asked for, at the lowest address where one fits, of `capacity` slots."""

    def __init__(self, capacity: int) -> None:
        self._used = bytearray(capacity)  # a slot is 0 or 1

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A (start, size) piece, or None when no hole is large enough."""
        start = self._used.find(bytes(size))
        if start < 0:
            return None
        self._used[start : start + size] = b"\1" * size
        return start, size

    def free(self, start: int, size: int) -> None:
        """Give a piece back."""
        self._used[start : start + size] = bytes(size)


class Buddy:
    """Pieces of 2^k slots at multiples of their size; a free piece joins its buddy, with which it makes the next size. What of
    `capacity` is beyond a power of two becomes pieces of the next smaller ones.

    Source: Knowlton, "A fast storage allocator", CACM 1965.
    """

    def __init__(self, capacity: int) -> None:
        self._free: dict[int, list[int]] = {1 << k: [] for k in range(capacity.bit_length())}
        start = 0
        for size in sorted(self._free, reverse=True):
            if capacity & size:
                self._free[size].append(start)
                start += size

    def allocate(self, size: int) -> tuple[int, int] | None:
        """A (start, size) piece of at least `size` slots, or None when there is none."""
        wanted = power_of_two(size)
        found = next((s for s in sorted(self._free) if s >= wanted and self._free[s]), None)
        if found is None:
            return None
        start = self._free[found].pop(0)
        while found > wanted:  # halve it; the upper half stays free
            found //= 2
            insort(self._free[found], start + found)
        return start, wanted

    def free(self, start: int, size: int) -> None:
        """Give a piece back."""
        while start ^ size in self._free[size]:
            self._free[size].remove(start ^ size)
            start, size = min(start, start ^ size), 2 * size
        insort(self._free[size], start)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def reserve_max(max_model_len: int) -> Callable[[int, int], int]:
    """Reserve for the longest sequence that the server takes, as FasterTransformer and "Orca (Max)" do."""
    return lambda input_len, output_len: max_model_len


def reserve_power_of_two(input_len: int, output_len: int) -> int:
    """ "Orca (Pow2)": outputs are over-reserved by less than twice, as if their rough length were known."""
    return input_len + power_of_two(output_len)


def reserve_exactly(input_len: int, output_len: int) -> int:
    """ "Orca (Oracle)": the final length, which no real server knows."""
    return input_len + output_len


def simulate_contiguous(
    system: str, capacity: int, lengths: Lengths, reserve: Callable[[int, int], int], memory: FirstFit | Buddy
) -> Usage:
    """Run requests through a memory in which each gets one contiguous piece.

    Args:
        system: name for the result.
        capacity: slots in the memory.
        lengths: the requests.
        reserve: (input, output) → slots to reserve.
        memory: an empty allocator of `capacity` slots.

    Raises:
        ValueError: "one sequence does not fit the memory of N tokens"; or the requests are too few (`UsageMeter.result`).
    """
    meter = UsageMeter(system, capacity)
    waiting, settled = deque(lengths), int(SETTLED_SHARE * len(lengths))
    running: list[list[int]] = []  # tokens held, start, slots, final
    num_finished = 0
    while waiting:
        while waiting and (piece := memory.allocate(reserve(*waiting[0]))) is not None:
            input_len, output_len = waiting.popleft()
            running.append([input_len, *piece, input_len + output_len - 1])  # the last token is never fed back
        if not running:
            raise ValueError(f"{system}: one sequence does not fit the memory of {capacity} tokens; use more of it")
        if num_finished >= settled and waiting:
            meter.add((tokens, slots, final) for tokens, _, slots, final in running)
        for seq in running:
            if seq[0] == seq[3]:
                memory.free(seq[1], seq[2])
                num_finished += 1
        running = [[seq[0] + 1, *seq[1:]] for seq in running if seq[0] < seq[3]]
    return meter.result()


def simulate_paged(system: str, capacity: int, lengths: Lengths, block_size: int) -> Usage:
    """Run requests through the engine's scheduler and block manager, without a model, a token budget, and prefix caching: no
    two of these prompts share a block, and what a finished one leaves in the cache counts as free either way. Raises ValueError
    if not even one sequence fits, or the requests are too few."""
    longest = max(i + o for i, o in lengths)
    if longest > capacity // block_size * block_size:
        raise ValueError(f"{system}: one sequence does not fit the memory of {capacity} tokens; use more of it")
    manager = BlockManager(capacity // block_size, block_size, enable_prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=capacity, max_num_batched_tokens=2 * capacity), manager)
    for seq_id, (input_len, output_len) in enumerate(lengths):
        scheduler.add(Sequence(seq_id, [0] * input_len, SamplingParams(max_tokens=output_len, ignore_eos=True)))
    meter, settled = UsageMeter(system, capacity), int(SETTLED_SHARE * len(lengths))
    while scheduler.waiting:
        decision = scheduler.schedule()
        if len(lengths) - len(scheduler.waiting) - len(scheduler.running) >= settled and scheduler.waiting:
            # what the memory holds once this step is computed
            meter.add(
                (seq.num_computed_tokens + count, len(manager.tables[seq.seq_id]) * block_size, seq.max_len - 1)
                for seq, count in decision.scheduled.items()
            )
        scheduler.update(decision, [[0]] * len(decision.sampled))
    return meter.result(scheduler.num_preemptions)
