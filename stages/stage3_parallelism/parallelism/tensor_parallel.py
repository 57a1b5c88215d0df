"""A model's matrix products cut over ranks (Shoeybi et al., "Megatron-LM", 2019, §3).

Two cuts that fit each other. A *column-parallel* layer gives each rank some of the outputs: every rank needs the whole input,
and computes without a word. A *row-parallel* layer takes what such a layer gave, so each rank multiplies its part of the
inputs with its part of the weights, and the sum over the ranks is the result: one all-reduce. Attention is such a pair (heads
are outputs of the one projection and inputs of the other), the MLP another, so a layer needs two all-reduces. Embedding and
head are cut by vocabulary.

Every layer here takes its own part out of a checkpoint's tensors in `weight_loader`; with one rank the part is the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.config.model_config import ModelConfig
from .communication import Communicator
from .linear import Embedding, Linear, copy_weight

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}

MLP_UNIT = 32
"""The MLP's columns are dealt out in units of this many, where its width allows, so that kernels keep whole vectors."""


def check_size(loaded: Tensor, dim: int, size: int) -> None:
    """See that a checkpoint's tensor has `size` rows, or columns with `dim` 1.

    Raises:
        ValueError: it has not.
    """
    if loaded.dim() <= dim or loaded.shape[dim] != size:
        expected = [*loaded.shape[:dim], size, *loaded.shape[dim + 1 :]]
        raise ValueError(f"expected shape {expected}, the checkpoint has {list(loaded.shape)}")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows (or columns) start..stop−1 of `full` belong to this rank."""

    full: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, loaded: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of a checkpoint's tensor.

        Raises:
            ValueError: the tensor has not `full` rows (or columns).
        """
        raise NotImplementedError("Stage 3 · Task 3.3: Shard.of, see stages/stage3_parallelism/GUIDE.md#task-3-3")

    def times(self, size: int) -> Shard:
        """The same part where each unit is `size` rows wide."""
        return Shard(self.full * size, self.start * size, self.stop * size)


