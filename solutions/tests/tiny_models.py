"""Small random models with a tokenizer, made with transformers: folders to load, and the oracle to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 320
"""256 bytes, three special tokens, and ids that only random weights produce (they decode to nothing)."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so every text has tokens and a character may take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _save(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Spread the weights, so that layers matter and greedy choices are far apart, and save with a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim > 1:
                param.normal_(0.0, 0.2, generator=generator)
            elif name.endswith("bias"):
                param.normal_(0.0, 0.5, generator=generator)
            else:
                param.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(0.0, 0.5, generator=generator)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model.eval()


_LLAMA_SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip


def make_tiny_llama(path: Path, **overrides: Any) -> LlamaForCausalLM:
    """Save a LLaMA with grouped-query attention to `path`; overrides are arguments of `LlamaConfig`."""
    return _save(LlamaForCausalLM(LlamaConfig(**(_LLAMA_SIZES | overrides))), path)


def make_tiny_mistral(path: Path, **overrides: Any) -> MistralForCausalLM:
    """Save a Mistral with a window of 24 tokens to `path`; overrides are arguments of `MistralConfig`."""
    sizes = _LLAMA_SIZES | {"sliding_window": 24} | overrides
    return _save(MistralForCausalLM(MistralConfig(**sizes)), path)


def make_tiny_gpt2(path: Path, **overrides: Any) -> GPT2LMHeadModel:
    """Save a GPT-2 to `path`; overrides are arguments of `GPT2Config`."""
    sizes = {
        "vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    return _save(GPT2LMHeadModel(GPT2Config(**(sizes | overrides))), path)


_SIZES = _LLAMA_SIZES | {"hidden_size": 192, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 128,
    "short_factor": [1.0 + i / 20 for i in range(12)], "long_factor": [1.0 + i / 2 for i in range(12)],
}  # fmt: skip
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}
_GEMMA = _SIZES | {
    "hidden_size": 96, "head_dim": 32, "num_hidden_layers": 5, "sliding_window": 24, "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
_DEEPSEEK = _SIZES | {
    "num_hidden_layers": 3, "num_key_value_heads": 6, "kv_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "mistral": _SIZES | {"sliding_window": 24},
    "gpt2": {
        "vocab_size": VOCAB_SIZE, "n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 512,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    },
    "qwen2": _SIZES | {"tie_word_embeddings": True},
    "qwen3": _SIZES | {"hidden_size": 96, "head_dim": 32, "rope_parameters": YARN},
    "smollm3": _SIZES | {"num_hidden_layers": 4},
    "phi3": _SIZES | {"max_position_embeddings": 512, "original_max_position_embeddings": 128, "rope_parameters": LONGROPE},
    "olmo2": _SIZES,
    "olmo3": _SIZES | {
        "num_hidden_layers": 5, "sliding_window": 24, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}, "full_attention": YARN,
        },
    },
    "gemma2": _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    "starcoder2": _SIZES | {"norm_epsilon": 1e-5, "tie_word_embeddings": True},
    "gpt_neox": _SIZES | {
        "hidden_size": 160, "num_attention_heads": 5, "num_key_value_heads": None, "layer_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25},
    },
    "mixtral": _SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": _SIZES | {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160,
    },
    "qwen3_moe": _SIZES | {
        "hidden_size": 96, "head_dim": 32, "num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "norm_topk_prob": True, "rope_parameters": YARN,
    },
    "gpt_oss": _SIZES | {
        "hidden_size": 96, "head_dim": 32, "num_hidden_layers": 4, "sliding_window": 24, "num_local_experts": 5,
        "num_experts_per_tok": 2, "intermediate_size": 96, "swiglu_limit": 1.5, "rope_parameters": YARN | {"truncate": False},
    },
    "deepseek_v2": _DEEPSEEK | {
        "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "group_limited_greedy",
        "rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2},
    },
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": 64, "n_shared_experts": 1, "rope_parameters": YARN},
}  # fmt: skip
"""What makes each family itself, by transformers' ``model_type``: KV heads that two ranks cannot share evenly, heads of 32
elements (which the kernels of a CPU turn) though hidden / heads may be another number, scaling that some dozen tokens meet."""


GGUF_SAYS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    "gpt_oss": {"swiglu_limit": 7.0},
}
"""What these must be for a GGUF file: of two factors on magnitudes it keeps one, and no limit but gpt-oss's own."""


def make_tiny(family: str, path: Path, **overrides: Any) -> PreTrainedModel:
    """Save a model of a family of `FAMILIES` to `path`; overrides are arguments of its configuration."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | overrides))
    # transformers has other ways to compute attention, which leave soft caps out
    return _save(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), path)
