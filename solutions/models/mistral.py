"""Mistral 7B (Jiang et al., 2023): LLaMA's layers around grouped-query attention over a sliding window.

A token attends to itself and the ``sliding_window - 1`` tokens before it. Information still travels further, one window
a layer, but keys and values left of the window are never read again: the block manager frees their blocks, so a
sequence's KV memory stops growing at the window. (The paper's rolling buffer does the same by overwriting.)
"""

from __future__ import annotations

from .llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral with its head; every layer has the window of `ModelConfig.sliding_window`."""