def possible_sizes(model: ModelConfig) -> list[int]:
    """The numbers of ranks that a model's heads can be dealt out to: see `TensorParallel.heads`."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    return [n for n in range(1, heads + 1) if n <= kv_heads or (n % kv_heads == 0 and heads % n == 0)]


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """The ranks that share a model, and which part of it is this rank's.

    Attributes:
        rank, size: this rank, from 0, of so many. communicator: how it talks to the others; None with one rank.
        whole_experts: each rank has some experts of a model that has them, not a part of each.
    """

    rank: int = 0
    size: int = 1
    communicator: Communicator | None = None
    whole_experts: bool = False

    def share(self, units: int) -> Shard:
        """As even a part of `units` as there is; the first ranks have the larger ones."""
        # Hint: An output of a linear layer is a row of its weight, which is [out, in]. So cutting outputs is cutting
        # rows, of weight and bias alike.
        raise NotImplementedError("Stage 3 · Task 3.3: TensorParallel.share, see stages/stage3_parallelism/GUIDE.md#task-3-3")

    def heads(self, model: ModelConfig) -> tuple[Shard, Shard]:
        """This rank's query heads and KV heads.

        Query heads stay with the KV head that they read. With more ranks than KV heads, several ranks hold the same KV head
        and share its query heads.

        Raises:
            ValueError: the heads cannot be dealt out over so many ranks.
        """
        # Hint: Deal out whole groups: a KV head with its query heads. Only when there are more ranks than KV heads is a
        # group cut.
        raise NotImplementedError("Stage 3 · Task 3.5: TensorParallel.heads, see stages/stage3_parallelism/GUIDE.md#task-3-5")

    def mlp(self, model: ModelConfig) -> Shard:
        """This rank's columns of the MLP's hidden layer."""
        unit = math.gcd(model.intermediate_size, MLP_UNIT)
        return self.share(model.intermediate_size // unit).times(unit)

    def experts(self, count: int) -> Shard:
        """Which of a layer's `count` experts this rank has something of: with `whole_experts` as even a part of them as there
        is (`share`), and otherwise all, as each is cut."""
        # Hint: Every rank has every token and the router. What is missing on a rank is what the others' experts say;
        # what adds up, and what must be in the sum once?
        raise NotImplementedError("Stage 3 · Task 3.9: TensorParallel.experts, see stages/stage3_parallelism/GUIDE.md#task-3-9")

    def vocabulary(self, model: ModelConfig) -> Shard:
        """This rank's token ids. All parts are of the same size, so the last ones may reach past the vocabulary: padding."""
        # Hint: A rank that does not have a token's row gives zeros, and the sum over the ranks is the row. At the top
        # every rank has some tokens' logits, and all are put side by side.
        raise NotImplementedError(
            "Stage 3 · Task 3.6: TensorParallel.vocabulary, see stages/stage3_parallelism/GUIDE.md#task-3-6"
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        return x if self.communicator is None else self.communicator.all_reduce(x)

    @property
    def is_native(self) -> bool:
        """Whether a recorded step can have the sums in it."""
        return self.communicator is None or self.communicator.is_native

    def check(self) -> None:
        """See that no sum of a recorded step has failed; see `Communicator.check`."""
        if self.communicator is not None:
            self.communicator.check()


SINGLE = TensorParallel()


class ColumnParallelLinear(Linear):
    """Linear layers over one input as a single matrix product, of each this rank's outputs: [T, in] -> [T, local out].

    Args:
        pieces: by the name that a checkpoint's parts are told apart by (see `shard_ids`), this rank's outputs of each.
    """

    def __init__(self, in_features: int, pieces: dict[str, Shard], bias: bool) -> None:
        super().__init__(in_features, sum(map(len, pieces.values())), bias)
        self.inputs, self.pieces = Shard(in_features, 0, in_features), pieces
        self.shard_ids: tuple[str, ...] = tuple(pieces)

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        """Take this rank's rows of one piece's weight or bias into the memory that `param` has; without `shard_id`, of all
        pieces in order (GPT-2 keeps QKV so).

        Raises:
            ValueError: the checkpoint's tensor has another shape, also where this rank has no row of it.
        """
        raise NotImplementedError(
            "Stage 3 · Task 3.3: ColumnParallelLinear.weight_loader, see stages/stage3_parallelism/GUIDE.md#task-3-3"
        )


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values of this rank's heads in one product: [T, hidden] -> [T, (H + 2·H_kv)·D]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        """The pieces "q", "k" and "v": this rank's heads of `config`, each `head_dim` outputs wide."""
        raise NotImplementedError(
            "Stage 3 · Task 3.5: QKVParallelLinear.__init__, see stages/stage3_parallelism/GUIDE.md#task-3-5"
        )


class GateUpParallelLinear(ColumnParallelLinear):
    """Both inputs of a gated MLP in one product, joined: ``act(gate(x)) · up(x)``, [T, hidden] -> [T, local I]."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        columns = parallel.mlp(config)
        super().__init__(config.hidden_size, {"gate": columns, "up": columns}, config.mlp_bias)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.multiply(x))

    def activate(self, gate_up: Tensor) -> Tensor:
        """[T, 2 · local I] -> [T, local I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate).mul_(up)


class RowParallelLinear(Linear):
    """A product whose inputs are cut: [T, local in] -> [T, out], summed over the ranks.

    What is to be added once, the bias and the residual stream, rank 0 adds to its part before the sum.

    Args:
        inputs: this rank's part of the inputs.
    """

    def __init__(self, inputs: Shard, out_features: int, bias: bool, parallel: TensorParallel) -> None:
        super().__init__(len(inputs), out_features, bias)
        self.inputs = inputs
        self.parallel = parallel

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, local in] -> [T, out], the same on all ranks. `Linear` makes the product, by `multiply`.

        With `add_to` [T, out], the residual stream, which is the same on all ranks, that is added too: by rank 0 alone, whose
        result lies in it. The other ranks' results lie elsewhere, and their `add_to` is as it was.
        """
        # Hint: The result is a sum over the ranks. Ask of every term, the product, the bias and the residual: how often
        # would it be in that sum?
        raise NotImplementedError(
            "Stage 3 · Task 3.4: RowParallelLinear.forward, see stages/stage3_parallelism/GUIDE.md#task-3-4"
        )

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        """Take this rank's columns of the weight [out, in]; of the bias [out] all on rank 0 and zeros on the others.

        Raises:
            ValueError: the checkpoint's tensor has another shape.
        """
        raise NotImplementedError(
            "Stage 3 · Task 3.4: RowParallelLinear.weight_loader, see stages/stage3_parallelism/GUIDE.md#task-3-4"
        )


class VocabParallelEmbedding(Embedding):
    """A row for each token id, of which this rank holds some: the others' tokens are zeros here, and the sum is complete."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        self.rows = parallel.vocabulary(config)
        super().__init__(len(self.rows), config.hidden_size)
        self.parallel = parallel

    def forward(self, ids: Tensor) -> Tensor:
        """[T] -> [T, hidden], the rows of all ids on every rank; `ids` stay as they are."""
        raise NotImplementedError(
            "Stage 3 · Task 3.6: VocabParallelEmbedding.forward, see stages/stage3_parallelism/GUIDE.md#task-3-6"
        )

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        load_vocabulary(param, loaded, self.rows)


def load_vocabulary(param: nn.Parameter, loaded: Tensor, rows: Shard) -> None:
    """Take this rank's rows of `loaded` [V, hidden]; padding becomes zeros.

    Raises:
        ValueError: the checkpoint's tensor has another shape.
    """
    raise NotImplementedError("Stage 3 · Task 3.6: load_vocabulary, see stages/stage3_parallelism/GUIDE.md#task-3-6")


class ParallelLMHead(Linear):
    """Logits of the next token: [N, hidden] -> [N, V] on every rank. A tied head uses the embedding's weight."""

    def __init__(self, config: ModelConfig, embedding: VocabParallelEmbedding, parallel: TensorParallel) -> None:
        tied = embedding.weight if config.tie_word_embeddings else None
        super().__init__(config.hidden_size, len(embedding.rows), False, tied)
        self.rows, self.parallel = embedding.rows, parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, V]: each rank computes its tokens' logits, as `Linear` does, all get all, and the padding is cut
        off."""
        raise NotImplementedError("Stage 3 · Task 3.6: ParallelLMHead.forward, see stages/stage3_parallelism/GUIDE.md#task-3-6")

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        load_vocabulary(param, loaded, self.rows)
