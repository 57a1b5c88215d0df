"""The class of each architecture: the families' files, found by the names that a config.json gives them."""

from __future__ import annotations

from .gpt import GPT2LMHeadModel
from .layers import CausalLM
from .llama import LlamaForCausalLM
from .mistral import MistralForCausalLM
from .qwen2 import Qwen2ForCausalLM
from .qwen3 import Qwen3ForCausalLM

MODEL_CLASSES: dict[str, type[CausalLM]] = {
    model.__name__: model
    for model in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, GPT2LMHeadModel)
}
