"""Runs text through a model, a layer at a time, and gathers statistics of each matrix's inputs.

A layer is run on the whole calibration text, quantized, and run again with its new weights. So the next layer gets the inputs
that it will get in use, errors included. Only the hidden states between two layers and one layer's statistics are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attention.backends import make_backend
from ..attention.paged_attention import AttentionMetadata
from ..models.llama import LlamaForCausalLM
from ..models.loader import ModelSource, load_model
from ..parallelism.linear import Linear
from ..parallelism.tensor_parallel import ColumnParallelLinear
from .layout.groups import GroupQuantized

MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The matrix products of a decoder layer, in the order in which data goes through them."""
BEFORE = {"self_attn.o_proj": (MATRICES[0], "v"), "mlp.down_proj": (MATRICES[2], "up")}
"""Matrices whose inputs another one makes: that one, and which of its pieces."""
BLOCK_SIZE = 16


@dataclass(slots=True)
class Statistics:
    """Of a matrix's inputs x: the mean of x xᵀ, [K, K] float32, and of |x|, [K]."""

    covariance: Tensor
    magnitude: Tensor
    count: int = 0

    @classmethod
    def empty(cls, size: int) -> Statistics:
        return cls(torch.zeros(size, size), torch.zeros(size))

    def add(self, x: Tensor) -> None:
        """Take in more inputs, [T, K]."""
        x = x.float()
        share = len(x) / (self.count + len(x))
        self.covariance.mul_(1 - share).addmm_(x.t(), x, alpha=share / len(x))
        self.magnitude.mul_(1 - share).add_(x.abs().mean(dim=0), alpha=share)
        self.count += len(x)

    def divided_by(self, scale: Tensor) -> Statistics:
        """Those of x / scale."""
        return Statistics(self.covariance / torch.outer(scale, scale), self.magnitude / scale, self.count)


@dataclass(slots=True)
class LayerInputs:
    """A decoder layer and what goes into its matrices.

    Attributes:
        inputs: statistics by the names of `MATRICES`.
        changed: weights beside the matrices that were changed, by their names within the layer.
    """

    layer: nn.Module
    inputs: dict[str, Statistics]
    changed: dict[str, Tensor] = field(default_factory=dict)

    def matrix(self, name: str) -> Linear:
        return matrix_of(self.layer, name)

    def weight(self, name: str) -> Tensor:
        """[N, K] float32: the matrix, with all of its pieces."""
        return plain_weight(self.matrix(name)).data

    def can_fold(self, name: str) -> bool:
        """Whether the inputs of a matrix can be divided by a factor each where they are made: not behind a bias."""
        if name not in BEFORE:
            return True
        before = self.matrix(BEFORE[name][0])
        return before.bias is None and self.weight(name).shape[1] == len(self._rows_before(name))

    def fold(self, name: str, scale: Tensor) -> None:
        """Multiply a matrix's columns by `scale` [K], and divide what makes its inputs."""
        self.weight(name).mul_(scale)
        norm = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}.get(name)
        if norm is not None:
            self.changed[f"{norm}.weight"] = self.layer.get_parameter(f"{norm}.weight").data.div_(scale)
        else:
            self._rows_before(name).div_(scale[:, None])

    def _rows_before(self, name: str) -> Tensor:
        """The rows of the matrix whose outputs are this one's inputs: v's for o_proj, up's for down_proj."""
        before, piece = BEFORE[name]
        matrix = self.matrix(before)
        return pieces_of(matrix, plain_weight(matrix).data)[piece]


def matrix_of(layer: nn.Module, name: str) -> Linear:
    """A matrix product of a decoder layer."""
    matrix = layer.get_submodule(name)
    assert isinstance(matrix, Linear), name
    return matrix


def plain_weight(matrix: Linear) -> nn.Parameter:
    """[N, K] float32: the weight of a matrix that is not quantized."""
    assert matrix.weight is not None, "the model is loaded in float32"
    return matrix.weight


def pieces_of(matrix: Linear, rows: Tensor) -> dict[str | None, Tensor]:
    """What belongs to each of the pieces that a checkpoint keeps apart, of a tensor with the matrix's rows; views."""
    if not isinstance(matrix, ColumnParallelLinear):
        return {None: rows}
    return dict(zip(matrix.pieces, rows.split([len(piece) for piece in matrix.pieces.values()]), strict=True))


class Calibration:
    """Sends the calibration text through a model, layer by layer.

    Args:
        source: the model. tokens: [B, L] int64, B samples.
    """

    def __init__(self, source: ModelSource, tokens: Tensor) -> None:
        self.model = self.load(source)
        self.layers = list(self.model.model.layers)
        config = source.config
        length, blocks = tokens.shape[1], -(-tokens.shape[1] // BLOCK_SIZE)
        self.hidden = self.model.model.embed_tokens(tokens)  # [B, L, hidden]
        positions = torch.arange(length)
        self._rope = self.model.model.rotary_emb(positions)
        backend = make_backend("auto", "cpu", torch.float32, config.head_dim, BLOCK_SIZE)
        # one sample at a time; a layer needs no keys and values but its own, so all share one cache
        cache = torch.zeros(2, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        self._metadata = AttentionMetadata(
            kv_caches=[cache] * config.num_layers,
            slot_mapping=positions,
            block_tables=torch.arange(blocks, dtype=torch.int32)[None],
            query_start_loc=torch.tensor([0, length], dtype=torch.int32),
            context_lens=torch.tensor([length], dtype=torch.int32),
            max_query_len=length,
            max_context_len=length,
            backend=backend,
        )
        self._metadata.plan = backend.plan(self._metadata, config.sliding_window)

    @staticmethod
    def load(source: ModelSource) -> LlamaForCausalLM:
        """The whole model in float32, computed by PyTorch."""
        model = load_model(source, torch.float32, torch.device("cpu"))
        assert isinstance(model, LlamaForCausalLM), "others are refused before"
        return model

    @torch.inference_mode()
    def inputs_of(self, index: int) -> LayerInputs:
        """Run a layer, without moving on, and gather the statistics of its matrices' inputs.

        Raises:
            ValueError: the model computes NaN or infinity on this text.
        """
        layer = self.layers[index]
        statistics = {name: Statistics.empty(plain_weight(matrix_of(layer, name)).shape[1]) for name in MATRICES}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0]))
            for name in MATRICES
        ]
        for sample in self.hidden:
            layer(sample.clone(), self._rope, self._metadata)
        for hook in hooks:
            hook.remove()
        for name, inputs in statistics.items():
            if not bool(inputs.covariance.isfinite().all()):
                raise ValueError(f"layer {index}, {name}: the model computes NaN or infinity on the calibration text")
        return LayerInputs(layer, statistics)

    @torch.inference_mode()
    def advance(self, index: int, quantized: dict[str, GroupQuantized], changed: dict[str, Tensor]) -> None:
        """Give a layer its new weights and run it: its outputs are what the next layer sees."""
        layer = self.layers[index]
        for name, weight in quantized.items():
            plain_weight(matrix_of(layer, name)).data.copy_(weight.dequantize())
        for name, tensor in changed.items():
            layer.get_parameter(name).data.copy_(tensor)
        for sample in self.hidden:
            sample.copy_(layer(sample.clone(), self._rope, self._metadata))
