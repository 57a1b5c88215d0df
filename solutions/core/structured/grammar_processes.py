"""Compiles the grammars of structured answers beside the engine, so that none delays the others for long or does harm.

A grammar is first tried in a process that is killed when it takes too long or too much memory (`grammar_worker`). If it passes,
it is compiled again here, in a thread. That takes as long again, but sending the automaton over would take longer, because
XGrammar writes it as JSON: 2 MB for a schema of 3 fields, compiled in 0.10 s, written in 0.15 s and read in 0.06 s, and 24 MB
for one of 120 fields, in 0.29, 1.86 and 0.73 s (vocabulary of 49,152, one core of a Xeon).

Two threads do this. The first gives each grammar one second, so a fast one waits at most a second or two for each other client,
whatever they have sent. Slower grammars go to the second thread, which allows each the whole limit.

The process takes some seconds to load XGrammar, and 320 MB here, of which much is shared with the engine. A server starts it in
the background as soon as it serves. Elsewhere the first structured request does, and waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from ...batching.sampling_params import StructuredOutput
from ...batching.scheduler_config import QueueFullError
from .grammar_queue import MAX_WAITING, CompilingStoppedError, FairQueue, Job
from .grammar_worker import Limits, receive
from .structured_output import GrammarCompiler
from .trial_process import TrialProcess

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

LIMITS = Limits(seconds=10.0, wall_seconds=30.0, mib=512, automaton_mib=32, token_seconds=0.1)
"""Limit in wall-clock time. It is longer than the limit in processor time, because other programs may keep the machine busy."""
SHORT_SECONDS = 1.0
"""Wall-clock limit of a form for which others wait."""
CACHE_BYTES = 256 << 20
"""Most compiled grammars that are kept."""
FAILURE_SECONDS = 60.0
"""How long the refusal of a form is remembered."""
MAX_FAILURES = 1024


class GrammarProcesses:
    """Compiles forms of answers; any thread may ask.

    Args:
        make_compiler: makes the one of this process, in a thread, when it is needed.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._make_compiler = make_compiler
        self._compiler: GrammarCompiler | None = None  # made by who starts the process
        self._process = TrialProcess(self._vocabulary)
        self._wake = threading.Condition()  # guards all below
        self._queue = FairQueue()
        self._jobs: dict[bytes, Job] = {}
        self._trials: dict[Job, socket.socket] = {}
        self._compiled: OrderedDict[bytes, CompiledGrammar] = OrderedDict()
        self._failed: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._threads: list[threading.Thread] = []
        self._stopped = False
        self.num_compiled = 0
        """Forms that were compiled, found wrong or found too dear, those that are known not counted."""

    def start(self) -> None:
        """Start the process in the background, so that who asks first need not wait for it. Whatever prevents that is told to
        who asks."""

        def work() -> None:
            with contextlib.suppress(OSError, ValueError, CompilingStoppedError):
                self._process.start()

        threading.Thread(target=work, name="start forms", daemon=True).start()

    def compile(self, wanted: StructuredOutput, client: str | None = None) -> Future[CompiledGrammar]:
        """Ask for the automaton of a form. Requests for the same form share it, also while it is compiled.

        Args:
            client: for whom; clients take turns.

        Returns:
            What gives the automaton; cancel it when it is not wanted any more. Or it raises a ValueError: the form is not well
            formed, or takes too much, as the message says; QueueFullError: too many wait; CompilingStoppedError.
        """
        key = hashlib.sha256(
            f"{wanted.kind}:{wanted.white_space!r}:{wanted.definition}".encode(errors="surrogatepass")
        ).digest()
        future: Future[CompiledGrammar] = Future()
        with self._wake:
            if self._stopped:
                future.set_exception(CompilingStoppedError("the engine is shutting down"))
                return future
            if key in self._compiled:
                self._compiled.move_to_end(key)
                future.set_result(self._compiled[key])
                return future
            if key in self._failed and self._failed[key][0] > time.monotonic():
                future.set_exception(ValueError(self._failed[key][1]))
                return future
            job = self._jobs.get(key)
            if job is not None:
                job.waiters[future] = client
            else:
                job = self._jobs[key] = Job(key, wanted, {future: client})
                self._wait(job)

        def leave(done: Future[CompiledGrammar]) -> None:
            if done.cancelled():
                self._leave(job, done)

        future.add_done_callback(leave)
        return future

    @property
    def num_waiting(self) -> int:
        """Who waits for a form."""
        with self._wake:
            return sum(len(job.waiters) for job in self._jobs.values())

    def close(self) -> None:
        """Stop. Those who wait get an error, and no process is left."""
        with self._wake:
            self._stopped = True
            jobs = list(self._jobs.values())
            self._queue.waiting.clear()
            self._wake.notify_all()
        self._process.close()
        for job in jobs:
            self._finish(job, error=CompilingStoppedError("the engine is shutting down"))

    def _wait(self, job: Job) -> None:
        """Let a form wait for a thread; if too many do, one is refused."""
        with self._wake:
            refused = self._queue.put(job)
            if not self._threads:
                for name, target in (("short", self._run_short), ("long", self._run_long)):
                    self._threads.append(threading.Thread(target=target, name=f"{name} forms", daemon=True))
                    self._threads[-1].start()
            self._wake.notify_all()
        if refused is not None:
            full = f"{MAX_WAITING} forms of answers wait to be compiled; try again later"
            self._finish(refused, error=QueueFullError(full, "forms"))

    def _leave(self, job: Job, future: Future[CompiledGrammar]) -> None:
        """A waiter has left. A form that nobody waits for is not compiled."""
        with self._wake:
            job.waiters.pop(future, None)
            if job.waiters or self._jobs.get(job.key) is not job:
                return
            del self._jobs[job.key]
            if job in self._queue.waiting:
                self._queue.waiting.remove(job)
            if job in self._trials:
                with contextlib.suppress(OSError):  # it has just ended
                    self._trials[job].shutdown(socket.SHUT_WR)

    # ------------------------------------------------------------------------------------------------- in the two threads

    def _vocabulary(self) -> dict[str, object]:
        if self._compiler is None:
            self._compiler = self._make_compiler()
        return {"vocabulary": self._compiler.vocabulary, "vocab_size": self._compiler.vocab_size}

    def _run_short(self) -> None:
        while (job := self._next(lambda: self._queue.take(False))) is not None:
            self._compile(job, replace(LIMITS, wall_seconds=SHORT_SECONDS))

    def _run_long(self) -> None:
        while (job := self._next(lambda: self._queue.take(True) or self._queue.take(False))) is not None:
            self._compile(job, LIMITS)

    def _next(self, take: Callable[[], Job | None]) -> Job | None:
        found: list[Job | None] = []

        def look() -> bool:
            found[:] = [None if self._stopped else take()]
            return self._stopped or found[0] is not None

        with self._wake:
            self._wake.wait_for(look)
        return found[0]

    def _compile(self, job: Job, limits: Limits) -> None:
        """Try a form; compile it, or let it wait for the second thread, or say why not."""
        try:
            code, trouble = self._try(job, limits)
            if self._jobs.get(job.key) is not job:
                return  # nobody waits for it any more
            if code == -signal.SIGALRM and limits.wall_seconds < LIMITS.wall_seconds:
                job.is_long = True
                self._wait(job)
            elif code in (-signal.SIGALRM, -signal.SIGPROF):
                seconds = limits.seconds if code == -signal.SIGPROF else limits.wall_seconds
                self._finish(job, trouble=f"structured_output takes more than {seconds:g} s to compile; make it simpler")
            elif code:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise ValueError(f"structured_output cannot be compiled: the process that tried it has ended ({how})")
            elif trouble is not None:
                self._finish(job, trouble=trouble)
            else:
                assert self._compiler is not None, "who started the process has made it"
                self._finish(job, grammar=self._compiler.compile(job.wanted))
        except Exception as error:
            self._finish(job, error=error)

    def _try(self, job: Job, limits: Limits) -> tuple[int, str | None]:
        """How the trial of a form ended, and what it said is wrong. If the process that it was to be forked from has been
        killed, it is tried in a new one, once.

        Raises:
            ValueError: no process can be had.
        """
        problem = "it has ended twice; the log has more"
        for _ in range(2):
            trouble = None
            try:
                with self._process.begin(job.wanted, limits) as trial:
                    with self._wake:
                        self._trials[job] = trial
                        if self._jobs.get(job.key) is not job:
                            trial.shutdown(socket.SHUT_WR)
                    while (message := receive(trial)) is not None:
                        if "ended" in message:
                            return message["ended"], trouble
                        trouble = message["trouble"]
            except OSError as error:
                problem = str(error)
            finally:
                with self._wake:
                    self._trials.pop(job, None)
        raise ValueError(f"structured_output needs a process of its own to compile it in, which cannot be had: {problem}")

    def _finish(
        self, job: Job, grammar: CompiledGrammar | None = None, trouble: str | None = None, error: Exception | None = None
    ) -> None:
        """Tell all who wait for a form: the automaton, or what is wrong with it, which is remembered; or another error."""
        with self._wake:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]
            waiters, job.waiters = list(job.waiters), {}
            self.num_compiled += error is None
            if grammar is not None:
                self._compiled[job.key] = grammar
                while sum(one.memory_size_bytes for one in self._compiled.values()) > CACHE_BYTES:
                    self._compiled.popitem(last=False)
            if trouble is not None:
                self._failed[job.key] = time.monotonic() + FAILURE_SECONDS, trouble
                self._failed.move_to_end(job.key)
                while len(self._failed) > MAX_FAILURES:
                    self._failed.popitem(last=False)
        for future in waiters:
            if future.set_running_or_notify_cancel():
                if grammar is not None:
                    future.set_result(grammar)
                else:
                    future.set_exception(error or ValueError(trouble))
