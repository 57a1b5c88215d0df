"""Runs the cases of fuzz modules, each module in a process of its own, so that a crash or a hang is a finding as well."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 120.0
"""Seconds that a case may take, unless its module has a `LIMIT`."""
START_LIMIT = 180.0
"""Seconds that importing a module, or its first case, may take: the first makes what the others share."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A case that did not end well.

    Attributes:
        kind: "fails", "hangs" or "crashes". text: the traceback, or the last that the process said.
    """

    module: str
    seed: int
    kind: str
    text: str

    @property
    def signature(self) -> tuple[str, str, str]:
        """What findings of the same fault have in common: where the exception comes from, without numbers and texts in it."""
        places = re.findall(r'File "[^"]*/([^/"]+)", line (\d+)', self.text)
        last = self.text.strip().splitlines()[-1] if self.text.strip() else ""
        return self.kind, re.split(r"[:\d(]", last)[0], " ".join(places[-1]) if places and self.kind == "fails" else ""


@dataclass(slots=True)
class Module:
    """A file of cases, and what has become of them.

    Attributes:
        name: of the file. imported: the name to import it by.
    """

    name: str
    imported: str
    folder: Path
    num_cases: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    broken: bool = False
    worker: Worker | None = None


def discover(folder: Path) -> dict[str, Module]:
    """All files of a folder that have a function `run`, by name."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        if "run" in functions:
            inside = folder.is_relative_to(ROOT)
            imported = ".".join((*folder.relative_to(ROOT).parts, path.stem)) if inside else path.stem
            found[path.stem] = Module(path.stem, imported, folder)
    return found


def choose(modules: dict[str, Module], wanted: str) -> list[Module]:
    """Modules by name, or by one of the words of a name, as in ``twins,http``; "all" is all.

    Raises:
        ValueError: there is no such module.
    """
    chosen: dict[str, Module] = {}
    for word in wanted.split(","):
        names = [name for name in modules if word in ("all", name)] or [n for n in modules if word in n.split("_")]
        if not names:
            raise ValueError(f"there are no cases {word!r}; there are all, {', '.join(modules)}")
        chosen |= {name: modules[name] for name in names}
    return list(chosen.values())


class Died(Exception):
    """A worker gave no answer; the message says how it ended."""


class Worker:
    """The process of a module. Starting it waits until the module is imported.

    Raises:
        Died: it cannot be imported.
    """

    def __init__(self, module: Module) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(module.folder)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", module.imported], cwd=ROOT, env=os.environ | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )  # fmt: skip
        self.is_new = True
        self.limit = self._answer(START_LIMIT)["limit"] or LIMIT

    def run(self, seed: int) -> dict[str, Any]:
        """Run a case: its error, if it has one, and its seconds.

        Raises:
            Died: it hangs, or the process has ended.
        """
        limit = max(self.limit, START_LIMIT if self.is_new else 0)
        self.is_new = False
        self._errors.seek(0)  # of both processes: they share the open file
        self._errors.truncate()
        with contextlib.suppress(BrokenPipeError):  # it has died, which the answer says
            self._process.stdin.write(f"{seed}\n".encode())
            self._process.stdin.flush()
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any]:
        if not select.select([self._process.stdout], [], [], limit)[0]:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)  # it writes down where it is
            time.sleep(0.5)
            self.close()
            raise Died(f"hangs\nno answer in {limit:g} s; it was at\n{self._said()}")
        line = self._process.stdout.readline()
        if not line:
            self.close()
            code = self._process.returncode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            raise Died(f"crashes\n{self._said()}\nthe process {how}")
        return json.loads(line)

    def _said(self) -> str:
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 6000))
        return self._errors.read().decode(errors="replace").strip("\0\n ")

    def close(self) -> None:
        """End the process and whatever it has started."""
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if code is None:
            self._process.wait()


def run_case(module: Module, seed: int) -> Finding | None:
    """Run one case in the module's process, which is started if there is none; what there is to say about it."""
    start = time.monotonic()
    try:
        if module.worker is None:
            module.broken = True  # until it is imported
            module.worker = Worker(module)
            module.broken = False
        answer = module.worker.run(seed)
        return Finding(module.name, seed, "fails", answer["error"]) if answer["error"] else None
    except Died as error:
        module.worker = None
        kind, _, text = str(error).partition("\n")
        return Finding(module.name, seed, kind, text)
    finally:
        module.num_cases += 1
        module.seconds += time.monotonic() - start


def fuzz(
    modules: list[Module], seed: int, seconds: float, jobs: int, most_cases: int | None, told: Callable[[Finding | None], None]
) -> None:
    """Run cases until the time is over, `jobs` at once; case i of a module has the seed ``seed + i``.

    The module that has had the least time goes next. One that cannot be imported is given up.

    Args:
        most_cases: of a module. told: hears of each case.
    """
    deadline = time.monotonic() + seconds
    running: dict[Future[Finding | None], Module] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while True:
                idle = [m for m in modules if m not in running.values() and not m.broken and m.num_cases != most_cases]
                if time.monotonic() < deadline:
                    for module in sorted(idle, key=lambda m: m.seconds)[: jobs - len(running)]:
                        running[pool.submit(run_case, module, seed + module.num_cases)] = module
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    module, finding = running.pop(done), done.result()
                    if finding is not None:
                        module.findings.append(finding)
                    told(finding)
        finally:
            for module in modules:
                if module.worker is not None:
                    module.worker.close()
