"""What the ranks do in the tests of stage 3, as threads or as processes, which import this file and little else."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.parallelism.communication import (
    Communicator,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    split_evenly,
)
from stages.parallelism.distributed import join, leave, open_rendezvous


def numbers(rank: int, length: int) -> Tensor:
    """What rank `rank` brings: 1, 2, 3, … times 10^rank. All sums are whole numbers, so no order of summing matters."""
    return torch.arange(1, length + 1, dtype=torch.float64) * 10**rank


def total(size: int, length: int) -> Tensor:
    """The sum of what all ranks bring: 11, 22, 33, … for two, 1111, 2222, … for four."""
    return torch.arange(1, length + 1, dtype=torch.float64) * sum(10**rank for rank in range(size))


@dataclass(slots=True)
class Reduced:
    """What `ring_all_reduce` gave on a rank, whether it is the tensor that went in, and what it cost."""

    result: Tensor
    in_place: bool
    calls: int
    bytes_sent: int


def reduce_all(comm: Communicator, length: int) -> Reduced:
    """A ring all-reduce of `numbers`."""
    x = numbers(comm.rank, length)
    result = ring_all_reduce(x, comm)
    traffic = comm.traffic["exchange"]
    return Reduced(x, result is x, traffic.calls, traffic.bytes_sent)


def reduce_many(comm: Communicator, lengths: list[int]) -> list[Tensor]:
    """The same for several lengths, one after the other."""
    return [reduce_all(comm, length).result for length in lengths]


def scatter(comm: Communicator, length: int) -> Tensor:
    """A ring reduce-scatter of `numbers`, cut evenly."""
    return ring_reduce_scatter(split_evenly(numbers(comm.rank, length), comm.size), comm).clone()


def gather(comm: Communicator, length: int) -> list[Tensor]:
    """A ring all-gather: rank r has the chunk r of `total` of one rank, and garbage in place of the others."""
    chunks = [
        chunk.clone() if rank == comm.rank else torch.full_like(chunk, torch.nan)
        for rank, chunk in enumerate(split_evenly(total(1, length), comm.size))
    ]
    got = ring_all_gather(chunks, comm)
    assert all(a is b for a, b in zip(got, chunks, strict=True)), "ring_all_gather fills the chunks that it is given"
    return got


def both_halves(comm: Communicator, lengths: list[int]) -> list[tuple[Tensor, list[Tensor]]]:
    """Reduce-scatter and all-gather for several lengths."""
    return [(scatter(comm, length), gather(comm, length)) for length in lengths]


def say_who(comm: Communicator) -> tuple[int, int, int]:
    """This rank, how many there are, and the sum of 10^rank over all."""
    return comm.rank, comm.size, int(comm.all_reduce(torch.tensor([10.0**comm.rank]))[0])


def meet_again(comm: Communicator, wait: float) -> tuple[int, int, int]:
    """Two ranks part; rank 0 waits `wait` seconds for somebody who never comes; then they meet in a new group and `say_who`."""
    store = open_rendezvous(timeout=5) if comm.rank == 0 else None
    port = int(comm.broadcast(torch.tensor([store.port if store else 0])))
    leave()
    if comm.rank == 0:
        with contextlib.suppress(TimeoutError):
            join(0, 2, open_rendezvous(timeout=wait), timeout=wait)
    return say_who(join(comm.rank, 2, store or f"127.0.0.1:{port}", timeout=5))


def fail_on_rank_1(comm: Communicator, how: str) -> None:
    """Rank 1 raises or dies; the others wait for it in a sum."""
    if comm.rank == 1 and how == "raise":
        raise ValueError("planted")
    if comm.rank == 1:
        os._exit(7)
    comm.all_reduce(torch.ones(3))
