"""Task 3.11 ★: sums through memory that several ranks see, with ranks as threads, as processes, and played by the test."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.core.platform import native
from stages.course.fixtures.checks import check_equal
from stages.parallelism.communication import CommunicationError
from stages.parallelism.shared_memory import SharedMemory, nameless_file

if native.compiler() is None:
    pytest.skip("there is no C++ compiler here; install g++ or clang++", allow_module_level=True)

LINE = 64
"""Bytes from one flag to the next."""
SLOT = 256
"""Bytes of a slot: 64 floats, or 128 numbers in bfloat16."""
LENGTHS = [0, 1, 3, 15, 16, 17, 63, 64, 65, 128, 129, 300]
TYPES = [torch.float32, torch.bfloat16]
BEHIND = 150
"""Numbers of other memory behind a sum, more than a slot holds."""
PATIENCE = 10.0
"""Seconds within which everything here ends, where it is right."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The learner's file, built by itself."""
    return ctypes.CDLL(str(native.build(tmp_path_factory.mktemp("sums"), "sums", native.SUMS)))


def on_threads(
    library: ctypes.CDLL, size: int, work: Callable[[SharedMemory], Any], parts: int = 1, timeout: float = 4.0
) -> list[Any]:
    """What ``work(memory)`` gives on each of `size` ranks, which are threads that start at once."""
    descriptor, results, errors = nameless_file(), {}, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(SharedMemory(os.dup(descriptor), rank, size, parts, timeout, SLOT, library))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    os.close(descriptor)
    if errors:
        raise errors[0]
    assert len(results) == size, f"only the ranks {sorted(results)} of {size} came back"
    return [results[rank] for rank in range(size)]


def numbers(rank: int, length: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(100 * rank + length)).to(dtype)


def total(parts: list[Tensor]) -> Tensor:
    """Added in float32, in the order of ranks, and rounded once."""
    found = torch.zeros(parts[0].shape)
    for part in parts:
        found += part.float()
    return found.to(parts[0].dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (3, 1), (2, 3)])
def test_sums_of_all_lengths(library: ctypes.CDLL, size: int, parts: int, dtype: torch.dtype) -> None:
    """None, one, a register of numbers and one more or less, a slot and one more or less, several slots; in one to three parts.
    Where the sum goes lies other memory behind it.

    Why: the hidden states of one token fit into a slot, those of a prompt into hundreds. Behind them is the next tensor.
    """

    def work(memory: SharedMemory) -> list[tuple[Tensor, Tensor]]:
        found = []
        for length in LENGTHS:
            x, y = numbers(memory.rank, length, dtype), torch.full((length + BEHIND,), 7.0, dtype=dtype)
            memory.call("all_reduce", x, y[:length])
            found.append((x, y))
        return found

    for rank, found in enumerate(on_threads(library, size, work, parts)):
        for length, (x, y) in zip(LENGTHS, found, strict=True):
            parts_of = [numbers(other, length, dtype) for other in range(size)]
            what = f"{length} numbers on rank {rank} of {size}"
            check_equal(y[:length].float(), total(parts_of).float(), f"the sum of {what}")
            check_equal(y[length:].float(), [7.0] * BEHIND, f"what lies behind the sum of {what}")
            check_equal(x.float(), parts_of[rank].float(), f"what went in, {what}")


def test_a_sum_in_place_and_a_gathering(library: ctypes.CDLL) -> None:
    """The sum takes the place of what was added; a gathering has all ranks' numbers behind one another.

    Why: this is how layers call them, the sum behind each row-parallel product and the gathering behind the head.
    """

    def work(memory: SharedMemory) -> tuple[Tensor, Tensor]:
        x, y = numbers(memory.rank, 150, torch.float32), torch.zeros(450)
        memory.call("all_gather", x, y)
        memory.call("all_reduce", x, x)
        return x, y

    expected = [numbers(rank, 150, torch.float32) for rank in range(3)]
    for rank, (x, y) in enumerate(on_threads(library, 3, work)):
        check_equal(x, total(expected), f"the sum on rank {rank}")
        check_equal(y, torch.cat(expected), f"what rank {rank} has gathered")


@pytest.mark.parametrize("length", [1, 16, 33])
def test_all_ranks_have_the_same_bits(library: ctypes.CDLL, length: int) -> None:
    """100,000,000, 1 and −100,000,000: added in the order of ranks they are 0, in others 1.

    Why: each rank draws the next token by itself. If their logits differ in the last bit, so may one day their tokens, and from
    there on they compute different texts.
    """
    values = [1e8, 1.0, -1e8]

    def work(memory: SharedMemory) -> Tensor:
        x = torch.full((length,), values[memory.rank])
        memory.call("all_reduce", x, x)
        return x

    for rank, x in enumerate(on_threads(library, 3, work)):
        check_equal(x, [0.0] * length, f"the sum on rank {rank}")


