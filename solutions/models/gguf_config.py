"""What a GGUF file's header says of its model, as a Hugging Face ``config.json``; and the names of its tensors.

llama.cpp calls Mistral llama, too, and takes some things for granted that a config.json says: they are written here, by family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType

from .config.entries import Entries, ModelError
from .config.families import FAMILIES
from .config.readers import KINDS
from .gguf_bert import LAYER_NAMES, OUTER_NAMES, bert_config
from .gguf_deepseek import SIGMOID, SOFTMAX, latents
from .gguf_tokenizer import end_tokens
from .rope import periods, scale_llama3

EXACT_DTYPES = {GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16, GGMLType.MXFP4: torch.bfloat16}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that say how positions become angles, which a config.json does."""

RMS = "rms_norm_eps"
"""What most families call the epsilon of their norms."""

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SHARED_EXPERTS = {part: name.replace("shared_expert.", "shared_experts.") for part, name in _SHARED_EXPERT.items()}
_LATENTS = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.kv_b_proj",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}
_PLAIN_MLP = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FOUR_NORMS = _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_GEMMA_27B = {("gemma2", 46), ("gemma3", 62)}
"""Those whose factor on scores is that of heads of hidden / heads elements, known to llama.cpp by their numbers of layers."""


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """What llama.cpp makes of a family.

    Attributes:
        architecture: Hugging Face's name. names: of the tensors that other families lack, or call otherwise.
        interleaved: RoPE turns pairs (2i, 2i + 1), so the rows of queries and keys lie in that order.
        taken_for_granted: entries of config.json that no header has. norm: what config.json calls the epsilon of norms.
        one_added: norms' weights are stored with 1 added.
        joined: tensors that have each head's first rows of a matrix, with the two last axes swapped, and those with the others.
        outer: names of the tensors that belong to no layer. layers: what the names of all others begin with.
        config: reads the header; None: as that of a decoder.
    """

    architecture: str
    names: dict[str, str] = field(default_factory=dict)
    interleaved: bool = False
    taken_for_granted: dict[str, Any] = field(default_factory=dict)
    one_added: bool = False
    norm: str = RMS
    joined: dict[str, str] = field(default_factory=dict)
    outer: dict[str, str] = field(default_factory=_OUTER_NAMES.copy)
    layers: str = "model.layers"
    config: Callable[[Entries, dict[str, gguf.ReaderTensor]], dict[str, Any]] | None = None

    def other(self, name: str) -> str | None:
        """The name of the tensor that is joined to this one, if any is."""
        before, _, part = name.removesuffix(".weight").rpartition(".")
        return f"{before}.{self.joined[part]}.weight" if part in self.joined else None

    def hf_name(self, name: str) -> str:
        """A tensor's name in a checkpoint of Hugging Face. The first files with experts have a tensor for each.

        Raises:
            ModelError: the family has no such tensor.
        """
        names = _LAYER_NAMES | self.names
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)", name):
            layer, part, expert, kind = match.groups()
            ours = names.get(part if expert is None else f"{part}_exps")
            if ours is not None:
                ours = ours if expert is None else ours.replace(".experts.", f".experts.{expert}.")
                return f"{self.layers}.{layer}.{ours}{'' if ours.endswith('_bias') else f'.{kind}'}"
        part, _, kind = name.rpartition(".")
        if part in self.outer:
            return f"{self.outer[part]}.{kind}"
        raise ModelError(f"tensor {name!r} in the GGUF file belongs to no layer of a {self.architecture}")


