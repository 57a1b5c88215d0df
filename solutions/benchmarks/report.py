"""What every measurement is kept with: the machine, the versions, the command; and how it is shown."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from ..core.doctor import instruction_sets, processor_name
from ..core.platform.machine import available_cores, cpu_flags, total_memory

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
LOAD_AT_START = os.getloadavg()[0]
"""What others were doing on the machine, before a measurement's own work fills it."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is one line, and whose help keeps the lines of its examples."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains every flag)\n")

    def check_counts(self, args: argparse.Namespace, *names: str) -> None:
        """Exit with one line if one of these arguments, a number or a list of numbers, is below 1; None is a default."""
        for name in names:
            value = getattr(args, name)
            lowest = min(value) if isinstance(value, list) else value
            if lowest is not None and lowest < 1:
                self.error(f"--{name.replace('_', '-')} must be at least 1, got {lowest}")


def hardware() -> dict[str, Any]:
    """The machine, as far as it decides how fast something runs, and how busy it was."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "instruction_sets": instruction_sets(cpu_flags()),
        "cores_used": available_cores(),
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "gpus": [{"name": card.name, "memory_bytes": card.total_memory} for card in cards],
        "system": f"{platform.system()} {platform.release()}",
        "load_average_1min": round(LOAD_AT_START, 2),
    }


def versions() -> dict[str, str]:
    """Python and the packages whose code the measured time is spent in."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of this source tree, "+changes" behind it if tracked files differ; None outside a repository."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
    except FileNotFoundError:  # git is not installed
        return None
    if commit.returncode != 0:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return commit.stdout.strip() + ("+changes" if changed else "")


def record(benchmark: str, flags: dict[str, Any], results: Any) -> dict[str, Any]:
    """Everything that a result needs to be believed and measured again, ready for JSON.

    Args:
        benchmark: its name. flags: the settings it ran with. results: what it measured.
    """
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *without_outputs(sys.argv[1:])]),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "flags": {name: value for name, value in flags.items() if name not in ("output_json", "plot")},
        "results": results,
    }


def without_outputs(argv: Sequence[str]) -> list[str]:
    """A command line less its output files, which say nothing about the measurement."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip or word.startswith(("--output-json=", "--plot=")):
            skip = False
        elif word in ("--output-json", "--plot"):
            skip = True
        else:
            kept.append(word)
    return kept


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a record; the folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=2, default=str, ensure_ascii=False) + "\n")


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, lowest and highest of repeated measurements, and all of them in order."""
    every = list(values)
    return {"median": statistics.median(every), "min": min(every), "max": max(every), "values": every}


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    """Print a table, the first column to the left and all others to the right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
