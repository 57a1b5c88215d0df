"""A closed room for a graded command: what it may use, what it sees, and how it ended. `supervise` stands at its door."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import psutil

from solutions.core.platform.machine import cache_root
from stages.course.grading import guard, isolation
from stages.course.grading.supervise import TOKEN, marked
from stages.course.tools.catalog import ROOT

PASSED_ON = ("PATH", "LANG", "LC_ALL", "CC", "CXX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "SDKROOT")
"""Variables that a graded process gets from the grader's environment; others may hold the instructor's secrets."""
GRACE = 30.0
"""Seconds beyond a command's limit after which its supervisor is taken for lost."""
STOPPED = {
    "seconds": "it took longer than {seconds:g} s; is there an endless loop?",
    "cpu": "it computed for more than {cpu_seconds:g} s; is there an endless loop?",
    "memory": "it took more than {memory_gib:g} GiB of memory",
    "processes": "it started more than {processes} processes",
    "output": "it printed more than {output_mib:g} MiB",
    "disk": "it wrote more than {disk_mib:g} MiB to the disk",
    "lost": "it ended the process that looked after it",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command and all that it starts may use together. Files and memory are also limited for each process."""

    seconds: float = 120
    cpu_seconds: float = 240
    memory_bytes: int = 6 << 30
    processes: int = 64
    output_bytes: int = 8 << 20
    file_bytes: int = 256 << 20
    disk_bytes: int = 1 << 30

    def within(self, seconds: float) -> Limits:
        """These limits with another time; two cores may compute for all of it."""
        return replace(self, seconds=seconds, cpu_seconds=2 * seconds)

    def say(self, reason: str) -> str:
        """Why a command was stopped, as a person reads it."""
        sizes = {"memory_gib": self.memory_bytes / 2**30, "output_mib": self.output_bytes / 2**20}
        return STOPPED[reason].format(**asdict(self), **sizes, disk_mib=self.disk_bytes / 2**20)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit status, or minus the number of the signal that ended it; None: it was stopped.
        stopped: why it was stopped, in words, or "".
        output: the end of what it printed. seconds: how long it ran.
    """

    code: int | None
    stopped: str
    output: str
    seconds: float

    @property
    def normal(self) -> bool:
        """Whether it came to its own end."""
        return self.code is not None and self.code >= 0

    @property
    def lost(self) -> bool:
        """Whether nobody looked after it until its end, so that nothing that it reported can be believed."""
        return self.stopped == STOPPED["lost"]

    @property
    def how(self) -> str:
        """Why it did not."""
        if self.stopped:
            return self.stopped
        with contextlib.suppress(ValueError):
            return f"it crashed ({signal.Signals(-(self.code or 0)).name})"
        return f"it ended with exit code {self.code}"


class Sandbox:
    """Runs commands in closed rooms.

    Args:
        hidden: folders that no graded command may read: other learners' files, the reference.
    """

    def __init__(self, hidden: tuple[Path, ...] = ()) -> None:
        self.hidden = tuple(dict.fromkeys(path.resolve() for path in hidden))
        self._running: set[subprocess.Popen] = set()
        self._closed = False

    @cached_property
    def isolated(self) -> bool:
        """Whether this system lets us have namespaces; tried once."""
        if isolation.unshare_command() is None:
            return False
        with room() as scratch:
            order = self._order([sys.executable, "-c", ""], scratch, {}, (), Limits().within(60), True)
            return self._supervise(order, 60).get("code") == 0

    @property
    def walls(self) -> str:
        """What keeps graded code in, for the report."""
        if self.isolated:
            return "namespaces of Linux: no network, a file system that can only be read, processes of its own, limits"
        return (
            "limits and a guard in Python only, because this system has no namespaces for us: network and files are refused to "
            "Python code, not to programs that it might start; grade strangers' code in a container or a virtual machine"
        )

    def run(
        self, command: list[str], scratch: Path, environment: dict[str, str], limits: Limits, learners: tuple[Path, ...] = (),
        text: str = "",
    ) -> Ended:  # fmt: skip
        """Run a command in ``scratch/work`` until it ends or passes a limit. Nothing that it started is left behind.

        Args:
            command: the first word is a path.
            scratch: a folder of `room`, in which it may write.
            environment: variables beside those that every graded process has.
            learners: files whose code may not import the reference, or reach for other code.
            text: what it reads on its standard input; at most a pipe's room, 64 KiB.
        """
        order = self._order(command, scratch, environment, learners, limits, self.isolated) | {"input": text}
        verdict = self._supervise(order, limits.seconds + GRACE)
        output = _end_of(scratch / "output.txt")
        stopped = limits.say(verdict["stopped"]) if verdict["stopped"] else ""
        return Ended(verdict["code"], stopped, output, verdict["seconds"])

    def _order(
        self, command: list[str], scratch: Path, environment: dict[str, str], learners: tuple[Path, ...], limits: Limits,
        isolated: bool,
    ) -> dict:  # fmt: skip
        needed = (scratch, Path(sys.prefix), Path(sys.base_prefix))
        hidden = [str(folder) for folder in self.hidden if not any(path.is_relative_to(folder) for path in needed)]
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
            "HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp"), "BYOV_CACHE": str(scratch / "cache"),
            "TRITON_CACHE_DIR": str(scratch / "tmp" / "triton"), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": f"{scratch / 'guard'}{os.pathsep}{scratch / 'work'}", "OMP_NUM_THREADS": "1",
            "GRADING_HIDDEN": json.dumps(hidden), "GRADING_LEARNERS": json.dumps([str(path) for path in learners]),
            TOKEN: uuid.uuid4().hex,
        }  # fmt: skip
        return {
            "command": command, "environment": variables | environment, "folder": str(scratch / "work"),
            "output": str(scratch / "output.txt"), "scratch": str(scratch), "hidden": hidden, "isolated": isolated,
            "limits": asdict(limits), "input": "",
        }  # fmt: skip

    def close(self) -> None:
        """End all that runs, and start nothing any more."""
        self._closed = True
        for process in tuple(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _supervise(self, order: dict, patience: float) -> dict:
        """Hand an order to a supervisor; its verdict, also when it did not live to give one."""
        command = [sys.executable, "-m", "stages.course.grading.supervise"]
        if order["isolated"]:
            command = [*(isolation.unshare_command() or []), *command]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "STAGES": ""}
        said = ""
        if not self._closed:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            try:
                said, _ = process.communicate(json.dumps(order), timeout=patience)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                said = ""  # it is ended below, and the verdict is that it was lost
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.communicate()
                self._running.discard(process)
                for left in marked(order["environment"][TOKEN]):
                    with contextlib.suppress(psutil.Error):
                        left.kill()
        with contextlib.suppress(ValueError):
            return json.loads(said)
        return {"code": None, "stopped": "lost", "seconds": 0.0}


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """A folder for one command: its work, its temporary files, and caches of its own with what the real ones hold."""
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as name:
        scratch = Path(name).resolve()
        for folder in ("work", "tmp", "home", "guard", "cache"):
            (scratch / folder).mkdir()
        shutil.copyfile(guard.__file__, scratch / "guard" / "sitecustomize.py")
        known = cache_root()
        if (known / "native").is_dir():
            shutil.copytree(known / "native", scratch / "cache" / "native")
        if (known / "gguf").is_dir():
            (scratch / "cache" / "gguf").symlink_to(known / "gguf")
        yield scratch


def _end_of(path: Path, most: int = 20_000) -> str:
    """The last characters of a file that may be large, or not there."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode(errors="replace")
