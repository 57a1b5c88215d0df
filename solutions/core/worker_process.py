"""A rank in a process of its own: what the engine's process tells it, and how.

Rank 0 is the engine's own process, where the sequences are. The other ranks need only a step's arrays: these lie in a file in
memory that all processes map, and each rank's standard input is the door bell. A line there says what to do next, and its end
says that the engine is gone, whatever way it went, so no rank outlives it. Nothing has a name that could be left behind.

The arrays of a step may be overwritten as soon as every rank has copied them. They have when rank 0's step is over, because
every step has sums over all ranks in it.
"""

from __future__ import annotations

import abc
import base64
import contextlib
import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ..batching.step_arrays import StepArrays
from ..models.loader import ModelSource
from ..parallelism.communication import RingCommunicator
from ..parallelism.distributed import cores_of, join
from ..parallelism.shared_memory import SharedMemoryCommunicator, nameless_file
from ..parallelism.tensor_parallel import TensorParallel
from .config import EngineConfig
from .platform import native
from .platform.machine import available_cores, pick_threads
from .worker import Worker

STOP_SECONDS = 5.0
"""How long the ranks may take to end by themselves before they are killed."""


class WorkerDiedError(RuntimeError):
    """The process of another rank has ended."""


class WorkerHandle(abc.ABC):
    """A rank other than 0 as the engine sees it.

    Attributes:
        rank: 1, 2, …
        death_seconds: how long it takes at most until `check` knows that a rank is gone whose connections have just closed.
    """

    rank: int
    death_seconds: float

    @abc.abstractmethod
    def send(self, **message: Any) -> None:
        """Say what to do next: one of the keywords of `WorkerProc.handle_message`; does not wait for it.

        Raises:
            WorkerDiedError: nobody is there any more.
        """
        ...

    @abc.abstractmethod
    def check(self, seconds: float = 0.0) -> None:
        """See that it lives, and if there is reason to think otherwise, still does after so many seconds.

        Raises:
            WorkerDiedError: it does not.
        """
        ...

    def release(self) -> None:
        """Let it end by itself, where that is possible."""
        return

    @abc.abstractmethod
    def stop(self, seconds: float) -> None:
        """See that it has ended by itself after so many seconds, or end it; then it is gone or can do nothing any more."""
        ...


_DTYPES = {f.name: np.int32 if f.type == "Int32" else np.int64 for f in fields(StepArrays)}
_NAMES = list(_DTYPES)


class StepBoard:
    """Memory that several processes map, in which one of them lays out a step for the others.

    Where a step does not fit, the memory grows to twice its bytes, so that it seldom grows. It never shrinks: others map it.

    Args:
        descriptor: of the file that another process has made; None: make one.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = nameless_file() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def write(self, step: StepArrays) -> list[list[int]]:
        """Lay out a step; returns the arrays' shapes, by which `read` finds them."""
        arrays = [np.ascontiguousarray(getattr(step, name), _DTYPES[name]) for name in _NAMES]
        size = sum(array.nbytes for array in arrays)
        if self._map is None or len(self._map) < size:
            os.ftruncate(self.descriptor, 2 * size)
            self._map = mmap.mmap(self.descriptor, 0)
        at = 0
        for array in arrays:
            self._map[at : at + array.nbytes] = array.tobytes()
            at += array.nbytes
        return [list(array.shape) for array in arrays]

    def read(self, shapes: list[list[int]]) -> StepArrays:
        """A copy of the step that was laid out with these shapes."""
        counts = [int(np.prod(shape)) for shape in shapes]
        size = sum(count * np.dtype(_DTYPES[name]).itemsize for name, count in zip(_NAMES, counts, strict=True))
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self.descriptor, 0)  # it has grown
        arrays: list[NDArray[Any]] = []
        at = 0
        for name, shape, count in zip(_NAMES, shapes, counts, strict=True):
            array = np.frombuffer(self._map, _DTYPES[name], count, at).reshape(shape).copy()
            at += array.nbytes
            arrays.append(array)
        return StepArrays(*arrays)


