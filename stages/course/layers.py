"""What the tests of stage 3 need around a model's layers: sizes, random checkpoints, and layers filled from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.config.model_config import ModelConfig
from stages.parallelism.communication import Communicator
from stages.parallelism.tensor_parallel import (
    GateUpParallelLinear,
    ParallelLMHead,
    RowParallelLinear,
    Shard,
    TensorParallel,
    VocabParallelEmbedding,
)

HIDDEN, COLUMNS, TOKENS = 6, 64, 5
CONFIG = ModelConfig(
    "LlamaForCausalLM", vocab_size=10, hidden_size=HIDDEN, intermediate_size=COLUMNS, num_layers=1, num_heads=6, num_kv_heads=3,
    head_dim=4, max_position_embeddings=64, norm_eps=1e-5, hidden_act="silu", attention_bias=True, mlp_bias=True,
)  # fmt: skip


def sizes(**changes: Any) -> ModelConfig:
    """The sizes of the tests' model with some of them changed."""
    return replace(CONFIG, **changes)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers around zero, the same for the same seed on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def span(shard: Shard) -> tuple[int, int]:
    """First and last + 1 of what a rank has."""
    return shard.start, shard.stop


def all_ranks(size: int) -> list[TensorParallel]:
    """Every rank's view, in one process; nobody talks."""
    return [TensorParallel(rank, size) for rank in range(size)]


def of(communicator: Communicator) -> TensorParallel:
    """A rank that can talk to the others; alone it has nobody to talk to, as in an engine."""
    return TensorParallel(communicator.rank, communicator.size, communicator if communicator.size > 1 else None)


def load(layer: nn.Module, **tensors: Tensor) -> nn.Module:
    """Give a layer a checkpoint's tensors by its loader: ``weight=...``, or ``weight__q=...`` for the piece "q"."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter, _, shard_id = name.partition("__")
            layer.weight_loader(getattr(layer, parameter), tensor, shard_id or None)
    return layer


def empty(layer: nn.Module) -> nn.Module:
    """The layer with NaN in all its weights, so that what nobody loads is seen."""
    for parameter in layer.parameters():
        parameter.fill_(torch.nan)
    return layer


# What ranks do, as threads or as processes


def row_parallel(communicator: Communicator, columns: int, bias: bool, residual: bool) -> dict[str, Any]:
    """A row-parallel layer over `columns` random inputs: what it gives, and what that cost."""
    parallel = of(communicator)
    inputs = parallel.share(columns)
    layer = empty(RowParallelLinear(inputs, HIDDEN, bias, parallel))
    load(layer, weight=random(HIDDEN, columns), **({"bias": random(HIDDEN, seed=1)} if bias else {}))
    x = random(TOKENS, columns, seed=2)[:, inputs.start : inputs.stop]
    stream = random(TOKENS, HIDDEN, seed=3) if residual else None
    result = layer(x, stream) if residual else layer(x)
    traffic = communicator.traffic
    calls = {name: each.calls for name, each in traffic.items() if each.calls}
    return {"result": result, "stream": stream, "calls": calls}


def mlp(communicator: Communicator) -> dict[str, Any]:
    """A whole gated MLP, column-parallel and then row-parallel, added to a residual stream."""
    parallel = of(communicator)
    first = load(
        GateUpParallelLinear(CONFIG, parallel), weight__gate=random(COLUMNS, HIDDEN), bias__gate=random(COLUMNS, seed=2),
        weight__up=random(COLUMNS, HIDDEN, seed=1), bias__up=random(COLUMNS, seed=3),
    )  # fmt: skip
    second = load(
        RowParallelLinear(parallel.mlp(CONFIG), HIDDEN, True, parallel), weight=random(HIDDEN, COLUMNS, seed=4),
        bias=random(HIDDEN, seed=5),
    )  # fmt: skip
    result = second(first(random(TOKENS, HIDDEN, seed=6)), random(TOKENS, HIDDEN, seed=7))
    return {"result": result, "calls": {name: each.calls for name, each in communicator.traffic.items() if each.calls}}


def embed(communicator: Communicator, vocab_size: int, ids: list[int]) -> Tensor:
    """The rows of a random table for some ids."""
    config = sizes(vocab_size=vocab_size)
    embedding = empty(VocabParallelEmbedding(config, of(communicator)))
    return load(embedding, weight=random(vocab_size, HIDDEN))(torch.tensor(ids))


def logits(communicator: Communicator, vocab_size: int, tied: bool) -> dict[str, Any]:
    """The logits of three hidden states, and what they cost."""
    config = sizes(vocab_size=vocab_size, tie_word_embeddings=tied)
    parallel = of(communicator)
    embedding = load(empty(VocabParallelEmbedding(config, parallel)), weight=random(vocab_size, HIDDEN))
    head = ParallelLMHead(config, embedding, parallel)
    if not tied:
        load(empty(head), weight=random(vocab_size, HIDDEN, seed=1))
    result = head(random(3, HIDDEN, seed=2))
    return {"result": result, "calls": {name: each.calls for name, each in communicator.traffic.items() if each.calls}}


def top_and_bottom(communicator: Communicator, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Embedding and logits one after the other."""
    rows = embed(communicator, vocab_size, list(range(vocab_size)))
    return rows, logits(communicator, vocab_size, tied=False)["result"]
