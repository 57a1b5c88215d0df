"""Collectives through shared memory, between real processes: exact sums, in steps that are recorded, and ranks that end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from solutions.core.platform import native
from solutions.parallelism.communication import CommunicationError, Communicator
from solutions.parallelism.distributed import run_ranks
from solutions.parallelism.shared_memory import SharedMemoryCommunicator, nameless_file

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"there are no C++ kernels here: {native.why_not}")

PART = 1024
"""Bytes of a slot: 256 floats, 512 bfloat16s."""
SHAPES = [(0, 4), (1, 1), (1, 15), (1, 16), (3, 17), (1, 255), (1, 256), (1, 257), (2, 256), (7, 300), (5, 3, 2)]
DTYPES = (torch.float32, torch.bfloat16)


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def enter(comm: Communicator, path: Path, threads: int = 1, timeout: float = 20.0) -> SharedMemoryCommunicator:
    native.set_threads(threads)
    return SharedMemoryCommunicator(os.open(path, os.O_RDWR), threads, timeout, part_bytes=PART)


def all_shapes(comm: Communicator, path: Path, threads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shared = enter(comm, path, threads)
    results = []
    for shape in SHAPES:
        for dtype in DTYPES:
            x = part_of(comm.rank, shape, dtype)
            gathered = shared.all_gather(x)
            assert shared.all_reduce(x) is x
            results.append((x, gathered))
    return results


@pytest.mark.parametrize(("size", "threads"), [(1, 1), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_sums_and_gathers(tmp_path: Path, size: int, threads: int) -> None:
    """Less than a vector, a slot ± 1, several slots, nothing; one thread, and more than there is for it to do."""
    (tmp_path / "memory").touch()
    everyone = run_ranks(all_shapes, size, tmp_path / "memory", threads)
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    for (shape, dtype), results in zip(cases, zip(*everyone, strict=True), strict=True):
        parts = [part_of(rank, shape, dtype) for rank in range(size)]
        total = torch.zeros(shape)
        for part in parts:
            total += part.float()  # in the order of ranks, rounded once at the end
        for reduced, gathered in results:
            torch.testing.assert_close(reduced, total.to(dtype), rtol=0, atol=0)
            torch.testing.assert_close(gathered, torch.cat(parts), rtol=0, atol=0)


def other_types(comm: Communicator, path: Path) -> tuple[int, list[int], str, dict[str, int]]:
    shared = enter(comm, path)
    columns = torch.ones(4, 4)[:, :2]
    with pytest.raises(ValueError, match="contiguous") as caught:
        shared.all_reduce(columns)
    scalar = shared.all_reduce(torch.tensor(comm.rank + 1)).item()
    whole = shared.all_gather(torch.tensor([comm.rank + 1])).tolist()
    return scalar, whole, str(caught.value), {name: t.bytes_sent for name, t in shared.traffic.items()}


def test_what_it_cannot_do_the_library_does_or_refuses(tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    for scalar, whole, refusal, traffic in run_ranks(other_types, 2, tmp_path / "memory"):
        assert scalar == 3
        assert whole == [1, 2]
        assert refusal.endswith("strides (4, 1) of shape (4, 2)")
        assert traffic == {"all_reduce": 8, "all_gather": 8}


def many_rounds(comm: Communicator, path: Path) -> bool:
    """Ranks that come at different times, call after call: nobody may read what is of another call."""
    shared = enter(comm, path)
    generator = torch.Generator().manual_seed(comm.rank)
    for call in range(3000):
        if call % 100 == 0:
            time.sleep(0.002 * torch.rand(1, generator=generator).item())
        x = torch.full((20,), float(call + comm.rank))
        if shared.all_reduce(x).tolist() != [float(comm.size * call + sum(range(comm.size)))] * 20:
            return False
    return True


def test_calls_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    assert run_ranks(many_rounds, 3, tmp_path / "memory") == [True] * 3


def recorded(comm: Communicator, path: Path) -> list[list[float]]:
    shared = enter(comm, path)
    x = torch.ones(8, 20)
    with native.Recording(8) as recording:
        shared.all_reduce(x[:2])
        shared.all_reduce(x[:2])
    sums = [x[:, 0].tolist()]
    for rows in (1, 8):
        x.fill_(comm.rank + 1)
        recording.replay(rows)
        shared.check()
        sums.append(x[:, 0].tolist())
    assert shared.seconds_in_kernels > 0
    return sums


def test_a_recording_has_the_sums_in_it(tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    for sums in run_ranks(recorded, 2, tmp_path / "memory"):
        # twice summed over two ranks: of ones 4; of 1 and 2 it is 3, then 6
        assert sums[0] == [4.0] * 2 + [1.0] * 6
        assert sums[1][0] == 6.0
        assert set(sums[1][1:]) <= {1.0, 2.0}
        assert sums[2] == [6.0] * 8


def without_one(comm: Communicator, path: Path, how: str) -> tuple[str, float]:
    """Rank 2 does not come to the second call."""
    shared = enter(comm, path, timeout=1.0)
    shared.all_reduce(torch.ones(3))
    if comm.rank == 2 and how == "ends":
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    if comm.rank == 2:
        time.sleep(2)
        return "", 0.0
    with pytest.raises(CommunicationError) as caught:
        shared.all_reduce(torch.ones(3))
    with pytest.raises(CommunicationError, match="rank 2"):
        shared.check()
    return str(caught.value), time.monotonic() - start


@pytest.mark.slow
@pytest.mark.alone
def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    for rank, (message, seconds) in enumerate(run_ranks(without_one, 3, tmp_path / "memory", "hangs")[:2]):
        assert message.startswith(f"rank {rank} of 3: all_reduce failed after ")
        assert message.endswith("rank 2 did not come in time)")
        assert 0.8 < seconds < 4


def test_a_rank_that_ends_ends_all(tmp_path: Path) -> None:
    (tmp_path / "memory").touch()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 2 died with exit code -9"):
        run_ranks(without_one, 3, tmp_path / "memory", "ends")
    assert time.monotonic() - start < 20


def test_the_file_has_no_name(tmp_path: Path) -> None:
    descriptor = nameless_file()
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
