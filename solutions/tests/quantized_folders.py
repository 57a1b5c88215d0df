"""Quantized checkpoints written in NumPy from the layouts alone, next to the plain model that they stand for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)
SETTINGS = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_gpu_blocks_override": 160}
PROMPTS = [{"prompt_token_ids": [(3 * i + j * j) % 250 for j in range(5 + 7 * i)]} for i in range(3)]
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Stored:
    """How one layer is kept: `sorted_by` a seed, its columns are in groups of any order; None: neighbours are a group."""

    method: str = "gptq"
    bits: int = 4
    size: int = 16
    less_one: bool = True
    sorted_by: int | None = None
    g_idx: bool = True


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """[..., n] codes → [..., n · bits / 32] int32, the first in the lowest bits."""
    grouped = values.astype(np.uint32).reshape(*values.shape[:-1], -1, 32 // bits)
    packed = np.zeros(grouped.shape[:-1], np.uint32)
    for place in range(32 // bits):
        packed |= grouped[..., place] << np.uint32(bits * place)
    return packed.view(np.int32)


def random_layer(numbers: np.random.Generator, n_out: int, n_in: int, form: Stored) -> tuple[dict[str, Any], np.ndarray]:
    """A layer's tensors in a file, and the weight [out, in] that they stand for."""
    size = n_in if form.size == -1 else form.size
    count, top = -(-n_in // size), 2**form.bits
    groups = np.arange(n_in) // size
    if form.sorted_by is not None:
        groups = np.random.default_rng(form.sorted_by).permutation(groups)
    codes = numbers.integers(0, top, (n_in, n_out))
    zeros = numbers.integers(1, top, (count, n_out))
    scales = ((0.5 + numbers.random((count, n_out))) * 0.9 / top).astype(np.float16)
    weight = (codes - zeros[groups]).astype(np.float32) * scales[groups].astype(np.float32)
    if form.method == "awq":
        shuffled = [8 * (i // 8) + AWQ_NIBBLES[i % 8] for i in range(n_out)]
        parts = {"qweight": words(codes[:, shuffled], 4), "qzeros": words(zeros[:, shuffled], 4), "scales": scales}
    else:
        stored = (zeros - form.less_one) % top
        parts = {"qweight": words(codes.T, form.bits).T, "qzeros": words(stored, form.bits), "scales": scales}
        if form.g_idx:
            parts["g_idx"] = groups.astype(np.int32)
    return parts, weight.T


def quantize_folder(plain: Path, target: Path, form_of: Callable[[str], Stored | None], seed: int = 0) -> dict[str, Any]:
    """Put random weights in the place of those layers of the model in `plain` that `form_of` gives a form, which come packed
    into `target` with all else of the folder but the weights.

    Returns:
        The tensors of the packed file, to be written by the caller.
    """
    gpt2 = json.loads((plain / "config.json").read_text())["model_type"] == "gpt2"
    tensors, packed, numbers = load_file(plain / "model.safetensors"), {}, np.random.default_rng(seed)
    for name in list(tensors):
        layer, form = name.removesuffix(".weight"), None
        if tensors[name].ndim == 2 and not any(word in name for word in ("embed", "wte", "wpe")):
            form = form_of(layer)
        if form is None:
            packed[name] = tensors[name]
            continue
        turned = gpt2 and layer != "lm_head"
        n_out, n_in = tensors[name].shape[::-1] if turned else tensors[name].shape
        parts, weight = random_layer(numbers, n_out, n_in, form)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight.T if turned else weight))
        packed |= {f"{layer}.{part}": torch.from_numpy(np.ascontiguousarray(value)) for part, value in parts.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    target.mkdir()
    for file in plain.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    return packed


def describe(folder: Path, config: Any, file: str = "config.json") -> None:
    """Say how a folder is quantized, in config.json or in a file of its own."""
    if file == "config.json":
        config = json.loads((folder / file).read_text()) | {"quantization_config": config}
    (folder / file).write_text(json.dumps(config))


def save_pieces(tensors: dict[str, Any], folder: Path, base: str = "model", count: int = 1, index: bool = False) -> None:
    """Write tensors into `count` files, with an index or without."""
    names, where = sorted(tensors), {}
    for piece in range(count):
        file = f"{base}.safetensors" if count == 1 else f"{base}-{piece + 1:05}-of-{count:05}.safetensors"
        mine = {name: tensors[name].contiguous() for name in names[piece::count]}
        save_file(mine, folder / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    if index:
        (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def check_against_transformers(plain: Path, folder: Path, tolerance: float = 1e-3, **settings: Any) -> None:
    """The engine on `folder` gives the log-probabilities of transformers on the plain weights in `plain`."""
    oracle = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    llm = LLM(str(folder), **SETTINGS | settings)
    try:
        for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False):
            tokens = output.prompt_token_ids + output.outputs[0].token_ids
            with torch.inference_mode():
                expected = oracle(torch.tensor([tokens])).logits[0].log_softmax(-1)
            entries = output.prompt_logprobs[1:] + output.outputs[0].logprobs
            for position, entry in enumerate(entries, 1):
                difference = entry[tokens[position]].logprob - float(expected[position - 1, tokens[position]])
                assert abs(difference) < tolerance, (folder, position, difference)
    finally:
        llm.llm_engine.close()


def orders(numbers: random.Random) -> Callable[[str], int]:
    """A seed for each layer's order of columns, the same for layers that have one input."""
    seed = numbers.randrange(2**20)
    return lambda layer: seed + sum(layer.rpartition(".")[0].encode())
