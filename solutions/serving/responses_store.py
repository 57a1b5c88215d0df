"""Responses that clients may come back to, in bounded memory."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .responses_items import Message

MAX_BYTES = 64 << 20
EXPIRY_SECONDS = 3600.0


@dataclass(slots=True)
class StoredResponse:
    """One response.

    Attributes:
        response: as the API shows it; changes while it is computed.
        messages: the conversation up to and with its answer, without instructions.
        items: of its input.
        cancel: ends its computation; None once that has ended.
        size: bytes, counted when its computation ended. until: monotonic seconds.
    """

    response: dict[str, Any]
    messages: list[Message]
    items: list[dict[str, Any]]
    cancel: Callable[[], object] | None = None
    size: int = 0
    until: float = float("inf")


class ResponseStore:
    """Keeps finished responses for a time, the newest first when memory is short. One tenant sees nothing of another.

    Args:
        max_bytes: of all finished responses with their conversations, as JSON. expiry_seconds: after a response's end.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, expiry_seconds: float = EXPIRY_SECONDS) -> None:
        self.max_bytes, self.expiry_seconds = max_bytes, expiry_seconds
        self._entries: OrderedDict[tuple[str | None, str], StoredResponse] = OrderedDict()
        self._bytes = 0

    def add(self, tenant: str | None, entry: StoredResponse) -> None:
        """Keep a response that is computed in the background; `finish` follows."""
        self._entries[tenant, entry.response["id"]] = entry

    def finish(self, tenant: str | None, entry: StoredResponse) -> None:
        """Keep a response that has ended, and drop the oldest ones beyond the limit."""
        key = tenant, entry.response["id"]
        entry.cancel, entry.until = None, time.monotonic() + self.expiry_seconds
        entry.size = len(json.dumps([entry.response, entry.messages, entry.items]))
        self._bytes += entry.size
        self._entries[key] = entry
        self._entries.move_to_end(key)
        self._drop()

    def get(self, tenant: str | None, response_id: str) -> StoredResponse | None:
        """A response, if it is there."""
        self._drop()
        return self._entries.get((tenant, response_id))

    def delete(self, tenant: str | None, response_id: str) -> bool:
        """Forget a response, and end its computation; whether it was there."""
        self._drop()
        entry = self._entries.pop((tenant, response_id), None)
        if entry is not None:
            self._bytes -= entry.size
            if entry.cancel is not None:
                entry.cancel()
        return entry is not None

    def _drop(self) -> None:
        """Forget what has expired, and the oldest finished ones while there are too many bytes."""
        now = time.monotonic()
        for key, entry in list(self._entries.items()):
            if entry.cancel is not None:
                continue  # it has not ended yet
            if entry.until > now and self._bytes <= self.max_bytes:
                return
            del self._entries[key]
            self._bytes -= entry.size
