"""How a ``config.json`` becomes the fields of a `ModelConfig`, family by family; ``sparse_readers.py`` has those with experts.

Where a file is silent, transformers' default for the family holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .entries import Entries, ModelError
from .rope import read_rope

Fields = dict[str, Any]
MAX_LAYERS = 9999
KINDS = ("full_attention", "sliding_attention")
"""What ``layer_types`` calls layers that see the whole context, and those with a window."""


def of_all(hf: Entries) -> Fields:
    vocab_size = hf.whole("vocab_size")
    return {
        "vocab_size": vocab_size,
        "bos_token_id": next(iter(hf.token_ids("bos_token_id", vocab_size) or ()), None),
        "eos_token_ids": tuple(hf.token_ids("eos_token_id", vocab_size) or ()),
        "torch_dtype": hf.text("dtype", None) or hf.text("torch_dtype", None),
    }


def llama(hf: Entries, turns_parts: bool = False) -> Fields:
    """turns_parts: RoPE may turn only a part of each head."""
    hf = hf.silent(bos_token_id=1, eos_token_id=2)
    heads, hidden = hf.whole("num_attention_heads"), hf.whole("hidden_size")
    head_dim = hf.whole("head_dim", hidden // heads)
    rope, has_bias = read_rope(hf, head_dim), hf.flag("attention_bias", False)
    if rope["rotary_dim"] is not None and not turns_parts:
        raise ModelError("RoPE over a part of the head (partial_rotary_factor) is not supported in this family")
    return of_all(hf) | rope | {
        "hidden_size": hidden,
        "intermediate_size": hf.whole("intermediate_size"),
        "num_layers": hf.whole("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": hf.whole("num_key_value_heads", heads),
        "head_dim": head_dim,
        "norm_eps": hf.number("rms_norm_eps", 1e-6),
        "hidden_act": hf.text("hidden_act", "silu"),
        "tie_word_embeddings": hf.flag("tie_word_embeddings", False),
        "attention_bias": has_bias,
        "output_bias": has_bias,
        "mlp_bias": hf.flag("mlp_bias", False),
    }  # fmt: skip


NO_BIASES = {"attention_bias": False, "output_bias": False, "mlp_bias": False}


def mistral(hf: Entries) -> Fields:
    hf = hf.silent(num_key_value_heads=8, sliding_window=4096)
    return llama(hf) | NO_BIASES | {"sliding_window": hf.whole("sliding_window", None)}


def qwen2(hf: Entries) -> Fields:
    hf = hf.silent(bos_token_id=None, eos_token_id=None, num_key_value_heads=32, max_window_layers=28, sliding_window=4096)
    first = hf.whole("max_window_layers", low=0)
    return llama(hf) | NO_BIASES | {"attention_bias": True} | windows(hf, lambda layer: layer >= first)


def qwen3(hf: Entries) -> Fields:
    windows = {name: value for name, value in qwen2(hf).items() if name in ("sliding_window", "layer_windows")}
    fields = llama(hf.silent(head_dim=128, bos_token_id=None, eos_token_id=None, num_key_value_heads=32))
    return fields | {"mlp_bias": False} | windows


def smollm3(hf: Entries) -> Fields:
    hf = hf.silent(
        bos_token_id=128000, eos_token_id=128001, num_key_value_heads=4, tie_word_embeddings=True, rope_theta=2e6,
    )  # fmt: skip
    interval, layers = hf.whole("no_rope_layer_interval", 4), range(hf.whole("num_hidden_layers", high=MAX_LAYERS))
    turns = hf.many("no_rope_layers", int, None) or [(layer + 1) % interval for layer in layers]
    if len(turns) < len(layers):
        raise ModelError(f"config.json: no_rope_layers has {len(turns)} entries for {len(layers)} layers")
    still = tuple(layer for layer in layers if not turns[layer])
    return llama(hf) | {"layers_without_rope": still} | windows(hf, lambda layer: layer in still)


def phi3(hf: Entries) -> Fields:
    hf = hf.silent(eos_token_id=32000, rms_norm_eps=1e-5, original_max_position_embeddings=4096)
    return llama(hf, turns_parts=True) | NO_BIASES | {"sliding_window": hf.whole("sliding_window", None)}


def olmo2(hf: Entries) -> Fields:
    if hf.whole("sliding_window", None) is not None:
        raise ModelError("OLMo 2 with a sliding window is not supported; OLMo 3, Olmo3ForCausalLM, has one")
    return llama(hf.silent(bos_token_id=None, eos_token_id=50279, rms_norm_eps=1e-5)) | {"mlp_bias": False}


def olmo3(hf: Entries) -> Fields:
    hf = hf.silent(sliding_window=4096, use_sliding_window=True, rope_theta=500000.0)
    plain, theta = rope_by_kind(hf, hf.number("rope_theta", above=True))
    fields = olmo2(Entries(plain.content | {"sliding_window": None}))
    kinds = windows(hf, lambda layer: (layer + 1) % 4 != 0)
    if "layer_windows" not in kinds:
        raise ModelError("OLMo 3 is supported with a window in some layers and none in others, as published models have it")
    return fields | {"local_rope_theta": theta} | kinds


def gemma2(hf: Entries, pattern: int = 2) -> Fields:
    """pattern: every so many layers one sees the whole context, where the file does not say it."""
    every = hf.whole("sliding_window_pattern", pattern)
    hf = hf.silent(
        bos_token_id=2, eos_token_id=1, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, use_sliding_window=True,
        sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    )  # fmt: skip
    if hf.flag("use_bidirectional_attention", False):
        raise ModelError("Gemma with bidirectional attention (use_bidirectional_attention) is not supported")
    return llama(hf) | {
        "hidden_act": hf.text("hidden_activation", "gelu_pytorch_tanh"),
        "mlp_bias": False,
        "attention_scale": hf.number("query_pre_attn_scalar", 256.0, above=True) ** -0.5,
        "attention_soft_cap": hf.number("attn_logit_softcapping", None, above=True),
        "logit_soft_cap": hf.number("final_logit_softcapping", None, above=True),
    } | windows(hf, lambda layer: (layer + 1) % every != 0)  # fmt: skip


def rope_by_kind(hf: Entries, local: float) -> tuple[Entries, float]:
    """transformers 5 says how positions become angles by kind of layer: the entries with what holds for layers that see the
    whole context, and the base of the frequencies in those with a window, `local` where no kinds are told apart."""
    kinds = hf.entries("rope_parameters")
    sliding, others = kinds.entries("sliding_attention"), kinds.content.get("full_attention", hf.content.get("rope_scaling"))
    plain = Entries(hf.content | {"rope_parameters": others, "rope_scaling": None})
    return plain, float(sliding.number("rope_theta", local, above=True))


def gemma3(hf: Entries) -> Fields:
    hf = hf.silent(rope_theta=1e6, final_logit_softcapping=None)
    plain, theta = rope_by_kind(hf, hf.number("rope_local_base_freq", 10000.0, above=True))
    return gemma2(plain, 6) | {
        "attention_soft_cap": None,
        "local_rope_theta": theta,
        "max_position_embeddings": hf.whole("max_position_embeddings"),  # the whole context, also with linear scaling
    }


def starcoder2(hf: Entries) -> Fields:
    hf = hf.silent(bos_token_id=50256, eos_token_id=50256, num_key_value_heads=2, tie_word_embeddings=True)
    has_bias = hf.flag("use_bias", True)
    return llama(hf) | {
        "norm_eps": hf.number("norm_epsilon", 1e-5),
        "hidden_act": hf.text("hidden_act", "gelu_pytorch_tanh"),
        "sliding_window": hf.whole("sliding_window", None),
        "attention_bias": has_bias,
        "output_bias": has_bias,
        "mlp_bias": has_bias,
    }


def gpt_neox(hf: Entries) -> Fields:
    theta, share = hf.number("rotary_emb_base", 10000.0, above=True), hf.number("rotary_pct", 0.25)  # the older names
    hf = hf.silent(bos_token_id=0, eos_token_id=2, rope_theta=theta, partial_rotary_factor=share)
    has_bias = hf.flag("attention_bias", True)
    return llama(hf, turns_parts=True) | {
        "num_kv_heads": hf.whole("num_attention_heads"),
        "norm_eps": hf.number("layer_norm_eps", 1e-5),
        "hidden_act": hf.text("hidden_act", "gelu"),
        "parallel_residual": hf.flag("use_parallel_residual", True),
        "attention_bias": has_bias,
        "output_bias": has_bias,
        "mlp_bias": True,
    }


def windows(hf: Entries, slides: Callable[[int], bool]) -> Fields:
    """The window of all layers, None if there is none, and that of each layer where they differ.

    Args:
        slides: whether a layer has the window, where the file gives no ``layer_types``.

    Raises:
        ModelError: there are kinds of layers beside those with and without a window, or too few are named.
    """
    window: int | None = hf.whole("sliding_window", None) if hf.flag("use_sliding_window", False) else None
    layers = range(hf.whole("num_hidden_layers", high=MAX_LAYERS))
    kinds = hf.many("layer_types", str, None) or [KINDS[slides(layer)] for layer in layers]
    if len(kinds) != len(layers) or not set(kinds) <= set(KINDS):
        raise ModelError(f"config.json: layer_types must be {KINDS[0]} or {KINDS[1]} for each of {len(layers)} layers")
    if window is None or KINDS[1] not in kinds:
        return {"sliding_window": None}
    if KINDS[0] not in kinds:
        return {"sliding_window": window}
    return {"sliding_window": None, "layer_windows": tuple(window if kind == KINDS[1] else None for kind in kinds)}


def gpt2(hf: Entries) -> Fields:
    if not hf.flag("scale_attn_weights", True) or hf.flag("scale_attn_by_inverse_layer_idx", False):
        raise ModelError("GPT-2 with scale_attn_weights=false or scale_attn_by_inverse_layer_idx=true is not supported")
    heads, hidden = hf.whole("n_head"), hf.whole("n_embd")
    if hidden % heads:
        raise ModelError(f"config.json: n_embd, {hidden}, is no multiple of n_head, {heads}")
    return of_all(hf.silent(bos_token_id=50256, eos_token_id=50256)) | {
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
        "output_bias": True,
        "mlp_bias": True,
    }


def bert(hf: Entries) -> Fields:
    if hf.text("position_embedding_type", "absolute") != "absolute" or hf.flag("is_decoder", False):
        raise ModelError("BERT with relative positions (position_embedding_type) or as a decoder is not supported")
    heads, hidden = hf.whole("num_attention_heads"), hf.whole("hidden_size")
    if hidden % heads:
        raise ModelError(f"config.json: hidden_size, {hidden}, is no multiple of num_attention_heads, {heads}")
    return of_all(hf) | {
        "hidden_size": hidden,
        "intermediate_size": hf.whole("intermediate_size"),
        "num_layers": hf.whole("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": hf.whole("max_position_embeddings", 512),
        "norm_eps": hf.number("layer_norm_eps", 1e-12),
        "hidden_act": hf.text("hidden_act", "gelu"),
        "token_types": hf.whole("type_vocab_size", 2),
        "attention_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    }


def roberta(hf: Entries) -> Fields:
    fields, first = bert(hf), hf.whole("pad_token_id", 1, low=0) + 1
    if fields["max_position_embeddings"] <= first:
        raise ModelError(f"config.json: max_position_embeddings must be above {first}, the first position")
    return fields | {
        "first_position": first, "max_position_embeddings": fields["max_position_embeddings"] - first,
    }  # fmt: skip
