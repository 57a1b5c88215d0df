"""The process in which grammars are tried, as the engine holds it; `grammar_worker` is what runs in it."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict

from ...batching.sampling_params import StructuredOutput
from .grammar_queue import CompilingStoppedError
from .grammar_worker import Limits, send

ANSWER_SECONDS = 120.0
"""How long a process may take to start, and then to answer behind its limit."""
STOP_SECONDS = 5.0


class TrialProcess:
    """The process in which forms are tried. It starts when there is something to try, and again after it has died.

    Args:
        vocabulary: how to make one's compiler, arguments of `GrammarCompiler.from_vocabulary`.
    """

    def __init__(self, vocabulary: Callable[[], dict[str, object]]) -> None:
        self._vocabulary = vocabulary
        self._closed = False
        self._lock = threading.RLock()  # guards all below; `close` only reads before it has it
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def begin(self, wanted: StructuredOutput, limits: Limits) -> socket.socket:
        """Begin a trial.

        Returns:
            A connection on which its end will be told; whoever shuts down its writing side ends the trial.

        Raises:
            OSError: it cannot be started, or died just now.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._started(), [b"+"], [theirs.fileno()])
            ours.settimeout(ANSWER_SECONDS + limits.wall_seconds)
            send(ours, {"form": asdict(wanted), "limits": asdict(limits)})
        except BaseException:
            ours.close()
            raise
        return ours

    def start(self) -> None:
        """Start the process before there is anything to try.

        Raises:
            OSError: it cannot be started. CompilingStoppedError: `close` was called. ValueError: there is no vocabulary.
        """
        with self._lock:
            self._started()

    def close(self) -> None:
        """End the process and all its trials. One that is about to start is not waited for."""
        self._closed = True
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):  # it has ended just now
                control.shutdown(socket.SHUT_RDWR)  # ends the sending of a vocabulary that nobody reads yet
        with self._lock:
            self._end()

    def _started(self) -> socket.socket:
        """The connection to the process, which lives."""
        if self._closed:
            raise CompilingStoppedError("the engine is shutting down")
        if self._control is not None and self._lives(self._control):
            return self._control
        self._end()
        control, theirs = socket.socketpair()
        self._control = control
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # forks have one
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            command = [sys.executable, "-m", f"{__package__}.grammar_worker"]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)
        try:
            vocabulary = self._vocabulary()  # which is made while the process starts
            if self._closed:
                raise CompilingStoppedError("the engine is shutting down")
            send(control, vocabulary)
        except BaseException:
            self._end()
            raise
        return control

    def _lives(self, control: socket.socket) -> bool:
        """It says nothing on this connection, so what can be read there is the end."""
        return self._process is not None and self._process.poll() is None and not select.select([control], [], [], 0)[0]

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.terminate()  # if it is still about to start; later it ends because the connection has
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
