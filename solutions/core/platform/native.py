"""Builds the C++ kernels once, keeps the result, and loads it. They are plain C functions on plain pointers, called by ctypes.

There is no PyTorch header in them, so all of it compiles in seconds, with g++ or clang++. The library's name holds a hash of
the sources, the compiler and the processor's features: a changed source builds anew, and nothing that is built for another
processor is ever loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import filelock
import torch
from torch import Tensor

from .machine import AMX_FLAGS, cache_root, cpu_flags, may_use_amx

SOURCES = (
    "attention/paged_attention_cpu.cpp",
    "quantization/kernels/linear_cpu.cpp",
    "models/kernels/layers_cpu.cpp",
    "models/kernels/experts_cpu.cpp",
    "models/lora/lora_cpu.cpp",
    "models/lora/adapted_experts_cpu.cpp",
    "core/sampling/selection_cpu.cpp",
)
SUMS = ("parallelism/shared_memory_cpu.cpp",)
"""A library by itself: without it ranks add by other means, and all other kernels are there."""
HEADERS = (
    "core/platform/native.h",
    "core/platform/cores.h",
    "core/platform/shares.h",
    "core/platform/tiles.h",
    "core/platform/tiles_amx.h",
    "attention/paged_work_cpu.h",
    "attention/paged_decode_cpu.h",
    "attention/paged_prefill_cpu.h",
    "attention/paged_ordered_cpu.h",
    "quantization/kernels/linear_cpu.h",
    "quantization/kernels/linear_groups_cpu.h",
    "models/lora/lora_cpu.h",
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-pthread", "-fPIC", "-shared", "-Wall", "-Wextra")


class BuildError(RuntimeError):
    """The kernels could not be built; the message holds what the compiler said."""


def find_source(name: str) -> Path:
    """A file of this package that is not Python: the learner's, where a stage has one, else the reference's.

    Raises:
        FileNotFoundError: no folder of the package has it.
    """
    package = sys.modules[__package__.split(".")[0]]
    for folder in package.__path__:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(f"there is no {name} in {', '.join(package.__path__)}")


def compiler() -> str | None:
    """The C++ compiler: what `CXX` names, without it g++ or clang++; None if that is not here."""
    if chosen := os.environ.get("CXX"):
        return shutil.which(chosen)
    return shutil.which("g++") or shutil.which("clang++")


def need_compiler() -> str:
    """The C++ compiler.

    Raises:
        BuildError: it is not here.
    """
    if program := compiler():
        return program
    if chosen := os.environ.get("CXX"):
        raise BuildError(f"CXX is {chosen!r}, and there is no such program; set it to a C++ compiler or unset it")
    raise BuildError("no C++ compiler (g++ or clang++) was found")


def build(folder: Path, name: str = "kernels", sources: Sequence[str] = SOURCES) -> Path:
    """Compile some of the kernels, unless that has been done: returns the shared library in `folder`.

    Flags in `CXXFLAGS` come after the usual ones, so they can overrule them.

    Raises:
        BuildError: there is no compiler, or it refuses.
    """
    program = need_compiler()
    flags = [*FLAGS, *without_amx(), *extra_flags()]
    facts = [platform.machine(), *sorted(cpu_flags())]
    return compile_library(folder, name, program, flags, map(find_source, sources), map(find_source, HEADERS), facts)


def without_amx() -> list[str]:
    """The flags that keep a compiler from AMX's tiles where the processor has them and the system does not let us."""
    return ["-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"] if AMX_FLAGS & cpu_flags() and not may_use_amx() else []