@pytest.mark.parametrize("length", [1, 16, 33])
def test_bfloat16_is_rounded_once(library: ctypes.CDLL, length: int) -> None:
    """256, 1 and 1 make 258. bfloat16 has no 257: rounded after each addition it is 256.

    Why: with eight ranks and two sums in each layer such steps add up to what a quantized model loses.
    """
    values = [256.0, 1.0, 1.0]

    def work(memory: SharedMemory) -> Tensor:
        x = torch.full((length,), values[memory.rank], dtype=torch.bfloat16)
        memory.call("all_reduce", x, x)
        return x

    for rank, x in enumerate(on_threads(library, 3, work)):
        check_equal(x.float(), [258.0] * length, f"the sum on rank {rank}")


def test_calls_do_not_mix(library: ctypes.CDLL) -> None:
    """Five hundred sums, one after the other, of 1 to 70 numbers, some in two slots; each rank brings another number each time.

    Why: a fast rank is in the next call while a slow one still reads this one. There are two slots, and nobody locks them.
    """

    def work(memory: SharedMemory) -> list[tuple[int, list[float]]]:
        wrong = []
        for call in range(500):
            x = torch.full((1 + call * 7 % 70,), float(call * (memory.rank + 1)))
            memory.call("all_reduce", x, x)
            if x.tolist() != [6.0 * call] * len(x):
                wrong.append((call, x.tolist()))
        return wrong

    for rank, wrong in enumerate(on_threads(library, 3, work)):
        check_equal(wrong[:1], [], f"the first wrong sum of rank {rank}: the call, and what it gave")


class Played:
    """A rank that the test plays: it sees the memory as bytes, and writes flags and slots by hand. One part."""

    def __init__(self, rank: int, size: int) -> None:
        self.descriptor, self.rank, self.size = nameless_file(), rank, size

    def open(self) -> None:
        self.bytes = mmap.mmap(self.descriptor, 0)

    def flag(self, rank: int) -> int:
        return int.from_bytes(self.bytes[self._flag(rank) :][:8], "little")

    def raise_flag(self, call: int) -> None:
        ctypes.c_int64.from_buffer(self.bytes, self._flag(self.rank)).value = call

    def slot(self, rank: int, call: int, count: int) -> Tensor:
        """The first numbers of a slot, as they lie there."""
        start = (1 + 2 * self.size) * LINE + (rank * 2 + call % 2) * SLOT
        return torch.frombuffer(self.bytes, dtype=torch.float32, count=count, offset=start)

    def _flag(self, rank: int) -> int:
        return (1 + self.size + rank) * LINE


def summing(memory: SharedMemory, x: Tensor, y: Tensor) -> tuple[threading.Thread, list[CommunicationError]]:
    """A thread in which a rank adds, and what it raises there."""
    errors: list[CommunicationError] = []

    def add() -> None:
        try:
            memory.call("all_reduce", x, y)
        except CommunicationError as error:
            errors.append(error)

    thread = threading.Thread(target=add, daemon=True)
    thread.start()
    return thread, errors


def test_a_rank_says_that_it_has_come_and_waits(library: ctypes.CDLL) -> None:
    """The test is rank 1 of two. Rank 0 adds 70 numbers twice, in slots of 64: its calls are 1 to 4. Each time its flag tells
    of numbers that are there, and it goes on when rank 1's flag has come to that call.

    Why: flags are all that ranks say to each other. Whoever raises his before the slot is written, waits before it is raised,
    or counts anew in each sum, meets another call or nobody.
    """
    played, x = Played(1, 2), torch.arange(70.0)
    memory = SharedMemory(played.descriptor, 0, 2, 1, PATIENCE / 5, SLOT, library)
    played.open()
    for calls in ((1, 2), (3, 4)):
        y = torch.zeros(70)
        rank, errors = summing(memory, x, y)
        for call, part, sums in zip(calls, x.split(64), y.split(64), strict=True):
            deadline = time.monotonic() + PATIENCE
            while played.flag(0) != call and rank.is_alive() and time.monotonic() < deadline:
                pass
            check_equal(played.flag(0), call, "the flag of rank 0")
            check_equal(played.slot(0, call, len(part)), part, f"rank 0's slot of call {call}")
            rank.join(0.02)
            assert rank.is_alive(), f"rank 0 did not wait for rank 1 in call {call}: {errors}"
            check_equal(sums, [0.0] * len(part), f"what rank 0 has of call {call} before rank 1 has come")
            played.slot(1, call, len(part)).copy_(1000 + part)
            played.raise_flag(call)
        rank.join(PATIENCE)
        check_equal([*map(str, errors)], [], "errors of rank 0")
        check_equal(y, 1000 + 2 * x, f"the sum of the calls {calls}")


