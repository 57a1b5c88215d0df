"""Collectives between real processes: the library's, and the rings beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from solutions.parallelism.communication import (
    Communicator,
    RingCommunicator,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    split_evenly,
)
from solutions.parallelism.distributed import cores_of, run_ranks

SIZES = (1, 2, 4)
LENGTHS = (1, 3, 4, 5, 1000)


def inputs(rank: int, length: int) -> torch.Tensor:
    """Whole numbers, so that every order of summing gives the same."""
    return (torch.arange(length, dtype=torch.float32) + 1) * (rank + 1)


def total(size: int, length: int) -> torch.Tensor:
    return sum(inputs(rank, length) for rank in range(size))


def library_calls(comm: Communicator) -> dict[str, object]:
    got: dict[str, object] = {
        "all_reduce": comm.all_reduce(inputs(comm.rank, 5)),
        "all_gather": comm.all_gather(torch.full((2, 3), float(comm.rank))),
    }
    got["traffic"] = {name: (t.calls, t.bytes_sent) for name, t in comm.traffic.items()}
    return got


@pytest.mark.parametrize("size", SIZES)
def test_the_librarys_collectives(size: int) -> None:
    for got in run_ranks(library_calls, size):
        torch.testing.assert_close(got["all_reduce"], total(size, 5), rtol=0, atol=0)
        assert got["all_gather"].tolist() == [[float(r)] * 3 for r in range(size) for _ in range(2)]
        assert got["traffic"] == {"all_reduce": (1, 2 * (20 * (size - 1) // size)), "all_gather": (1, 24 * (size - 1))}


def rings(comm: Communicator) -> list[dict[str, object]]:
    return [ring_calls(comm, length) for length in LENGTHS]


def ring_calls(comm: Communicator, length: int) -> dict[str, object]:
    comm.traffic.clear()
    reduced = ring_all_reduce(inputs(comm.rank, length), comm)
    sent = comm.traffic["exchange"].bytes_sent
    scattered = ring_reduce_scatter(split_evenly(inputs(comm.rank, length), comm.size), comm)
    chunks = split_evenly(torch.full((length,), -1.0), comm.size)
    chunks[comm.rank].fill_(comm.rank)
    gathered = torch.cat(ring_all_gather(chunks, comm))
    return {"reduced": reduced, "scattered": scattered.clone(), "gathered": gathered, "sent": sent}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rings(size: int) -> None:
    """Chunks of unequal length, and empty ones where there are fewer elements than ranks."""
    for length, results in zip(LENGTHS, zip(*run_ranks(rings, size), strict=True), strict=True):
        check_rings(size, length, results)


def check_rings(size: int, length: int, results: tuple[dict[str, object], ...]) -> None:
    parts = total(size, length).tensor_split(size)
    expected = torch.cat([torch.full((len(part),), float(r)) for r, part in enumerate(parts)])
    for rank, got in enumerate(results):
        torch.testing.assert_close(got["reduced"], total(size, length), rtol=0, atol=0)
        torch.testing.assert_close(got["scattered"], parts[rank], rtol=0, atol=0)
        torch.testing.assert_close(got["gathered"], expected, rtol=0, atol=0)
    # 2n(p − 1)/p bytes a rank, exactly where n divides, and in sum always
    assert sum(got["sent"] for got in results) == 2 * (size - 1) * 4 * length
    if length % size == 0:
        assert {got["sent"] for got in results} == {2 * (size - 1) * 4 * length // size}


def by_rings(_: Communicator) -> dict[str, object]:
    comm = RingCommunicator()
    summed = comm.all_reduce(inputs(comm.rank, 6).view(2, 3))
    gathered = comm.all_gather(torch.full((2, 3), float(comm.rank)))
    return {"all_reduce": summed, "all_gather": gathered, "calls": {name: t.calls for name, t in comm.traffic.items()}}


@pytest.mark.parametrize("size", SIZES)
def test_a_communicator_of_rings(size: int) -> None:
    for got in run_ranks(by_rings, size):
        torch.testing.assert_close(got["all_reduce"], total(size, 6).view(2, 3), rtol=0, atol=0)
        assert got["all_gather"].tolist() == [[float(r)] * 3 for r in range(size) for _ in range(2)]
        assert got["calls"] == ({"exchange": 3 * (size - 1)} if size > 1 else {})


def fail_on_one(comm: Communicator, how: str) -> None:
    if comm.rank == 1:
        if how == "raise":
            raise ValueError("planted")
        if how == "die":
            os._exit(7)
        time.sleep(60)
    comm.all_reduce(torch.ones(3))


@pytest.mark.parametrize(
    ("how", "timeout", "message"),
    [("raise", 30, "rank [01] (of 2: all_reduce )?failed|planted"), ("die", 30, "all_reduce failed|exit code 7")],
)
def test_a_rank_that_fails_ends_all(how: str, timeout: float, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        run_ranks(fail_on_one, 2, how, timeout=timeout)
    assert time.monotonic() - start < 25


@pytest.mark.slow
def test_a_rank_that_hangs_is_named() -> None:
    with pytest.raises((RuntimeError, TimeoutError), match=r"rank 0 of 2: all_reduce failed|ranks .* did not end in time"):
        run_ranks(fail_on_one, 2, "hang", timeout=8)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_who_started_it(how: signal.Signals) -> None:
    """Also ranks that compute or sleep and talk to nobody, and the server that they were forked from."""
    code = "from solutions.parallelism.distributed import run_ranks; from solutions.tests.test_communication import nap\n"
    parent = subprocess.Popen([sys.executable, "-c", code + "run_ranks(nap, 2)"], stdout=subprocess.PIPE, text=True)
    ranks = sorted(parent.stdout.readline() for _ in range(2))
    assert ranks == ["rank 0 naps\n", "rank 1 naps\n"]
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(how)
    parent.wait(10)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


def nap(comm: Communicator) -> None:
    os.write(1, f"rank {comm.rank} naps\n".encode())  # in one piece: two ranks write to the same pipe
    time.sleep(60)


def test_cores_are_divided() -> None:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        pytest.skip("one core, or a system that does not tell cores apart")
    first, second = cores_of(0, 2), cores_of(1, 2)
    assert not set(first) & set(second)
    assert set(first) | set(second) <= set(cores)
    assert len(cores_of(5, 1000)) == 1
