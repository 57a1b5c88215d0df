"""The tokenizer in a model's folder, whatever wrote it, with no code but transformers' own and never a question.

Most folders have a ``tokenizer.json``, which is loaded as transformers does. One that has only SentencePiece's own file is
converted, see `sentencepiece_model`. Whatever goes wrong, in files of which the libraries check little, is a `ModelError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config.entries import ModelError, read_json
from .config.families import KNOWN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG_FILE = "tokenizer_config.json"
PROCESSOR_TEMPLATE = "chat_template.json"
"""Where models that see have had their chat template."""


def has_own_code(folder: Path) -> bool:
    """Whether the folder's tokenizer comes with Python code of its own.

    Raises:
        ModelError: its description cannot be read.
    """
    file = folder / CONFIG_FILE
    return file.is_file() and bool(read_json(file).get("auto_map"))


def read_tokenizer(where: Path | str, architecture: str, name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or a hub id.

    Code that the folder brings is not run: a tokenizer that can be had without it is, with transformers' own class.

    Args:
        architecture: of the model. name: the model's, for messages.

    Raises:
        ModelError: it cannot be loaded, or gives an added token another id than its files say.
    """
    folder = Path(where)
    try:
        if folder.is_dir() and not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            from .sentencepiece_model import load_sentencepiece

            tokenizer = load_sentencepiece(folder)
        else:
            tokenizer = _auto_tokenizer(where, KNOWN[architecture].model_type)
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{type(tokenizer).__name__} is no fast tokenizer; convert it to a tokenizer.json")
        tokenizer.decode(tokenizer.encode("a b"))  # settings of the wrong kind show only here
        if tokenizer.chat_template is None and (folder / PROCESSOR_TEMPLATE).is_file():
            tokenizer.chat_template = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template")
        if not isinstance(tokenizer.chat_template, str | dict | None):
            raise ModelError(f"chat_template must be a string or named templates, got {tokenizer.chat_template!r:.60}")
        if folder.is_dir():
            _check_added_tokens(tokenizer, folder)
    except Exception as error:  # the libraries raise what comes: TypeError, KeyError, a bare Exception
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if folder.is_dir() and has_own_code(folder):
            reason = (
                f"it is Python code of the folder's own (auto_map), which is not run; save it as a tokenizer.json ({reason})"
            )
        raise ModelError(f"cannot load the tokenizer of {name} from {where}: {reason}") from error
    return tokenizer


def _auto_tokenizer(where: Path | str, model_type: str) -> Any:
    """A tokenizer of transformers, fast or not.

    It is chosen by the names of the configuration's class and type. One that has only these is given: config.json is not read
    once more, and what transformers' own brings along takes longer to import than all that is needed here.
    """
    import transformers  # takes a second
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]  # made elsewhere

    named = type(CONFIG_MAPPING_NAMES[model_type], (transformers.PreTrainedConfig,), {"model_type": model_type})
    config = named()
    config._name_or_path = str(where)
    return transformers.AutoTokenizer.from_pretrained(where, config=config, trust_remote_code=False)


def _check_added_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The libraries number added tokens anew where the ids in the files have gaps, and say nothing."""
    for file, token, expected in _added_tokens(folder):
        given = tokenizer.convert_tokens_to_ids(token)
        if given != expected:
            raise ModelError(
                f"{file} gives {token!r} the id {expected!r}, but loaded it has {given}; the files do not fit together"
            )


def _added_tokens(folder: Path) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) of each token that a folder's files add to the vocabulary."""
    if (folder / "tokenizer.json").is_file():
        for token in read_json(folder / "tokenizer.json").get("added_tokens") or []:
            yield "tokenizer.json", token["content"], token["id"]
    if (folder / CONFIG_FILE).is_file():
        for number, token in (read_json(folder / CONFIG_FILE).get("added_tokens_decoder") or {}).items():
            yield CONFIG_FILE, token["content"], int(number)
    if (folder / "added_tokens.json").is_file():
        for token, number in read_json(folder / "added_tokens.json").items():
            yield "added_tokens.json", token, number
