"""The files of a model's folder: which hold its weights, and which say how they are quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..quantization.layout.description import FILES, implied_method
from .config.entries import ModelError, read_json

_PIECE = re.compile(r"(.+)-(\d{1,9})-of-(\d{1,9})\.safetensors")
_OTHERS = ("adapter", "consolidated")
"""How files begin that are no model's weights under Hugging Face's names: LoRA adapters, and Mistral's own."""


def quantization_description(folder: Path, hf_config: dict[str, Any]) -> Any:
    """What the folder says of how its weights are quantized, as config.json would say it; None: nothing.

    AutoGPTQ and AutoAWQ once wrote it into a file of its own, whose entries also fill what config.json leaves out.

    Raises:
        ModelError: a file cannot be read.
    """
    said = hf_config.get("quantization_config")
    if not said and isinstance(hf_config.get("compression_config"), dict):
        return {**hf_config["compression_config"], "quant_method": "compressed-tensors"}
    if not said and (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"}
    for name, method in FILES.items():
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        content["quant_method"] = content.get("quant_method") or implied_method(content) or method
        if not said:
            return content
        if isinstance(said, dict) and said.get("quant_method") in (None, content["quant_method"]):
            # not what config.json says under another name
            missing = {"checkpoint_format", "is_marlin_format", "version", "quant_method"} & content.keys()
            said = {key: content[key] for key in missing} | {k: v for k, v in said.items() if v is not None}
    return said


def weight_files(folder: Path, ways_out: str) -> list[Path]:
    """The safetensors files of a model: ``model.safetensors``, the files that an index names, or one file or one numbered set
    of another name, such as AutoGPTQ's ``gptq_model-4bit-128g.safetensors``.

    Args:
        ways_out: what a person may do who has none.

    Raises:
        ModelError: there are none, some are missing, or there are those of several models.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    files = [file for file in folder.glob("*.safetensors") if file.is_file() and not file.name.startswith(_OTHERS)]
    indexes = list(folder.glob("*.safetensors.index.json"))
    names = {_base_name(file) for file in files} | {file.name.removesuffix(".safetensors.index.json") for file in indexes}
    if not names:
        code = next((suffix for suffix in (".bin", ".pt", ".pth") if any(folder.glob(f"*{suffix}"))), None)
        if code is not None:
            raise ModelError(f"{folder} has only {code} weights, which can run code when read; convert them to safetensors")
        raise ModelError(f"{folder} has no weights (model.safetensors); {ways_out}")
    name = _chosen(folder, names)
    index = folder / f"{name}.safetensors.index.json"
    return _indexed(index) if index.is_file() else _numbered([file for file in files if _base_name(file) == name])


def _base_name(file: Path) -> str:
    piece = _PIECE.fullmatch(file.name)
    return piece[1] if piece else file.name.removesuffix(".safetensors")


def _chosen(folder: Path, names: set[str]) -> str:
    """The one name; or of several that which a description calls the model's (``model_file_base_name``)."""
    if len(names) == 1:
        return next(iter(names))
    for description in FILES:
        if (folder / description).is_file():
            named = read_json(folder / description).get("model_file_base_name")
            if isinstance(named, str) and named in names:
                return named
    listed = ", ".join(sorted(names)[:3])
    raise ModelError(f"{folder} holds weights under several names ({listed}); leave those of one model there")


def _indexed(index: Path) -> list[Path]:
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise ModelError(f"{index} names no files (weight_map)")
    files = [index.parent / file for file in sorted(set(mapped.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{index.parent} lacks weight files that its index names: {', '.join(missing[:3])}")
    return files


def _numbered(files: list[Path]) -> list[Path]:
    """Files of one name: a single one, or all pieces of a set that has no index."""
    pieces = {file: _PIECE.fullmatch(file.name) for file in sorted(files)}
    if len(files) == 1 and pieces[files[0]] is None:
        return files
    found = {int(piece[2]) for piece in pieces.values() if piece}
    totals = {int(piece[3]) for piece in pieces.values() if piece}
    total = max(totals, default=0)
    if len(totals) != 1 or None in pieces.values() or len(found) != len(files) or not found <= set(range(1, total + 1)):
        raise ModelError(f"{files[0].parent} holds weights of several models under one name; leave those of one there")
    if len(found) < total:
        raise ModelError(f"{files[0].parent} has {len(found)} of {total} weight files like {min(files).name}; fetch the others")
    return list(pieces)
