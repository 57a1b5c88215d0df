"""Runs batches beside a server's live requests, one after the other, and goes on where an earlier server was stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import suppress
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Receive, Scope, Send

from .answering import BatchStoppedError, answer_all
from .batch_files import AnswerFile, BatchRequest, LineError, read_requests
from .batch_store import BatchStore, Room

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 24 * 3600
PRIORITY = 1 << 30
"""Of a batch's requests: all others, which have 0 unless they ask for more, go first."""
MAX_REQUESTS = 50_000
"""Most requests of a batch, as OpenAI has it."""
MAX_WAITING = 100
"""Most batches of a tenant that have not ended."""
EXPIRED = {"code": "batch_expired", "message": "This request could not be executed before the completion window expired."}


def for_tenant(app: ASGIApp, tenant: str | None) -> ASGIApp:
    """The application as a tenant's batch calls it: whose requests these are is known, and others go first."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {}).update(tenant=tenant, priority=PRIORITY)
        await app(scope, receive, send)

    return call


class BatchRunner:
    """Answers batches. All methods are called on the event loop.

    Args:
        app: the server's application, whose engine schedules by priority.
        at_once: how many requests may be on their way together; they share the engine with live ones.
    """

    def __init__(self, app: ASGIApp, store: BatchStore, at_once: int) -> None:
        self.app, self.store, self.at_once = app, store, at_once
        self._queue = deque(store.unfinished())
        self._more = asyncio.Event()
        self._running: tuple[str, dict[str, Any], asyncio.Task[None]] | None = None  # id, record as it is now, who answers it

    async def run(self) -> None:
        """Run batches until cancelled, or until the engine has failed. What is answered then stays, and another server that has
        the folder goes on."""
        try:
            while True:
                while not self._queue:
                    self._more.clear()
                    await self._more.wait()
                tenant, batch_id = self._queue.popleft()
                room = self.store.room(tenant)
                record = room.batches.get(batch_id)
                assert record is not None, "only what has ended is forgotten"
                task = asyncio.create_task(self._complete(room, record, for_tenant(self.app, tenant)))
                self._running = batch_id, record, task
                try:
                    await task
                finally:
                    task.cancel()
                    self._running = None
        except BatchStoppedError as error:
            logger.error("Batches are stopped: %s", error)

    def add(self, tenant: str | None, fields: dict[str, Any]) -> dict[str, Any]:
        """Take a new batch.

        Args:
            fields: of its record, as the client gave them.

        Raises:
            ValueError: too many wait.
        """
        if sum(one == tenant for one, _ in self._queue) >= MAX_WAITING:
            raise ValueError(f"{MAX_WAITING} batches wait, and no more may; try again later")
        room, now = self.store.room(tenant), int(time.time())
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        record = fields | {
            "id": room.batches.new_id(), "object": "batch", "status": "validating", "errors": None, "output_file_id": None,
            "error_file_id": None, "created_at": now, "expires_at": now + WINDOW_SECONDS,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, **{f"{name}_at": None for name in times},
        }  # fmt: skip
        room.batches.put(record["id"], record)
        room.forget_batches()
        self._queue.append((tenant, record["id"]))
        self._more.set()
        return record

    def get(self, tenant: str | None, batch_id: str) -> dict[str, Any] | None:
        """A batch as it is now, if it is there."""
        stored = self.store.room(tenant).batches.get(batch_id)
        running = self._running
        return running[1] if stored is not None and running is not None and running[0] == batch_id else stored

    def cancel(self, tenant: str | None, record: dict[str, Any]) -> None:
        """End a batch that has not ended: at once if it waits, else as soon as what is on its way is aborted."""
        if record["status"] == "cancelling":
            return
        room, waits = self.store.room(tenant), (tenant, record["id"])
        _enter(room, record, "cancelling")
        if self._running is not None and self._running[0] == record["id"]:
            self._running[2].cancel()
        else:
            self._queue.remove(waits)
            _enter(room, record, "cancelled")

    async def _complete(self, room: Room, record: dict[str, Any], app: ASGIApp) -> None:
        """Bring a batch to its end, wherever it is."""
        if record["status"] == "cancelling":  # when an earlier server ended
            _finish(room, record, "cancelled")
            return
        try:
            requests = await asyncio.to_thread(read_requests, room.content(record["input_file_id"]), record["endpoint"])
            if len(requests) > MAX_REQUESTS:
                raise LineError(f"a batch may have {MAX_REQUESTS} requests, and this has {len(requests)}", None)
            await self._answer(room, record, app, requests)
        except LineError as error:
            _fail(room, record, "invalid_request", str(error), error.line)
        except asyncio.CancelledError:
            if record["status"] != "cancelling":
                raise
            _finish(room, record, "cancelled")
        except BatchStoppedError:
            raise
        except Exception:
            logger.exception("A batch has failed: %s", record["id"])
            with suppress(OSError):  # the disk may be full; then the next server tries again
                _fail(room, record, "server_error", "the batch's files cannot be read or written; the server's log has more")

    async def _answer(self, room: Room, record: dict[str, Any], app: ASGIApp, requests: list[BatchRequest]) -> None:
        """Answer what has no answer yet, until the batch expires, and finish the batch."""
        output, errors = (room.content(each) for each in _answer_ids(record))
        with AnswerFile(output, requests) as good, AnswerFile(errors, requests) as bad:
            record["request_counts"]["total"] = len(requests)
            _enter(room, record, "in_progress")

            def put(request: BatchRequest, line: dict[str, Any]) -> None:
                (good if line["response"] and line["response"]["status_code"] == 200 else bad).write(request.custom_id, line)
                count()

            def count() -> None:
                record["request_counts"].update(completed=len(good.answered), failed=len(bad.answered))

            def left() -> list[BatchRequest]:
                answered = good.answered | bad.answered
                return [one for one in requests if one.custom_id not in answered]

            count()
            end = "completed"
            try:
                async with asyncio.timeout(record["expires_at"] - time.time()):
                    await answer_all(app, left(), self.at_once, put)
            except TimeoutError:
                end = "expired"
                for request in left():
                    put(request, {"id": f"batch_req_{uuid4().hex}", "response": None, "error": EXPIRED})
        if end == "completed":
            _enter(room, record, "finalizing")
        _finish(room, record, end)


def _enter(room: Room, record: dict[str, Any], status: str) -> None:
    """Let a batch have a status, and remember when it got it first."""
    record["status"] = status
    record[f"{status}_at"] = record[f"{status}_at"] or int(time.time())
    room.batches.put(record["id"], record)


def _fail(room: Room, record: dict[str, Any], code: str, message: str, line: int | None = None) -> None:
    record["errors"] = {"object": "list", "data": [{"code": code, "message": message, "line": line, "param": None}]}
    _enter(room, record, "failed")


def _answer_ids(record: dict[str, Any]) -> tuple[str, str]:
    """Ids of the files with the answers and with the errors of a batch."""
    name = "file-" + record["id"].removeprefix("batch_")
    return f"{name}o", f"{name}e"


def _finish(room: Room, record: dict[str, Any], status: str) -> None:
    """Make files of the answers, and end the batch."""
    for field, file_id, name in zip(("output_file_id", "error_file_id"), _answer_ids(record), ("output", "error"), strict=True):
        path = room.content(file_id)
        if path.exists() and path.stat().st_size:
            record[field] = room.publish(file_id, f"{record['id']}_{name}.jsonl", "batch_output")["id"]
        else:
            path.unlink(missing_ok=True)
    _enter(room, record, status)
