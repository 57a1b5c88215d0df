"""What the tests of kernels need: a device, the learner's CUDA file built for this CPU, a child process to run kernels in."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from stages.attention import cuda_build
from stages.core.platform import native
from stages.course.preflight import relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Triton's kernels run: compiled on a GPU, interpreted on a CPU."""
NOT_NEEDED = ("int attend_f16", "int attend_bf16", "    if (group == 1) return")
"""What lines begin with that choose kernels which no test calls, and which take most of the compiler's time."""


PATIENCE = 2
"""Seconds after which threads that wait at different barriers are given up."""


class KernelError(RuntimeError):
    """A kernel did not come to its end; the message is what it said."""


def build_cuda(folder: Path, tests: str) -> ctypes.CDLL:
    """The learner's kernels, and behind them those of a test that call their parts, compiled for this CPU.

    Raises:
        BuildError: the compiler refuses; the message is the compiler's.
    """
    learners = native.find_source(cuda_build.KERNELS)
    lines = ["" if line.startswith(NOT_NEEDED) else line for line in learners.read_text(encoding="utf-8").splitlines()]
    source = folder / "kernels.cu"
    head = [f"#define CUDA_ON_CPU_PATIENCE {PATIENCE}", f'#line 1 "{relative(learners)}"']
    source.write_text("\n".join([*head, *lines, tests]), encoding="utf-8")
    return ctypes.CDLL(str(cuda_build.build(torch.device("cpu"), folder, source)))


def contained(compute: Callable[[], Tensor], *shape: int, device: str = "cpu") -> Tensor:
    """What `compute` gives, as float32 of this shape; on a CPU from a process of its own, since a kernel that writes where it
    must not ends its process.

    Raises:
        KernelError: the process did not come to its end.
    """
    if device != "cpu":
        return compute().float().cpu()
    size = torch.Size(shape).numel()
    result = torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.float32).view(shape).fill_(torch.nan)
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            _compute(compute, result, said.fileno())
        try:
            status = os.waitpid(child, 0)[1]
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    if os.WIFSIGNALED(status):
        name = signal.strsignal(os.WTERMSIG(status))
        raise KernelError(f"the kernel ended its process ({name})\n{text or 'it read or wrote where it must not'}")
    if status != 0:
        raise KernelError(text)
    return result


def _compute(compute: Callable[[], Tensor], result: Tensor, said: int) -> None:
    """What the child does: it never returns, and leaves nothing behind that is the parent's."""
    faulthandler.disable()
    os.dup2(said, 2)  # where CUDA's stand-in says what is wrong
    torch.set_num_threads(1)  # the parent's threads are not there
    try:
        result.copy_(compute())
    except BaseException as error:
        while (cause := error.__cause__ or error.__context__) is not None:  # Triton's interpreter wraps what went wrong
            error = cause
        frames = traceback.extract_tb(error.__traceback__)
        mine = [frame for frame in frames if "/stages/stage" in frame.filename and "/tests/" not in frame.filename]
        places = [f"{relative(frame.filename)}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in mine[-1:]]
        os.write(said, "\n".join([f"{type(error).__name__}: {error}", *places]).encode())
        os._exit(1)
    os._exit(0)
