"""Builds the C++ kernels once, keeps the result, and loads it. They are plain C functions on plain pointers, called by ctypes.

There is no PyTorch header in them, so all of it compiles in seconds with any C++17 compiler. The library's name holds a hash of
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
import time
from pathlib import Path

import filelock

from .machine import cache_root, cpu_flags

SOURCES = ("attention/paged_attention_cpu.cpp", "quantization/kernels/linear_cpu.cpp", "models/layers_cpu.cpp")
HEADERS = ("core/native.h",)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-Wall", "-Wextra")


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
    """The C++ compiler: what `CXX` names, else g++ or clang++; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "") or shutil.which("g++") or shutil.which("clang++")


def build(folder: Path) -> Path:
    """Compile the kernels, unless that has been done: returns the shared library in `folder`.

    Flags in `CXXFLAGS` come after the usual ones, so they can overrule them.

    Raises:
        BuildError: there is no compiler, or it refuses.
    """
    program = compiler()
    if program is None:
        raise BuildError("no C++ compiler (g++ or clang++) was found")
    sources = [find_source(name) for name in SOURCES]
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    facts = [version, platform.machine(), *sorted(cpu_flags()), *flags]
    texts = [path.read_bytes() for path in (*sources, *map(find_source, HEADERS))]
    digest = hashlib.sha256(b"\0".join([*texts, *(fact.encode() for fact in facts)])).hexdigest()[:20]
    library = folder / f"kernels-{digest}.so"
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
                raise BuildError(f"{program} could not compile the kernels:\n{run.stderr.strip()}")
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


def main() -> None:
    """Build the kernels and say so in one line; what set-up calls."""
    start = time.perf_counter()
    if load() is None:
        print(f"No C++ kernels, the engine runs on PyTorch's: {why_not}")
    else:
        print(f"C++ kernels are ready ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
