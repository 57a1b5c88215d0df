"""Task 3.2: the ring all-reduce, and the communicator that puts it under a model.

Rank r brings 1, 2, 3, … times 10^r, so a sum shows by its digits who is in it. Most tests run the ranks as threads of this
process, whose messages can be looked at; some start real processes.
"""

from __future__ import annotations

import pytest
import torch

from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.rank_jobs import ThreadRing, engine_calls, numbers, reduce_all, reduce_many, total
from stages.course.fixtures.ranks import ThreadCommunicator, Wires, on_processes, on_threads
from stages.parallelism.communication import Communicator, ring_all_reduce

BYTES = 8
"""Of an element in these tests, float64."""


def test_one_rank_has_the_sum_already() -> None:
    """A single rank gets its own tensor back, unchanged, and sends nothing.

    Why: the same model file runs on one device and on eight; on one it must cost nothing.
    """
    (got,) = on_threads(1, reduce_all, 3)
    check_equal(got.result, [1, 2, 3], "the sum")
    check_equal(got.calls, 0, "exchanges")


def test_two_ranks() -> None:
    """[1, 2, 3, 4] and [10, 20, 30, 40] become [11, 22, 33, 44] on both, in the tensors that were given.

    Why: the layers above hand in what they computed and go on with the same tensor. A sum that is somewhere else is lost.
    """
    for rank, got in enumerate(on_threads(2, reduce_all, 4)):
        check_equal(got.result, [11, 22, 33, 44], f"the tensor of rank {rank}")
        check_equal(got.in_place, True, f"whether rank {rank} returns the tensor that it was given")


@pytest.mark.parametrize("size", [3, 4, 5])
def test_more_ranks(size: int) -> None:
    """Each of `size` ranks ends with the sum over all, everybody's share once: 111, 1111 or 11111 times 1, 2, 3, …

    Why: with two ranks every rank is a neighbour of every other, and many a wrong order of chunks gives the right sum.
    """
    for rank, got in enumerate(on_threads(size, reduce_all, 2 * size)):
        check_equal(got.result, total(size, 2 * size), f"the tensor of rank {rank}")


@pytest.mark.parametrize(("size", "length"), [(2, 3), (3, 7), (4, 10), (4, 5), (4, 3), (4, 1), (5, 2)])
def test_lengths_that_do_not_divide(size: int, length: int) -> None:
    """Chunks differ by one element where the ranks do not divide the length, and some are empty where it is smaller.

    Why: the last step of a prompt may have any number of tokens. Rounding up sends more, and rounding down loses the rest.
    """
    for rank, got in enumerate(on_threads(size, reduce_all, length)):
        check_equal(got.result, total(size, length), f"the tensor of rank {rank}")


