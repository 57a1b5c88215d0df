"""LoRA adapters as PEFT saves them, with random weights, and the oracle: a copy of the model with the sums in its weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "deepseek_v2": ("q_proj", "o_proj"),
    "deepseek_v3": ("q_b_proj", "o_proj"),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), LLAMA_TARGETS[:4]),
}
"""Linear layers of families that do not have LLaMA's."""


def make_adapter(
    folder: Path, model: PreTrainedModel, rank: int = 4, seed: int = 0, targets: tuple[str, ...] = LLAMA_TARGETS,
    scale: float | None = None, **config: Any,
) -> PreTrainedModel:  # fmt: skip
    """Save a random adapter of these layers, and add it to a copy of the model.

    Args:
        scale: of the product; default: 2. config: entries of ``adapter_config.json``, which have to mean this scale.

    Returns:
        The copy.
    """
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets), "bias": "none"}
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(model), {}
    with torch.no_grad():
        for name, layer in merged.named_modules():
            if name.rpartition(".")[2] not in targets:
                continue
            transposed = type(layer).__name__ == "Conv1D"  # GPT-2's keep [in, out]
            rows, columns = layer.weight.t().shape if transposed else layer.weight.shape
            a = torch.empty(rank, columns).normal_(0, 0.15, generator=generator)
            b = torch.empty(rows, rank).normal_(0, 0.15, generator=generator)
            tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
            added = (2.0 if scale is None else scale) * (b @ a)
            layer.weight += added.t() if transposed else added
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return merged


def likeliest(model: PreTrainedModel, prompt: list[int], said: list[int]) -> list[int]:
    """For each token of an answer the one that transformers finds likeliest there, in one pass; a greedy answer is that."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()
