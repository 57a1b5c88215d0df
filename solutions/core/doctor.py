"""``python -m solutions.core.doctor``: what this machine has, and what the engine will use of it with no flag set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..models.loader import ModelSource, resolve_model
from .config import EngineConfig
from .platform.machine import (
    available_cores,
    available_memory,
    cpu_flags,
    cpu_has_bf16,
    format_bytes,
    pick_threads,
    processor_name,
    total_memory,
)
from .startup import Limits, resolve_limits, with_blocks

Rows = list[tuple[str, str]]

INSTRUCTION_SETS = {
    "AVX2": {"avx2"},
    "AVX512": {"avx512f"},
    "AVX512-VNNI": {"avx512_vnni"},
    "AVX512-BF16": {"avx512_bf16"},
    "AMX-BF16": {"amx_bf16"},
    "AMX-INT8": {"amx_int8"},
    "NEON": {"asimd", "advsimd"},
    "Arm-BF16": {"bf16", "feat_bf16"},
    "Arm-I8MM": {"i8mm", "feat_i8mm"},
}
"""Names for people, and how Linux and macOS spell each."""


def tool_version(commands: list[str], pattern: str) -> str | None:
    """The first of the commands that is installed, with its version, such as "g++ 12.2.0"; None: none is.

    Args:
        pattern: a regular expression whose group is the version in the output of ``--version``.
    """
    for command in commands:
        if shutil.which(command):
            run = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
            match = re.search(pattern, run.stdout)
            return f"{command} {match[1] if match else '(version unknown)'}"
    return None


def instruction_sets(flags: frozenset[str]) -> str:
    """Which of `INSTRUCTION_SETS` the flags hold, the ones that matter for the engine's speed."""
    return " ".join(name for name, spellings in INSTRUCTION_SETS.items() if not spellings.isdisjoint(flags)) or "none known"


def gpus() -> str:
    """Name and memory of each GPU that PyTorch sees."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{card.name} ({format_bytes(card.total_memory)})" for card in cards) or "none that PyTorch sees"


def machine_rows() -> Rows:
    """What this machine has."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    chosen = os.environ.get("CXX")
    compiler = tool_version([chosen] if chosen else ["g++", "clang++"], r"(\d+\.\d+(?:\.\d+)?)")
    cores = f"{available_cores()} of {os.cpu_count()}"
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", platform.python_version()),
        ("PyTorch", f"{torch.__version__.partition('+')[0]}, {build}"),
        ("processor", processor_name()),
        ("cores allowed", cores + " (affinity and cgroup quota)"),
        ("instruction sets", instruction_sets(cpu_flags())),
        ("memory", f"{format_bytes(total_memory())}, of which {format_bytes(available_memory())} free"),
        (
            "C++ compiler",
            compiler or (f"CXX is {chosen!r}, which was not found" if chosen else "none found; install g++ or clang++"),
        ),
        ("nvcc", tool_version(["nvcc"], r"release (\d+\.\d+)") or "none found; only needed to compile CUDA kernels"),
        ("GPU", gpus()),
    ]


def model_rows(source: ModelSource) -> Rows:
    """Where the model's files lie, and how large they are."""
    assert source.path is not None  # only random weights have none
    size = sum(file.stat().st_size for file in source.path.iterdir())
    return [("model", source.name), ("its files", f"{source.path} ({format_bytes(size)})")]


def why_dtype(limits: Limits) -> str:
    """Why `--dtype auto` chose what it did."""
    if limits.device.type != "cpu":
        return ", the checkpoint's 16 bits"
    if limits.dtype is torch.float32:
        return ", for neither the processor nor kernels here are fast in bfloat16"
    return ", which the processor multiplies" if cpu_has_bf16() else ", which the C++ kernels widen in registers"


def engine_rows(config: EngineConfig, source: ModelSource) -> Rows:
    """What the engine would choose now."""
    limits = with_blocks(resolve_limits(config, source), config, source.config, weight_bytes=0)
    kv_cache = f"{limits.num_blocks} blocks of {config.block_size} tokens in {format_bytes(limits.kv_bytes)}"
    return [
        ("device", str(limits.device)),
        ("dtype", str(limits.dtype).removeprefix("torch.") + why_dtype(limits)),
        ("threads", str(pick_threads())),
        ("attention", limits.attention_backend),
        ("layers", limits.choice.why),
        ("KV cache", kv_cache),
        ("longest sequence", f"{limits.max_model_len} tokens"),
        ("a step", f"{config.max_num_seqs} sequences, {limits.max_num_batched_tokens} tokens"),
    ]


def show(title: str, rows: Rows, console: Console) -> None:
    """Print rows as a table without lines."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for name, value in rows:
        table.add_row(f"[cyan]{name}[/cyan]", Text(value, overflow="fold"))
    console.print(table)


def main() -> None:
    """Print both tables. If the engine could not start, say so in one line and exit with 1."""
    console = Console(highlight=False)
    show("This machine has", machine_rows(), console)
    config = EngineConfig()
    try:
        source = resolve_model(config.model)
        rows = model_rows(source) + engine_rows(config, source)
    except ValueError as problem:
        sys.exit(f"\nThe engine cannot start: {problem}")
    console.print()
    show("The engine will use", rows, console)


if __name__ == "__main__":
    main()
