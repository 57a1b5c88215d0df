"""What ranks say to each other: the collectives that tensor parallelism needs, counted, and rings written out.

The library (gloo between CPUs, NCCL between GPUs) carries the bytes; a `Communicator` counts them and gives every failure a
name. The rings show what such a library does inside: each rank talks only to its two neighbours, all links are busy all the
time, and an all-reduce of n bytes over p ranks moves 2n(p−1)/p bytes a rank, which no algorithm beats (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


class CommunicationError(RuntimeError):
    """A collective did not come to its end: another rank has died, hangs, or called something else."""


@dataclass(slots=True)
class Traffic:
    """What one kind of call has cost this rank so far.

    Attributes:
        calls: how many. bytes_sent: by this rank; of the library's collectives as a ring would send them. seconds: inside the
            calls, waiting for others included.
    """

    calls: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0


class Communicator:
    """Collectives among `size` ranks. Every rank makes the same calls, in the same order, with tensors of the same shape.

    Args:
        group: of torch.distributed; None: the one of all ranks.

    Attributes:
        rank, size: this rank, 0 to size − 1, and how many there are.
        traffic: by the name of the call.
    """

    is_native = False
    """Whether sums are native kernels, which a recorded step can have in it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' contiguous `x`, in place, the same bits on every rank.

        Raises:
            ValueError: `x` is not contiguous.
        """
        if not x.is_contiguous():  # gloo would sum what lies between its elements
            raise ValueError(f"all_reduce needs a contiguous tensor, got strides {x.stride()} of shape {tuple(x.shape)}")
        with self._counted("all_reduce", 2 * _ring_bytes(x, self.size)):
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [n, ...] behind one another in the order of ranks: [size · n, ...]."""
        out = x.new_empty((self.size * len(x), *x.shape[1:]))
        with self._counted("all_gather", (self.size - 1) * x.nbytes):
            dist.all_gather(list(out.tensor_split(self.size)), x.contiguous(), group=self.group)
        return out

    def exchange(self, outgoing: Tensor, target: int, incoming: Tensor, source: int) -> Tensor:
        """Send and receive at once: in a ring where all sent first, all would wait for a receiver. Fills `incoming`."""
        with self._counted("exchange", outgoing.nbytes):
            pending = [
                dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=target),
                dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=source),
            ]
            for request in dist.batch_isend_irecv(pending):
                request.wait()
        return incoming

    def check(self) -> None:
        """See that the calls of a recorded step, which raise nothing themselves, have come to their end.

        Raises:
            CommunicationError: one has not.
        """

    @contextmanager
    def _counted(self, name: str, bytes_sent: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            seconds = time.perf_counter() - start
            reason = str(error).strip().splitlines()[0]
            where = f"rank {self.rank} of {self.size}: {name}"
            raise CommunicationError(
                f"{where} failed after {seconds:.1f} s; another rank has died or hangs ({reason})"
            ) from error
        traffic = self.traffic[name]
        traffic.calls += 1
        traffic.bytes_sent += bytes_sent
        traffic.seconds += time.perf_counter() - start


def _ring_bytes(x: Tensor, size: int) -> int:
    """Bytes a rank sends when `x` goes once around a ring in `size` parts."""
    return x.nbytes * (size - 1) // size


def split_evenly(x: Tensor, parts: int) -> list[Tensor]:
    """`x`, seen as one row, in `parts` views that differ by at most one element; the first ones are the longer ones."""
    return list(x.view(-1).tensor_split(parts))


def ring_reduce_scatter(chunks: list[Tensor], communicator: Communicator) -> Tensor:
    """Sum each rank's chunk over all ranks, with neighbours alone.

    In each of size − 1 rounds a rank sends one chunk to the next rank and adds what comes from the one before to its own copy.
    A chunk starts at the rank after its owner and collects every rank's share on the way around to it. Messages and sums are of
    the chunks' own type; empty chunks go around like others.

    Args:
        chunks: one for each rank, contiguous, of any lengths (the same on every rank). They are overwritten by partial sums.

    Returns:
        This rank's chunk, complete.
    """
    rank, size = communicator.rank, communicator.size
    incoming = torch.empty_like(max(chunks, key=Tensor.numel))
    for step in range(size - 1):
        outgoing, mine = chunks[(rank - step - 1) % size], chunks[(rank - step - 2) % size]
        mine += communicator.exchange(outgoing, (rank + 1) % size, incoming[: mine.numel()], (rank - 1) % size)
    return chunks[rank]


def ring_all_gather(chunks: list[Tensor], communicator: Communicator) -> list[Tensor]:
    """Give every rank all chunks, with neighbours alone: in each of size − 1 rounds a rank passes on what it got last.

    Args:
        chunks: one for each rank, contiguous; only this rank's own needs to be filled.

    Returns:
        The same list, all of it filled.
    """
    rank, size = communicator.rank, communicator.size
    for step in range(size - 1):
        outgoing, incoming = chunks[(rank - step) % size], chunks[(rank - step - 1) % size]
        communicator.exchange(outgoing, (rank + 1) % size, incoming, (rank - 1) % size)
    return chunks


def ring_all_reduce(x: Tensor, communicator: Communicator) -> Tensor:
    """The sum of all ranks' contiguous `x`, in place, with neighbours alone, in 2(size − 1) rounds.

    `x` is cut evenly as one row, whatever its shape, a chunk for each rank. In the first half of the rounds each rank gets the
    complete sum of its own chunk, in the second half all get all chunks.

    Args:
        x: of any shape, the same on every rank; there may be fewer elements than ranks.

    Returns:
        `x` itself.
    """
    chunks = split_evenly(x, communicator.size)
    ring_reduce_scatter(chunks, communicator)
    ring_all_gather(chunks, communicator)
    return x


class RingCommunicator(Communicator):
    """Sums and gathers by the rings above instead of the library's: slower, and all of it can be read."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' contiguous `x`, in place, by `ring_all_reduce`."""
        return ring_all_reduce(x, self)

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [n, ...] behind one another in the order of ranks, by `ring_all_gather`: [size · n, ...].

        The chunks that go around are views of the result, so nothing is copied but `x` itself.
        """
        out = x.new_empty((self.size * len(x), *x.shape[1:]))
        chunks = list(out.tensor_split(self.size))
        chunks[self.rank].copy_(x)
        ring_all_gather(chunks, self)
        return out
