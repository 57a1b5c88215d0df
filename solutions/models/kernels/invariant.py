"""The pass behind ``--batch-invariant``: what a model says of a token is the same bit for bit, whatever else is in the step.

The C++ products and attention see to that themselves. What is left to PyTorch is not so: an elementwise function computes most
of a tensor in vectors and its end number by number, which may round differently, and where its end is depends on what else is
in the step, and on the threads that share it. Products over latents depend on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.latent_in_order import LatentInOrder, OrderedPlan
from ...attention.paged_attention import AttentionBackend, AttentionMetadata
from ...parallelism.linear import Linear
from ..mla import LatentAttention
from .attach import packed_of, put

NEEDS_CPU_KERNELS = "--batch-invariant: it needs the C++ kernels of a CPU, and attention runs on {}"
VECTORS = 64
"""Elements that PyTorch's loops take at a time at most: two vectors of 512 bits of bfloat16."""
ONE_THREAD = 16384
"""Elements from which PyTorch shares GELU among threads; other elementwise functions at twice as many."""


def make_invariant(model: nn.Module, backend: AttentionBackend) -> None:
    """Let the layers that kernels were attached to compute each token by itself where PyTorch would not.

    Raises:
        ValueError: a product, or attention, is not one that does so.
    """
    if not getattr(backend, "batch_invariant", False):
        raise ValueError(NEEDS_CPU_KERNELS.format(backend.name))
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and packed_of(layer) is None:
            what = "x".join(map(str, layer.weight.shape))
            raise ValueError(f"--batch-invariant: it needs the C++ kernels of a CPU, which have none for {name}, {what}")
    for layer in model.modules():
        if callable(activation := getattr(layer, "activation", None)):
            put(layer, "activation", partial(in_whole_vectors, activation))
        if isinstance(layer, LatentAttention):
            put(layer, "attend", partial(token_by_token, layer.layer, layer.attend))


def in_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of x [T, n], a part of the rows at a time that one thread computes, each filled up to whole
    vectors, so that no element is at an end."""
    size = -(-x.shape[-1] // VECTORS) * VECTORS
    whole = F.pad(x, (0, size - x.shape[-1])).contiguous()
    parts = whole.split(max(1, (ONE_THREAD - 1) // size))
    return torch.cat([function(part) for part in parts])[:, : x.shape[-1]]


def token_by_token(
    layer: int, attend: Callable[..., Tensor], still: Tensor, turned: Tensor, vectors: Tensor, metadata: AttentionMetadata
) -> Tensor:
    """`LatentAttention.attend`, for one token after the other."""
    backend, plan = metadata.backend, metadata.plan
    assert isinstance(backend, LatentInOrder)
    assert isinstance(plan, OrderedPlan)
    backend.write(layer, vectors, metadata)
    inputs = zip(still.split(1), turned.split(1), vectors.split(1), plan.single, strict=True)
    # copies, as products may depend on where in memory a row begins
    return torch.cat([attend(a.clone(), b.clone(), c.clone(), single) for a, b, c, single in inputs])
