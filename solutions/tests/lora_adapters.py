"""LoRA adapters as PEFT saves them, with random weights, and the oracle: a copy of the model with the sums in its weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "mixtral": (*LLAMA_TARGETS[:4], "gate", "experts"),
    "qwen2_moe": (*LLAMA_TARGETS, "gate", "shared_expert_gate", "experts"),
    "qwen3_moe": (*LLAMA_TARGETS[:4], "gate", "experts"),
    "gpt_oss": (*LLAMA_TARGETS[:4], "router", "experts"),
    "deepseek_v2": ("q_proj", "o_proj", *LLAMA_TARGETS[4:], "gate", "experts"),
    "deepseek_v3": ("q_b_proj", "o_proj", *LLAMA_TARGETS[4:], "gate", "experts"),
}
"""Linear layers of families that do not have LLaMA's; "experts" are all matrices of a layer's experts."""
OLD_NAMES = {"mixtral": ("block_sparse_moe.experts", "w1", "w3", "w2")}
"""Experts as layers, as transformers 4 had them, of a family that called them otherwise than all others."""


def make_adapter(
    folder: Path, model: PreTrainedModel, rank: int = 4, seed: int = 0, targets: tuple[str, ...] = LLAMA_TARGETS,
    scale: float | None = None, as_layers: bool = False, **config: Any,
) -> PreTrainedModel:  # fmt: skip
    """Save a random adapter of these layers, and add it to a copy of the model.

    Args:
        scale: of the product; default: 2. as_layers: a tensor for each matrix of each expert; default: for that of all experts.
        config: entries of ``adapter_config.json``, which have to mean this scale.

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
            if name.endswith(".experts"):
                old = OLD_NAMES.get(model.config.model_type, ("mlp.experts", *LLAMA_TARGETS[4:])) if as_layers else None
                tensors |= _change(name, layer, rank, generator, 2.0 if scale is None else scale, old)
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


def _change(
    name: str, experts: nn.Module, rank: int, generator: torch.Generator, scale: float, old: tuple[str, ...] | None
) -> dict[str, Tensor]:
    """Add random products to the matrices of all experts of a layer, and say what PEFT saves: layers of `old` names or none."""
    width = experts.down_proj.shape[1 if experts.is_transposed else 2]
    gate, up, every = slice(width), slice(width, None), slice(None)
    if old:
        pieces = zip(old[1:], ("gate_up_proj", "gate_up_proj", "down_proj"), (gate, up, every), strict=True)
    else:
        pieces = zip((".base_layer", ""), ("gate_up_proj", "down_proj"), (every, every), strict=True)
    tensors = {}
    for piece, matrix, rows in pieces:
        weight = experts.get_parameter(matrix)
        weight = (weight.transpose(1, 2) if experts.is_transposed else weight)[:, rows]  # [E, out, in]
        a = torch.empty(len(weight), rank, weight.shape[2]).normal_(0, 0.15, generator=generator)
        b = torch.empty(*weight.shape[:2], rank).normal_(0, 0.15, generator=generator)
        weight += scale * (b @ a)
        halves = {f"{name}{piece}": (a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous())}
        if old:
            stem = name.replace("mlp.experts", old[0])
            halves = {f"{stem}.{i}.{piece}": (a[i].clone(), b[i].clone()) for i in range(len(a))}
        for layer, both in halves.items():
            tensors |= {f"base_model.model.{layer}.lora_{half}.weight": tensor for half, tensor in zip("AB", both, strict=True)}
    return tensors


def likeliest(model: PreTrainedModel, prompt: list[int], said: list[int]) -> list[int]:
    """For each token of an answer the one that transformers finds likeliest there, in one pass; a greedy answer is that."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + said[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].argmax(-1).tolist()
