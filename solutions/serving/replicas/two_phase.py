"""Sends a prompt to a server that computes prompts, then the request to one that writes answers; waits for nobody too long.

The first answers one token, which nobody reads: what counts are the KV blocks that it keeps, from where the second fetches them
(`--kv-transfer-config`). So whatever becomes of the first phase, the second has all it needs to answer alone. A prompt shorter
than a block of `prefix_router` goes to the second phase at once, and so does what no server hands over.

Nothing here knows of HTTP libraries or Ray: a `Send` brings a call to a server. Sources: vLLM's proxies for disaggregated
prefill; Zhong et al., "DistServe", OSDI 2024, §4.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import error_body
from .prefix_router import PrefixAffinity, request_keys

REST_SECONDS = 5.0
"""A server that could not be reached is asked last for so long."""
GENERATING = ("/v1/completions", "/v1/chat/completions")
"""Paths whose prompts are computed first."""
LEFT_OUT = (
    "stream", "stream_options", "n", "best_of", "min_tokens", "logprobs", "top_logprobs", "use_beam_search", "response_format",
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "max_completion_tokens",
)  # fmt: skip
"""What shapes an answer and not its prompt."""


class GoneError(Exception):
    """A server cannot be reached, or has ended within an answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to a server; `path` with its query."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(slots=True)
class Reply:
    """A server's answer: its head, and its body as it comes. Who does not read `pieces` to the end calls `close`."""

    status: int
    headers: list[tuple[bytes, bytes]]
    pieces: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]]

    @property
    def is_events(self) -> bool:
        """Whether it is a stream of events."""
        return any(name.lower() == b"content-type" and b"text/event-stream" in value for name, value in self.headers)


Send = Callable[[str, Call], Awaitable[Reply]]
"""(server, call) → the answer, as soon as its head is there. Raises `GoneError`, and so do its pieces."""


class Pool:
    """Servers that do the same, of which each request goes to the one that knows most of its prompt and has little to do."""

    def __init__(self, servers: Sequence[str]) -> None:
        self.loads = dict.fromkeys(servers, 0)
        self._policy = PrefixAffinity()
        self._rests_until = dict.fromkeys(servers, 0.0)

    def order(self, keys: Sequence[bytes]) -> list[str]:
        """All servers, the chosen one first; those that rest come last."""
        now = time.monotonic()
        well = {name: load for name, load in self.loads.items() if self._rests_until[name] <= now}
        first = [self._policy.choose(keys, well)] if well else []
        others = sorted(self.loads.keys() - set(first), key=lambda name: (self._rests_until[name], self.loads[name], name))
        return first + others

    def rest(self, server: str) -> None:
        """Ask it last for a while."""
        self._rests_until[server] = time.monotonic() + REST_SECONDS


def prefill_body(path: str, body: Any) -> dict[str, Any] | None:
    """The body that has a server compute a request's prompt and write one token; None where there is nothing to hand over: it
    is no request for text, or one that reads its own prompt's log-probabilities."""
    if path.partition("?")[0] not in GENERATING or not isinstance(body, dict):
        return None
    if body.get("prompt_logprobs") is not None or body.get("echo"):
        return None
    return {name: value for name, value in body.items() if name not in LEFT_OUT} | {"max_tokens": 1}


