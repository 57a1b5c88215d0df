"""Task 3.1: reduce-scatter and all-gather, the two halves of the ring, each for itself.

Rank r brings 1, 2, 3, … times 10^r, so a sum shows by its digits who is in it.
"""

from __future__ import annotations

import random

import pytest
import torch

from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.rank_jobs import both_halves, gather, numbers, scatter, scatter_chunks, total
from stages.course.fixtures.ranks import Wires, on_processes, on_threads
from stages.parallelism.communication import Communicator, ring_all_gather, ring_reduce_scatter, split_evenly

UNEVEN = [(2, 3), (3, 7), (4, 10), (4, 5), (4, 3), (4, 1), (5, 2)]


def test_one_rank_needs_nobody() -> None:
    """A single rank has its chunk complete and all chunks there are, without a message.

    Why: one device must cost nothing.
    """
    wires = Wires(1)
    check_equal(on_threads(1, scatter, 3, wires=wires)[0], [1, 2, 3], "the chunk of rank 0")
    check_equal(torch.cat(on_threads(1, gather, 3, wires=wires)[0]), [1, 2, 3], "all chunks")
    check_equal(dict(wires.sent), {}, "messages")


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_reduce_scatter_leaves_each_rank_its_own_chunk(size: int) -> None:
    """Of the sum over all ranks, rank r gets chunk r.

    Why: which chunk a rank ends with is a promise to whoever goes on with it. With another one, layers would compute with the
    wrong rows, and nothing would crash.
    """
    chunks = total(size, 2 * size).tensor_split(size)
    for rank, got in enumerate(on_threads(size, scatter, 2 * size)):
        check_equal(got, chunks[rank], f"the chunk of rank {rank}")


@pytest.mark.parametrize(("size", "length"), UNEVEN)
def test_reduce_scatter_of_unequal_chunks(size: int, length: int) -> None:
    """Chunks may differ in length, and some may be empty.

    Why: a buffer that is cut to the wrong chunk's length adds elements to their neighbours.
    """
    chunks = total(size, length).tensor_split(size)
    for rank, got in enumerate(on_threads(size, scatter, length)):
        check_equal(got, chunks[rank], f"the chunk of rank {rank}")


@pytest.mark.parametrize("lengths", [(1, 5), (5, 1), (0, 3, 1), (2, 0, 0, 7), (1, 4, 2, 3, 6)])
def test_chunks_of_any_lengths(lengths: tuple[int, ...]) -> None:
    """The longest chunk may be any of them, and the first one empty. In both halves a message is one chunk, as long as that is.

    Why: chunks that are cut evenly begin with the longest, others do not. A buffer as long as the first one, or as the average,
    has no room for what comes; and messages that are padded to the longest send what nobody asked for.
    """
    chunks = [torch.arange(1, length + 1, dtype=torch.float64) for length in lengths]
    share = sum(10**rank for rank in range(len(lengths)))
    wires, size = Wires(len(lengths)), len(lengths)
    for rank, (got, _) in enumerate(on_threads(size, scatter_chunks, chunks, wires=wires)):
        check_equal(got, chunks[rank] * share, f"the chunk of rank {rank}")
        sent = [len(elements) for _, elements in wires.sent[rank]]
        check_equal(sent, [lengths[(rank - 1 - turn) % size] for turn in range(size - 1)], f"lengths that rank {rank} sends")
    wires = Wires(size)
    for rank, (whole, _) in enumerate(on_threads(size, _gather_chunks, chunks, wires=wires)):
        check_equal(torch.cat(whole), torch.cat(chunks), f"all chunks on rank {rank}")
        sent = [len(elements) for _, elements in wires.sent[rank]]
        check_equal(sent, [lengths[(rank - turn) % size] for turn in range(size - 1)], f"lengths that rank {rank} hands on")


