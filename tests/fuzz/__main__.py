"""``python -m tests.fuzz``, or ``make fuzz``: made-up cases until the time is over, and how to repeat those that go wrong.

A module of this folder with a function ``run(rng: random.Random) -> None`` is a kind of case; it raises if something is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from tests.fuzz.driver import Finding, Module, choose, discover, fuzz

FOLDER = Path(__file__).parent


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all modules together (default: 10)")
    parser.add_argument("--what", default="all", metavar="NAMES", help="modules, or a word of their names, with commas between")
    parser.add_argument("--seed", type=int, help="of each module's first case, the next one's is one more (default: random)")
    parser.add_argument("--cases", type=int, metavar="N", help="at most, of each module (default: no limit)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at once (default: 2)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the modules are (default: here)")
    args = parser.parse_args(argv)
    for name in ("minutes", "jobs", "cases"):
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"--{name} must be more than 0")
    return args


def how_to_repeat(finding: Finding) -> str:
    """The command that runs this case alone."""
    return f"make fuzz WHAT={finding.module} SEED={finding.seed} CASES=1"


class Report:
    """Prints each new fault once, with the command that repeats it, and a line that says how far it is."""

    def __init__(self, modules: list[Module], progress: Progress, seconds: float) -> None:
        self._modules, self._progress = modules, progress
        self._task = progress.add_task("starting")
        self._end = time.monotonic() + seconds
        self._seen: set[tuple[str, ...]] = set()

    def __call__(self, finding: Finding | None) -> None:
        if finding is not None:
            self._show(finding)
        cases, faults = (sum(counts) for counts in zip(*((m.num_cases, len(m.findings)) for m in self._modules), strict=True))
        left = max(0.0, self._end - time.monotonic())
        self._progress.update(self._task, description=f"{cases} cases, {faults} went wrong, {left:.0f} s left")

    def _show(self, finding: Finding) -> None:
        console = self._progress.console
        console.print(f"{finding.module} {finding.kind}: {how_to_repeat(finding)}", style="bold red", markup=False)
        signature = (finding.module, *finding.signature)
        text = "the same fault as before, it seems" if signature in self._seen else finding.text
        console.print(text.rstrip(), markup=False, highlight=False)
        self._seen.add(signature)


def summary(modules: list[Module]) -> Table:
    """A row a module."""
    table = Table(title="fuzz", title_justify="left", title_style="bold")
    for name in ("module", "cases", "ms a case", "went wrong", "faults"):
        table.add_column(name, justify="left" if name == "module" else "right")
    for module in modules:
        faults = len({finding.signature for finding in module.findings})
        pace = 1000 * module.seconds / max(1, module.num_cases)
        wrong = len(module.findings)
        table.add_row(module.name, str(module.num_cases), f"{pace:.0f}", str(wrong), str(faults), style="red" if wrong else "")
    return table


def main(argv: list[str] | None = None) -> int:
    """Run it; 0 if nothing went wrong, 1 if something did or nothing ran, 2 for wrong flags."""
    args = parse_flags(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        modules = choose(discover(args.folder.resolve()), args.what)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seed = random.randrange(10**9) if args.seed is None else args.seed
    console.print(f"fuzz: {', '.join(m.name for m in modules)}; SEED={seed}", highlight=False)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        report = Report(modules, progress, 60 * args.minutes)
        try:
            fuzz(modules, seed, 60 * args.minutes, args.jobs, args.cases, report)
        except KeyboardInterrupt:
            console.print("stopped")
    console.print(summary(modules))
    findings = [finding for module in modules for finding in module.findings]
    for finding in findings:
        console.print(how_to_repeat(finding), markup=False, highlight=False)
    return 1 if findings or not any(module.num_cases for module in modules) else 0


if __name__ == "__main__":
    sys.exit(main())
