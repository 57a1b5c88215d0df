"""Ranks: how they find each other, which cores are theirs, and how a function is run on several of them."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
import torch.distributed as dist

from ..core.platform.machine import available_cores
from .communication import Communicator

TIMEOUT_SECONDS = 60.0
"""How long a rank waits for another one, at a rendezvous or in a collective, until it says that something is wrong."""
START_SECONDS = 600.0
"""How long a rank may take to come to the rendezvous: it loads PyTorch first, perhaps over a network."""
START_METHOD: Literal["forkserver", "spawn"] = "forkserver" if sys.platform == "linux" else "spawn"
"""How `run_ranks` starts processes; on macOS system libraries do not survive a fork."""


def open_rendezvous(host: str = "127.0.0.1", timeout: float = TIMEOUT_SECONDS) -> dist.TCPStore:
    """The place where ranks meet, on a port that was free: rank 0 opens it, and tells the others ``store.port``."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=timeout))


def join(
    rank: int, size: int, store: dist.Store | str, device: torch.device | str = "cpu", timeout: float = TIMEOUT_SECONDS
) -> Communicator:
    """Become rank `rank` of `size`; returns when all have come.

    Args:
        store: what `open_rendezvous` gave, or its address as "host:port", with the port behind the last colon.
        device: decides what carries tensors: gloo between CPUs, NCCL between GPUs; a GPU becomes the current one.
        timeout: seconds to wait for the store, for the others, and later in each of the group's calls.

    Raises:
        TimeoutError: not all ranks have come in time.
    """
    # Hint: A store is a dictionary that several processes share. Whoever arrives writes its name there, then waits for
    # all the others.
    raise NotImplementedError("Stage 3 · Task 3.7: join, see stages/stage3_parallelism/GUIDE.md#task-3-7")


def has_come(rank: int, store: dist.Store) -> bool:
    """Whether a rank has reached the rendezvous."""
    here: bool = store.check([f"rank {rank}"])
    return here


def wait_for_ranks(
    ranks: Collection[int], store: dist.Store, check: Callable[[], None], timeout: float = START_SECONDS, pause: float = 0.02
) -> None:
    """Wait until all of `ranks` have reached the rendezvous.

    Args:
        store: what `open_rendezvous` gave; `has_come` asks it.
        check: called as long as some are missing, every `pause` seconds; raises when a rank has died, which ends the wait.
        timeout: seconds, by `time.monotonic`, until those that are missing are given up.

    Raises:
        TimeoutError: not all have come in time; the message names those that are missing.
    """
    raise NotImplementedError("Stage 3 · Task 3.7: wait_for_ranks, see stages/stage3_parallelism/GUIDE.md#task-3-7")


def leave() -> None:
    """Close the connections of `join`, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def cores_of(rank: int, size: int) -> list[int]:
    """The cores of this rank: the process's own, dealt out evenly; empty where a system does not tell them apart.

    With more ranks than cores several ranks share one.
    """
    raise NotImplementedError("Stage 3 · Task 3.7: cores_of, see stages/stage3_parallelism/GUIDE.md#task-3-7")


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """Call ``function(communicator, *args)`` on `size` ranks, each a process with one thread, and return what each gave.

    On Linux the first call starts a server that has PyTorch loaded, and all ranks are forked from it in milliseconds. It has
    nothing of this package in it, so ranks see the files as they are now. Elsewhere each rank loads PyTorch anew.

    Args:
        function: at the top level of a module, for the processes to find it. Its result must be picklable.

    Raises:
        RuntimeError: a rank failed; the message is its traceback.
        TimeoutError: a rank did not end in time; all are killed.
    """
    context: multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext
    if START_METHOD == "spawn":
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "psutil"])
    results: multiprocessing.Queue[tuple[int, bytes | None, str | None]] = context.Queue()
    store = open_rendezvous(timeout=timeout)
    address = f"127.0.0.1:{store.port}"
    processes = [
        context.Process(target=_rank_main, args=(function, rank, size, address, timeout, results, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, results, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        results.close()


def _collect(processes: list[Any], results: Any, deadline: float) -> list[Any]:
    """What each rank gave, in the order of ranks.

    Args:
        processes: by rank; their `exitcode` is None as long as they run.
        results: a queue of (rank, pickled value, None), or (rank, None, traceback) of one that failed.
        deadline: when time is up, by `time.monotonic`.

    Raises:
        RuntimeError: a rank failed, with its traceback, or died without a word, with its exit code.
        TimeoutError: time is up; the message names the ranks that are missing.
    """
    found: dict[int, Any] = {}
    while len(found) < len(processes):
        with contextlib.suppress(queue.Empty):
            rank, value, failure = results.get(timeout=0.2)
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed:\n{failure}")
            found[rank] = pickle.loads(value)
            continue
        missing = [rank for rank in range(len(processes)) if rank not in found]
        dead = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
        if dead:
            raise RuntimeError(f"rank {dead[0]} died with exit code {processes[dead[0]].exitcode} and said nothing")
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {', '.join(map(str, missing))} of {len(processes)} did not end in time")
    return [found[rank] for rank in range(len(processes))]


def _rank_main(
    function: Callable[..., Any], rank: int, size: int, address: str, timeout: float, results: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        communicator = join(rank, size, address, timeout=timeout)
        value = function(communicator, *args)
        leave()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
    results.put((rank, pickle.dumps(value), None))  # by value: a queue's own pickling of tensors needs this process to live on


def _end_with_parent() -> None:
    """Wait until the process that called `run_ranks` is gone, whatever way it went, and end with it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is a process of its own"
    parent.join()
    os._exit(1)
