"""The families of models: what each is called, and how its ``config.json`` becomes the fields of a `ModelConfig`.

A family is an entry here with a reader (``readers.py``, ``sparse_readers.py``), a file in ``models/`` that says what it
computes, and an entry in ``gguf_config.py`` where llama.cpp knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import readers, sparse_readers
from .entries import Entries, ModelError
from .readers import Fields


@dataclass(frozen=True, slots=True)
class Family:
    """Attributes:
    architecture: as ``architectures`` names it, and the class in ``models/``. model_type: as transformers calls it.
    read: the fields of a `ModelConfig` from a config.json.
    """

    architecture: str
    model_type: str
    read: Callable[[Entries], Fields]


def find_family(hf: Entries) -> Family:
    """The family of a config.json: by its ``architectures``, or without them by its ``model_type``.

    Raises:
        ModelError: none is supported.
    """
    model_type = hf.text("model_type", "")
    named = [OLDER_NAMES.get(name, name) for name in hf.many("architectures", str, [])] or [
        name for name, family in KNOWN.items() if family.model_type == model_type
    ]
    if known := next((name for name in named if name in KNOWN), None):
        return KNOWN[known]
    asked = next(iter(named), model_type) or "none named"
    raise ModelError(f"model architecture {asked!r} is not supported; supported are {', '.join(KNOWN)}")


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama", readers.llama),
        Family("MistralForCausalLM", "mistral", readers.mistral),
        Family("Qwen2ForCausalLM", "qwen2", readers.qwen2),
        Family("Qwen3ForCausalLM", "qwen3", readers.qwen3),
        Family("SmolLM3ForCausalLM", "smollm3", readers.smollm3),
        Family("Phi3ForCausalLM", "phi3", readers.phi3),
        Family("Olmo2ForCausalLM", "olmo2", readers.olmo2),
        Family("Olmo3ForCausalLM", "olmo3", readers.olmo3),
        Family("Gemma2ForCausalLM", "gemma2", readers.gemma2),
        Family("Gemma3ForCausalLM", "gemma3_text", readers.gemma3),
        Family("Starcoder2ForCausalLM", "starcoder2", readers.starcoder2),
        Family("GPTNeoXForCausalLM", "gpt_neox", readers.gpt_neox),
        Family("MixtralForCausalLM", "mixtral", sparse_readers.mixtral),
        Family("Qwen2MoeForCausalLM", "qwen2_moe", sparse_readers.qwen2_moe),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", sparse_readers.qwen3_moe),
        Family("DeepseekV2ForCausalLM", "deepseek_v2", sparse_readers.deepseek_v2),
        Family("DeepseekV3ForCausalLM", "deepseek_v3", sparse_readers.deepseek_v3),
        Family("GptOssForCausalLM", "gpt_oss", sparse_readers.gpt_oss),
        Family("GPT2LMHeadModel", "gpt2", readers.gpt2),
    )
}
"""Those that write texts, by architecture."""
ENCODERS = {
    family.architecture: family
    for family in (
        Family("BertModel", "bert", readers.bert),
        Family("RobertaModel", "roberta", readers.roberta),
        Family("XLMRobertaModel", "xlm-roberta", readers.roberta),
    )
}
"""Those that only read them."""
KNOWN = FAMILIES | ENCODERS
OLDER_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
"""As the first checkpoints have them."""
