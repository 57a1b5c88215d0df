"""What the compiled CUDA kernels take of a card, as its assembler reports. Needs nvcc, and no card."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from solutions.attention.cuda_build import KERNELS, nvcc
from solutions.core.platform import native


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes of a card.

    Attributes:
        kernel: name with template arguments. registers: of a thread, at most 255. What finds no room is `spilled`.
        spilled: bytes that a thread stores to and loads from memory for want of registers.
        shared: bytes of a block, besides those that the launch asks for.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int


def resources(arch: str) -> list[Resources]:
    """Compile the kernels for one architecture, "sm_90" say, and read what the assembler reports."""
    program = nvcc()
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "-O3", "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
        command += [str(native.find_source(KERNELS)), "-o", str(Path(folder, "kernels.cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return parse_resources(run.stderr)


def parse_resources(report: str) -> list[Resources]:
    """Read what ``ptxas -v`` prints; sorted by name."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        shared = re.search(r"(\d+) bytes smem", part)
        (registers,) = re.findall(r"Used (\d+) registers", part)
        found.append(Resources(demangle(name), int(registers), sum(map(int, spills)), int(shared[1]) if shared else 0))
    return sorted(found, key=lambda kernel: kernel.kernel)


def demangle(symbol: str) -> str:
    """``paged_attention_v1<half, 8, 4>`` from the symbol that the compiler makes of it."""
    name, *_ = re.findall(r"paged_attention_v[12]|merge_splits|write_kv_kernel", symbol)
    (dtype, numbers), *_ = re.findall(r"I(f|6__half|13__nv_bfloat16)((?:Li\d+E)*)E", symbol)
    words = [{"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}[dtype], *re.findall(r"Li(\d+)E", numbers)]
    return f"{name}<{', '.join(words)}>"
