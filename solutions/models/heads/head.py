"""What drafts on top of a model: some layers over the hidden states that it computes anyway, and what is asked of them.

A head is found and checked before anything is loaded, and loaded beside its target. Where its drafts have their context, and
how they become chains and trees, is not its business (`core/speculation/head_drafts.py`).
"""

from __future__ import annotations

import abc
from typing import Protocol

import torch
from torch import Tensor, nn

from ...attention.paged_attention import AttentionMetadata
from ...parallelism.linear import Layer
from ..llama import LlamaForCausalLM


class DraftHead(Layer, abc.ABC):
    """Says what comes two tokens behind a position, of the position's feature and the token behind it. Its own output stands
    for the next feature."""

    @abc.abstractmethod
    def forward(self, embedded: Tensor, features: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        """What stands for the next features, [T, hidden], and is what `best` reads.

        Args:
            embedded: [T, hidden], of the tokens behind T positions. features: [T, hidden], of the positions.
            rope: of the positions. metadata: a step of one cached layer.
        """
        ...

    @abc.abstractmethod
    def run_layers(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        """All of `forward` behind the product that joins both inputs: [T, hidden] -> [T, hidden]; overwrites `hidden`."""
        ...

    @property
    @abc.abstractmethod
    def layers(self) -> list[nn.Module]:
        """All layers of `run_layers`, those that they consist of included."""
        ...

    @abc.abstractmethod
    def best(self, hidden: Tensor, count: int) -> Tensor:
        """The `count` likeliest tokens behind each row of [T, hidden], in that order: [T, count] int64, ids of the target."""
        ...

    @property
    @abc.abstractmethod
    def parts(self) -> list[tuple[nn.Module, bool]]:
        """What it consists of, for passes that put kernels in place, and of each whether its matrices may be rounded."""
        ...


class FoundHead(Protocol):
    """A head that was found and fits its target as far as can be seen without the weights."""

    def load(self, target: LlamaForCausalLM, dtype: torch.dtype) -> DraftHead:
        """The head, on the CPU, beside the loaded target.

        Raises:
            ValueError: it cannot be read, or is for another target; one line.
        """
        ...
