"""The table of docs/clients.md, from the record of what ran: results.json beside this file, a client's last run each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from solutions.tests.clients.environments import catalogue
from solutions.tests.clients.shared import FEATURES

ROOT = Path(__file__).parents[3]
RECORD = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- from here on: make test-clients ARGS=--write -->\n", "<!-- to here -->\n"

Record = dict[str, Any]
"""A client's name → its version, the date of the run, and either `features` (name → error or null) or why it is left out."""


def enter(name: str, run: dict[str, Any]) -> None:
    """Put a client's run into the record, and renew the page."""
    record = read() | {name: run}
    ordered = {client.name: record[client.name] for client in catalogue() if client.name in record}
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(ordered)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def read() -> Record:
    record: Record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return record


def shown() -> str:
    """The table as the page has it."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def table(record: Record) -> str:
    """Markdown: a row for each client that ran, then what fails and who is left out."""
    lines = [f"| client | version | run | {' | '.join(FEATURES)} |", f"|---|---|---|{'---|' * len(FEATURES)}"]
    failures, absent = [], []
    for name, run in record.items():
        if "left out" in run:
            absent.append(f"- {name} {run['version']}, {run['date']}: {run['left out']}")
            continue
        cells = [_cell(run["features"], feature) for feature in FEATURES]
        lines.append(f"| {name} | {run['version']} | {run['date']} | {' | '.join(cells)} |")
        failures += [f"- {name}, {feature}: {error}" for feature, error in run["features"].items() if error]
    for title, each in (("What fails:", failures), ("Left out, since the packages could not be installed:", absent)):
        lines += ["", title, "", *each] if each else []
    return "\n".join(lines) + "\n"


def _cell(features: dict[str, str | None], name: str) -> str:
    if name not in features:
        return ""
    return "**no**" if features[name] else "yes"
