"""Runs Python commands in forks of one process that has the slow imports behind it: PyTorch alone takes seconds.

The gate and the mutation runs start pytest some thousand times. `Warm` starts this file once as a server; it imports the third
parties, but neither `stages` nor `solutions`, and forks for each job. Half of what is left is pytest itself: settings, plugins,
conftest. So jobs of pytest that differ in nothing but tests share one that has all this behind it (`_Ready`), and forks again
for each before it looks for tests. Where forking is unsafe (macOS) or missing, each job gets a fresh process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn, TextIO

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
START_LIMIT = 60
"""Seconds for what pytest reads before there are tests."""
STALE = 75
"""How a pytest ends that stood ready, if files that it has read have changed since (`EX_TEMPFAIL`)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to run: ``python -m module arguments tests`` in `folder`.

    Attributes:
        environment: variables beside those that this process has; None takes one away.
        tests: for pytest, files, folders or ids of tests, on which none of its settings depend; others are arguments.
        results: for pytest, a variable that nothing reads before there are tests, and its value; or nothing.
        limit: seconds after which the job and all that it started are killed.
        test_limit: for pytest, seconds that one test may compute; None leaves the limit that the tests have.
    """

    folder: str
    module: str
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)
    limit: float = 600
    test_limit: float | None = None
    tests: list[str] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)


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


def _enter(job: Job) -> None:
    """Go where a job is at home."""
    os.chdir(job.folder)
    for name, value in job.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path.insert(0, job.folder)


def _test(job: Job, *plugins: object) -> int:
    """Run pytest as a job says."""
    _enter(job)
    # a process that a test starts looks for the main module again, and is not to find this file
    sys.modules["__main__"] = ModuleType("__main__")
    limits = [] if job.test_limit is None else [_TestLimit(job.test_limit)]
    return int(pytest.main([*job.arguments, *job.tests], plugins=[*plugins, *limits]))


def _work(job: Job) -> int:
    """Do a job in this process, which is of no use for anything else afterwards."""
    if job.module == "pytest":
        os.environ.update(job.results)
        return _test(job)
    _enter(job)
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
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, target in ((0, nothing), (1, file), (2, file)):
        os.dup2(target, stream)
    os.close(file)
    os.close(nothing)


def _limit_memory() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, most))


def _begin(folder: str) -> None:
    """What a job's process does before all else; `folder` takes its temporary files."""
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    os.setsid()  # a group of its own, which can be killed as a whole
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _limit_memory()


def _end(work: Callable[[], int]) -> NoReturn:
    """Do the work of this process, and end it with the code that it gives."""
    code = 1
    try:
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> tuple[int, bool]:
    """The code with which a job ends, and whether it had to be ended."""
    deadline = time.monotonic() + limit
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


def _fork(job: Job, output: str) -> tuple[int, bool]:
    def work() -> int:
        _begin(folder)
        _redirect(output)
        return _work(job)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a job ends without tidying up
        child = os.fork()
        if child == 0:
            _end(work)
        return _wait(child, job.limit)


# ---------------------------------------------------------------------------------------------- a pytest that stands ready
class _Door:
    """A plugin for pytest: it stops before it looks for tests. Then a fork of it goes on for each order, with its tests."""

    def __init__(self, orders: TextIO, replies: TextIO, output: str) -> None:
        self.orders, self.replies, self.output = orders, replies, output
        self.before = set(sys.modules)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        read = self._read(session.config.rootpath)
        state = _state(read)
        session.config.get_terminal_writer().flush()
        gc.collect()
        gc.freeze()
        for line in self.orders:
            if _state(read) != state:
                os._exit(STALE)
            order = json.loads(line)
            folder = tempfile.mkdtemp()
            os.truncate(self.output, 0)
            child = os.fork()
            if child == 0:
                self.orders.close()
                self.replies.close()
                _begin(folder)
                os.environ.update(order["results"])
                importlib.invalidate_caches()
                session.config.pluginmanager.getplugin("capturemanager").read_global_capture()  # what a killed one has left
                session.config.args = order["tests"] or session.config.args
                return
            try:
                code, timed_out = _wait(child, order["limit"])
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(json.dumps({"code": code, "timed_out": timed_out}), file=self.replies, flush=True)
        os._exit(0)

    def _read(self, root: Path) -> list[str]:
        """The files that pytest and conftest have read: modules, settings, lists of tasks and hints."""
        modules = [sys.modules[name] for name in set(sys.modules) - self.before]
        paths = [file for module in modules if (file := getattr(module, "__file__", None))]
        return paths + [str(path) for pattern in ("*.toml", "*/*.toml", "*/*/*.toml") for path in root.glob(pattern)]


