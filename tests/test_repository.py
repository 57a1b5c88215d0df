"""What holds for every file of the repository: the rules that the overlay of stages and the readers rely on."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
SKIPPED = {".venv", ".git", ".cache", "build", "__pycache__"}
SOURCES = {".py", ".cu", ".cpp", ".h", ".cuh"}


def files(folder: str, suffixes: set[str]) -> list[Path]:
    found = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return sorted(p for p in found if SKIPPED.isdisjoint(p.relative_to(ROOT).parts))


SOLUTIONS = files("solutions", SOURCES)
MODULES = [p for p in SOLUTIONS if p.suffix == ".py" and "tests" not in p.parts]


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def test_there_is_something_to_check() -> None:
    assert "solutions/memory/block_allocator.py" in names(MODULES)


def test_folders_of_solutions_are_namespace_packages() -> None:
    """An __init__.py would end the search for a module there, and a learner's folder would hide the reference's."""
    assert names(sorted((ROOT / "solutions").rglob("__init__.py"))) == ["solutions/__init__.py"]


def absolute_imports(source: str) -> list[int]:
    """Lines of a module that import `solutions` or `stages` by name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        if any(m.split(".")[0] in ("solutions", "stages") for m in modules):
            lines.append(node.lineno)
    return lines


def test_the_check_of_imports_sees_each_spelling() -> None:
    source = "import solutions\nimport os, solutions.core.engine\nfrom solutions.core import engine\nfrom ..core import x\n"
    assert absolute_imports(source) == [1, 2, 3]


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_solutions_import_each_other_relatively(path: Path) -> None:
    """The same file is a part of `solutions` and of `stages`; a name would tie it to one of them."""
    assert absolute_imports(path.read_text()) == []


@pytest.mark.parametrize("path", SOLUTIONS, ids=names(SOLUTIONS))
def test_files_are_short_and_finished(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 500
    # raising NotImplementedError means "a learner's task"; the reference has none
    assert re.findall(r"raise NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", text) == []


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_functions_fit_a_screen(path: Path) -> None:
    lengths = {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert {name: length for name, length in lengths.items() if length > 80} == {}


PAGES = {"compare.py", "grade.py", "latency.py", "memory.py", "throughput.py"}
"""Commands that people and graders type by the path of a file."""


def test_each_measurement_has_one_place() -> None:
    """`benchmarks/` holds results and pages; what measures is in `solutions/benchmarks/`, and runs by ``-m``."""
    pages = {path.name for path in (ROOT / "benchmarks").iterdir() if path.name != "__pycache__"}
    assert pages == PAGES | {"README.md", "results"}
    modules = files("solutions/benchmarks", {".py"})
    assert {path.name for path in modules} & PAGES == {"latency.py", "memory.py", "throughput.py"}


def makefile_targets() -> dict[str, str | None]:
    """Each target a person may type, and its line of help."""
    rules = re.findall(r"^([a-z][a-z0-9-]*):(?!=)(?:.*?## (.*)|.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return {name: text or None for name, text in rules}


def test_every_target_has_help_and_is_phony() -> None:
    targets = makefile_targets()
    assert {"setup", "serve", "test", "test-parity", "doctor", "lint"} <= targets.keys()
    assert [name for name, text in targets.items() if text is None] == []
    phony = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == targets.keys()


def test_make_alone_prints_every_target_with_its_help() -> None:
    run = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = dict(re.findall(r"^  ([a-z][a-z0-9-]*) +(.+)$", run.stdout, re.MULTILINE))
    assert printed == makefile_targets()


PINNED_BY_TORCH = {"triton"}
"""On a CUDA machine torch brings its own version; without it the engine does all but run Triton's kernels."""


PACKAGES = {"google": "protobuf", "opentelemetry": "opentelemetry-sdk"}
"""Modules → their packages, where the names differ by more than a sign."""


def normal(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_engine_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    check_declared(
        [p for p in MODULES if p.parent.name != "benchmarks"], project["dependencies"] + extras["ray"] + extras["otel"]
    )
    check_declared(MODULES, project["dependencies"] + extras["dev"])  # whose measurements need more


def check_declared(modules: list[Path], lines: list[str]) -> None:
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    imported = set()
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    foreign = {normal(PACKAGES.get(name, name)) for name in imported - sys.stdlib_module_names}
    assert "torch" in foreign
    assert foreign - declared - PINNED_BY_TORCH == set()


def test_pinned_packages_take_every_python_that_the_project_takes() -> None:
    """A pin that wants 3.11.5 fails on Debian's 3.11.2. Seen of packages that are installed here."""
    pinned = {
        normal(name) for name in re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    pythons = ("3.11.0", "3.12.0", "3.13.0")
    refused = {
        f"{package.name} {package.version} wants Python {wanted}"
        for package in importlib.metadata.distributions()
        if normal(package.name) in pinned and (wanted := package.metadata.get("Requires-Python"))
        for python in pythons
        if python not in SpecifierSet(wanted)
    }
    assert refused == set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert all(python in SpecifierSet(project["requires-python"]) for python in pythons)


def test_constraints_pin_every_dependency_exactly() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin)] == []
    pinned = {normal(pin.split("==")[0]) for pin in pins}
    declared = set(re.findall(r'^    "([A-Za-z0-9_-]+)(?:\[\w+\])?>=', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {"torch", "pytest", "ray"} <= declared
    assert {normal(name) for name in declared} - pinned == PINNED_BY_TORCH
