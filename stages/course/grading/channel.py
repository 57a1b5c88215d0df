"""The results of a graded process, each signed with a key that is used once: written there, and read by the grader.

A record is its length (4 bytes), its signature (32 bytes) and a tuple in Python's own format, which begins with its number.
Nobody without the key adds one, takes one out or changes one without notice.
"""

from __future__ import annotations

import hashlib
import marshal
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE, SIGNATURE = 4, 32
LONGEST = 64 << 20
"""Bytes of results that are read; a hostile file could write more."""
FORGED = "there are results that are not the grader's"


def signed_writer(path: str, key: bytes) -> Callable[..., None]:
    """What writes records. It calls nothing that Python code could have replaced by then."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write, dump, sign = os.write, marshal.dumps, hashlib.blake2b
    count = 0

    def send(*record: Any) -> None:
        nonlocal count
        body = dump((count, *record))
        count += 1
        write(file, len(body).to_bytes(SIZE, "big") + sign(body, key=key, digest_size=SIGNATURE).digest() + body)

    return send


def read_records(path: Path, key: bytes, ended: bool) -> tuple[list[tuple[Any, ...]], str]:
    """The records up to the first that is not right, and what is wrong with that one, or "".

    Args:
        ended: the process came to its own end; otherwise it may have been in the middle of a record.
    """
    if not path.is_file():
        return [], ""
    with path.open("rb") as file:
        text = file.read(LONGEST)
    records: list[tuple[Any, ...]] = []
    at = 0
    while at < len(text):
        start = at + SIZE + SIGNATURE
        size = int.from_bytes(text[at : at + SIZE], "big")
        body = text[start : start + size]
        if not body or len(body) != size:
            return records, FORGED if ended and len(text) < LONGEST else ""
        if hashlib.blake2b(body, key=key, digest_size=SIGNATURE).digest() != text[at + SIZE : start]:
            return records, FORGED
        number, *record = marshal.loads(body)
        if number != len(records):
            return records, FORGED
        records.append(tuple(record))
        at = start + size
    return records, ""
