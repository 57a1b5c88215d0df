"""Qwen2 and Qwen2.5 (Yang et al., 2024): LLaMA with a bias on queries, keys and values, and on nothing else.

How it differs from ``llama.py``: in the fields of its `ModelConfig` alone. ``attention_bias`` is on and ``output_bias`` off, so
`QKVParallelLinear` has a bias, cut like its rows, and the projection behind attention has none. A config.json may also name a
window for its upper layers (``max_window_layers``); with one for all layers it runs as Mistral does, with one for some it is
refused.
"""

from __future__ import annotations

from .llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 with its head."""
