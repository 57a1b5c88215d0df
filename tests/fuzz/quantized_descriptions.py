"""Quantized checkpoints with descriptions placed, spelled and spoilt at random: right numbers, or one clear line.

A case is a tiny model whose layers are kept in forms drawn at random by a writer made from the layouts alone. A description
of it is written in the words of one of the tools; sometimes one of its keys is changed, or a tensor is.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solutions.tests.quantized_folders import Stored, check_against_transformers, describe, quantize_folder, save_pieces
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

KEYS = (
    "bits", "w_bit", "group_size", "q_group_size", "quant_method", "checkpoint_format", "format", "version", "desc_act", "sym",
    "zero_point", "lm_head", "dynamic", "pack_dtype", "meta", "modules_to_not_convert", "backend", "is_marlin_format",
    "adapter", "damp_percent", "static_groups", "true_sequential", "modules_in_block_to_quantize", "model_file_base_name",
    "rotation",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 4, 8, 16, 32, 128, 2**70, 4.0, 0.5, float("inf"), "", "4", "gptq", "gptq_v2", "GPTQ",
    "awq", "gemm", "GEMM", "gemv", "marlin", "bitblas", "hqq", "fp8", "int32", "int64", "a\nb", "x" * 500, [], ["lm_head"], {},
    {"-:.*": {}}, {".*": {}}, {"+:.*up_proj": {"bits": 8}}, {"(": {}}, {".*": None}, {"x": 1}, [[None]],
)  # fmt: skip
HARMLESS = {
    "lm_head", "meta", "modules_to_not_convert", "modules_in_block_to_quantize", "damp_percent", "static_groups", "zero_point",
    "true_sequential", "model_file_base_name", "sym",
}  # fmt: skip
"""Keys that say nothing that bears on the numbers: with any value the answer is right."""


@dataclass(frozen=True)
class Case:
    """How a model's layers are kept: most in `base`, those with `other` in their names in `own`, those with `skipped` plain."""

    base: Stored
    own: Stored
    other: str | None
    skipped: tuple[str, ...]
    with_head: bool

    def form_of(self, layer: str) -> Stored | None:
        if (layer == "lm_head" and not self.with_head) or any(word in layer for word in self.skipped):
            return None
        return self.own if self.other and self.other in layer else self.base


def draw_case(rng: random.Random) -> Case:
    method = rng.choice(["gptq", "awq"])
    wide, less_one = 8 if method == "gptq" else 4, rng.random() < 0.6
    is_sorted = method == "gptq" and rng.random() < 0.3
    base = Stored(
        method, rng.choice([4, wide]), rng.choice([8, 16, 32, -1]), less_one, rng.randrange(2**20) if is_sorted else None,
        is_sorted or rng.random() < 0.7,
    )  # fmt: skip
    words = rng.sample(["q_proj", "k_proj", "up_proj", "down_proj", "c_attn", "c_fc", "mlp", "self_attn"], 3)
    own = Stored(method, wide, rng.choice([16, 32]), less_one, None, base.g_idx)
    other = words[2] if rng.random() < 0.3 else None
    return Case(base, own, other, tuple(words[: rng.randrange(3)]), rng.random() < 0.3)


def draw_description(rng: random.Random, case: Case) -> tuple[dict[str, Any], str]:
    """Words for a checkpoint, and the file to put them in."""
    form = case.base
    bits, size = ("w_bit", "q_group_size") if rng.random() < 0.3 else ("bits", "group_size")
    said: dict[str, Any] = {bits: form.bits, size: form.size, "quant_method": form.method}
    if form.method == "awq":
        said |= {"version": rng.choice(["gemm", "GEMM"]), "zero_point": True, "modules_to_not_convert": None}
    else:
        said |= {"desc_act": form.sorted_by is not None, "sym": rng.random() < 0.5, "true_sequential": True}
        if not form.less_one:
            said[rng.choice(["checkpoint_format", "format"])] = "gptq_v2"
        elif rng.random() < 0.5:
            said["checkpoint_format"] = "gptq"
    dynamic: dict[str, Any] = {f"-:.*{word}": {} for word in case.skipped if rng.random() < 0.5}
    if case.other:
        dynamic[f".*{case.other}"] = {"bits": case.own.bits, "group_size": case.own.size}
    if dynamic:
        said["dynamic"] = dynamic
    if rng.random() < 0.3:
        del said["quant_method"]
    files = ["config.json", "quantize_config.json"] + (["quant_config.json"] if form.method == "awq" else [])
    return said, rng.choice(files)


def spoil(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    """Change one tensor so that its layer cannot be read."""
    name = rng.choice(sorted(name for name in tensors if name.endswith((".qweight", ".qzeros", ".scales"))))
    tensor = tensors[name]
    changed = (None, tensor[:-1], tensor.unsqueeze(0), tensor.to(torch.float64).flatten())[rng.randrange(4)]
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.contiguous()


def make_plain(rng: random.Random, folder: Path) -> None:
    kind = rng.randrange(3)
    if kind == 0:
        make_tiny_llama(folder, num_hidden_layers=1, attention_bias=rng.random() < 0.3, mlp_bias=rng.random() < 0.3)
    elif kind == 1:
        make_tiny_mistral(folder, num_hidden_layers=1)
    else:
        make_tiny_gpt2(folder, n_layer=1, tie_word_embeddings=rng.random() < 0.5)


def run(rng: random.Random) -> None:
    """One case.

    Raises:
        AssertionError: what was loaded gives other numbers than the model, a valid checkpoint is refused, or an error is not
            one line.
    """
    with tempfile.TemporaryDirectory() as root:
        plain, folder = Path(root) / "plain", Path(root) / "packed"
        make_plain(rng, plain)
        case = draw_case(rng)
        tensors = quantize_folder(plain, folder, case.form_of, rng.randrange(2**20))
        said, file = draw_description(rng, case)
        is_valid = any(name.endswith(".qweight") for name in tensors)
        if rng.random() < 0.3:
            for name in [name for name in tensors if name.endswith(".scales")]:
                tensors.setdefault(f"{name.removesuffix('scales')}bias", torch.zeros(tensors[name].shape[-1]))
        if rng.random() < 0.5:
            key, value = rng.choice(KEYS), rng.choice(VALUES)
            if key not in ("format", "checkpoint_format") or value not in ("gptq", "gptq_v2", "GPTQ"):  # a lie, but a good one
                said[key] = value
                is_valid = is_valid and key in HARMLESS
        if is_valid and rng.random() < 0.15:
            spoil(rng, tensors)
            is_valid = False
        describe(folder, said, file)
        save_pieces(tensors, folder, rng.choice(["model", "gptq_model-4bit"]), rng.randint(1, 3), rng.random() < 0.5)
        told = f"{json.dumps(said)} in {file}, {case}"
        refusal = None
        try:
            check_against_transformers(plain, folder, enable_cpu_kernels=rng.random() < 0.7)
        except ValueError as error:
            refusal = str(error)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} of {told}") from error
        assert refusal is None or "\n" not in refusal, f"several lines: {refusal} of {told}"
        assert refusal is None or not is_valid, f"refused though valid: {refusal} of {told}"