@pytest.mark.parametrize(("size", "length"), [(2, 8), (3, 9), (4, 8), (4, 400), (5, 20)])
def test_no_rank_sends_more_than_it_must(size: int, length: int) -> None:
    """Each rank sends 2n(p − 1)/p bytes of a tensor of n bytes, in 2(p − 1) exchanges.

    Why: this is the least with which it can be done, and hardly grows with p. Sending whole tensors around sends p/2 times as
    much as that.
    """
    for rank, got in enumerate(on_threads(size, reduce_all, length)):
        check_equal(got.result, total(size, length), f"the tensor of rank {rank}")
        check_equal(got.calls, 2 * (size - 1), f"exchanges of rank {rank}")
        check_equal(got.bytes_sent, 2 * length * BYTES * (size - 1) // size, f"bytes that rank {rank} sends")


@pytest.mark.parametrize("shape", [(1, 8), (2, 2, 2), (8, 1), (3, 8)])
def test_the_shape_does_not_matter(shape: tuple[int, ...]) -> None:
    """A tensor of any shape is cut as one row: over 4 ranks each sends 2n · 3/4, also where there are fewer rows than ranks.

    Why: a decode step of one sequence is a single row. Cut by rows, it goes around whole, in one rank's hands.
    """
    elements = torch.Size(shape).numel()
    for rank, got in enumerate(on_threads(4, reduce_all, elements, shape)):
        check_equal(got.result.flatten(), total(4, elements), f"the tensor of rank {rank}")
        check_equal(got.bytes_sent, 2 * elements * BYTES * 3 // 4, f"bytes that rank {rank} sends")


@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_elements_than_ranks_go_around_as_well(length: int) -> None:
    """Of 1, 2 or 3 elements over 4 ranks all ranks together send 2 · 3 times as many, in 6 exchanges each, empty ones included.

    Why: in a ring everybody waits for the one before. One that leaves a round out because it has nothing to say hangs all; and
    if the library does the small sums, the ring is not what is tested.
    """
    results = on_threads(4, reduce_all, length)
    check_equal([got.calls for got in results], [6] * 4, "exchanges of the ranks")
    check_equal(sum(got.bytes_sent for got in results), 2 * 3 * length * BYTES, "bytes that all ranks send")


def test_uneven_chunks_cost_no_more_in_sum() -> None:
    """Of 10 elements over 4 ranks all ranks together send 2 · 3 · 10 elements: every chunk goes around, and no padding.

    Why: 2n(p − 1)/p is an average where p does not divide n. Chunks that are padded to the longest send more.
    """
    results = on_threads(4, reduce_all, 10)
    check_equal(sum(got.bytes_sent for got in results), 2 * 3 * 10 * BYTES, "bytes that all ranks send")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_talks_to_the_next_one_only(size: int) -> None:
    """In each round a rank sends one chunk, to the rank behind it; the last one sends to the first.

    Why: then every link of the ring carries one chunk in every round, and none waits for another. A star through rank 0 would
    have its links busy and all others idle.
    """
    wires = Wires(size)
    on_threads(size, reduce_all, 3 * size, wires=wires)
    for rank in range(size):
        targets = [target for target, _ in wires.sent[rank]]
        check_equal(targets, [(rank + 1) % size] * (2 * (size - 1)), f"to whom rank {rank} sends")
        lengths = [len(elements) for _, elements in wires.sent[rank]]
        check_equal(lengths, [3] * (2 * (size - 1)), f"elements in each message of rank {rank}")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_second_half_hands_complete_chunks_around(size: int) -> None:
    """What a rank sends in the rounds p to 2(p − 1) are chunks of the final sum, a different one each time.

    Why: after p − 1 rounds each chunk is complete on one rank. To go on adding would count shares twice, and to wait longer
    would be rounds for nothing.
    """
    wires = Wires(size)
    on_threads(size, reduce_all, 2 * size, wires=wires)
    chunks = [chunk.tolist() for chunk in total(size, 2 * size).tensor_split(size)]
    for rank in range(size):
        late = [elements for _, elements in wires.sent[rank][size - 1 :]]
        check_equal([chunk in chunks for chunk in late], [True] * (size - 1), f"rank {rank}: whether these are complete chunks")
        check_equal(len({tuple(chunk) for chunk in late}), size - 1, f"different chunks that rank {rank} hands around")


def fractions(comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(comm.rank)
    return ring_all_reduce(torch.randn(shape, generator=generator).to(dtype), comm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_have_the_same_bits(dtype: torch.dtype) -> None:
    """After an all-reduce of fractions in any shape all ranks hold the same bits, and the sum up to rounding.

    Why: each rank goes on computing from its own copy. If they differ in the last bit, ranks may in the end choose different
    tokens, and answers fall apart (each chunk must be summed in one place and copied from there).
    """
    shape = (3, 5, 7)
    results = on_threads(4, fractions, shape, dtype)
    parts = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype).double() for rank in range(4)]
    for rank, got in enumerate(results):
        check_equal(got.shape, torch.Size(shape), f"shape on rank {rank}")
        assert torch.equal(got, results[0]), f"rank {rank} and rank 0 hold different bits"
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    assert torch.allclose(results[0].double(), sum(parts), atol=tolerance), "the sum of four random tensors"


@pytest.mark.parametrize("size", [2, 4])
def test_between_processes(size: int) -> None:
    """Real processes over gloo: lengths 1, 3, 8 and 1000 one after the other.

    Why: threads share a memory; here a message takes its time, and an operation that waits for the wrong side waits for ever.
    """
    lengths = [1, 3, 8, 1000]
    on_threads(1, reduce_many, lengths)
    for rank, results in enumerate(on_processes(size, reduce_many, lengths)):
        for length, got in zip(lengths, results, strict=True):
            check_equal(got, total(size, length), f"{length} elements on rank {rank}")


def layer_sum(comm: ThreadCommunicator, rows: int) -> tuple[torch.Tensor, bool, dict[str, int]]:
    ring = ThreadRing(comm)
    x = numbers(comm.rank, 3 * rows).view(rows, 3)
    result = ring.all_reduce(x)
    return x, result is x, {name: traffic.calls for name, traffic in ring.traffic.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_layers_sum_goes_around_the_ring(size: int, rows: int) -> None:
    """RingCommunicator.all_reduce of [T, 3] is the sum over the ranks, in the tensor that it was given, by exchanges alone.

    Why: this is what a row-parallel layer calls. If the library did the adding, the answer would be as right and the ring idle.
    """
    for rank, (x, in_place, calls) in enumerate(on_threads(size, layer_sum, rows)):
        check_equal(x, total(size, 3 * rows).view(rows, 3), f"the tensor of rank {rank}")
        check_equal(in_place, True, f"whether rank {rank} returns the tensor that it was given")
        check_equal(calls, {"exchange": 2 * (size - 1)} if size > 1 else {}, f"calls of rank {rank}")


def rows_of(rank: int, rows: int) -> torch.Tensor:
    """[rows, 3]: what rank `rank` brings to a gathering."""
    return numbers(rank, 3 * rows).view(rows, 3)


def places_of_messages(comm: ThreadCommunicator, rows: int) -> tuple[torch.Tensor, list[int]]:
    """What a rank has gathered, and in which memory the messages were that it got and handed on."""
    ring, places = ThreadRing(comm), []
    exchange = ring.exchange

    def watched(outgoing: torch.Tensor, target: int, incoming: torch.Tensor, source: int) -> torch.Tensor:
        places.extend(x.untyped_storage().data_ptr() for x in (outgoing, incoming))
        return exchange(outgoing, target, incoming, source)

    ring.exchange = watched
    return ring.all_gather(rows_of(comm.rank, rows)), places


@pytest.mark.parametrize("size", [2, 3])
def test_what_goes_around_lies_in_the_result(size: int) -> None:
    """Each message is read from and written to the very tensor that is returned.

    Why: logits of 256 sequences are 150 MB on each rank. Gathered elsewhere and then joined they are copied once more, and are
    there twice.
    """
    for rank, (result, places) in enumerate(on_threads(size, places_of_messages, 2)):
        check_equal(set(places), {result.untyped_storage().data_ptr()}, f"memory of the messages of rank {rank}")


def gathered(comm: ThreadCommunicator, rows: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, tuple[int, int]]]:
    ring = ThreadRing(comm)
    x = rows_of(comm.rank, rows).t().contiguous().t()  # as it comes, it need not be contiguous
    result = ring.all_gather(x)
    return result, x, {name: (traffic.calls, traffic.bytes_sent) for name, traffic in ring.traffic.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 4])
def test_gathered_rows_stand_in_the_order_of_ranks(size: int, rows: int) -> None:
    """RingCommunicator.all_gather of [n, 3] is [size · n, 3]: the rows of rank 0, then those of rank 1, and so on. What a rank
    brought stays as it is.

    Why: the parts of the logits are put together by this order. One part in the place of another is a token nobody meant.
    """
    expected = torch.cat([rows_of(rank, rows) for rank in range(size)])
    for rank, (result, x, _) in enumerate(on_threads(size, gathered, rows)):
        check_equal(result, expected, f"what rank {rank} has gathered")
        check_equal(x, rows_of(rank, rows), f"what rank {rank} brought")


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathering_sends_each_part_once_over_each_link(size: int) -> None:
    """A rank sends p − 1 parts, by exchanges alone, and each part is one rank's rows.

    Why: logits are the largest thing that ranks say to each other: V numbers a sequence, at every step.
    """
    for rank, (_, _, traffic) in enumerate(on_threads(size, gathered, 2)):
        check_equal(traffic, {"exchange": (size - 1, (size - 1) * 6 * BYTES)}, f"calls and bytes of rank {rank}")


@pytest.mark.parametrize("size", [2, 3])
def test_the_engines_calls_between_processes(size: int) -> None:
    """Real processes over gloo, in bfloat16: a sum of [2, 5] and a gathering of [2, 3].

    Why: these are the two calls of a model cut over ranks, in the type that it computes in.
    """
    on_threads(1, layer_sum, 1)
    for rank, (summed, parts) in enumerate(on_processes(size, engine_calls)):
        check_equal(summed.double(), torch.full((2, 5), float(sum(range(1, size + 1)))).double(), f"the sum on rank {rank}")
        expected = torch.cat([torch.full((2, 3), float(each)) for each in range(size)]).double()
        check_equal(parts.double(), expected, f"what rank {rank} has gathered")


def test_the_oracle_is_a_sum() -> None:
    """What these tests expect is the sum of what the ranks bring, and one rank's all-reduce is what that rank brings.

    Why: a test is worth as much as what it compares with.
    """
    check_equal(on_threads(1, reduce_all, 5)[0].result, numbers(0, 5), "the sum of one")
    check_equal(total(3, 5), numbers(0, 5) + numbers(1, 5) + numbers(2, 5), "the sum of three")
