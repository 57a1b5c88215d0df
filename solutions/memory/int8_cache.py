"""Keys and values of 8 bits: whole numbers, and a scale for each vector that a head caches.

Half the bytes of 16 bits, so twice the tokens fit into a card and decoding reads half as much. A scale for each token and head
alone keeps one large vector from costing its neighbours their digits, and a block never has to be rounded again when a token
joins it. Source: Liu et al., "KIVI", ICML 2024, section 3, which compares scales along tokens with scales along channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_engine import write_kv

LARGEST_CODE = 127
"""Codes reach from −127 to 127: −128 has no counterpart."""
LARGEST_SCALE = 65504.0
"""The largest number of float16."""


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector of x as whole numbers, its codes, and what they are multiples of, its scale.

    The scale is the largest magnitude over `LARGEST_CODE`, and a part in a thousand more: float16 rounds it, and the largest
    magnitude must stay within `LARGEST_CODE` steps. Each code is the nearest one for the scale as it is stored. A vector of
    zeros has zeros for codes, and so has one whose scale is too small for float16 and becomes 0. Of one that is too large the
    scale is `LARGEST_SCALE`, and its codes end at `LARGEST_CODE`. x is not changed.

    Args:
        x: [..., D], of any type of floats. All is computed in float32.

    Returns:
        codes [..., D] int8, from −`LARGEST_CODE` to `LARGEST_CODE`; scales [...] float16, 0 or larger.
    """
    x = x.float()
    scales = (x.abs().amax(dim=-1) * (1.001 / LARGEST_CODE)).clamp_(max=LARGEST_SCALE).to(torch.float16)
    steps = scales.float().unsqueeze(-1)
    codes = (x / steps.masked_fill(steps == 0, 1.0)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes.to(torch.int8), scales


def write_quantized(key: Tensor, value: Tensor, kv_cache: Tensor, kv_scales: Tensor, slot_mapping: Tensor) -> None:
    """Store the keys and values of T tokens in one layer's int8 cache, each vector with a scale of its own, and change nothing
    else there.

    Args:
        key, value: [T, H_kv, D], of any type of floats.
        kv_cache: [2, num_blocks, block_size, H_kv, D] int8. kv_scales: [2, num_blocks, block_size, H_kv] float16.
        slot_mapping: [T] int64, a different slot for each token: ``block * block_size + offset``.
    """
    (keys, key_scales), (values, value_scales) = quantize_vectors(key), quantize_vectors(value)
    write_kv(keys, values, kv_cache, slot_mapping)
    write_kv(key_scales, value_scales, kv_scales, slot_mapping)


def read_quantized(codes: Tensor, scales: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """The vectors of some rows, in their order, as floats: code times scale, in float32. A row may be asked for twice. Of the
    cache nothing but these rows is made floats.

    Args:
        codes: [N, D] int8, one layer's keys or its values; row ``slot * H_kv + head``. scales: [N] float16.
        rows: [R] int32 or int64.
        out: [R, D] float32, overwritten whatever it holds. It may be a part of wider rows.

    Returns:
        out.
    """
    return out.copy_(codes.index_select(0, rows)).mul_(scales.index_select(0, rows).unsqueeze(1))
