"""What the header of a DeepSeek's GGUF file says of its latents and experts, as a Hugging Face ``config.json``.

llama.cpp writes attention as it computes it in the absorbed way: one head of keys and values, as long as a latent with the key
that RoPE turns. The lengths of the heads themselves have keys of their own.
"""

from __future__ import annotations

from typing import Any

from gguf import ExpertGatingFuncType

from .config.entries import REQUIRED, Entries, ModelError

SOFTMAX, SIGMOID = int(ExpertGatingFuncType.SOFTMAX), int(ExpertGatingFuncType.SIGMOID)
"""How scores of experts are made: V2's way, and V3's."""


def latents(metadata: Entries, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Entries that only DeepSeek has; none for another architecture. A file without groups of experts has one, as for
    llama.cpp. Of YaRN's two factors on magnitudes llama.cpp keeps one: they are equal in all published models.

    Args:
        scaling: what the file says of positions.

    Raises:
        ModelError: an entry is missing or wrong.
    """
    if metadata.text("general.architecture") != "deepseek2":
        return {}

    def whole(name: str, default: Any = REQUIRED, low: int = 1) -> Any:
        return metadata.whole(f"deepseek2.{name}", default, low)

    if (scores := whole("expert_gating_func", SOFTMAX)) not in (SOFTMAX, SIGMOID):
        raise ModelError(f"DeepSeek with expert_gating_func {scores} in a GGUF file is not supported")
    rank, turning = whole("attention.kv_lora_rank"), whole("rope.dimension_count")
    # files from before the absorbed way have the lengths of the heads where later ones have those of the latents
    names = ("key_length_mla", "value_length_mla")
    query, value = (whole(f"attention.{name}", whole(f"attention.{name.removesuffix('_mla')}")) for name in names)
    groups = whole("expert_group_count", 1)
    if share := metadata.number("deepseek2.rope.scaling.yarn_log_multiplier", 0.0):
        factor = round(10 * share, 6)
        scaling = (scaling or {}) | {"mscale": factor, "mscale_all_dim": factor}
    return {
        "num_key_value_heads": whole("attention.head_count"),
        "head_dim": turning,
        "partial_rotary_factor": 1.0,
        "rope_scaling": scaling,
        "kv_lora_rank": rank,
        "q_lora_rank": whole("attention.q_lora_rank", None),
        "qk_nope_head_dim": query - turning,
        "qk_rope_head_dim": turning,
        "v_head_dim": value,
        "n_routed_experts": whole("expert_count"),
        "n_shared_experts": whole("expert_shared_count", 0, low=0),
        "num_experts_per_tok": whole("expert_used_count"),
        "moe_intermediate_size": whole("expert_feed_forward_length"),
        "first_k_dense_replace": whole("leading_dense_block_count", 0, low=0),
        "routed_scaling_factor": metadata.number("deepseek2.expert_weights_scale", 1.0),
        "norm_topk_prob": metadata.flag("deepseek2.expert_weights_norm", False),
        "topk_method": "noaux_tc" if scores == SIGMOID else "group_limited_greedy" if groups > 1 else "greedy",
        "n_group": groups,
        "topk_group": whole("expert_group_used_count", groups),
    }
