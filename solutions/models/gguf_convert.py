"""GGUF files (llama.cpp's format) as Hugging Face folders, converted once and cached.

The folder holds the exact values of the file: quantized tensors in float32 (``d·q + m`` with 16-bit d and m needs more
bits than bfloat16 has), 16-bit tensors as they are. Loading in any precision is then one pass over mapped memory. Or it holds
the quantized matrices of layers as codes (see `gguf_blocks`), of which products are computed as they are.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file

from ..core.platform.machine import cache_root
from ..core.platform.progress import LateBar
from ..quantization.layout.blocks import BlockFormat
from ..quantization.layout.groups import GroupQuantized
from .config.entries import Entries, ModelError
from .config.model_config import ModelConfig
from .gguf_bert import write_pooling
from .gguf_blocks import TYPES, formats, read_groups
from .gguf_config import EXACT_DTYPES, ROPE_TENSORS, GgufFamily, gguf_family, hf_config
from .gguf_fused import unfused
from .gguf_shards import check_shards, shards_of
from .gguf_tokenizer import tokenizer_from_gguf

FORMAT_VERSION = 3
"""Raise it when the same file converts to something else than before: older folders are then made anew."""

MAX_SHARD_BYTES = 2 << 30


def convert_gguf(path: Path, progress: bool = True, as_codes: bool = False) -> Path:
    """The Hugging Face folder of a GGUF file, or of several that one of them stands for; made now unless the cache has it.

    With `as_codes` quantized matrices stay so, where their type is one of `gguf_blocks.TYPES`.

    Folders are named after the file's path, size and time of change, so a new file at the same path replaces the old
    folder. A folder appears in one rename when it is complete; a lock keeps two processes from making the same one.

    Raises:
        ModelError: not a GGUF file, damaged, of an unsupported architecture, without a matrix to keep as codes, or no room on
            the disk.
    """
    paths = shards_of(path.absolute())
    path = paths[0].resolve()
    changed = [number for part in paths for number in (part.stat().st_size, part.stat().st_mtime_ns)]
    family = f"{'codes-' if as_codes else ''}{path.stem}-{_digest(str(path))}"
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
            _convert(paths, partial, progress, as_codes)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:10]


def _convert(paths: list[Path], folder: Path, progress: bool, as_codes: bool) -> None:
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
        tensors = unfused(tensors, config, family.names)
        whole = [tensor for name, tensor in tensors.items() if family.other(name) is None]  # whose rows are a matrix
        kept = formats(whole) if as_codes else {}
        if as_codes and not kept:
            raise ModelError(f"{path} has no matrix in blocks of {', '.join(kind.name for kind in TYPES)}; leave the flag out")
        config |= {"quantization_config": {"quant_method": "gguf"}} if kept else {}
        own = {key.removeprefix("tokenizer."): value for key, value in metadata.items() if key.startswith("tokenizer.")}
        tokenizer = tokenizer_from_gguf(Entries(own, str(path)), config["max_position_embeddings"])
        _write_json(folder / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
        _write_json(folder / "generation_config.json", ids)
        tokenizer.save_pretrained(folder)
        write_pooling(header, folder)
        others = {f".{other}." for other in family.joined.values()}
        names = {n: family.hf_name(n) for n in tensors if n not in ROPE_TENSORS and not any(other in n for other in others)}
        _write_weights(_Weights(tensors, names, config, family, kept), folder, progress)
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


def _write_weights(weights: _Weights, folder: Path, progress: bool) -> None:
    """Write one safetensors file, or several of about `MAX_SHARD_BYTES` so that memory stays small."""
    sizes = {name: weights.size(name) for name in weights.names}
    total, free = sum(sizes.values()), shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(
            f"converting the GGUF file takes {total / 2**30:.1f} GiB and {folder.parent} has {free / 2**30:.1f} GiB free; "
            f"make room, or set BYOV_CACHE to a folder on another disk"
        )
    shards: list[list[str]] = [[]]
    for name in sizes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    with LateBar("converting the model, once", total, progress) as bar:
        for file, shard in zip(files, shards, strict=True):
            content: dict[str, torch.Tensor] = {}
            for name in shard:
                content |= weights.stored(name)
                bar.advance(sizes[name])
            save_file(content, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library lets only its owner read it
            weight_map |= dict.fromkeys(content, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors of a file, and what they are to be written as.

    Attributes:
        names: those in a checkpoint of Hugging Face. kept: tensors that stay codes, by name.
    """

    tensors: dict[str, gguf.ReaderTensor]
    names: dict[str, str]
    config: dict[str, Any]
    family: GgufFamily
    kept: dict[str, BlockFormat]

    def size(self, name: str) -> int:
        """Bytes of what is written of a tensor."""
        count, form = sum(int(tensor.n_elements) for tensor in self._parts(name)), self.kept.get(name)
        if form is None:
            return count * self._dtype(name).itemsize
        return count * form.bits // 8 + count // form.group_size * 4

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """What is written of a tensor, by name."""
        tensor, form = self.tensors[name], self.kept.get(name)
        if form is None:
            values, *others = map(_plain, self._parts(name))
            if others:  # [H, rank, still] and [H, value, rank], as [H·(still + value), rank]
                values = np.concatenate((values.swapaxes(1, 2), *others), axis=1).reshape(-1, values.shape[1])
            values = self._in_order(name, values)
            if self.family.one_added and name.split(".")[-2].endswith("norm"):
                values = values - 1
            # a copy: the file's own memory is read-only
            return {self.names[name]: torch.from_numpy(np.array(values)).to(self._dtype(name))}
        weight, layer = read_groups(tensor, form), self.names[name].removesuffix(".weight")
        parts = [torch.from_numpy(self._in_order(name, part.numpy())) for part in (weight.codes, weight.scales, weight.zeros)]
        matrices: dict[str, Sequence[torch.Tensor]] = {layer: parts}
        if weight.codes.ndim == 3:  # of all experts
            before, _, matrix = layer.rpartition(".")
            matrices = {f"{before}.{number}.{matrix}": of for number, of in enumerate(zip(*parts, strict=True))}
        content: dict[str, torch.Tensor] = {}
        for layer, (codes, scales, zeros) in matrices.items():
            packed = form.pack(GroupQuantized(codes, scales, zeros, form.bits, form.group_size))
            content |= {f"{layer}.{part}": tensor for part, tensor in packed.items()}
        return content

    def _parts(self, name: str) -> list[gguf.ReaderTensor]:
        """The tensor, and what is joined to it."""
        other = self.family.other(name)
        return [self.tensors[name], *([] if other is None else [self.tensors[other]])]

    def _dtype(self, name: str) -> torch.dtype:
        first, *others = (EXACT_DTYPES.get(tensor.tensor_type, torch.float32) for tensor in self._parts(name))
        return first if {first, *others} == {first} else torch.float32

    def _in_order(self, name: str, values: np.ndarray) -> np.ndarray:
        """A matrix, or what its rows have besides, in Hugging Face's order of rows."""
        heads = {"attn_q": self.config["num_attention_heads"], "attn_k": self.config["num_key_value_heads"]}
        part = name.split(".")[-2]
        return _unpermute(values, heads[part]) if self.family.interleaved and part in heads else values


def _plain(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Its numbers, in float32 or as they are."""
    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(f"tensor type {tensor.tensor_type.name} in the GGUF file is not supported") from None


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from RoPE pairs (2i, 2i + 1), llama.cpp's order, to pairs (i, i + D/2), Hugging Face's."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, D / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(values.shape)