GGUF_FAMILIES = {
    "llama": GgufFamily("LlamaForCausalLM", interleaved=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen3": GgufFamily("Qwen3ForCausalLM", _HEAD_NORMS),
    "qwen2moe": GgufFamily("Qwen2MoeForCausalLM", _EXPERTS | _SHARED_EXPERT, taken_for_granted={"norm_topk_prob": False}),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", _EXPERTS | _HEAD_NORMS, taken_for_granted={"norm_topk_prob": True}),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", interleaved=True, taken_for_granted={"no_rope_layer_interval": 4}),
    "phi3": GgufFamily("Phi3ForCausalLM", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": GgufFamily(
        "Starcoder2ForCausalLM", _PLAIN_MLP, taken_for_granted={"hidden_act": "gelu_pytorch_tanh"}, norm="norm_epsilon"
    ),
    "gptneox": GgufFamily(
        "GPTNeoXForCausalLM",
        _PLAIN_MLP | {"attn_qkv": "self_attn.qkv_proj"},
        taken_for_granted={"hidden_act": "gelu"},
        norm="layer_norm_eps",
    ),
    "olmo2": GgufFamily("Olmo2ForCausalLM", _HEAD_NORMS | _POST_NORMS),
    "gemma2": GgufFamily("Gemma2ForCausalLM", _FOUR_NORMS, taken_for_granted=_GELU, one_added=True),
    "gemma3": GgufFamily("Gemma3ForCausalLM", _FOUR_NORMS | _HEAD_NORMS, taken_for_granted=_GELU, one_added=True),
    "deepseek2": GgufFamily("DeepseekV2ForCausalLM", _EXPERTS | _SHARED_EXPERTS | _LATENTS, joined={"attn_k_b": "attn_v_b"}),
    "bert": GgufFamily("BertModel", LAYER_NAMES, outer=OUTER_NAMES, layers="encoder.layer", config=bert_config),
    "gpt-oss": GgufFamily("GptOssForCausalLM", _EXPERTS | _POST_NORMS | {"attn_sinks": "self_attn.sinks"}),
}
"""By ``general.architecture``."""
_WITH_WINDOW = {"LlamaForCausalLM": "MistralForCausalLM", "Olmo2ForCausalLM": "Olmo3ForCausalLM"}
"""Families that llama.cpp tells apart by their window alone."""
_MIXTRAL = GgufFamily("MixtralForCausalLM", _EXPERTS, interleaved=True)
_DEEPSEEK_V3 = replace(GGUF_FAMILIES["deepseek2"], architecture="DeepseekV3ForCausalLM")


def gguf_family(metadata: Entries) -> GgufFamily:
    """The family of a file.

    Raises:
        ModelError: it is not supported.
    """
    name = metadata.text("general.architecture")
    if name not in GGUF_FAMILIES:
        supported = ", ".join(GGUF_FAMILIES)
        raise ModelError(f"GGUF architecture {name!r} is not supported; supported are {supported}; Mistral is labelled llama")
    has_experts = bool(metadata.whole(f"{name}.expert_count", 0, low=0))
    family = _MIXTRAL if has_experts and name == "llama" else GGUF_FAMILIES[name]
    if name == "deepseek2" and metadata.whole("deepseek2.expert_gating_func", SOFTMAX) == SIGMOID:
        family = _DEEPSEEK_V3
    if has_experts and "ffn_gate_exps" not in family.names:
        raise ModelError(f"GGUF files of {name} with experts are not supported")
    return family


def hf_config(metadata: Entries, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """What the original ``config.json`` said, as far as the model computes with it.

    Raises:
        ModelError: an architecture or feature that is not supported, or an entry is missing or wrong.
        KeyError: a tensor is missing.
    """
    family, name = gguf_family(metadata), metadata.text("general.architecture")
    embedding = tensors["token_embd.weight"]
    dtype = {"dtype": str(EXACT_DTYPES.get(embedding.tensor_type, torch.float32)).removeprefix("torch.")}
    if family.config is not None:
        return family.config(metadata, tensors) | dtype
    if any(isinstance(metadata.content.get(f"{name}.attention.head_count{kind}"), list) for kind in ("", "_kv")):
        raise ModelError("GGUF files whose layers differ in their numbers of heads are not supported")
    if not metadata.flag(f"{name}.attention.causal", True):
        raise ModelError(f"GGUF files of {name} whose tokens see later ones (attention.causal) are not supported")
    heads, hidden = metadata.whole(f"{name}.attention.head_count"), metadata.whole(f"{name}.embedding_length")
    head_dim = metadata.whole(f"{name}.attention.key_length", hidden // heads)
    window = metadata.whole(f"{name}.attention.sliding_window", 0, low=0)
    architecture = _WITH_WINDOW.get(family.architecture, family.architecture) if window else family.architecture
    rotated = metadata.whole(f"{name}.rope.dimension_count", head_dim)
    parts: dict[str, Any] = {"partial_rotary_factor": rotated / head_dim}
    scaling = _rope_scaling(metadata, f"{name}.rope", tensors)
    if scaling is not None and scaling["rope_type"] == "longrope":  # where Phi-3's own files have it
        parts["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings")
    layers = metadata.whole(f"{name}.block_count")
    if family.one_added or architecture == "Olmo3ForCausalLM":
        parts |= _by_layer(metadata, name)
    if family.one_added:
        parts["query_pre_attn_scalar"] = hidden // heads if (name, layers) in _GEMMA_27B else head_dim
    if name == "gpt-oss":
        scaling = scaling and scaling | {"truncate": False}
    windows = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0} if window else {}
    vocab_size = int(embedding.shape[1])
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata.whole(f"{name}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.whole(f"{name}.context_length"),
        family.norm: _decimal(metadata.number(f"{name}.attention.layer_norm_{'rms_' * (family.norm == RMS)}epsilon")),
        "hidden_act": "silu",
        "rope_theta": _decimal(metadata.number(f"{name}.rope.freq_base", 10000.0, above=True)),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & tensors.keys()),
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "use_parallel_residual": metadata.flag(f"{name}.use_parallel_residual", True),
        "bos_token_id": next(iter(metadata.token_ids("tokenizer.ggml.bos_token_id", vocab_size) or ()), None),
        "eos_token_id": [token for token in end_tokens(metadata) if token < vocab_size] or None,
        "pad_token_id": next(iter(metadata.token_ids("tokenizer.ggml.padding_token_id", vocab_size) or ()), None),
    } | dtype | family.taken_for_granted | parts | windows | _experts(metadata, name) | latents(metadata, scaling)  # fmt: skip


