"""Runs one command within limits and lets nothing that it started outlive it: ``python -m stages.course.grading.supervise``.

An order comes as JSON on the standard input and a verdict goes to the standard output. In namespaces of its own this process
is the first one, with which the kernel ends all others. Without them it adopts what its children leave behind (Linux), or
finds it by a word in its environment (macOS).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from stages.course.grading import isolation

POLL = 0.05
DISK_EVERY = 10
"""Polls between two looks at how much was written, which takes longer than a look at processes."""
THREADS_EACH = 64
"""Threads in all that make as much of a crowd as a process too many, for each process that is allowed."""
TOKEN = "GRADING_TOKEN"


class Watch:
    """Looks after a command while it runs.

    Args:
        order: what `sandbox.Sandbox` sends.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.limits: dict[str, float] = order["limits"]
        self.alone: bool = order["isolated"]
        self.token: str = order["environment"][TOKEN]
        self.output, self.scratch = Path(order["output"]), Path(order["scratch"])

    def family(self) -> list[psutil.Process]:
        """All that the command has started, itself included."""
        me = os.getpid()
        if self.alone:
            return [process for process in psutil.process_iter() if process.pid != me]
        found = {process.pid: process for process in psutil.Process().children(recursive=True)}
        if sys.platform != "linux":
            found |= {process.pid: process for process in marked(self.token) if process.pid != me}
        return list(found.values())

    def excess(self, look_at_disk: bool) -> str | None:
        """Which limit is passed, if one is."""
        memory = cpu = threads = count = 0
        if self.alone and len(psutil.pids()) > 2 * self.limits["processes"]:
            return "processes"  # said at once, since there are more with every moment
        for process in self.family():
            with contextlib.suppress(psutil.Error), process.oneshot():
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                times = process.cpu_times()
                cpu += times.user + times.system
                memory += process.memory_info().rss
                threads += process.num_threads()
                count += 1
        if count > self.limits["processes"] or threads > THREADS_EACH * self.limits["processes"]:
            return "processes"
        if memory > self.limits["memory_bytes"]:
            return "memory"
        if cpu > self.limits["cpu_seconds"]:
            return "cpu"
        if self.output.stat().st_size > self.limits["output_bytes"]:
            return "output"
        return "disk" if look_at_disk and written(self.scratch) > self.limits["disk_bytes"] else None

    def wait(self, child: int) -> tuple[int | None, str | None]:
        """Exit code of the command, or the limit that it passed."""
        deadline, polls = time.monotonic() + self.limits["seconds"], 0
        while True:
            while True:  # whoever ended is buried, also the adopted
                try:
                    ended, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return -signal.SIGKILL, None
                if ended == child:
                    return os.waitstatus_to_exitcode(status), None
                if ended == 0:
                    break
            polls += 1
            reason = "seconds" if time.monotonic() > deadline else self.excess(polls % DISK_EVERY == 0)
            if reason is not None:
                return None, reason
            time.sleep(POLL)

    def end_all(self) -> None:
        """Kill what is left; in namespaces the kernel does, when this process ends. Stopped first: who is stopped starts
        nobody."""
        while not self.alone and (family := self.family()):
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            time.sleep(0.005)


def marked(token: str) -> list[psutil.Process]:
    """This user's processes whose environment says that they were started for a grading."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TOKEN) == token:
                found.append(process)
    return found


def threads_of_user() -> int:
    """How many threads this user has, as far as can be seen from here."""
    count = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.uids().real == os.getuid():
                count += process.num_threads()
    return count


def go_first() -> None:
    """Let no crowd of processes keep this one from its work, where the system allows that: to root, on Linux."""
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def written(folder: Path) -> int:
    """Bytes of all files in a folder, which may change meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(path, name).lstat().st_size
    return total


def start(order: dict[str, Any]) -> int:
    """Start the command in a session of its own, with the kernel's limits on each of its processes; returns its id."""
    # The kernel counts all of a user's threads, and root's not at all.
    most_threads = threads_of_user() + THREADS_EACH * order["limits"]["processes"] // 4
    child = os.fork()
    if child:
        return child
    if hasattr(os, "sched_setscheduler"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        os.setsid()
        said, say = os.pipe()
        os.write(say, order["input"].encode())
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((said, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.closerange(3, 1024)
        limits = order["limits"]
        for kind, most in (
            (resource.RLIMIT_DATA, limits["memory_bytes"]), (resource.RLIMIT_CPU, limits["cpu_seconds"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, most_threads),
        ):  # fmt: skip
            with contextlib.suppress(ValueError, OSError):  # lower already, or macOS has no such limit
                resource.setrlimit(kind, (int(most), int(most)))
        if order["isolated"]:
            isolation.give_up_rights()
        os.chdir(order["folder"])
        os.execve(order["command"][0], order["command"], order["environment"])
    except BaseException as error:
        os.write(2, f"could not start: {error}\n".encode())
    finally:
        os._exit(127)


def main() -> int:
    order = json.loads(sys.stdin.read())
    Path(order["output"]).touch()
    if sys.platform == "linux":
        isolation.prctl(isolation.PR_SET_CHILD_SUBREAPER, 1)
    if order["isolated"]:
        isolation.close_the_room(Path(order["scratch"]), [Path(folder) for folder in order["hidden"]])
    go_first()
    watch = Watch(order)
    begin = time.monotonic()
    try:
        code, stopped = watch.wait(start(order))
    finally:
        watch.end_all()
    print(json.dumps({"code": code, "stopped": stopped, "seconds": round(time.monotonic() - begin, 2)}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
