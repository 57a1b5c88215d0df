"""OLMo 3 (OLMo team, 2025): OLMo 2 with a window in three of four layers.

How it differs from ``olmo2.py``: layers with a window turn queries and keys by the plain frequencies, whatever stretches those
of the others, as in Gemma 3.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from .gemma import TwoRotations
from .llama import LlamaForCausalLM, LlamaModel
from .olmo2 import Olmo2Attention, Olmo2DecoderLayer


class Olmo3Attention(Olmo2Attention):
    """OLMo 2's attention; `rope` is (cos, signed sin) of layers with a window and of the others, joined."""

    def forward(self, x: Tensor, rope: tuple[Tensor, ...] | None, metadata: AttentionMetadata, add_to: Tensor | None) -> Tensor:
        assert rope is not None
        local, far = (rope[0], rope[1]), (rope[2], rope[3])
        return super().forward(x, far if self.attn.sliding_window is None else local, metadata, add_to)


class Olmo3DecoderLayer(Olmo2DecoderLayer):
    """The same layer around it."""

    attention = Olmo3Attention


class Olmo3Model(LlamaModel):
    """LLaMA's model with two rotations."""

    rotation = TwoRotations


class Olmo3ForCausalLM(LlamaForCausalLM):
    """OLMo 3 with its head."""

    body = Olmo3Model
    decoder_layer = Olmo3DecoderLayer
