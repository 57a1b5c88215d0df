"""Connects the event loop to the engine: the engine steps in a thread of its own, so that HTTP stays responsive.

Two queues join the worlds. Commands (submit, abort) go to the engine thread and take effect at the next step border;
outputs come back with one hop a step, however many requests the step served.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..batching.sampling_params import RequestOutputKind, SamplingParams, StructuredOutput
from ..batching.scheduler_config import QueueFullError
from ..core.output import RequestOutput
from ..core.structured.grammar_queue import CompilingStoppedError
from .output_stream import OutputStream

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

    from ..core.engine import LLMEngine
    from ..core.input import EngineRequest, Prompt

logger = logging.getLogger(__name__)

INLINE_LIMIT = 2048
"""Characters or token ids up to which prompts are prepared on the event loop; longer ones go to a thread."""
HEALTH_SECONDS = 1.0
"""Seconds between two checks: of an idle engine, whether all its ranks live; of a busy one, whether its step hangs."""

FULL = "{waiting} tokens of prompts are waiting, at most {limit} may; try again later"
ENDED, FAILED = "the server is shutting down", "the engine has failed; the server's log has the cause"
"""What clients learn when the engine's thread has ended."""


class EngineDeadError(RuntimeError):
    """The engine failed or was shut down; no request can be served any more."""