class TwoPhase:
    """Both pools, and what a request meets on its way.

    Args:
        prefill, decode: addresses of servers. send: brings them calls. prefill_seconds: so long a prompt may take; then the
            other server computes it. seconds: so long a whole request may take; what is late is refused, or its stream ends
            with an error.

    Attributes:
        counts: (phase, outcome) → how many; outcomes are "done", "skipped", "refused", "failed" and "late".
    """

    def __init__(
        self, prefill: Sequence[str], decode: Sequence[str], send: Send, prefill_seconds: float, seconds: float
    ) -> None:
        self.prefill, self.decode, self._send = Pool(prefill), Pool(decode), send
        self._prefill_seconds, self._seconds = prefill_seconds, seconds
        self.counts: Counter[tuple[str, str]] = Counter()

    async def answer(self, call: Call) -> Reply:
        """Both phases of a request. Whoever leaves closes the reply, and with it the server's work for it."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            body = json.loads(call.body) if call.body else None
        except (ValueError, RecursionError):
            body = None  # the server says what is wrong
        keys, first = request_keys(body), prefill_body(call.path, body)
        try:
            async with asyncio.timeout_at(deadline):
                if first is None or not keys:
                    self.counts["prefill", "skipped"] += 1
                elif (refusal := await self._compute_prompt(call, first, keys)) is not None:
                    return refusal
                return await self._write(call, keys, deadline)
        except TimeoutError:
            self.counts["decode", "late"] += 1
            return error_reply(504, f"there was no answer within {self._seconds:g} s")

    async def _compute_prompt(self, call: Call, body: dict[str, Any], keys: Sequence[bytes]) -> Reply | None:
        """The first phase; a reply only if a server refuses the request, as it is wrong or too much waits."""
        call = replace(call, path=call.path.partition("?")[0], body=json.dumps(body).encode())
        for server in self.prefill.order(keys):
            self.prefill.loads[server] += 1
            try:
                async with asyncio.timeout(self._prefill_seconds):
                    reply = await self._send(server, call)
                    try:
                        whole = b"".join([piece async for piece in reply.pieces])
                    finally:
                        await reply.close()
            except GoneError:
                self.counts["prefill", "failed"] += 1
                self.prefill.rest(server)
                continue
            except TimeoutError:
                self.counts["prefill", "late"] += 1
                self.prefill.rest(server)
                return None
            finally:
                self.prefill.loads[server] -= 1
            if reply.status < 400:
                self.counts["prefill", "done"] += 1
                return None
            if reply.status < 500:
                self.counts["prefill", "refused"] += 1
                return whole_reply(reply.status, reply.headers, whole)
            self.counts["prefill", "failed"] += 1
            self.prefill.rest(server)
        return None

    async def _write(self, call: Call, keys: Sequence[bytes], deadline: float) -> Reply:
        """The second phase: the answer of a server, of another one if the first cannot be reached."""
        for server in self.decode.order(keys):
            self.decode.loads[server] += 1
            try:
                reply = await self._send(server, call)
            except BaseException as error:
                self.decode.loads[server] -= 1
                if not isinstance(error, GoneError):
                    raise
                self.counts["decode", "failed"] += 1
                self.decode.rest(server)
                continue
            return self._passed_on(server, reply, deadline)
        return error_reply(503, "no server that writes answers can be reached; try again later")

    def _passed_on(self, server: str, reply: Reply, deadline: float) -> Reply:
        """A server's answer, whose end is noted and whose pieces come in time."""
        open_replies = [server]

        async def close() -> None:
            if open_replies:
                self.decode.loads[open_replies.pop()] -= 1
                await reply.close()

        async def pieces() -> AsyncIterator[bytes]:
            problem, outcome = "", "refused" if reply.status >= 400 else "done"
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        piece = await anext(reply.pieces, None)
                    if piece is None:
                        break
                    yield piece
            except GoneError:
                problem, outcome = "the server that wrote this answer has died", "failed"
                self.decode.rest(server)
            except TimeoutError:
                problem, outcome = f"the answer took more than {self._seconds:g} s", "late"
            finally:
                await close()
            self.counts["decode", outcome] += 1
            if problem and not reply.is_events:
                raise GoneError(problem)
            if problem:
                yield b"data: " + _error_body(503, problem) + b"\n\ndata: [DONE]\n\n"

        return Reply(reply.status, reply.headers, pieces(), close)


def whole_reply(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> Reply:
    """An answer that is there as a whole."""

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    async def close() -> None:
        return

    return Reply(status, headers, pieces(), close)


def error_reply(status: int, message: str) -> Reply:
    """A refusal in OpenAI's form."""
    body = _error_body(status, message)
    return whole_reply(status, [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))], body)


def _error_body(status: int, message: str) -> bytes:
    return error_body(message, status).model_dump_json().encode()