def _gather_chunks(comm: Communicator, chunks: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Gather chunks of which this rank has its own; the others are NaN beforehand."""
    mine = [chunk.clone() if rank == comm.rank else torch.full_like(chunk, torch.nan) for rank, chunk in enumerate(chunks)]
    return ring_all_gather(mine, comm), comm.rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_chunks_keep_their_type(dtype: torch.dtype) -> None:
    """Messages and sums are of the chunks' own type, and whole numbers beyond 2^53 come out exact.

    Why: a model computes in bfloat16, and a buffer of another type is garbage between processes. To sum in a smaller type loses
    digits, in a larger one sends more.
    """
    large = 2**60 + 1 if dtype is torch.int64 else 2**40 + 1 if dtype is torch.float64 else 1
    chunks = [torch.tensor([large, 3]).to(dtype), torch.tensor([5]).to(dtype)]
    for rank, (got, _) in enumerate(on_threads(2, scatter_chunks, chunks)):
        check_equal(got.dtype, dtype, f"type of the chunk of rank {rank}")
        check_equal(got, chunks[rank] * 11, f"the chunk of rank {rank}")


def test_partial_sums_lie_in_the_chunks_that_were_given() -> None:
    """The sums are made in the tensors of the list, which stays a list of these tensors.

    Why: chunks may be views of one tensor, and whoever gave them goes on with that. Sums in new tensors are lost to it.
    """
    chunks = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    views = on_threads(2, _sums_in_views, chunks)
    for rank, (whole, number) in enumerate(views):
        check_equal(number, [2, 1][rank], f"elements of the chunk of rank {rank}")
        mine = whole[:2] if rank == 0 else whole[2:]
        check_equal(mine, chunks[rank] * 11, f"the part of rank {rank} in the tensor that its chunks are views of")


def _sums_in_views(comm: Communicator, chunks: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    whole = torch.cat(chunks) * 10**comm.rank
    return whole, ring_reduce_scatter([whole[:2], whole[2:]], comm).numel()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_gather_gives_everybody_everything(size: int) -> None:
    """Each rank has one chunk and ends with all of them, in the order of ranks, in the list that it gave.

    Why: this is how the parts of the logits come together. A chunk in the wrong place is another token's score.
    """
    for rank, got in enumerate(on_threads(size, gather, 2 * size)):
        check_equal(torch.cat(got), total(1, 2 * size), f"all chunks on rank {rank}")


@pytest.mark.parametrize(("size", "length"), UNEVEN)
def test_all_gather_of_unequal_chunks(size: int, length: int) -> None:
    """Chunks may differ in length, and some may be empty.

    Why: as above. What a rank does not have is NaN beforehand, so nothing passes by luck.
    """
    for rank, got in enumerate(on_threads(size, gather, length)):
        check_equal(torch.cat(got), total(1, length), f"all chunks on rank {rank}")


@pytest.mark.parametrize("job", [scatter, gather])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_half_takes_size_minus_one_rounds(size: int, job: object) -> None:
    """A half is p − 1 messages of one chunk from each rank, all to the next one.

    Why: two halves are then exactly one all-reduce: 2(p − 1) messages, 2n(p − 1)/p bytes.
    """
    wires = Wires(size)
    on_threads(size, job, 3 * size, wires=wires)
    for rank in range(size):
        check_equal([target for target, _ in wires.sent[rank]], [(rank + 1) % size] * (size - 1), f"to whom rank {rank} sends")
        check_equal([len(elements) for _, elements in wires.sent[rank]], [3] * (size - 1), f"elements in messages of {rank}")


def halves_in_a_row(comm: Communicator, length: int) -> torch.Tensor:
    x = numbers(comm.rank, length)
    chunks = split_evenly(x, comm.size)
    ring_reduce_scatter(chunks, comm)
    ring_all_gather(chunks, comm)
    return x


@pytest.mark.parametrize(("size", "length"), [(2, 4), (3, 7), (4, 3)])
def test_one_after_the_other_is_an_all_reduce(size: int, length: int) -> None:
    """The all-gather of what the reduce-scatter left is the whole sum on every rank.

    Why: this is how task 3.2 makes the sum of a layer. And sequence parallelism puts work between the two halves, on a part of
    the tokens each, at no more bytes than before.
    """
    for rank, got in enumerate(on_threads(size, halves_in_a_row, length)):
        check_equal(got, total(size, length), f"the tensor of rank {rank}")


@pytest.mark.parametrize("size", [2, 4])
def test_between_processes(size: int) -> None:
    """Real processes over gloo, lengths 1, 3 and 1000.

    Why: the library's own collectives work like this, between machines; here you are the library.
    """
    lengths = [1, 3, 1000]
    on_threads(1, both_halves, lengths)
    for rank, results in enumerate(on_processes(size, both_halves, lengths)):
        for length, (scattered, gathered) in zip(lengths, results, strict=True):
            check_equal(scattered, total(size, length).tensor_split(size)[rank], f"{length} elements: the chunk of rank {rank}")
            check_equal(torch.cat(gathered), total(1, length), f"{length} elements: all chunks on rank {rank}")


@pytest.mark.parametrize("number", range(4))
def test_any_ranks_with_any_chunks(number: int) -> None:
    """Two to six ranks, with random chunks of random lengths.

    Why: sums over ranks have as many cases as there are machines.
    """
    dice = random.Random(310 + number)
    for _ in range(3):
        size = dice.randrange(2, 7)
        chunks = [torch.tensor([dice.randrange(1, 1000) for _ in range(dice.randrange(8))]).double() for _ in range(size)]
        share = sum(10**rank for rank in range(size))
        for rank, (got, _) in enumerate(on_threads(size, scatter_chunks, chunks)):
            check_equal(got, chunks[rank] * share, f"the chunk of rank {rank} of {size}")
        length = dice.randrange(40)
        for rank, whole in enumerate(on_threads(size, gather, length)):
            check_equal(torch.cat(whole), total(1, length), f"all chunks on rank {rank} of {size}")
