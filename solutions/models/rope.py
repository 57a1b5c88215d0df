"""Rotary positions (RoPE; Su et al., 2021): how fast each pair of a head's elements turns, and over which positions.

Scaling stretches the positions a model was trained on over a longer context. "linear" slows all pairs (Chen et al., 2023).
"dynamic" raises the base as NTK-aware scaling does (bloc97 and emozilla, 2023). "llama3" slows only the pairs that turn less
than ``low_freq_factor`` times in the trained context and blends up to ``high_freq_factor`` (Llama 3.1). "yarn" blends between
``beta_slow`` and ``beta_fast`` turns, pair by pair (Peng et al., 2023). "longrope" divides each pair by a number of its own,
which was searched for (Ding et al., 2024). The last two also enlarge queries and keys a little. The formulas, and the order of
their roundings, are those of transformers.

Two of them depend on a sequence's length: transformers computes "dynamic" anew whenever a sequence grows past the trained
context, and "longrope" has other divisors beyond it. Keys cached earlier then keep the old rotation. Here all sequences share
one table and cached blocks, so one length must hold for all: the longest that is served. If that is within the trained context,
the frequencies are those of short sequences; else those that transformers uses on a sequence of `max_model_len` tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config.model_config import ModelConfig


class RotaryEmbedding(nn.Module):
    """Turns each pair of elements of queries and keys by an angle that grows with the position.

    Pairs are (i, i + D/2), as in GPT-NeoX and all Hugging Face checkpoints. Tables of cos and sin are made once for
    every position, and one look-up serves all layers of a step. Where RoPE turns only a part of a head, the last pairs turn by
    an angle of 0.
    """

    cos: Tensor
    signed_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        length = max(config.max_position_embeddings, config.longest)
        positions = torch.arange(length, dtype=torch.float32)
        angles = positions[:, None] * rope_inverse_frequencies(config)  # [positions, R / 2]
        magnitude = (config.rope_scaling or {}).get("attention_factor", 1.0)
        still = (0, config.rope_dim // 2 - angles.shape[1])
        cos, sin = F.pad(angles.cos() * magnitude, still, value=1.0), F.pad(angles.sin() * magnitude, still)
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(dtype), persistent=False)  # [positions, D]
        self.register_buffer("signed_sin", torch.cat((-sin, sin), dim=-1).to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin with its first half negated), each [T, 1, D], for `rotate_`; positions is [T]."""
        return self.cos[positions].unsqueeze(1), self.signed_sin[positions].unsqueeze(1)


def rotate_(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `heads` [T, any number of heads, D] in place by `rope`, the result of `RotaryEmbedding`."""
    cos, signed_sin = rope
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return heads.mul_(cos).addcmul_(swapped, signed_sin)


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair that turns, [R / 2] in float32, after scaling; R is `ModelConfig.rotary_dim`, or D."""
    scaling: dict[str, Any] = config.rope_scaling or {"rope_type": "default"}
    numbers = {name: value for name, value in scaling.items() if name not in ("rope_type", "attention_factor")}
    kind, theta, size = scaling["rope_type"], config.rope_theta, config.rotary_dim or config.rope_dim
    served = config.longest
    if kind == "dynamic":
        trained, factor = config.max_position_embeddings, scaling["factor"]
        theta *= (factor * max(served, trained) / trained - (factor - 1)) ** (size / (size - 2))
    if kind == "longrope":
        is_long = served > scaling["original_max_position_embeddings"]
        divisors = torch.tensor(scaling["long_factor" if is_long else "short_factor"], dtype=torch.float32)
        return 1.0 / (divisors * periods(theta, size))
    frequencies = 1.0 / periods(theta, size)
    if kind == "linear":
        factor = float(scaling["factor"])
        return frequencies / factor
    if kind == "llama3":
        return scale_llama3(frequencies, **numbers)
    if kind == "yarn":
        return scale_yarn(theta, size, **numbers)
    return frequencies


def periods(theta: float, size: int) -> Tensor:
    """Positions in which each pair of `size` elements turns by one radian, [size / 2] in float32."""
    lengths: Tensor = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return lengths


def scale_llama3(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Llama 3.1's scaling of `frequencies` [R / 2]."""
    wavelength = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelength
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow = wavelength > original_max_position_embeddings / low_freq_factor
    fast = wavelength < original_max_position_embeddings / high_freq_factor
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, blended))


def scale_yarn(
    theta: float,
    size: int,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """YaRN's frequencies, [size / 2]: those before the pair that turns `beta_fast` times in the trained context stay, those
    behind the one that turns `beta_slow` times are slowed by `factor`, and between the two they are blended."""

    def pair_that_turns(times: float) -> float:
        return size * math.log(original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    slowed = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    length = periods(theta, size)
    kept = 1 - slowed
    return 1.0 / (factor * length) * (1 - kept) + 1.0 / length * kept
