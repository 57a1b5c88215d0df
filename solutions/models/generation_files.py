"""What ``generation_config.json`` says: the tokens that end a text, and how tokens are drawn unless a request says otherwise.

Names and meaning are vLLM's, as those of ``--generation-config`` and ``--override-generation-config`` are. What the file says
of other ways to decode, such as ``do_sample`` or ``num_beams``, is passed over.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..batching.sampling_params import SamplingParams
from .config.entries import Entries, ModelError, read_json
from .config.model_config import ModelConfig

FILE = "generation_config.json"
SAMPLING = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
"""Entries that are read, and the fields of `SamplingParams` that they fill."""


def with_generation(config: ModelConfig, folder: Path) -> ModelConfig:
    """The model with what a folder's file says, if there is one: more tokens that end a text, and how tokens are drawn.

    Raises:
        ModelError: the file cannot be read.
    """
    if not (folder / FILE).is_file():
        return config
    entries = Entries(read_json(folder / FILE), FILE)
    ends = (*config.eos_token_ids, *(entries.token_ids("eos_token_id", config.vocab_size) or ()))
    return replace(config, eos_token_ids=tuple(dict.fromkeys(ends)), sampling=_sampling(entries.content))


def with_sampling(config: ModelConfig, source: str, override: str | dict[str, Any] | None) -> ModelConfig:
    """The model with the defaults for drawing that the settings choose.

    Args:
        source: "auto": what the model's own file says; "vllm": nothing; else a folder whose file counts in its place.
        override: entries that go before those, an object or one as JSON; null: the file's does not count.

    Raises:
        ValueError: there is no such file, or a value is not possible; the message says which.
    """
    if source == "vllm":
        config = replace(config, sampling={})
    elif source != "auto":
        folder = Path(source).expanduser()
        if not (folder / FILE).is_file():
            raise ModelError(f"--generation-config {source}: there is no {folder / FILE}; it takes auto, vllm or a folder")
        config = with_generation(config, folder)
    try:
        SamplingParams(**config.sampling)
    except ValueError as error:
        raise ModelError(f"{FILE}: {error}; --generation-config vllm does without it") from None
    own = {} if override is None else {SAMPLING[name]: value for name, value in _parse(override).items()}
    sampling = {name: value for name, value in (config.sampling | own).items() if value is not None}
    try:
        SamplingParams(**sampling)
    except ValueError as error:
        raise ValueError(f"--override-generation-config: {error}") from None
    return replace(config, sampling=sampling)


def _sampling(entries: dict[str, Any]) -> dict[str, Any]:
    return {ours: entries[theirs] for theirs, ours in SAMPLING.items() if entries.get(theirs) is not None}


def _parse(override: str | dict[str, Any]) -> dict[str, Any]:
    try:
        given = json.loads(override) if isinstance(override, str) else override
    except ValueError as error:
        raise ValueError(f"--override-generation-config is not valid JSON: {error}") from None
    if not isinstance(given, dict) or not given.keys() <= SAMPLING.keys():
        raise ValueError(f"--override-generation-config must be an object with any of {', '.join(SAMPLING)}, got {override}")
    return given
