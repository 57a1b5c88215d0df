"""Where the time of `make test` goes, file by file.

``make test ARGS="--junitxml=times.xml"`` writes what each test took; ``python -m tests.times times.xml`` prints the table of
the longest files, and ``--write`` puts it into CONTRIBUTING.md. Two processes share the work, so the suite takes about
half of the sum.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "CONTRIBUTING.md"
TABLE = re.compile(r"(?<=\n\n)\| tests in \|.*?(?=\n\n)", re.DOTALL)
LONGEST = 15
"""Files that have a row of their own."""


def seconds_by_file(record: Path) -> dict[str, list[float]]:
    """File → the seconds of each of its tests, of a record that pytest's `--junitxml` wrote; the longest file first."""
    files = defaultdict(list)
    for case in ET.parse(record).iter("testcase"):
        module = re.sub(r"\.Test\w*$", "", case.attrib["classname"])
        files[module.replace(".", "/") + ".py"].append(float(case.attrib["time"]))
    return dict(sorted(files.items(), key=lambda item: -sum(item[1])))


def times_table(files: dict[str, list[float]]) -> str:
    longest, rest = list(files.items())[:LONGEST], list(files.values())[LONGEST:]
    rows = [*longest, (f"{len(rest)} other files", [seconds for times in rest for seconds in times])]
    rows.append(("all", [seconds for times in files.values() for seconds in times]))
    cells = [f"| {name} | {len(times):,} | {sum(times):,.0f} |" for name, times in rows if times]
    return "\n".join(["| tests in | tests | seconds |", "|---|---:|---:|", *cells])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.times", description=__doc__.split("\n\n")[0])
    parser.add_argument("record", type=Path, help="what `make test ARGS=--junitxml=FILE` wrote")
    parser.add_argument("--write", action="store_true", help="put the table into CONTRIBUTING.md")
    args = parser.parse_args()
    table = times_table(seconds_by_file(args.record))
    if args.write:
        DOCUMENT.write_text(TABLE.sub(lambda _: table, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
