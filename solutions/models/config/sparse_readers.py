"""How the ``config.json`` of a model with experts becomes the fields of a `ModelConfig`."""

from __future__ import annotations

from dataclasses import replace

from .entries import Entries, ModelError
from .experts import MAX_EXPERTS, Mixture, Routing, read_experts
from .latent import read_latent
from .readers import NO_BIASES, Fields, llama, qwen2, windows
from .rope import yarn_magnitude


def mixtral(hf: Entries) -> Fields:
    hf = hf.silent(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2)
    window = {"sliding_window": hf.whole("sliding_window", None)}
    return llama(hf) | NO_BIASES | window | {"mixture": read_experts(hf, hf.whole("intermediate_size"), renormalise=True)}


def qwen2_moe(hf: Entries) -> Fields:
    hf = hf.silent(
        num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        num_key_value_heads=16,
    )  # fmt: skip
    sizes = hf.whole("moe_intermediate_size"), hf.whole("shared_expert_intermediate_size")
    mixture = read_experts(hf, sizes[0], hf.flag("norm_topk_prob", False), sizes[1])
    return qwen2(hf) | {"attention_bias": hf.flag("qkv_bias", True), "mixture": mixture}


def qwen3_moe(hf: Entries) -> Fields:
    hf = hf.silent(
        bos_token_id=None, eos_token_id=None, num_key_value_heads=4, sliding_window=4096, num_experts_per_tok=8,
        moe_intermediate_size=768,
    )  # fmt: skip
    hf = hf if "num_local_experts" in hf.content else hf.silent(num_experts=128)
    window = hf.whole("sliding_window", None) if hf.flag("use_sliding_window", False) else None
    mixture = read_experts(hf, hf.whole("moe_intermediate_size"), hf.flag("norm_topk_prob", False))
    return llama(hf) | {"mlp_bias": False, "sliding_window": window, "mixture": mixture}


def deepseek_v2(hf: Entries) -> Fields:
    hf = hf.silent(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64,
        n_shared_experts=2, moe_intermediate_size=1407,
    )  # fmt: skip
    method = hf.text("topk_method", "greedy")
    scores = hf.text("scoring_func", "softmax")
    if method not in ("greedy", "group_limited_greedy") or scores != "softmax":
        raise ModelError(f"DeepSeek-V2 with topk_method {method!r} and scoring_func {scores!r} is not supported")
    if hf.flag("norm_topk_prob", False):
        raise ModelError("DeepSeek-V2 with renormalised weights of experts (norm_topk_prob) is not supported")
    return _deepseek(hf if method == "group_limited_greedy" else Entries(hf.content | {"n_group": 1, "topk_group": 1}), False)


def deepseek_v3(hf: Entries) -> Fields:
    hf = hf.silent(
        bos_token_id=0, eos_token_id=1, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048, routed_scaling_factor=2.5,
        n_group=8, topk_group=4, num_experts_per_tok=8, first_k_dense_replace=3, norm_topk_prob=True,
    )  # fmt: skip
    if hf.text("topk_method", "noaux_tc") != "noaux_tc" or hf.text("scoring_func", "sigmoid") != "sigmoid":
        raise ModelError("DeepSeek-V3 with another topk_method than noaux_tc, or scoring_func than sigmoid, is not supported")
    return _deepseek(hf, True)


def _deepseek(hf: Entries, corrected: bool) -> Fields:
    """corrected: as in `Routing`."""
    if hf.whole("moe_layer_freq", 1) != 1:
        raise ModelError("DeepSeek with experts in some layers alone (moe_layer_freq) is not supported")
    fields, latent = llama(hf), read_latent(hf, not corrected or hf.flag("rope_interleave", True))
    count, groups = hf.whole("n_routed_experts", high=MAX_EXPERTS), hf.whole("n_group", 1)
    routing = Routing(corrected, groups, hf.whole("topk_group", 1, high=groups), hf.number("routed_scaling_factor", 1.0))
    if count % groups or (corrected and count < 2 * groups):
        raise ModelError(f"config.json: n_routed_experts, {count}, cannot be dealt out to {groups} groups (n_group)")
    chosen = hf.whole("num_experts_per_tok", high=count // groups * routing.chosen_groups)
    size, scale = hf.whole("moe_intermediate_size"), latent.query_dim**-0.5
    given = hf.entries("rope_parameters" if hf.content.get("rope_parameters") else "rope_scaling")
    if "rope_scaling" in fields and (share := given.number("mscale_all_dim", 0.0)):
        scale *= yarn_magnitude(given.number("factor", 1.0), share) ** 2
    dense = frozenset(range(hf.whole("first_k_dense_replace", 0, low=0)))
    renormalise, shared = hf.flag("norm_topk_prob", False), size * hf.whole("n_shared_experts", 0, low=0)
    return fields | {
        "num_kv_heads": 1,
        "head_dim": latent.cached // 2,
        "latent": latent,
        "attention_scale": scale,
        "mixture": Mixture(count, chosen, size, renormalise, shared, dense, routing=routing),
    }


def gpt_oss(hf: Entries) -> Fields:
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    hf = hf.silent(
        bos_token_id=None, eos_token_id=None, num_key_value_heads=8, head_dim=64, sliding_window=128, use_sliding_window=True,
        rms_norm_eps=1e-5, rope_theta=150000.0, attention_bias=True, num_experts_per_tok=4, rope_scaling=yarn,
    )  # fmt: skip
    hf = hf if "num_experts" in hf.content else hf.silent(num_local_experts=128)
    experts = read_experts(hf, hf.whole("intermediate_size"), renormalise=True)
    clamped = hf.number("swiglu_alpha", 1.702, above=True), hf.number("swiglu_limit", 7.0, above=True)
    fields = llama(hf) | {"mlp_bias": False, "attention_sinks": True, "mixture": replace(experts, clamped=clamped)}
    return fields | windows(hf, lambda layer: layer % 2 == 0)
