"""GGUF files (llama.cpp's format) as Hugging Face folders, converted once and cached.

The folder holds the exact values of the file: quantized tensors in float32 (``d·q + m`` with 16-bit d and m needs more
bits than bfloat16 has), 16-bit tensors as they are. Loading in any precision is then one pass over mapped memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file

from ..core.platform.machine import cache_root
from ..core.platform.progress import LateBar
from .config.entries import Entries, ModelError
from .config.model_config import ModelConfig
from .gguf_config import EXACT_DTYPES, ROPE_TENSORS, GgufFamily, gguf_family, hf_config
from .gguf_shards import check_shards, shards_of
from .gguf_tokenizer import tokenizer_from_gguf

FORMAT_VERSION = 2
"""Raise it when the same file converts to something else than before: older folders are then made anew."""

MAX_SHARD_BYTES = 2 << 30


def convert_gguf(path: Path, progress: bool = True) -> Path:
    """The Hugging Face folder of a GGUF file, or of several that one of them stands for; made now unless the cache has it.

    Folders are named after the file's path, size and time of change, so a new file at the same path replaces the old
    folder. A folder appears in one rename when it is complete; a lock keeps two processes from making the same one.

    Raises:
        ModelError: not a GGUF file, damaged, of an unsupported architecture, or no room on the disk.
    """
    paths = shards_of(path.absolute())
    path = paths[0].resolve()
    changed = [number for part in paths for number in (part.stat().st_size, part.stat().st_mtime_ns)]
    family = f"{path.stem}-{_digest(str(path))}"
    folder = cache_root() / "gguf" / f"{family}-{_digest(FORMAT_VERSION, *changed)}"
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
            _convert(paths, partial, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:10]


def _convert(paths: list[Path], folder: Path, progress: bool) -> None:
    path, readers = paths[0], []
    try:
        for path in paths:
            _check_magic(path)
            readers.append(gguf.GGUFReader(path))
        path = paths[0]
        check_shards(paths, readers)
        metadata = {key: field.contents() for key, field in readers[0].fields.items()}
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    except ModelError:
        raise
    except Exception as error:  # the library follows what the header says, wherever that leads
        raise ModelError(f"{path} is damaged or incomplete ({_first_line(error)}); fetch it again") from error
    try:
        header = Entries(metadata, str(path))
        config, family = hf_config(header, tensors), gguf_family(header)
        ModelConfig.from_hf(config)  # refuse before the long part what the engine cannot run
        own = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
        tokenizer = tokenizer_from_gguf(Entries(own, str(path)), config["max_position_embeddings"])
        _write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        _write_json(folder / "generation_config.json", ids)
        tokenizer.save_pretrained(folder)
        _write_weights(tensors, config, family, folder, progress)
    except (ModelError, OSError):
        raise
    except KeyError as missing:
        raise ModelError(f"{path} is incomplete: it has no entry {missing}") from None
    except Exception as error:  # nor do NumPy and tokenizers foresee what a damaged file holds
        raise ModelError(f"{path} cannot be converted ({_first_line(error)}); fetch it again") from error


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(
    tensors: dict[str, gguf.ReaderTensor], config: dict[str, Any], family: GgufFamily, folder: Path, progress: bool
) -> None:
    """Dequantize into one safetensors file, or several of at most `MAX_SHARD_BYTES` so that memory stays small."""
    names = {name: family.hf_name(name) for name in tensors if name not in ROPE_TENSORS}
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
                content[names[name]] = _hf_tensor(tensors[name], config, family)
                bar.advance(sizes[name])
            save_file(content, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library lets only its owner read it


def _stored_dtype(tensor: gguf.ReaderTensor) -> torch.dtype:
    return EXACT_DTYPES.get(tensor.tensor_type, torch.float32)


def _hf_tensor(tensor: gguf.ReaderTensor, config: dict[str, Any], family: GgufFamily) -> torch.Tensor:
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(f"tensor type {tensor.tensor_type.name} in the GGUF file is not supported") from None
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    part = tensor.name.split(".")[-2]
    if family.interleaved and part in heads:
        values = _unpermute(values, heads[part])
    if family.one_added and part.endswith("norm"):
        values = values - 1
    return torch.from_numpy(np.array(values)).to(_stored_dtype(tensor))  # a copy: the file's own memory is read-only


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from RoPE pairs (2i, 2i + 1), llama.cpp's order, to pairs (i, i + D/2), Hugging Face's."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, D / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(values.shape)
