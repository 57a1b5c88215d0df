"""Carries a flat batch to the worker or workers that run the model, and their result back."""

from __future__ import annotations

import abc
import os
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ..batching.continuous_batch import FlatBatch
from ..batching.step_arrays import FlatArrays, StepArrays
from ..batching.wanted_rows import logit_calls
from ..models.config.model_config import ModelConfig
from ..models.loader import ModelSource
from ..models.lora.adapter_files import Adapter
from ..parallelism.distributed import leave, open_rendezvous, wait_for_ranks
from ..parallelism.shared_memory import nameless_file
from ..parallelism.tensor_parallel import TensorParallel
from .config import EngineConfig
from .worker import StepResult, Worker
from .worker_process import STOP_SECONDS, Setup, StepBoard, WorkerHandle, WorkerProcHandle, init_worker_distributed


class Executor(abc.ABC):
    """The engine's view of the devices.

    Attributes:
        worker: that of rank 0, in this process.
    """

    worker: Worker

    @abc.abstractmethod
    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        """Set up the KV cache on every device."""
        ...

    @abc.abstractmethod
    def execute(self, batch: FlatBatch) -> StepResult:
        """Run one step."""
        ...

    def load_adapter(self, slot: int, folder: Path, adapter: Adapter) -> None:
        """Put an adapter, as rank 0 has read it from `folder`, into a slot on every device."""
        assert self.worker.adapters is not None  # `AdapterRegistry` has seen to that
        self.worker.adapters.load(slot, adapter)

    def check_health(self) -> None:
        """See that all ranks live; for an engine that has nothing to do, so nothing that would fail.

        Raises:
            WorkerDiedError: one does not.
        """
        return

    def close(self) -> None:
        """End the other ranks, if there are any. Nothing can be executed afterwards."""
        return

    @property
    def device(self) -> torch.device:
        return self.worker.device

    @property
    def dtype(self) -> torch.dtype:
        return self.worker.dtype

    @property
    def weight_bytes(self) -> int:
        return self.worker.weight_bytes

    @property
    def attention_backend(self) -> str:
        return self.worker.backend.name


class UniProcExecutor(Executor):
    """One worker in this process."""

    def __init__(self, config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.worker = Worker(config, source, device, dtype)

    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.worker.create_cache(num_blocks, block_size, num_host_blocks)

    def execute(self, batch: FlatBatch) -> StepResult:
        return self.worker.execute(batch)

    def close(self) -> None:
        if self.worker.tiers is not None:
            self.worker.tiers.close()


class LockstepExecutor(Executor):
    """Tensor parallelism: rank 0 here, the others elsewhere, all in lock step. Subclasses say where, and how they are told.

    A subclass's constructor makes `_others` and `_finalizer`, which ends them, and then calls `_init_worker`.
    """

    _others: Sequence[WorkerHandle]
    _finalizer: weakref.finalize[..., LockstepExecutor]

    def _init_worker(self, setup: Setup, store: dist.TCPStore, threads: int | None = None) -> None:
        """Wait for the others, join them as `setup` says, and make rank 0's worker.

        Raises:
            WorkerDiedError: a rank failed to start. TimeoutError: one did not come.
        """
        try:
            wait_for_ranks([other.rank for other in self._others], store, self.check_health)
            self.worker = Worker(
                setup.config, setup.source, setup.device, setup.dtype, init_worker_distributed(setup, store), threads
            )
        except BaseException:
            self._finalizer()
            raise

    @abc.abstractmethod
    def _broadcast_step(self, step: StepArrays) -> None:
        """Let the others take part in a step; does not wait for them."""
        ...

    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        """Set up the KV cache on every rank, the same number of blocks on each. The others are told first: on a GPU this
        records steps, which have sums in them."""
        self._broadcast(cache=[num_blocks, block_size, num_host_blocks])
        self.worker.create_cache(num_blocks, block_size, num_host_blocks)

    def execute(self, batch: FlatBatch) -> StepResult:
        """Let every rank compute one step, and sample on this one.

        A RuntimeError may be another rank's death: each is looked at (`check`) for its `death_seconds`, all from the failure
        on. Any other error comes out at once.

        Raises:
            WorkerDiedError: another rank has ended, before or within the step.
        """
        self._broadcast_step(step_arrays(batch))
        try:
            return self.worker.execute(batch)
        except RuntimeError:
            start = time.monotonic()
            for other in self._others:  # a rank that is gone, or just about to go, is the better explanation
                other.check(start + other.death_seconds - time.monotonic())
            raise

    def load_adapter(self, slot: int, folder: Path, adapter: Adapter) -> None:
        self._broadcast(adapter=[slot, str(folder.absolute())])
        super().load_adapter(slot, folder, adapter)

    def check_health(self) -> None:
        for other in self._others:
            other.check()

    def close(self) -> None:
        self._finalizer()

    def _broadcast(self, **message: object) -> None:
        for other in self._others:
            other.send(**message)


class MultiProcExecutor(LockstepExecutor):
    """Each other rank in a process of its own on this machine.

    Raises:
        WorkerDiedError: a rank failed to start.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        size = config.tensor_parallel_size
        store = open_rendezvous()
        self._board, memory = StepBoard(), nameless_file()
        address = f"127.0.0.1:{store.port}"
        setups = [
            Setup(config, source, _device(device, rank), dtype, rank, size, address, self._board.descriptor, memory)
            for rank in range(size)
        ]
        self._others = [WorkerProcHandle(setup) for setup in setups[1:]]
        self._finalizer = weakref.finalize(self, end_ranks, self._others, (self._board.descriptor, memory))
        self._init_worker(setups[0], store)

    def _broadcast_step(self, step: StepArrays) -> None:
        self._broadcast(step=self._board.write(step))


def _device(device: torch.device, rank: int) -> torch.device:
    return torch.device(device.type, rank) if device.type == "cuda" else device


def end_ranks(others: Iterable[WorkerHandle], descriptors: Iterable[int] = ()) -> None:
    """End the other ranks and this one's connections to them, and close the files that they shared."""
    deadline = time.monotonic() + STOP_SECONDS
    for other in others:
        other.release()
    for other in others:
        other.stop(deadline - time.monotonic())
    leave()
    for descriptor in descriptors:
        os.close(descriptor)


def step_arrays(batch: FlatBatch) -> StepArrays:
    """What the other ranks need to know of a step; the rows for logits are those of `logit_calls`, with drafts too."""
    decision, calls = batch.decision, logit_calls(batch)

    def pairs(moves: Iterable[tuple[int, int]]) -> np.ndarray:
        return np.array(list(moves), np.int64).reshape(-1, 2)

    return StepArrays(
        **{array.name: getattr(batch, array.name) for array in fields(FlatArrays)},
        swap_out=pairs(decision.swap_out),
        swap_in=pairs(decision.swap_in),
        copies=pairs(decision.copies),
        logit_rows=np.concatenate([*calls, np.empty(0, np.int64)]),
        logit_counts=np.array([len(rows) for rows in calls], np.int64),
    )


def local_model(model: ModelConfig, config: EngineConfig) -> ModelConfig:
    """The part of a model that rank 0 holds, of which no rank has more: what decides how many blocks fit."""
    heads, kv_heads = TensorParallel(0, config.tensor_parallel_size).heads(model)
    return replace(model, num_heads=len(heads), num_kv_heads=len(kv_heads))
