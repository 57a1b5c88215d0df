"""What keys and values follow from, as a digest: the same in every process and on every machine that has the model's files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path

import torch

from ..quantization.layout.description import FILES
from .loader import WAYS_OUT, ModelSource
from .model_files import weight_files


def kv_identity(source: ModelSource, is_random: bool, seed: int, longest: int, *facts: object) -> bytes:
    """32 bytes that differ where equal tokens have other keys and values, or these lie differently in a block. Adapters and
    cache salts are no part of it: they are in a block's hash, beside the tokens.

    Args:
        source, is_random, seed: see `model_identity`. longest: sequence in tokens; some scalings of RoPE compute with it.
        facts: what else they depend on, such as the cache's layout, each with the same `repr` in every process.
    """
    model, longest = model_identity(source, is_random, seed), longest if source.config.rope_scaling is not None else 0
    package = __name__.partition(".")[0]  # a learner's engine may be wrong
    return sha256(repr((model, longest, package, *facts)).encode()).digest()


def model_identity(source: ModelSource, is_random: bool, seed: int) -> bytes:
    """32 bytes that differ where the weights do, or what is computed with them.

    The files are read from end to end, some 1.5 GB a second and core: of sizes and times alone nobody can tell a model from a
    version of it that was trained a little longer.

    Args:
        is_random: the weights are made up, with this `seed`, instead of those in the files.
    """
    if is_random or source.path is None:
        return sha256(repr((torch.__version__, seed, source.config)).encode()).digest()
    described = [source.path / name for name in ("config.json", *sorted(FILES)) if (source.path / name).is_file()]
    with ThreadPoolExecutor() as threads:
        digests = threads.map(_digest, [*described, *sorted(weight_files(source.path, WAYS_OUT))])
        return sha256(b"".join(digests)).digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return file_digest(file, "sha256").digest()
