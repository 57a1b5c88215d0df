"""The files of an offline batch: requests in, answers out, a line of JSON each, in OpenAI's batch format."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of a batch.

    Attributes:
        custom_id: the caller's name for it, which no other line of the file has.
        url: the route that answers it, one of `URLS`.
        body: what a client would post there. A response is not stored unless it asks for that.
    """

    custom_id: str
    url: str
    body: dict[str, Any]


class LineError(ValueError):
    """A line of a batch file is no request; `line` is its number, from 1; None: there is no line."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


def read_requests(path: Path, endpoint: str | None = None) -> list[BatchRequest]:
    """The requests of a batch file, in its order. Empty lines are passed over.

    Args:
        endpoint: what all of them must have as url; None: any of `URLS`.

    Raises:
        LineError: a line is not a request, or two have the same ``custom_id``, or there is none.
        OSError: the file cannot be read.
    """
    urls = URLS if endpoint is None else (endpoint,)
    requests: dict[str, BatchRequest] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line), urls)
            if request.custom_id in requests:
                raise ValueError(f"an earlier line has the custom_id {request.custom_id!r}, too")
        except ValueError as error:  # json's errors and UnicodeDecodeError are among them
            raise LineError(str(error), number) from None
        requests[request.custom_id] = request
    if not requests:
        raise LineError("the file holds no requests; write one a line, as JSON", None)
    return list(requests.values())


def _request(line: Any, urls: tuple[str, ...]) -> BatchRequest:
    if not isinstance(line, dict):
        raise ValueError("a line must be a JSON object with custom_id, method, url and body")
    custom_id, method, url, body = (line.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be a string that is not empty")
    if method != "POST":
        raise ValueError(f"method must be POST, got {method!r}")
    if url not in urls:
        raise ValueError(f"url must be one of {', '.join(urls)}; got {url!r}")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object: what a client would post to the url")
    for field in ("stream", "background"):
        if body.get(field):
            raise ValueError(f"{field} must be off: a batch has whole answers")
    return BatchRequest(custom_id, url, {"store": False, **body} if url == "/v1/responses" else body)


class AnswerFile:
    """The answers of a batch, written a whole line at a time, so that a run that was killed can go on where it was.

    What an earlier run left is kept, but for a last line that was cut off. Use as a context manager.

    Attributes:
        answered: the ``custom_id`` of each line that is there.

    Raises:
        ValueError: another run writes to the file now, or it holds something else than answers to `requests`.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, requests: list[BatchRequest]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self.answered = self._read(path, {request.custom_id for request in requests})
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, path: Path, known: set[str]) -> set[str]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when this process ends
        except BlockingIOError:
            raise ValueError(f"another run writes to {path} now") from None
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            answered = [json.loads(line)["custom_id"] for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is there and holds no answers of a batch; choose another file") from None
        if strangers := set(answered) - known:
            raise ValueError(f"{path} holds answers to another batch, such as {min(strangers)!r}; choose another file")
        os.ftruncate(self._file, len(whole))
        return set(answered)

    def write(self, custom_id: str, line: dict[str, Any]) -> None:
        """Add an answer.

        Raises:
            OSError: the disk is full, say; the file then may end in half a line, which the next run drops.
        """
        left = memoryview((json.dumps({"custom_id": custom_id, **line}, ensure_ascii=False) + "\n").encode())
        while left:
            left = left[os.write(self._file, left) :]
        self.answered.add(custom_id)

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
