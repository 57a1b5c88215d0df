"""What all measurements share: their flags, bars, tables and pictures, and the record that each result is kept with."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..core.doctor import instruction_sets
from ..core.platform.machine import available_cores, cpu_flags, processor_name, total_memory

Flags = argparse.Namespace
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
LOAD_AT_START = os.getloadavg()[0]
"""What others were doing on the machine, before a measurement's own work fills it."""
PICTURES = (".png", ".svg", ".pdf")
PAGES = ("compare", "grade", "latency", "memory", "throughput")
"""Commands that people type by the path of a file; all others are modules."""


def command(name: str) -> str:
    """How a measurement is started."""
    return f"python benchmarks/{name}.py" if name in PAGES else f"python -m solutions.benchmarks.{name}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose every complaint is one line, and whose help keeps its lines: the `text`, with its examples
    behind the flags. `picture` says what `finish` draws, if anything, and `has_results` whether it writes a record; `required`
    are flags for the usage."""

    def __init__(self, name: str, text: str, picture: str | None = None, required: str = "", has_results: bool = True) -> None:
        text, _, examples = text.partition("\nexamples:\n")
        super().__init__(
            usage=f"{command(name)} {required}[flag ...]", description=text, epilog=examples and f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        self._counts: list[str] = []
        self._picture, self._has_results = picture, has_results

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains every flag)\n")

    def add_flag(self, name: str, default: Any, text: str, group: Any = None, **settings: Any) -> None:
        """Add a flag whose type is its default's; a list takes several values. Whole numbers must be at least 1. The default is
        added to the help `text`; `settings` are as of `add_argument`."""
        is_list = isinstance(default, list)
        kind = type(default[0] if is_list else default)
        if kind is int:
            self._counts.append(name)
        shown = " ".join(map(str, default)) if is_list else default
        settings = {"type": kind, "nargs": "+" if is_list else None} | settings
        (group or self).add_argument(name, default=default, help=f"{text} (default: {shown})", **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Flags:
        """The flags, with those of what `finish` writes; exits with one line if one is wrong."""
        self.set_defaults(plot=None)
        if self._picture is not None:
            self.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {self._picture}, as PNG, SVG or PDF")
        if self._has_results:
            self.add_argument("--output-json", type=Path, metavar="FILE", help="write results, machine, versions and flags")
        found = super().parse_args(args, namespace)
        if found.plot is not None and found.plot.suffix not in PICTURES:
            self.error(f"--plot must end in {', '.join(PICTURES)}, got {found.plot}")
        for name in self._counts:
            value = getattr(found, name.lstrip("-").replace("-", "_"))
            lowest = min(value) if isinstance(value, list) else value
            if lowest < 1:
                self.error(f"{name} must be at least 1, got {lowest}")
        return found


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """Ends the program with one line on a ValueError or one of `more`, and quietly when it is interrupted."""
    try:
        yield
    except (ValueError, *more) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def say(line: str) -> None:
    """A line about what is going on, beside the results."""
    print(line, file=sys.stderr, flush=True)


def tracked(items: Iterable[Any], text: str, total: int | None = None) -> Iterator[Any]:
    """The items one by one, with a bar on standard error where that is a terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        yield from bar.track(items, total=total, description=text)


@contextmanager
def drawing(
    path: Path, columns: int = 1, figsize: tuple[float, float] | None = None, dpi: int = 90, **settings: Any
) -> Iterator[Any]:
    """Axes, an array of them if there are several columns; what is drawn on them is written to `path`. `settings` are those of
    `matplotlib.figure.Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    yield figure.subplots(1, columns, **settings)
    figure.savefig(path, dpi=dpi)


def finish(args: Flags, name: str, results: Any, draw: Callable[[Path], None] | None = None, **flags: Any) -> None:
    """Draw and write what was measured, each if a flag asks for it; `flags` are settings that are not among `args`."""
    if args.plot is not None and draw is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(args.plot)
    if args.output_json is not None:
        contents = json.dumps(record(name, vars(args) | flags, results), indent=2, default=str, ensure_ascii=False)
        args.output_json.parent.mkdir(parents=True, exist_ok=True)
        args.output_json.write_text(contents + "\n")
        say(f"written: {args.output_json}")


def hardware() -> dict[str, Any]:
    """The machine, as far as it decides how fast something runs, and how busy it was."""
    cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
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


def git_commit() -> str | None:
    """The commit of this source tree, "+changes" behind it if tracked files differ; None outside a repository."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is no repository
        return None


def record(benchmark: str, flags: dict[str, Any], results: Any) -> dict[str, Any]:
    """Everything that a result needs to be believed and measured again, ready for JSON: the machine, the versions of the
    packages that the measured time is spent in, and the settings."""
    return {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([command(benchmark), *without_outputs(sys.argv[1:])]),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "flags": {name: value for name, value in flags.items() if name not in ("output_json", "plot")},
        "results": results,
    }


def without_outputs(argv: Sequence[str]) -> list[str]:
    """A command line less its output files, which say nothing about the measurement."""
    outputs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    outputs.add_argument("--output-json")
    outputs.add_argument("--plot")
    return outputs.parse_known_args(argv)[1]


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, lowest and highest of repeated measurements, and all of them in order."""
    every = list(values)
    return {"median": statistics.median(every), "min": min(every), "max": max(every), "values": every}


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str | None = None) -> None:
    """Print a table, the first column to the left and all others to the right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
