"""Layers of experts on as many ranks as there are, and the models that are made of them.

Each rank has either a part of every expert, as it has of an MLP, or with `TensorParallel.whole_experts` some experts whole
(expert parallelism; Lepikhin et al., "GShard", 2021). Whole experts stay as wide as they are, so their products are larger and
fewer; but a rank whose experts everybody chooses is waited for.

All ranks have all tokens here, as attention is cut by heads. So no token has to travel to its expert, which is what an
all-to-all is for: a rank computes what it has, and the sum over the ranks is complete either way, by one all-reduce a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ..parallelism.linear import Layer
from ..parallelism.tensor_parallel import TensorParallel
from .config.model_config import ModelConfig
from .llama import LlamaDecoderLayer, LlamaForCausalLM
from .moe import Experts, Router, mixture_of, sizes_of

_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class SparseMLP(Layer):
    """Router and experts.

    Attributes:
        kind: the class of its experts, for families that differ there.
    """

    kind: type[Experts] = Experts

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = self.kind(config, parallel)
        self.parallel = parallel

    def forward(self, x: Tensor, add_to: Tensor | None) -> Tensor:
        """What a layer's experts say of each token, complete, and the same on all ranks.

        The logits of `gate` are the same everywhere, as all ranks have the router and the tokens. Each rank's `experts` compute
        their part, and one all-reduce makes the whole of it.

        Args:
            x: [T, hidden], the same on all ranks. add_to: [T, hidden], the residual stream, which has to be in the sum once;
                rank 0 adds it in place. None: there is none.

        Returns:
            [T, hidden].
        """
        # Hint: Every rank has every token and the router. What is missing on a rank is what the others' experts say;
        # what adds up, and what must be in the sum once?
        raise NotImplementedError("Stage 3 · Task 3.9: SparseMLP.forward, see stages/stage3_parallelism/GUIDE.md#task-3-9")


class SparseDecoderLayer(LlamaDecoderLayer):
    """LLaMA's layer with experts, but for the layers that have none.

    Attributes:
        sparse: the class of router and experts, for families that differ there.
    """

    sparse: type[SparseMLP] = SparseMLP

    def make_mlp(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> Layer:
        if layer in mixture_of(config).dense_layers:
            return super().make_mlp(config, layer, parallel)
        return self.sparse(config, parallel)


class SparseForCausalLM(LlamaForCausalLM):
    """A model with experts and its head. A checkpoint has a tensor for each matrix of each expert, or one for all experts.

    Attributes:
        is_transposed: transformers keeps a matrix of all experts as [E, in, out], not as [E, out, in].
    """

    decoder_layer = SparseDecoderLayer
    is_transposed = False

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        self.mine = parallel.experts(len(sizes_of(config)))

    def pieces(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint's tensor consists of, by the names of a checkpoint with a tensor for each matrix of each expert.

        A tensor for all experts has three dimensions, the first of which counts experts, and a name like
        ``model.layers.N.mlp.experts.down_proj``, with or without ``.weight`` behind it. Matrix e of it is
        ``model.layers.N.mlp.experts.e.down_proj.weight``, a view. Every other tensor is a piece, as it is.
        """
        raise NotImplementedError(
            "Stage 3 · Task 3.9: SparseForCausalLM.pieces, see stages/stage3_parallelism/GUIDE.md#task-3-9"
        )

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        """See `LlamaForCausalLM.place`. None also for what belongs to an expert that this rank has not (`mine`), so that nobody
        reads it. A number behind the layer's last expert is no expert of another rank: it goes on, to be refused by name."""
        raise NotImplementedError(
            "Stage 3 · Task 3.9: SparseForCausalLM.place, see stages/stage3_parallelism/GUIDE.md#task-3-9"
        )
