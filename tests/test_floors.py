"""Imports go down only: neither the folders of `solutions/` nor its files import each other in a circle.

A subfolder counts as a folder of its own. Imports inside functions and imports for types count like all others.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "solutions"
TREE = {
    "attention", "batching", "benchmarks", "core", "memory", "models", "parallelism", "quantization", "serving", "tests",
}  # fmt: skip
MOST_IN_CORE = 15
"""Files that may lie directly in `core/`."""

Graph = dict[str, set[str]]


def module_of(folder: Path, name: str) -> Path | None:
    """The file of a module below `folder`, if there is one."""
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    return path if path.is_file() else None


def imported(path: Path, source: str) -> set[Path]:
    """Files of the tree that a file imports, wherever in it and for whatever reason."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [f"{node.module}.{alias.name}" if node.module else alias.name for alias in node.names]
            found |= {module_of(folder, name) for name in (*names, node.module or "") if name}
    return {other for other in found if other is not None and other != path}


def files() -> Graph:
    """File → files that it imports, tests left out."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "tests"]
    return {name(path): {name(other) for other in imported(path, path.read_text())} for path in paths}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def folders(graph: Graph) -> Graph:
    """The same between folders."""
    result: Graph = {}
    for file, others in graph.items():
        here = Path(file).parent.as_posix()
        result.setdefault(here, set()).update(Path(other).parent.as_posix() for other in others)
    return {folder: others - {folder} for folder, others in result.items()}


def circle(graph: Graph) -> list[str]:
    """The nodes of a circle in their order, or nothing."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_files_form_no_circle() -> None:
    assert circle(files()) == []


def test_folders_form_no_circle() -> None:
    assert circle(folders(files())) == []


def test_the_check_finds_lazy_imports_and_imports_for_types() -> None:
    path = ROOT / "memory" / "cache_engine.py"
    lazy = "def f():\n    from ..core import engine\n"
    typed = "if TYPE_CHECKING:\n    from ..core.scheduler import Scheduler\n"
    assert {name(other) for other in imported(path, lazy + typed)} == {"core/engine.py", "core/scheduler.py"}


def test_the_check_finds_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle(folders({"x/a.py": {"y/b.py"}, "y/c.py": {"x/d.py"}})) == ["x", "y", "x"]
    assert circle(folders({"x/a.py": {"x/y/b.py"}, "x/y/c.py": {"z/d.py"}})) == []


def test_solutions_has_the_folders_of_its_tree_and_no_other() -> None:
    hidden = {"__pycache__"}
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} - hidden == TREE
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == {"README.md", "__init__.py"}


def test_the_platform_imports_nothing_of_the_engine() -> None:
    assert {other for file, others in files().items() if file.startswith("core/platform/") for other in others} <= {
        file for file in files() if file.startswith("core/platform/")
    }


def test_core_holds_few_files() -> None:
    assert len([path for path in (ROOT / "core").iterdir() if path.is_file()]) <= MOST_IN_CORE
