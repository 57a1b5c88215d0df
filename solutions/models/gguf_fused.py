"""Matrices that llama.cpp's converter has laid into one (``--fuse-qkv``, ``--fuse-gate-up-exps``), each by itself again.

Rows of a quantized tensor are whole blocks, so they can be told apart without touching what the blocks hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from .config.entries import ModelError

Tensors = dict[str, gguf.ReaderTensor]


def unfused(tensors: Tensors, config: dict[str, Any], own: dict[str, str]) -> Tensors:
    """The tensors of a file, with those that are fused in parts.

    Args:
        config: what the file's ``config.json`` would say. own: names of the family's own parts of layers, which stay whole.

    Raises:
        ModelError: a fused tensor has other rows than its parts have.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    parts = {
        "attn_qkv": {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads},
        "ffn_gate_up_exps": {"ffn_gate_exps": 1, "ffn_up_exps": 1},
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        part = name.split(".")[-2] if name.startswith("blk.") else ""
        if part in own or part not in parts:
            found[name] = tensor
            continue
        for piece in _cut(tensor, part, parts[part], -2 if name.endswith(".weight") else -1):
            found[piece.name] = piece
    return found


def _cut(tensor: gguf.ReaderTensor, part: str, shares: dict[str, int], axis: int) -> Iterator[gguf.ReaderTensor]:
    """The parts of a tensor along an axis, each of as many rows as its share says."""
    rows, total = tensor.data.shape[axis], sum(shares.values())
    if rows % total:
        raise ModelError(f"{tensor.name} in the GGUF file has {rows} rows, which are no {total} equal parts")
    ends = np.cumsum(list(shares.values())) * (rows // total)
    for new, data in zip(shares, np.split(tensor.data, ends[:-1], axis=axis), strict=True):
        shape = tensor.shape.copy()
        shape[-1 - axis] = data.shape[axis]  # llama.cpp names the last axis first
        name = tensor.name.replace(f".{part}.", f".{new}.")
        yield tensor._replace(name=name, data=data, shape=shape, n_elements=int(np.prod(shape)))
