"""Runs Python commands in forks of one process that has the slow imports behind it: PyTorch alone takes seconds.

The gate and the mutation runs start pytest some hundred times. `Warm` starts this file once as a server; it imports the third
parties, but neither `stages` nor `solutions`, and forks for each job. Where forking is unsafe (macOS) or missing, each job gets
a fresh process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType

import pytest

CAN_FORK = sys.platform == "linux"
PRELOADED = (
    "hypothesis.stateful", "numpy", "torch", "transformers:PreTrainedTokenizerFast", "transformers:GPT2LMHeadModel",
    "transformers:LlamaForCausalLM", "transformers:MistralForCausalLM", "rich.console", "fastapi",
    "openai", "prometheus_client", "starlette.testclient:TestClient", "uvicorn",
)  # fmt: skip
"""Modules that a server imports before it forks; after a colon a name in it, for modules that load lazily."""
MEMORY_LIMIT = 8 << 30
"""Bytes of data that a job may have: an endless loop that fills a list must not bring the machine down."""
POLL = 0.005


@dataclass(frozen=True, slots=True)
class Job:
    """What to run: ``python -m module arguments`` in `folder`.

    Attributes:
        environment: variables beside those that this process has; None takes one away.
        limit: seconds after which the job and all that it started are killed.
        test_limit: for pytest, seconds that one test may compute; None leaves the limit that the tests have.
    """

    folder: str
    module: str
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)
    limit: float = 600
    test_limit: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended. `code` is its exit status, or minus the number of the signal that killed it."""

    code: int
    output: str
    timed_out: bool


class Warm:
    """A server to hand jobs to, one at a time; it starts with the first. Use it with ``with``, or `close` it."""

    def __init__(self, preloaded: tuple[str, ...] = PRELOADED) -> None:
        self.preloaded = preloaded
        self._server: subprocess.Popen | None = None

    def run(self, job: Job) -> Ended:
        """Run a job to its end.

        Raises:
            RuntimeError: the server itself broke down.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output.txt"
            order = json.dumps({"job": asdict(job), "output": str(output)})
            code, timed_out = self._ask(order) if CAN_FORK else _run_alone(order, job.limit)
            text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        return Ended(code, text, timed_out)

    def _ask(self, order: str) -> tuple[int, bool]:
        if self._server is None:
            self._server = _start("serve", *self.preloaded)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(order + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the process that runs the tests has ended; its message is above")
        reply = json.loads(answer)
        return reply["code"], reply["timed_out"]

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.communicate()  # end of its input: it ends itself
            self._server = None

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _start(*arguments: str) -> subprocess.Popen:
    # -P: this file's folder is not where the job's modules are to be looked for
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "STAGES"))}
    environment = {"OMP_NUM_THREADS": "1"} | environment
    environment.pop("PYTHONPATH", None)
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )


def _run_alone(order: str, limit: float) -> tuple[int, bool]:
    process = _start("once")
    try:
        process.communicate(order, timeout=limit)
        return process.returncode, False
    except subprocess.TimeoutExpired:
        return -int(signal.SIGTERM), True
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------------------------------------- the server's side
class TooLong(BaseException):
    """A test has used up its time. No `Exception`: hypothesis would take that for a finding, and run the endless test again."""


class _TestLimit:
    """A plugin for pytest that ends a test which computes for too long; how busy the machine is makes no difference."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        def stop(number: int, frame: object) -> None:
            raise TooLong(f"more than {self.seconds} seconds of computing")

        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _work(job: Job) -> int:
    """Do a job in this process, which is of no use for anything else afterwards."""
    os.chdir(job.folder)
    for name, value in job.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path.insert(0, job.folder)
    if job.module == "pytest":
        # a process that a test starts looks for the main module again, and is not to find this file
        sys.modules["__main__"] = ModuleType("__main__")
        plugins = [] if job.test_limit is None else [_TestLimit(job.test_limit)]
        return int(pytest.main(job.arguments, plugins=plugins))
    sys.argv = [job.module, *job.arguments]
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stdout.flush()  # what was printed before comes before
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _redirect(output: str) -> None:
    """Let everything that this process prints go to a file, and give it nothing to read."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, target in ((0, nothing), (1, file), (2, file)):
        os.dup2(target, stream)
    os.close(file)
    os.close(nothing)


def _limit_memory() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, most))


def _fork(job: Job, output: str) -> tuple[int, bool]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a job ends without tidying up
        return _fork_in(folder, job, output)


def _fork_in(folder: str, job: Job, output: str) -> tuple[int, bool]:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            os.setsid()  # a group of its own, which can be killed as a whole
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _redirect(output)
            _limit_memory()
            code = _work(job)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + job.limit
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), False
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                return os.waitstatus_to_exitcode(status), True
            time.sleep(POLL)
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        raise


def _preload(names: list[str]) -> None:
    import importlib

    for name in names:
        module, _, attribute = name.partition(":")
        loaded = importlib.import_module(module)
        if attribute:
            getattr(loaded, attribute)


def main(arguments: list[str]) -> int:
    """``serve MODULE...``: orders come line by line on the standard input; ``once``: there is one, and no fork."""
    if arguments[0] == "once":
        order = json.loads(sys.stdin.read())
        _redirect(order["output"])
        return _work(Job(**order["job"]))
    with contextlib.suppress(KeyboardInterrupt):
        _preload(arguments[1:])
        gc.collect()
        gc.freeze()  # what all jobs share need not be gone through again in each
        for line in sys.stdin:
            order = json.loads(line)
            code, timed_out = _fork(Job(**order["job"]), order["output"])
            print(json.dumps({"code": code, "timed_out": timed_out}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