@dataclass(slots=True)
class Setup:
    """What a rank is told first."""

    config: EngineConfig
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    rank: int
    size: int
    address: str
    board: int | None = None
    memory: int | None = None


def init_worker_distributed(setup: Setup, store: dist.Store | str) -> TensorParallel:
    """Join the other ranks. Sums go through the memory that they share, if there is one and the CPU kernels are wanted, or
    around a ring, if that is asked for."""
    communicator = join(setup.rank, setup.size, store, setup.device)
    if setup.config.collective_backend == "ring":
        return TensorParallel(setup.rank, setup.size, RingCommunicator())
    wanted = setup.device.type == "cpu" and setup.config.enable_cpu_kernels
    if wanted and setup.memory is not None and native.have_sums():
        communicator = SharedMemoryCommunicator(setup.memory, pick_threads(ranks=setup.size))
    return TensorParallel(setup.rank, setup.size, communicator)


class WorkerProc:
    """A rank other than 0 in its own process, wherever that is: it joins the others, loads its part, and does as it is told."""

    def __init__(self, setup: Setup) -> None:
        self.worker = Worker(
            setup.config, setup.source, setup.device, setup.dtype, init_worker_distributed(setup, setup.address)
        )

    def handle_message(
        self, cache: list[int] | None = None, step: StepArrays | None = None, adapter: tuple[int, str] | None = None
    ) -> None:
        """Create the KV cache (arguments of `Worker.create_cache`), load an adapter (slot and folder), or take part in a
        step."""
        if cache is not None:
            self.worker.create_cache(*cache)
        if adapter is not None:
            assert self.worker.adapters is not None
            self.worker.adapters.load(adapter[0], self.worker.adapters.read(Path(adapter[1])))
        if step is not None:
            self.worker.execute_without_sampling(step)


class WorkerProcHandle(WorkerHandle):
    """Rank `setup.rank` in a process on this machine."""

    death_seconds = 2.0

    def __init__(self, setup: Setup) -> None:
        self.rank = setup.rank
        threads = max(1, available_cores() // setup.size)
        command = [sys.executable, "-m", __name__]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        shared = [descriptor for descriptor in (setup.board, setup.memory) if descriptor is not None]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=shared, env=environment, text=True)
        assert self._process.stdin is not None
        self._bell = self._process.stdin
        self.send(setup=base64.b64encode(pickle.dumps(setup)).decode())

    def send(self, **message: Any) -> None:
        """Ring the bell. A step is told by the shapes that `StepBoard.write` gave."""
        try:
            self._bell.write(json.dumps(message) + "\n")
            self._bell.flush()
        except (BrokenPipeError, ValueError):
            raise WorkerDiedError(self._death()) from None

    def check(self, seconds: float = 0.0) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, seconds))
            raise WorkerDiedError(self._death())

    def release(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._bell.close()

    def stop(self, seconds: float) -> None:
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _death(self) -> str:
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the worker of rank {self.rank} has ended, {how}; what it said stands above in the log"


def main() -> None:
    """Serve as a rank until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine's process, whose end reaches everyone
    setup: Setup = pickle.loads(base64.b64decode(json.loads(sys.stdin.readline())["setup"]))
    if setup.device.type == "cpu" and (cores := cores_of(setup.rank, setup.size)):
        os.sched_setaffinity(0, cores)
    worker_proc = WorkerProc(setup)
    board = StepBoard(setup.board)
    for line in sys.stdin:
        message = json.loads(line)
        if "step" in message:
            message["step"] = board.read(message["step"])
        worker_proc.handle_message(**message)
    os._exit(0)  # whatever the others do: there is nothing to save, and closing connections would wait for them


if __name__ == "__main__":
    main()
