"""Runs text through a model, a layer at a time, and gathers statistics of each matrix's inputs.

A layer is run on the whole calibration text, quantized, and run again with its new weights. So the next layer gets the inputs
that it will get in use, errors included. Only the hidden states between two layers and one layer's statistics are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attention.backends import make_backend
from ..attention.latent_attention import LatentBackend
from ..attention.paged_attention import AttentionMetadata, attention_metadata
from ..batching.step_arrays import PagedArrays
from ..models.config.model_config import ModelConfig
from ..models.llama import LlamaForCausalLM
from ..models.loader import ModelSource, load_model
from .layout.groups import GroupQuantized
from .matrices import Fold, matrices_of, plain_weight, readers_of_norms, rows_before

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

    @classmethod
    def of_all(cls, parts: Iterable[Statistics]) -> Statistics:
        """Those of all inputs that went into several matrices, each with as much weight as its inputs are many."""
        known = [part for part in parts if part.count]
        count = sum(part.count for part in known)
        covariance = sum((part.covariance * (part.count / count) for part in known), torch.zeros(()))
        return cls(covariance, sum((part.magnitude * (part.count / count) for part in known), torch.zeros(())), count)

    def divided_by(self, scale: Tensor) -> Statistics:
        """Those of x / scale."""
        return Statistics(self.covariance / torch.outer(scale, scale), self.magnitude / scale, self.count)


@dataclass(slots=True)
class LayerInputs:
    """A decoder layer and what goes into its matrices.

    Attributes:
        inputs: statistics by the names of the matrices within the layer; of those that got any input.
        readers: see `readers_of_norms`.
        changed: weights beside the matrices that were changed, by their names within the layer.
    """

    layer: nn.Module
    inputs: dict[str, Statistics]
    readers: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """[N, K] float32: the matrix, with all of its pieces."""
        return self.layer.get_parameter(f"{name}.weight").data

    @property
    def untouched(self) -> list[str]:
        """Matrices that no input went into: those of experts that no token chose."""
        return [name for name in matrices_of(self.layer) if name not in self.inputs]

    def folds(self) -> Iterator[Fold]:
        """What can be divided where it is made, in the order in which data goes through the layer."""
        matrices = matrices_of(self.layer)
        by_norm = {
            next(name for name in names if name in matrices): (norm, names)
            for norm, names in self.readers.items()
            if any(name in matrices for name in names)
        }
        for name in matrices:
            if name in by_norm:
                norm, names = by_norm[name]
                routers = tuple(each for each in names if each not in matrices)
                yield Fold(tuple(each for each in names if each in matrices), norm, routers)
            elif name in self.inputs and rows_before(self.layer, name) is not None:
                yield Fold((name,))

    def fold(self, fold: Fold, scale: Tensor) -> None:
        """Multiply the columns of matrices, and of routers beside them, by `scale` [K], and divide what makes their inputs."""
        for name in (*fold.matrices, *fold.routers):
            self.weight(name).mul_(scale)
        self.changed |= {f"{name}.weight": self.weight(name) for name in fold.routers}
        if fold.norm is None:
            rows = rows_before(self.layer, fold.matrices[0])
            assert rows is not None
            rows.div_(scale[:, None])
            return
        norm = self.layer.get_submodule(fold.norm)
        offset = getattr(norm, "offset", 0.0)  # a norm may multiply by this much more than its weight
        for name, param in norm.named_parameters():
            more = offset if name == "weight" else 0.0
            self.changed[f"{fold.norm}.{name}"] = param.data.add_(more).div_(scale).sub_(more)


class Calibration:
    """Sends the calibration text through a model, layer by layer.

    Args:
        source: the model. tokens: [B, L] int64, B samples.
    """

    def __init__(self, source: ModelSource, tokens: Tensor) -> None:
        self.model = self.load(source)
        self.layers = list(self.model.model.layers)
        self._metadata = one_sample(source.config, tokens.shape[1])
        self.hidden, self._rope = self._before_layers(tokens)  # [B, L, hidden]

    @staticmethod
    def load(source: ModelSource) -> LlamaForCausalLM:
        """The whole model in float32, computed by PyTorch."""
        model = load_model(source, torch.float32, torch.device("cpu"))
        assert isinstance(model, LlamaForCausalLM), "others are refused before"
        return model

    @torch.inference_mode()
    def _before_layers(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the first layer is given: hidden states [B, L, hidden], and the rotation."""
        body, seen = self.model.model, []
        positions = torch.arange(tokens.shape[1])
        body.layers = nn.ModuleList()  # so that the hidden states come to the last norm as they are
        hook = body.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        body(tokens, positions, self._metadata)
        hook.remove()
        body.layers = nn.ModuleList(self.layers)
        return seen[0], body.rotary_emb(positions)

    @torch.inference_mode()
    def inputs_of(self, index: int) -> LayerInputs:
        """Run a layer, without moving on, and gather the statistics of its matrices' inputs.

        Raises:
            ValueError: the model computes NaN or infinity on this text.
        """
        layer = self.layers[index]
        readers = readers_of_norms(layer, lambda: layer(self.hidden[0].clone(), self._rope, self._metadata))
        matrices = matrices_of(layer)
        statistics = {name: Statistics.empty(plain_weight(matrix).shape[1]) for name, matrix in matrices.items()}
        hooks = [
            matrix.register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0]))
            for name, matrix in matrices.items()
        ]
        for sample in self.hidden:
            layer(sample.clone(), self._rope, self._metadata)
        for hook in hooks:
            hook.remove()
        for name, inputs in statistics.items():
            if not bool(inputs.covariance.isfinite().all()):
                raise ValueError(f"layer {index}, {name}: the model computes NaN or infinity on the calibration text")
        return LayerInputs(layer, {name: inputs for name, inputs in statistics.items() if inputs.count}, readers)

    @torch.inference_mode()
    def advance(self, index: int, quantized: dict[str, GroupQuantized], changed: dict[str, Tensor]) -> None:
        """Give a layer its new weights and run it: its outputs are what the next layer sees."""
        layer = self.layers[index]
        for name, weight in quantized.items():
            layer.get_parameter(f"{name}.weight").data.copy_(weight.dequantize())
        for name, tensor in changed.items():
            layer.get_parameter(name).data.copy_(tensor)
        for sample in self.hidden:
            sample.copy_(layer(sample.clone(), self._rope, self._metadata))


def one_sample(config: ModelConfig, length: int) -> AttentionMetadata:
    """A step that computes one sample of so many tokens. A layer needs its own keys and values alone: all share a cache."""
    backend = make_backend("auto", "cpu", torch.float32, config.head_dim, BLOCK_SIZE, kind=config.attention_kind)
    if isinstance(backend, LatentBackend):
        backend.plain_from = 1  # so that latents go through their matrix, whose inputs are wanted
    blocks, groups = -(-length // BLOCK_SIZE), len(config.windows)
    slots, tables = torch.arange(length), torch.arange(blocks, dtype=torch.int32)[None]
    if groups > 1:
        slots, tables = slots.expand(groups, -1), tables.expand(groups, -1, -1)
    starts, contexts = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    cache = torch.zeros(2, blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    arrays = PagedArrays(slots, tables, starts, contexts)
    caches = [cache] * config.num_layers
    return attention_metadata(arrays, (length, length), caches, None, backend, config.windows)
