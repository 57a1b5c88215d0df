"""The process beside the engine in which forms of answers are tried, each in a fork of its own that may be killed.

XGrammar cannot be interrupted, and a client's grammar may take it for ever. So the engine asks here first. This process has
loaded XGrammar once and forks for each form; the operating system limits the fork's time and memory.

Standard input is the connection to the engine. It brings a line and the vocabulary, then for each trial a line with the limits
and a socket; the form follows on that socket. The fork's message comes back, if there is one, and then how the fork ended;
whoever has read that line knows that the fork is gone. When the engine closes its side of the socket, the fork is killed. When
standard input ends, the engine is gone: all forks are killed, and this process ends. If this process is killed, its forks die
too, on Linux at once, elsewhere at their time limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import socket
import struct
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...batching.sampling_params import StructuredOutput
from .grammar_probe import probe
from .structured_output import GrammarCompiler

PR_SET_PDEATHSIG = 1
LENGTH = struct.Struct("!Q")
"""What comes before anything whose length is not known."""


def send(to: socket.socket, message: Any) -> None:
    """Send a message as JSON, with its length before it."""
    data = json.dumps(message).encode()
    to.sendall(LENGTH.pack(len(data)) + data)


def receive(source: socket.socket) -> Any:
    """The next message, or None where the other side has closed."""
    head = _read(source, LENGTH.size)
    data = _read(source, *LENGTH.unpack(head)) if head else b""
    return json.loads(data) if data else None


def _read(source: socket.socket, size: int) -> bytes:
    """So many bytes, or none."""
    parts = bytearray()
    while len(parts) < size:
        with contextlib.suppress(ConnectionResetError):
            if part := source.recv(min(1 << 20, size - len(parts))):
                parts += part
                continue
        return b""
    return bytes(parts)


@dataclass(slots=True)
class Limits:
    """What a trial may take.

    Attributes:
        seconds: of the processor's time. wall_seconds: of wall-clock time.
        mib: of memory, besides what this process has. automaton_mib: of that, what the compiled automaton may have.
        token_seconds: of the processor's time, to follow the automaton by a token.
    """

    seconds: float
    wall_seconds: float
    mib: int
    automaton_mib: int
    token_seconds: float


def attempt(compiler: GrammarCompiler, wanted: StructuredOutput, limits: Limits) -> str | None:
    """Compile a form and follow it for some tokens; None, or what is wrong with it."""
    try:
        grammar = compiler.compile(wanted)
    except ValueError as error:
        if "bad_alloc" in str(error):  # what C++ calls it
            raise MemoryError from None
        return str(error)
    if grammar.memory_size_bytes > limits.automaton_mib << 20:
        return f"structured_output needs an automaton of more than {limits.automaton_mib} MiB; make it simpler"
    if probe(grammar, compiler.vocab_size, limits.token_seconds):
        return f"structured_output takes more than {limits.token_seconds:g} s a token to follow; make it simpler"
    return None


def confine(limits: Limits, parent: int) -> None:
    """Let the system end this process when its parent ends or its time is over, and give it no more memory than it may have."""
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Path("/proc/self/statm")
    if pages.exists():  # elsewhere nobody counts it
        size = int(pages.read_text().split()[0]) * resource.getpagesize() + (limits.mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # SIGPROF and SIGALRM, which nobody catches
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)


@dataclass(slots=True)
class _Fork:
    pid: int
    life: int
    """The end of a pipe whose other end closes with the fork."""
    answer: socket.socket


class Forks:
    """The trials that run.

    Args:
        compiler: what all of them start with.
        engine: the connection by which trials come.
    """

    def __init__(self, compiler: GrammarCompiler, engine: socket.socket) -> None:
        self._compiler, self._engine = compiler, engine
        self._selector = selectors.DefaultSelector()
        self._selector.register(engine, selectors.EVENT_READ)
        self._forks: list[_Fork] = []

    def serve(self) -> None:
        """Until the engine is gone; then no fork is left."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    if not self._start():
                        for fork in self._forks:
                            os.kill(fork.pid, signal.SIGKILL)
                        return
                elif key.fd == key.data.life:
                    self._reap(key.data)
                elif key.data in self._forks:  # its client sends nothing more, so this is the end of the connection
                    os.kill(key.data.pid, signal.SIGKILL)
                    self._selector.unregister(key.data.answer)

    def _start(self) -> bool:
        data, descriptors, _, _ = socket.recv_fds(self._engine, 1, 1)
        if not data:
            return False
        answer = socket.socket(fileno=descriptors[0])
        message = receive(answer)
        if message is None:
            answer.close()
            return True
        life, alive = os.pipe()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                self._engine.close()
                self._try(answer, message, parent)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(alive)
        fork = _Fork(pid, life, answer)
        self._forks.append(fork)
        self._selector.register(life, selectors.EVENT_READ, fork)
        self._selector.register(answer, selectors.EVENT_READ, fork)
        return True

    def _try(self, answer: socket.socket, message: dict[str, Any], parent: int) -> None:
        limits = Limits(**message["limits"])
        confine(limits, parent)
        try:
            trouble = attempt(self._compiler, StructuredOutput(**message["form"]), limits)
        except MemoryError:
            trouble = f"structured_output needs more than {limits.mib} MiB to compile; make it simpler"
        send(answer, {"trouble": trouble})
        os._exit(0)

    def _reap(self, fork: _Fork) -> None:
        """Say how a fork ended, as `os.waitstatus_to_exitcode` has it."""
        code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        self._forks.remove(fork)
        self._selector.unregister(fork.life)
        os.close(fork.life)
        with contextlib.suppress(KeyError):  # nobody wants its answer
            self._selector.unregister(fork.answer)
        with contextlib.suppress(OSError), fork.answer:
            send(fork.answer, {"ended": code})


def main() -> None:
    """Serve the engine at the other end of standard input until it is gone."""
    for sign in (signal.SIGINT, signal.SIGTERM):  # they are for the engine's process, whose end reaches everyone
        signal.signal(sign, signal.SIG_IGN)
    engine = socket.socket(fileno=0)
    setup = receive(engine)
    if setup is not None:
        Forks(GrammarCompiler.from_vocabulary(**setup), engine).serve()
    os._exit(0)


if __name__ == "__main__":
    main()
