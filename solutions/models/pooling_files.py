"""What a folder of sentence-transformers says besides the model: how a text becomes a vector, and how long a text may be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batching.pooling import Pooling
from .config.entries import Entries, ModelError, read_json
from .config.model_config import ModelConfig
from .tokenizer_files import CONFIG_FILE

MODULES = "modules.json"
"""The modules that a text passes, in order, each with its kind and its folder."""
LENGTHS = "sentence_bert_config.json"
KINDS = {"mean_tokens": "mean", "mean": "mean", "lasttoken": "last", "cls_token": "cls", "cls": "cls"}
"""As `Pooling` has them; the rest (maxima, weighted means) is not supported."""


def with_pooling(config: ModelConfig, folder: Path) -> ModelConfig:
    """The model with what its folder says of embeddings; as it is where that says nothing.

    Raises:
        ModelError: the folder asks for something that is not supported, or a file cannot be read.
    """
    if not (folder / MODULES).is_file():
        return config
    pooling, normalize = None, False
    for kind, path in _modules(folder / MODULES):
        if kind == "Pooling":
            pooling = _pooling_type(read_json(folder / path / "config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ModelError(f"{folder / MODULES}: embeddings that pass a {kind} are not supported")
    return replace(config, pooling=Pooling(pooling or "mean", normalize), max_model_len=_longest(folder, config.max_context))


def _longest(folder: Path, context: int) -> int:
    """Tokens of the longest text, in the words of older files or of newer ones."""
    older, newer = (read_json(folder / name) if (folder / name).is_file() else {} for name in (LENGTHS, CONFIG_FILE))
    if Entries(older, LENGTHS).flag("do_lower_case", False):
        raise ModelError(f"{folder / LENGTHS}: do_lower_case is not supported; let the tokenizer's normalizer do it")
    limit = Entries(older, LENGTHS).whole("max_seq_length", None) or newer.get("model_max_length")
    return min(limit, context) if type(limit) is int and limit > 1 else context


def _modules(file: Path) -> list[tuple[str, str]]:
    """(kind, path) of each module."""
    try:
        modules: Any = json.loads(file.read_text(encoding="utf-8"))
        return [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ModelError(f"{file} must be a list of modules, each with type and path") from None


def _pooling_type(description: dict[str, Any]) -> str:
    """The kind that a pooling's config.json names; the older files have a flag for each, the newer ones a word."""
    named = description.get("pooling_mode")
    flags = [name.removeprefix("pooling_mode_") for name, on in description.items() if name.startswith("pooling_mode_") and on]
    wanted = [named] if isinstance(named, str) else flags
    if len(wanted) != 1 or wanted[0] not in KINDS:
        raise ModelError(f"pooling by {' and '.join(map(str, wanted)) or 'nothing'} is not supported; mean, last or cls is")
    return KINDS[wanted[0]]
