"""Carries a flat batch to the worker or workers that run the model, and their result back."""

from __future__ import annotations

import abc

import torch

from ..batching.continuous_batch import FlatBatch
from ..models.loader import ModelSource
from .config import EngineConfig
from .worker import StepResult, Worker


class Executor(abc.ABC):
    """The engine's view of the devices."""

    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    attention_backend: str

    @abc.abstractmethod
    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        """Set up the KV cache on every device."""
        ...

    @abc.abstractmethod
    def execute(self, batch: FlatBatch) -> StepResult:
        """Run one step."""
        ...


class UniProcExecutor(Executor):
    """One worker in this process."""

    def __init__(self, config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.worker = Worker(config, source, device, dtype)
        self.device, self.dtype = device, dtype
        self.weight_bytes = self.worker.weight_bytes
        self.attention_backend = self.worker.backend.name

    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        self.worker.create_cache(num_blocks, block_size, num_host_blocks)

    def execute(self, batch: FlatBatch) -> StepResult:
        return self.worker.execute(batch)