def extra_flags() -> list[str]:
    """What the environment adds to a C++ compiler's flags."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def compile_library(
    folder: Path, name: str, program: str, flags: list[str], sources: Iterable[Path], headers: Iterable[Path],
    facts: Iterable[str] = (),
) -> Path:  # fmt: skip
    """Compile `sources` into one shared library in `folder`, unless that has been done, also by another process.

    Args:
        name: what the library's name begins with; a hash of all that the result depends on follows.
        headers: what the sources include. facts: what else the result depends on.

    Raises:
        BuildError: the compiler refuses.
    """
    sources = list(sources)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_bytes() for path in (*sources, *headers)]
    digest = hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in (version, *facts, *flags))])).hexdigest()[:20]
    library = folder / f"{name}-{digest}.so"
    if library.exists():  # no waiting for who builds another one
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "build.lock"):
        if not library.exists():
            # learners' folders come first on the package's path, so their header would be found first too
            includes = [f"-I{entry}" for entry in sys.modules[__package__.split(".")[0]].__path__]
            part = library.with_suffix(f".{os.getpid()}.part")
            run = subprocess.run(
                [program, *flags, *includes, *map(str, sources), "-o", str(part)], capture_output=True, text=True, check=False
            )
            if run.returncode != 0:
                said = run.stderr.strip() or f"it ended with {run.returncode}"
                raise BuildError(f"{program} could not compile the {name}:\n{said}")
            part.rename(library)
    return library


@functools.cache
def load() -> ctypes.CDLL | None:
    """The built kernels, or None where they cannot be had; `why_not` then says why."""
    global why_not
    try:
        return ctypes.CDLL(str(build(cache_root() / "native")))
    except (BuildError, OSError) as error:
        why_not = str(error)
        return None


why_not = ""
"""Why there are no kernels, once `load` has returned None."""


@functools.cache
def loaded() -> ctypes.CDLL:
    """The built kernels, for code that runs only where `load` has given them."""
    library = load()
    assert library is not None, why_not
    return library


@functools.cache
def sums() -> ctypes.CDLL:
    """The library of `SUMS`, for which the kernels lend their threads.

    Raises:
        BuildError: one of both cannot be built.
    """
    if load() is None:
        raise BuildError(why_not)
    return ctypes.CDLL(str(build(cache_root() / "native", "sums", SUMS)))


def have_sums() -> bool:
    """Whether `sums` can be had; where the compiler refuses them alone, standard error says why."""
    try:
        return load() is not None and sums() is not None
    except BuildError as error:
        print(f"Ranks do not add through shared memory: {error}", file=sys.stderr)
        return False


def set_threads(count: int) -> None:
    """Threads of every kernel from now on, in this process."""
    loaded().set_num_threads(ctypes.c_int64(count))


class Arguments(ctypes.Structure):
    """What a kernel's structure begins with.

    Attributes:
        rows: of all that it reads and writes; a recording changes it when it is replayed.
    """

    _fields_: ClassVar[Sequence[tuple[str, type[ctypes._SimpleCData[Any]]]]] = (("rows", ctypes.c_int64),)


class Kernel:
    """A C function of one argument, a pointer to a structure that lies here.

    Args:
        name: of the function. arguments: the structure, whose fields are set before each call.
        library: that has it; None: the kernels'.
    """

    def __init__(self, name: str, arguments: Arguments, library: ctypes.CDLL | None = None) -> None:
        self.function = getattr(library or loaded(), name)
        self.function.argtypes, self.function.restype = [ctypes.c_void_p], None
        self.arguments = arguments
        self._address = ctypes.addressof(arguments)

    def __call__(self) -> None:
        self.function(self._address)
        if (recording := _open()) is not None:
            recording.append(self.function, self.arguments)


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Recording:
    """The kernels that ran while it was open, with copies of their arguments: `replay` runs them all again in one call.

    What a CUDA graph is to a GPU: the same addresses are read and written again, so the inputs have to be put where they were,
    and the results of kernels, which `result` hands out, lie in buffers that stay. One buffer serves all results of a kind and
    width: each is valid until the next one, as in a model, where layer follows layer. Unlike a CUDA graph it can be replayed
    with another number of rows.

    Args:
        max_rows: most rows that it will be replayed with.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._kept: list[Arguments] = []
        self._calls: list[_Call] = []
        self._array: ctypes.Array[_Call] | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def append(self, function: Any, arguments: Arguments) -> None:
        """Note a call that has just been made."""
        copy = type(arguments).from_buffer_copy(arguments)
        self._kept.append(copy)
        self._calls.append(_Call(ctypes.cast(function, ctypes.c_void_p).value, ctypes.addressof(copy)))

    def part(self, indices: Iterable[int]) -> Recording:
        """A recording of some of the calls, on the same buffers, to see how long they take."""
        part = Recording(self.max_rows)
        part._buffers, part._kept = self._buffers, self._kept
        part._calls = [self._calls[i] for i in indices]
        part._close()
        return part

    def buffer(self, kind: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] at the start of a buffer that stays."""
        key = (kind, width, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self.max_rows, width, dtype=dtype)
        return self._buffers[key][:rows]

    def __enter__(self) -> Recording:
        _of_thread.recording = self
        return self

    def __exit__(self, *error: object) -> None:
        _of_thread.recording = None
        self._close()

    def _close(self) -> None:
        self._array = (_Call * len(self._calls))(*self._calls)

    def replay(self, rows: int) -> None:
        """Run all of it again, with so many rows."""
        loaded().replay(self._array, ctypes.c_int64(len(self._calls)), ctypes.c_int64(rows))


_of_thread = threading.local()
"""Holds the recording that a thread has open; another engine's thread may have one of its own at the same time."""


def _open() -> Recording | None:
    return getattr(_of_thread, "recording", None)


def result(kind: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Memory for a kernel's result, [rows, width]: fresh, or while a recording is open one of its buffers."""
    if (recording := _open()) is not None:
        return recording.buffer(kind, rows, width, dtype)
    return torch.empty(rows, width, dtype=dtype)


def main() -> None:
    """Build the kernels and say so in one line; what set-up calls."""
    start = time.perf_counter()
    if load() is None:
        print(f"No C++ kernels, the engine runs on PyTorch's: {why_not}")
    else:
        have_sums()
        print(f"C++ kernels are ready ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