class AsyncEngine:
    """An `LLMEngine` for use from one event loop.

    All methods are called on the loop, except `shutdown`, which may be called from any thread but the engine's.

    Args:
        max_waiting_tokens: of prompts that wait; requests beyond it are refused. None: no limit.
        stall_seconds: a step that takes longer counts as a failure of the engine.

    Attributes:
        may_step: asked before each step. While it returns False, requests stay queued and no step runs; call `between_steps`
            when its answer changes.
        on_death: called on the loop when the engine has failed, once all its requests have been told.
        on_rejection: called with the reason when a queue is full: "requests" or "tokens" on the engine's thread, "forms" on
            the loop.
        is_draining: set by the server when it wants no new requests; this class only holds the flag.
    """

    def __init__(self, engine: LLMEngine, max_waiting_tokens: int | None = None, stall_seconds: float = 300.0) -> None:
        self.engine = engine
        self.max_waiting_tokens = max_waiting_tokens
        self.stall_seconds = stall_seconds
        self.may_step: Callable[[], bool] = lambda: True
        self.on_death: Callable[[], None] | None = None
        self.on_rejection: Callable[[str], None] | None = None
        self.is_draining = False
        self._step_since: float | None = None
        self._loop: asyncio.AbstractEventLoop  # what `start` binds to
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._streams: dict[str, OutputStream] = {}  # touched by the event loop only
        self._death: str | None = None  # touched by the event loop only
        self._wake = threading.Condition()  # guards the two below
        self._commands: list[Callable[[], None]] = []
        self._stopping = False

    def start(self) -> None:
        """Bind to the running event loop and start the engine thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._loop.call_later(HEALTH_SECONDS, self._watch)

    def shutdown(self) -> None:
        """Stop after the step that is running, fail what is unfinished with `EngineDeadError`, and join the thread, however
        long its step takes, unless it hangs (`_is_stalled`) or was never started. The engine's processes that compile grammars
        are ended before that (`engine.input.close`)."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.engine.input.close()
        if self._thread.ident is not None:
            while self._thread.is_alive() and not self._is_stalled():
                self._thread.join(HEALTH_SECONDS)

    @property
    def is_running(self) -> bool:
        """False once the engine has failed or was shut down."""
        return self._death is None and self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        """Requests that are being answered; read it in the event loop."""
        return len(set(self._streams.values()))

    async def prepare(
        self, request_id: str, prompts: list[Prompt], params: SamplingParams, priority: int = 0, client: str | None = None
    ) -> list[EngineRequest]:
        """Tokenize and validate prompts, without bothering the engine thread; several get ids ``request_id-0``, …

        Args:
            client: for whom; clients take turns where forms of answers wait until they are compiled, and, with
                ``--scheduling-policy fair``, in the queue.

        Raises:
            ValueError: a prompt or a parameter is not valid.
            QueueFullError: too many forms wait to be compiled. EngineDeadError: the engine was shut down meanwhile.
        """
        names = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
        pairs = list(zip(names, prompts, strict=True))

        def work() -> list[EngineRequest]:
            return [self.engine.prepare(name, prompt, params, priority) for name, prompt in pairs]

        size = sum(map(_length, prompts))
        requests = work() if size <= INLINE_LIMIT else await asyncio.to_thread(work)
        for request in requests:
            request.client = client
        if params.structured_output is not None:
            grammar = await self._compile(params.structured_output, client)
            for request in requests:
                request.grammar = grammar
        return requests

    async def submit(self, requests: list[EngineRequest]) -> OutputStream:
        """Hand requests to the engine, all or none; returns when it has taken them.

        Raises:
            QueueFullError: too many requests wait.
            EngineDeadError: the engine failed or was shut down.
            ValueError: a request id is in use.
        """
        if self._death is not None:
            raise EngineDeadError(self._death)
        for request in requests:
            if request.request_id in self._streams:
                raise ValueError(f"request id {request.request_id!r} is in use")
        delta = all(request.params.output_kind is RequestOutputKind.DELTA for request in requests)
        stream = OutputStream([request.request_id for request in requests], self._abort, delta)
        self._streams.update((request.request_id, stream) for request in requests)
        self._send(partial(self._accept, requests, stream))
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> OutputStream:
        """`prepare` and `submit` one prompt: ``async for output in await engine.generate(…)``."""
        return await self.submit(await self.prepare(request_id, [prompt], params, priority))

    def between_steps(self, command: Callable[[], None]) -> None:
        """Let the engine's thread run something at its next step border, or at once if it has no work."""
        self._send(command)

    # ------------------------------------------------------------------------------------------- on the event loop

    async def _compile(self, wanted: StructuredOutput, client: str | None) -> CompiledGrammar:
        """A compiled form; who is cancelled here does not wait for it any more."""
        try:
            return await asyncio.wrap_future(self.engine.input.compile(wanted, client))
        except CompilingStoppedError as error:
            raise EngineDeadError(str(error)) from None
        except QueueFullError as error:
            if self.on_rejection is not None:
                self.on_rejection(error.reason)
            raise

    def _watch(self) -> None:
        """Every second, see whether a step hangs."""
        if self._death is None and self._is_stalled():
            logger.error("A step of the engine has taken more than %g seconds", self.stall_seconds)
            self._fail("the engine hangs; the server's log has more")
        if self._death is None:
            self._loop.call_later(HEALTH_SECONDS, self._watch)

    def _is_stalled(self) -> bool:
        since = self._step_since
        return since is not None and time.monotonic() - since > self.stall_seconds

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _abort(self, request_ids: list[str]) -> None:
        """Abort requests that nobody reads any more: forget their streams, and send the engine one command to drop them all at
        its next step border. Unknown ids are ignored: these requests have finished."""
        running = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if running:
            self._send(partial(self._abort_now, running))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Put a step's outputs into their streams, and forget under which name a request that has finished had its stream. A
        stream may serve several requests; one that was aborted has none."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # aborted while the step was running
                continue
            stream.put(output)
            if output.finished:
                del self._streams[output.request_id]

    def _fail(self, reason: str) -> None:
        """Declare the engine dead for this reason (`_death`): forget the streams, end each of them, once, with an
        `EngineDeadError` of it, then call `on_death`, unless this is how a shutdown ends. Later calls do nothing."""
        if self._death is not None:  # a thread that was given up has ended after all
            return
        self._death = reason
        streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(EngineDeadError(reason))
        if self.on_death is not None and not self._stopping:
            self.on_death()

    # -------------------------------------------------------------------------------------------- on the engine thread

    def _run(self) -> None:
        """What the engine's thread does until it is told to stop: take commands, step if there is work (`_has_work`), post the
        outputs of a step in one piece, if there are any. `_step_since` is the time, on `time.monotonic`, at which the step
        began that is running; None between steps, while commands are carried out too.

        Whatever happens, the last thing that it posts is `_fail` with a reason that may be shown to clients: `ENDED`, or
        `FAILED` behind an exception, which goes to the log.
        """
        reason = ENDED
        try:
            while (commands := self._next_commands()) is not None:
                for command in commands:
                    command()
                if self._has_work():
                    self._step_since = time.monotonic()
                    outputs = self.engine.step()
                    self._step_since = None
                    if outputs:
                        self._post(self._deliver, outputs)
        except Exception:
            reason = FAILED
            logger.exception("The engine has failed")
        finally:
            self._post(self._fail, reason)

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """Sleep until there is something to do: a command, requests to step for, or the end. While it sleeps, it checks the
        engine's health every `HEALTH_SECONDS`, and lets pass what that raises.

        Returns:
            All commands, oldest first, none of which comes again; None when the thread has to end, whatever waits.
        """
        with self._wake:
            while not self._wake.wait_for(lambda: self._stopping or self._commands or self._has_work(), HEALTH_SECONDS):
                self.engine.check_health()
            commands, self._commands = self._commands, []
            return None if self._stopping else commands

    def _has_work(self) -> bool:
        """Whether there is a step to make, and it may be made."""
        return self.engine.has_unfinished_requests() and self.may_step()

    def _accept(self, requests: list[EngineRequest], stream: OutputStream) -> None:
        """Submit all requests of a stream, or none: where one is refused, by `_admit` or by the engine (QueueFullError, or
        ValueError for an id in use), those before it are aborted at once (`_abort_now`). By `_post` the stream is told, once,
        that they are taken (`accept`) or the error (`fail`); and `on_rejection`, if somebody listens, the `reason` of a full
        queue.
        """
        for done, request in enumerate(requests):
            try:
                self._admit(request)
                self.engine.submit(request)
            except (QueueFullError, ValueError) as error:
                self._abort_now([earlier.request_id for earlier in requests[:done]])
                if self.on_rejection is not None and isinstance(error, QueueFullError):
                    self.on_rejection(error.reason)
                self._post(stream.fail, error)
                return
        self._post(stream.accept)

    def _admit(self, request: EngineRequest) -> None:
        """Check that there is room for a request.

        Raises:
            QueueFullError: more than `max_waiting_tokens` (None: no limit) would wait; the message is `FULL` with the numbers,
                the reason "tokens". An empty queue takes any request.
        """
        limit = self.max_waiting_tokens
        if limit is None:
            return
        waiting = self.engine.num_waiting_tokens
        if waiting and waiting + len(request.prompt_token_ids) > limit:
            raise QueueFullError(FULL.format(waiting=waiting, limit=limit), "tokens")

    def _abort_now(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.engine.abort_request(request_id)

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        if not self._loop.is_closed():  # a closed loop has nobody left to tell
            self._loop.call_soon_threadsafe(callback, *args)


def _length(prompt: Prompt) -> int:
    """Characters or token ids of a prompt, whatever is more."""
    if isinstance(prompt, str):
        return len(prompt)
    return max(len(prompt.get("prompt", "")), len(prompt.get("prompt_token_ids", ())))