def _experts(metadata: Entries, name: str) -> dict[str, Any]:
    count = metadata.whole(f"{name}.expert_count", 0, low=0)
    if not count:
        return {}
    return {
        "num_experts": count,
        "num_experts_per_tok": metadata.whole(f"{name}.expert_used_count"),
        "moe_intermediate_size": metadata.whole(f"{name}.expert_feed_forward_length", None),
        "shared_expert_intermediate_size": metadata.whole(f"{name}.expert_shared_feed_forward_length", None),
    }


def _by_layer(metadata: Entries, name: str) -> dict[str, Any]:
    """What only headers of Gemma and OLMo 3 have, as far as they have it: which layers have a window, and soft caps."""
    keys = {
        "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
        "rope_local_base_freq": "rope.freq_base_swa",
    }  # fmt: skip
    numbers = {ours: metadata.number(f"{name}.{key}", None, above=True) for ours, key in keys.items()}
    if isinstance(slides := metadata.content.get(f"{name}.attention.sliding_window_pattern"), list):
        pattern: dict[str, Any] = {"layer_types": [KINDS[bool(each)] for each in slides]}
    else:
        pattern = {} if slides is None else {"sliding_window_pattern": slides}
    return pattern | {ours: _decimal(value) for ours, value in numbers.items() if value is not None}


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(metadata: Entries, prefix: str, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any] | None:
    """Older files give linear scaling's factor alone, as ``rope.scale_linear``; one that names no kind means linear."""
    if "rope_freqs.weight" in tensors:
        return _divided(metadata, prefix, tensors["rope_freqs.weight"].data)
    original = metadata.whole(f"{prefix}.scaling.original_context_length", None)
    sizes = {} if original is None else {"original_max_position_embeddings": original}
    magnitude = metadata.number(f"{prefix}.scaling.attn_factor", 1.0, above=True)
    if "rope_factors_long.weight" in tensors:
        divisors = {name: tensors[f"rope_factors_{name}.weight"].data for name in ("short", "long")}
        named = {f"{name}_factor": [_decimal(value) for value in values] for name, values in divisors.items()}
        return {"rope_type": "longrope", "attention_factor": _decimal(magnitude)} | named | sizes
    kind = metadata.text(f"{prefix}.scaling.type", "linear")
    factor = metadata.number(f"{prefix}.scaling.factor", 0.0) or metadata.number(f"{prefix}.scale_linear", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    scaling = {"rope_type": kind, "factor": _decimal(factor) if factor else None} | sizes
    if kind == "yarn":
        share = metadata.number(f"{prefix}.scaling.yarn_ext_factor", 1.0)
        if magnitude != 1.0 or share != 1.0:
            raise ModelError(f"YaRN with attn_factor {magnitude:g} and ext_factor {share:g} in a GGUF file is not supported")
        if (factor := metadata.number(f"{prefix}.scaling.yarn_attn_factor", None, above=True)) is not None:
            scaling |= {"attention_factor": _decimal(factor)}
        betas = {name: metadata.number(f"{prefix}.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
        scaling |= {name: _decimal(value) for name, value in betas.items() if value is not None}
    return scaling


def _divided(metadata: Entries, prefix: str, divisors: np.ndarray) -> dict[str, Any]:
    """The scaling that divides each frequency by a number of its own, [D / 2]: Llama 3's, or one without a name.

    Of Llama 3's only the factor varies between the published models (8 in Llama 3.1, 32 in Llama 3.2), and the slowest pair,
    which is scaled in full, shows it. LongRoPE divides by any numbers.

    Raises:
        ModelError: they are no divisors.
    """
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise ModelError("the RoPE frequencies in the GGUF file (rope_freqs.weight) are divided by what is no number above 0")
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    plain = 1.0 / periods(metadata.number(f"{prefix}.freq_base", 10000.0, above=True), 2 * len(divisors))
    expected = plain / scale_llama3(plain, factor, low, high, original)
    if not torch.allclose(expected, torch.tensor(divisors), rtol=1e-3):
        given = [_decimal(value) for value in divisors]
        return {"rope_type": "longrope", "attention_factor": 1.0, "short_factor": given, "long_factor": given}
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip
