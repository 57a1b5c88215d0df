"""A GGUF file that is cut into several, as ``llama-gguf-split`` names them: ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import re
from pathlib import Path

import gguf

from .config.entries import Entries, ModelError

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def shards_of(path: Path) -> list[Path]:
    """All files of the model of which `path` is one, in order; a file that is named otherwise is alone.

    Raises:
        ModelError: some are missing.
    """
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    files = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or path not in files:
        raise ModelError(f"{path.parent} lacks {len(missing)} of {len(files)} files of the model: {', '.join(missing[:3])}")
    return files


def check_shards(files: list[Path], readers: list[gguf.GGUFReader]) -> None:
    """See that the files say what their names say.

    Raises:
        ModelError: they are parts of another model, or the one that is there is a part of several.
    """
    for number, (file, reader) in enumerate(zip(files, readers, strict=True)):
        said = Entries({key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}, str(file))
        count = said.whole("split.count", 1, low=0) or 1
        if (said.whole("split.no", 0, low=0), count) != (number, len(files)):
            raise ModelError(
                f"{file} is part {said.whole('split.no', 0, low=0) + 1} of {count} of a model, and its name says "
                f"{number + 1} of {len(files)}; keep the names that the parts had: NAME-00001-of-{count:05}.gguf"
            )