def _state(paths: list[str]) -> list[tuple[int, int] | None]:
    """When files were written last, and how long they are; None where there is none."""
    return [(stat.st_mtime_ns, stat.st_size) if (stat := _stat(path)) else None for path in paths]


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None


class _Ready:
    """The server's end of a pytest that stands ready for jobs like this one; `process` is 0 when it has ended."""

    def __init__(self, job: Job) -> None:
        self._like = replace(job, tests=[], results={}, limit=0)
        self._folder = tempfile.mkdtemp()
        self._output = str(Path(self._folder) / "output.txt")
        orders, self._orders = _pipe()
        self._replies, replies = _pipe()
        self.process = os.fork()
        if self.process == 0:
            self._orders.close()
            self._replies.close()
            _redirect(self._output)
            _end(lambda: _test(job, _Door(orders, replies, self._output)))
        orders.close()
        replies.close()

    def fits(self, job: Job) -> bool:
        """Whether a job differs from the first one in its tests only."""
        return self._like == replace(job, tests=[], results={}, limit=0)

    def run(self, job: Job, output: str) -> tuple[int, bool] | None:
        """Let a fork of it run a job: its code, and whether it had to be ended. None: it is stale, and has ended itself."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, as will be seen
            print(json.dumps({"tests": job.tests, "results": job.results, "limit": job.limit}), file=self._orders, flush=True)
        try:
            said, _, _ = select.select([self._replies], [], [], job.limit + START_LIMIT)
            line = self._replies.readline() if said else ""
        except KeyboardInterrupt:
            os.kill(self.process, signal.SIGINT)  # it ends what it has begun
            self.end(kill=False)
            raise
        shutil.copyfile(self._output, output)
        if line:
            reply = json.loads(line)
            return reply["code"], reply["timed_out"]
        code = self.end(kill=not said)
        return None if code == STALE else (code, not said)

    def end(self, kill: bool = True) -> int:
        """End it, or wait for its end; the code with which it did."""
        if kill:
            os.kill(self.process, signal.SIGKILL)
        _, status = os.waitpid(self.process, 0)
        self.process = 0
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        self._replies.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return os.waitstatus_to_exitcode(status)


def _pipe() -> tuple[TextIO, TextIO]:
    """Two ends of a pipe: what to read from, what to write into."""
    reader, writer = os.pipe()
    return os.fdopen(reader, encoding="utf-8"), os.fdopen(writer, "w", encoding="utf-8")


def _serve(lines: Iterable[str]) -> None:
    """Do one order after the other."""
    ready: _Ready | None = None
    try:
        for line in lines:
            order = json.loads(line)
            job, ended = Job(**order["job"]), None
            if job.module != "pytest":
                ended = _fork(job, order["output"])
            while ended is None:
                if ready is not None and ready.process and not ready.fits(job):
                    ready.end()
                if ready is None or not ready.process:
                    ready = _Ready(job)
                ended = ready.run(job, order["output"])
            print(json.dumps({"code": ended[0], "timed_out": ended[1]}), flush=True)
    finally:
        if ready is not None and ready.process:
            ready.end()


def _preload(names: list[str]) -> None:
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
        _serve(sys.stdin)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
