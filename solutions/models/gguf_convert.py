"""GGUF files (llama.cpp's format) as Hugging Face folders, converted once and cached.

The folder holds the exact values of the file: quantized tensors in float32 (``d·q + m`` with 16-bit d and m needs more
bits than bfloat16 has), 16-bit tensors as they are. Loading in any precision is then one pass over mapped memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from gguf import GGMLQuantizationType as GGMLType
from safetensors.torch import save_file

from ..core.platform.machine import cache_root
from ..core.platform.progress import LateBar
from .config.entries import Entries, ModelError
from .config.model_config import ModelConfig
from .gguf_tokenizer import end_tokens, tokenizer_from_gguf
from .rope import scale_llama3

FORMAT_VERSION = 2
"""Raise it when the same file converts to something else than before: older folders are then made anew."""

MAX_SHARD_BYTES = 2 << 30

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
_EXACT_DTYPES = {GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


def convert_gguf(path: Path, progress: bool = True) -> Path:
    """The Hugging Face folder of a GGUF file; made now unless the cache has it.

    Folders are named after the file's path, size and time of change, so a new file at the same path replaces the old
    folder. A folder appears in one rename when it is complete; a lock keeps two processes from making the same one.

    Raises:
        ModelError: not a GGUF file, damaged, of an unsupported architecture, or no room on the disk.
    """
    path = path.resolve()
    stat = path.stat()
    family = f"{path.stem}-{_digest(str(path))}"
    folder = cache_root() / "gguf" / f"{family}-{_digest(FORMAT_VERSION, stat.st_size, stat.st_mtime_ns)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{family}.lock"):
        if folder.is_dir():
            return folder
        for outdated in folder.parent.glob(f"{glob.escape(family)}-*"):
            shutil.rmtree(outdated)
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir()
        try:
            _convert(path, partial, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:10]


def _convert(path: Path, folder: Path, progress: bool) -> None:
    try:
        reader = gguf.GGUFReader(path) if _is_gguf(path) else None
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except ModelError:
        raise
    except Exception as error:  # the library follows what the header says, wherever that leads
        raise ModelError(f"{path} is damaged or incomplete ({_first_line(error)}); fetch it again") from error
    try:
        config = _hf_config(Entries(metadata, str(path)), tensors)
        ModelConfig.from_hf(config)  # refuse before the long part what the engine cannot run
        own = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
        tokenizer = tokenizer_from_gguf(Entries(own, str(path)), config["max_position_embeddings"])
        _write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        _write_json(folder / "generation_config.json", ids)
        tokenizer.save_pretrained(folder)
        _write_weights(tensors, config, folder, progress)
    except (ModelError, OSError):
        raise
    except KeyError as missing:
        raise ModelError(f"{path} is incomplete: it has no entry {missing}") from None
    except Exception as error:  # nor do NumPy and tokenizers foresee what a damaged file holds
        raise ModelError(f"{path} cannot be converted ({_first_line(error)}); fetch it again") from error


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")
    return True


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _hf_config(metadata: Entries, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any]:
    """What the original ``config.json`` said, as far as the model computes with it.

    Raises:
        ModelError: an architecture or feature that is not supported, or an entry is missing or wrong.
        KeyError: a tensor is missing.
    """
    architecture = metadata.text("general.architecture")
    if architecture != "llama":
        raise ModelError(f"GGUF architecture {architecture!r} is not supported; supported is llama, as Mistral is labelled too")
    if metadata.whole("llama.expert_count", 0, low=0) or metadata.whole("split.count", 0, low=0) > 1:
        raise ModelError("GGUF files with experts or split into several files are not supported")
    if any(isinstance(metadata.content.get(f"llama.attention.head_count{kind}"), list) for kind in ("", "_kv")):
        raise ModelError("GGUF files whose layers differ in their numbers of heads are not supported")
    heads, hidden = metadata.whole("llama.attention.head_count"), metadata.whole("llama.embedding_length")
    head_dim = metadata.whole("llama.attention.key_length", hidden // heads)
    rotated = metadata.whole("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ModelError(f"RoPE over {rotated} of {head_dim} elements of a head is not supported")
    window = metadata.whole("llama.attention.sliding_window", 0, low=0)  # llama.cpp calls Mistral llama: this tells them apart
    embedding = tensors["token_embd.weight"]
    vocab_size = int(embedding.shape[1])
    config = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": metadata.whole("llama.feed_forward_length"),
        "num_hidden_layers": metadata.whole("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.whole("llama.context_length"),
        "rms_norm_eps": _decimal(metadata.number("llama.attention.layer_norm_rms_epsilon")),
        "hidden_act": "silu",
        "rope_theta": _decimal(metadata.number("llama.rope.freq_base", 10000.0, above=True)),
        "rope_scaling": _rope_scaling(metadata, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": next(iter(metadata.token_ids("tokenizer.ggml.bos_token_id", vocab_size) or ()), None),
        "eos_token_id": [token for token in end_tokens(metadata) if token < vocab_size] or None,
        "pad_token_id": next(iter(metadata.token_ids("tokenizer.ggml.padding_token_id", vocab_size) or ()), None),
        "dtype": str(_EXACT_DTYPES.get(embedding.tensor_type, torch.float32)).removeprefix("torch."),
    }
    return config | ({"sliding_window": window} if window else {})


def _rope_scaling(metadata: Entries, tensors: dict[str, gguf.ReaderTensor]) -> dict[str, Any] | None:
    """Older files give linear scaling's factor alone, as ``rope.scale_linear``; one that names no kind means linear."""
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(metadata, tensors["rope_freqs.weight"].data)
    kind = metadata.text("llama.rope.scaling.type", "linear")
    factor = metadata.number("llama.rope.scaling.factor", 0.0) or metadata.number("llama.rope.scale_linear", 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    original = metadata.whole("llama.rope.scaling.original_context_length", None)
    scaling = {"rope_type": kind, "factor": _decimal(factor) if factor else None}
    return scaling | ({} if original is None else {"original_max_position_embeddings": original})


def _llama3_scaling(metadata: Entries, divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling from what llama.cpp keeps of it: the number that divides each frequency, [D / 2].

    Only the factor varies between the published models (8 in Llama 3.1, 32 in Llama 3.2), and the slowest pair, which
    is scaled in full, shows it.

    Raises:
        ModelError: the divisors are not those of Llama 3 with that factor.
    """
    scaling = {
        "rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    theta, size = metadata.number("llama.rope.freq_base", 10000.0, above=True), 2 * len(divisors)
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    expected = plain / scale_llama3(plain, **{key: value for key, value in scaling.items() if key != "rope_type"})
    if not torch.allclose(expected, torch.tensor(divisors), rtol=1e-3):
        raise ModelError("the RoPE frequencies in the GGUF file (rope_freqs.weight) are not those of Llama 3")
    return scaling


def _write_weights(tensors: dict[str, gguf.ReaderTensor], config: dict[str, Any], folder: Path, progress: bool) -> None:
    """Dequantize into one safetensors file, or several of at most `MAX_SHARD_BYTES` so that memory stays small."""
    names = {name: _hf_name(name) for name in tensors if name != "rope_freqs.weight"}
    sizes = {name: int(tensors[name].n_elements) * _stored_dtype(tensors[name]).itemsize for name in names}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(
            f"converting the GGUF file takes {total / 2**30:.1f} GiB and {folder.parent} has {free / 2**30:.1f} GiB free; "
            f"make room, or set BYOV_CACHE to a folder on another disk"
        )
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {names[name]: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    with LateBar("converting the model, once", total, progress) as bar:
        for file, shard in zip(files, shards, strict=True):
            content = {}
            for name in shard:
                content[names[name]] = _hf_tensor(tensors[name], config)
                bar.advance(sizes[name])
            save_file(content, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library lets only its owner read it


def _hf_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    part, _, kind = name.rpartition(".")
    if part in _OUTER_NAMES:
        return f"{_OUTER_NAMES[part]}.{kind}"
    raise ModelError(f"tensor {name!r} in the GGUF file belongs to no layer of a LLaMA model")


def _stored_dtype(tensor: gguf.ReaderTensor) -> torch.dtype:
    return _EXACT_DTYPES.get(tensor.tensor_type, torch.float32)


def _hf_tensor(tensor: gguf.ReaderTensor, config: dict[str, Any]) -> torch.Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(f"tensor type {tensor.tensor_type.name} in the GGUF file is not supported") from None
    if ".attn_q." in tensor.name:
        values = _unpermute(values, config["num_attention_heads"])
    elif ".attn_k." in tensor.name:
        values = _unpermute(values, config["num_key_value_heads"])
    return torch.from_numpy(np.array(values)).to(_stored_dtype(tensor))  # a copy: the file's own memory is read-only


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from RoPE pairs (2i, 2i + 1), llama.cpp's order, to pairs (i, i + D/2), Hugging Face's."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, D / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(values.shape)
