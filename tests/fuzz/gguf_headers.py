"""GGUF files whose header has been changed: any byte of it, or one entry's value, type or length."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import gguf

from solutions.tests.gguf_files import write_gguf
from solutions.tests.tiny_models import make_tiny_llama
from tests.fuzz.loading import SIZES, check_loads_or_is_refused, damage, quiet


@cache
def base() -> tuple[bytes, list[int], int]:
    """A small file; where its entries and tensors are described; where its tensors begin."""
    with tempfile.TemporaryDirectory() as made:
        model = make_tiny_llama(Path(made) / "hf", **SIZES, vocab_size=262)
        more = {
            "llama__rope__scaling__type": "linear",
            "llama__rope__scaling__factor": 2.0,
            "llama__attention__sliding_window": 8,
        }
        path = write_gguf(Path(made) / "tiny.gguf", model, names=["<|im_end|>"], **more)
        reader = gguf.GGUFReader(path)
        places = [field.offset for field in reader.fields.values()] + [tensor.field.offset for tensor in reader.tensors]
        return path.read_bytes(), places, reader.data_offset


def run(rng: random.Random) -> None:
    """One file, with the mistakes that `rng` draws."""
    content, places, header = base()
    if rng.random() < 0.4:
        content = damage(content, rng, within=header)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            start = rng.choice(places)
            content = content[:start] + damage_entry(content[start:], rng)
    if rng.random() < 0.05:
        content = content[: rng.randrange(len(content))]
    with quiet(), tempfile.TemporaryDirectory() as made:
        path = Path(made) / "model.gguf"
        path.write_bytes(content)
        check_loads_or_is_refused(path)


def damage_entry(content: bytes, rng: random.Random) -> bytes:
    """Change the entry, name first, that `content` begins with: its type, its value, or any of its bytes."""
    name = int.from_bytes(content[:8], "little")
    kind = 8 + min(name, 200)
    value = kind + 4
    where = rng.randrange(4)
    if where == 0:
        return content[:kind] + rng.randrange(14).to_bytes(4, "little") + content[value:]
    size = rng.choice((1, 4, 8))
    number = rng.choice((0, 1, 2, 3, 15, 17, 256, 262, 263, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 256**size
    if where == 1:
        return content[:value] + number.to_bytes(size, "little") + content[value + size :]
    if where == 2:
        start = value + rng.randrange(24)
        return content[:start] + number.to_bytes(size, "little") + content[start + size :]
    return damage(content, rng, within=value + 16)
