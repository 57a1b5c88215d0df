"""Where files and batches are kept: in a folder, so that they outlive the server. One tenant sees nothing of another."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import time
from pathlib import Path
from typing import Any

MAX_FILES = 1000
"""Most files of a tenant, answers of batches among them; more are not taken."""
MAX_BATCHES = 1000
"""Most batches of a tenant that are remembered; the oldest that have ended are forgotten."""
ENDED = ("completed", "failed", "cancelled", "expired")
SHARED = "shared"
"""Folder of those who need no key."""


class Records:
    """JSON objects by their ids, each a file of a folder, replaced as a whole. An id is `prefix` and 32 hexadecimal digits,
    which ascend with time, and perhaps a letter; whatever else is asked for, such as a path, is not there."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self._prefix = folder, prefix
        self._id = re.compile(rf"{prefix}[0-9a-f]{{32}}[oe]?")
        folder.mkdir(parents=True, exist_ok=True)

    def new_id(self) -> str:
        """An id that nobody can guess."""
        return f"{self._prefix}{time.time_ns():016x}{secrets.token_hex(8)}"

    def put(self, record_id: str, record: dict[str, Any]) -> None:
        """Keep a record, in place of an earlier one."""
        self.write(f"{record_id}.json", json.dumps(record).encode())

    def write(self, name: str, content: bytes) -> None:
        """Write a file that is whole or not there, also if the process is killed meanwhile."""
        unfinished = self.folder / f"{name}.part"
        unfinished.write_bytes(content)
        unfinished.replace(self.folder / name)

    def get(self, record_id: str) -> dict[str, Any] | None:
        """A record, if it is there."""
        if not self._id.fullmatch(record_id):
            return None
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{record_id}.json").read_bytes())
        except FileNotFoundError:
            return None
        return record

    def ids(self) -> list[str]:
        """All ids, the newest first."""
        return sorted((path.stem for path in self.folder.glob("*.json") if self._id.fullmatch(path.stem)), reverse=True)

    def delete(self, record_id: str) -> None:
        """Forget a record that is there."""
        (self.folder / f"{record_id}.json").unlink()


class Room:
    """The files and batches of one tenant. Records are OpenAI's objects."""

    def __init__(self, folder: Path) -> None:
        self.files = Records(folder / "files", "file-")
        self.batches = Records(folder / "batches", "batch_")

    def content(self, file_id: str) -> Path:
        """Where a file's content is; a batch writes its answers there before the file has a record."""
        return self.files.folder / f"{file_id}.content"

    def add_file(self, filename: str, content: bytes) -> dict[str, Any]:
        """Keep a file.

        Raises:
            ValueError: there are too many.
        """
        if len(self.files.ids()) >= MAX_FILES:
            raise ValueError(f"{MAX_FILES} files are kept, and no more may be; delete some")
        file_id = self.files.new_id()
        self.files.write(f"{file_id}.content", content)
        return self.publish(file_id, filename, "batch")

    def publish(self, file_id: str, filename: str, purpose: str) -> dict[str, Any]:
        """Make a record for a content that is there."""
        record = {
            "id": file_id, "object": "file", "bytes": self.content(file_id).stat().st_size, "created_at": int(time.time()),
            "expires_at": None, "filename": filename, "purpose": purpose, "status": "processed", "status_details": None,
        }  # fmt: skip
        self.files.put(file_id, record)
        return record

    def delete_file(self, file_id: str) -> None:
        """Forget a file that is there."""
        self.files.delete(file_id)
        self.content(file_id).unlink()

    def forget_batches(self) -> None:
        """Forget the oldest that have ended where there are too many."""
        for batch_id in self.batches.ids()[MAX_BATCHES:]:
            record = self.batches.get(batch_id)
            if record is not None and record["status"] in ENDED:
                self.batches.delete(batch_id)

    def tidy(self) -> None:
        """Remove what a process left that was killed while it wrote."""
        for records in (self.files, self.batches):
            for path in records.folder.glob("*.part"):
                path.unlink()
        for path in self.files.folder.glob("*.content"):
            if path.stem[-1] not in "oe" and self.files.get(path.stem) is None:
                path.unlink()


class BatchStore:
    """A folder with a room for each tenant, for one server at a time.

    Args:
        max_file_bytes: of one file.

    Raises:
        ValueError: another server uses the folder. OSError: it cannot be made or written.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when this process ends
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"another server uses {folder}; give each its own --files-dir") from None
        for path in folder.iterdir():
            if path.is_dir():
                Room(path).tidy()

    @property
    def max_body_bytes(self) -> int:
        """Of the form that brings a file."""
        return self.max_file_bytes + (1 << 16)

    def room(self, tenant: str | None) -> Room:
        """A tenant's room."""
        return Room(self.folder / (tenant or SHARED))

    def unfinished(self) -> list[tuple[str | None, str]]:
        """Tenants and ids of the batches that have not ended, the oldest first."""
        found = []
        for path in self.folder.iterdir():
            if path.is_dir():
                batches = Room(path).batches
                tenant = None if path.name == SHARED else path.name
                found += [
                    (tenant, each) for each in batches.ids()
                    if (record := batches.get(each)) is not None and record["status"] not in ENDED
                ]  # fmt: skip
        return sorted(found, key=lambda pair: pair[1])

    def close(self) -> None:
        """Let another server use the folder."""
        os.close(self._lock)
