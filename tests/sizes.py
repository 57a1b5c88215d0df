"""How large the engine is, counted one way for every commit.

``python -m tests.sizes`` prints the table of sizes in CONTRIBUTING.md as it should be now; ``--write`` puts it there;
``--at COMMIT`` prints the sizes of an earlier one. A line is a line of a file of source code, comments and empty lines too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "CONTRIBUTING.md"
SOURCES = {".py", ".cpp", ".h", ".cu"}
PAGE = {".js", ".css", ".html"}
LONG = 350
"""Lines that a file may have, tests excepted."""
PARTS = {
    "of it: forms of answers (JSON schemas, grammars)": r"core/(grammar|structured)/|core/structured_output",
    "of it: kernels for CPUs": r"_cpu\.|/native\.|/replay\.",
    "of it: the server": r"solutions/serving/",
}
"""What the engine's lines go to beside the engine itself: name → its paths."""
BEFORE = {
    "engine without tests and benchmarks, lines": 17788,
    "of it: forms of answers (JSON schemas, grammars)": 139,
    "of it: kernels for CPUs": 2884,
    "of it: the server": 3419,
    "both benchmark trees, lines": 5795,
    "files over 350 lines, tests excepted": 2,
    "files directly in `core/`": 27,
}
"""What ``--at 6e26112`` prints, the last commit before the floors; there was no list of a spine."""
GOALS = {
    "engine without tests and benchmarks, lines": 16000,
    "spine, lines": 4000,
    "both benchmark trees, lines": 4500,
    "files over 350 lines, tests excepted": 0,
    "files directly in `core/`": 15,
}
TABLE = re.compile(r"(?<=\n\n)\| size \|.*?(?=\n\n)", re.DOTALL)


def listed_files(commit: str | None = None) -> dict[str, int]:
    """File → lines, of `solutions/` and `benchmarks/`; of the working tree without a commit."""
    folders = ["solutions", "benchmarks"]
    if commit is None:
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES | PAGE]
        return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n") for path in paths}
    names = git("ls-tree", "-r", "--name-only", commit, *folders).splitlines()
    return {name: git("show", f"{commit}:{name}").count("\n") for name in names if Path(name).suffix in SOURCES | PAGE}


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def section(title: str) -> str:
    """A section of the engine's README."""
    text = (ROOT / "solutions/README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def spine() -> list[str]:
    """The files of the spine, from `solutions/`, in their order."""
    return re.findall(r"^\| \d+ \| \[[^]]+\]\(([^)]+)\)", section("The spine"), re.MULTILINE)


def walk() -> list[tuple[str, str]]:
    """The files of the reader's walk, from `solutions/`, with the functions at which to enter them."""
    return re.findall(r"^\| \d+ \| \[[^]]+\]\(([^)]+)\) \| `([^`]+)`", section("The reader's walk"), re.MULTILINE)


def sizes(files: dict[str, int]) -> dict[str, int]:
    """What the table counts."""

    def lines(wanted: Callable[[Path], bool]) -> int:
        return sum(count for name, count in files.items() if Path(name).suffix in SOURCES and wanted(Path(name)))

    def in_engine(path: Path) -> bool:
        return {"tests", "benchmarks"}.isdisjoint(path.parts)

    long = [n for name, n in files.items() if n > LONG and "tests" not in Path(name).parts]
    direct = [name for name in files if re.fullmatch(r"solutions/core/[^/]+\.py", name)]
    spine_files = {f"solutions/{file}" for file in spine()}
    return {
        "engine without tests and benchmarks, lines": lines(in_engine),
        **{
            name: lines(lambda path, paths=paths: in_engine(path) and re.search(paths, path.as_posix()) is not None)
            for name, paths in PARTS.items()
        },
        "spine, lines": lines(lambda path: path.as_posix() in spine_files),
        "both benchmark trees, lines": lines(lambda path: "benchmarks" in path.parts),
        "files over 350 lines, tests excepted": len(long),
        "files directly in `core/`": len(direct),
    }


def sizes_table(now: dict[str, int]) -> str:
    rows = [f"| {name} | {written(BEFORE.get(name))} | {count:,} | {written(GOALS.get(name))} |" for name, count in now.items()]
    return "\n".join(["| size | at 6e26112 | now | goal, at most |", "|---|---:|---:|---:|", *rows])


def written(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def numbers_in(text: str) -> dict[str, list[str]]:
    """Row → its cells, of the table in a text."""
    rows = (re.split(r" *\| *", line)[1:-1] for line in TABLE.search(text)[0].splitlines()[2:])
    return {name: cells for name, *cells in rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sizes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into CONTRIBUTING.md")
    parser.add_argument("--at", metavar="COMMIT", help="print the sizes of this commit")
    args = parser.parse_args()
    table = sizes_table(sizes(listed_files()))
    if args.at:
        counts = sizes(listed_files(args.at))
        print("\n".join(f"{counts[name]:7,} {name}" for name in counts if name != "spine, lines"))
    elif args.write:
        DOCUMENT.write_text(TABLE.sub(lambda _: table, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