def test_a_rank_that_is_ahead_is_not_waited_for(library: ctypes.CDLL) -> None:
    """Rank 1, which the test plays, has written both slots of a sum of 70 numbers before rank 0 begins.

    Why: ranks are at one call at a time, but not at the same time. Who waits for a flag to be equal waits for ever.
    """
    played, x, y = Played(1, 2), torch.arange(70.0), torch.zeros(70)
    memory = SharedMemory(played.descriptor, 0, 2, 1, PATIENCE / 5, SLOT, library)
    played.open()
    for call, part in zip((1, 2), x.split(64), strict=True):
        played.slot(1, call, len(part)).copy_(1000 + part)
    played.raise_flag(2)
    memory.call("all_reduce", x, y)
    check_equal(y, 1000 + 2 * x, "the sum")
    check_equal(played.flag(0), 2, "the flag of rank 0")


def test_nothing_is_read_where_a_rank_never_comes(library: ctypes.CDLL) -> None:
    """Rank 2 of three does not come to the second sum, of three slots. The others are told, and have nothing in its place.

    Why: a rank that has died must not hang all others; and half of a sum is a wrong hidden state, not an error.
    """

    def work(memory: SharedMemory) -> tuple[str, list[float]]:
        x, y = torch.ones(150), torch.zeros(150)
        memory.call("all_reduce", x, y)
        assert y.tolist() == [3.0] * 150
        if memory.rank == 2:
            return "", [3.0] * 150
        try:
            memory.call("all_reduce", 5 * x, y)
        except CommunicationError as error:
            return str(error), y.tolist()
        return "no error", y.tolist()

    for rank, (message, y) in enumerate(on_threads(library, 3, work, timeout=1.0)[:2]):
        assert "rank 2 did not come in time" in message, f"rank {rank} was told: {message}"
        check_equal(y, [3.0] * 150, f"where the sum of rank {rank} would be")


def test_a_call_for_each_slot_and_no_more(library: ctypes.CDLL) -> None:
    """A slot holds 64 floats, or 128 numbers in bfloat16. So many are one call, one more is two, none is none; and where a
    rank never comes, the call that waits for it is the last.

    Why: each call is a wait for the slowest. A flag that was raised for what nobody waits for leads others to read a slot.
    """
    played = Played(1, 2)
    memory = SharedMemory(played.descriptor, 0, 2, 1, PATIENCE / 50, SLOT, library)
    played.open()
    played.raise_flag(100)
    calls = 0
    single, half = torch.float32, torch.bfloat16
    for dtype, length, more in ((single, 0, 0), (single, 64, 1), (single, 65, 2), (half, 128, 1), (half, 129, 2)):
        x = torch.ones(length, dtype=dtype)
        memory.call("all_reduce", x, x)
        calls += more
        check_equal(played.flag(0), calls, f"calls up to {length} numbers in {dtype}")
    played.raise_flag(calls)
    with pytest.raises(CommunicationError):
        memory.call("all_reduce", torch.ones(150), torch.zeros(150))
    check_equal(played.flag(0), calls + 1, "the flag of rank 0 where rank 1 never comes")


def test_processes_add_as_threads_do(library: ctypes.CDLL) -> None:
    """Three processes, each with a view of the memory at an address of its own, add 40 times.

    Why: that is what ranks are. Nothing in the memory may be an address, and nobody's numbers are seen before they are written.
    """
    descriptor, children = nameless_file(), []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            wrong = 1
            try:
                memory = SharedMemory(descriptor, rank, 3, 1, PATIENCE / 5, SLOT, library)
                sums = []
                for call in range(40):
                    x = torch.full((50,), float(call + 10 * rank))
                    memory.call("all_reduce", x, x)
                    sums.append(x.tolist() == [3.0 * call + 30] * 50)
                wrong = 0 if all(sums) else 2
            finally:
                os._exit(wrong)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(descriptor)
    check_equal(codes, [0, 0, 0], "exit codes of the ranks: 1, one was lost; 2, a sum was wrong")
