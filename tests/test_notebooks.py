"""The notebooks are committed as they ran: in order, with outputs, on `stages` alone, and no result is typed in.

That they still run is the business of ``make notebooks``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIBRARIES = {"matplotlib", "numpy", "torch", "stages"} | sys.stdlib_module_names
"""What a notebook may import: never `solutions`, because it must run on the learner's code too."""
MACHINE_PATH = re.compile(r"/(?:home|root|work|tmp|usr|opt|var|mnt|Users|private)/|\b[A-Z]:\\")
RESULT = re.compile(
    r"\d\s*(?:%|×|x\b|(?:tok|tokens)/s|tokens? (?:a|per) second|times\b|ms\b|µs\b|s\b|seconds\b|[KMG]i?B\b)", re.IGNORECASE
)
"""A number with the unit of a measurement."""
MAX_BYTES = 700_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
Cell = dict[str, Any]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def cells(path: Path, *kinds: str) -> list[Cell]:
    """The cells of these kinds, "code" and "markdown", that are not empty."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] in kinds and source(cell).strip()]


def texts(cell: Cell) -> list[str]:
    """All that a code cell's outputs show as text."""
    shown = []
    for output in cell["outputs"]:
        shown += output.get("text", [])
        shown += [line for kind, data in output.get("data", {}).items() if kind.startswith("text/") for line in data]
    return shown


def imported(code: str) -> set[str]:
    """Top-level names of the modules that some code imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_there_is_something_to_check() -> None:
    names = ["1_block_management", "2_scheduler", "3_parallelism", "4_optimization", "5_production", "6_benchmark"]
    assert [path.stem for path in NOTEBOOKS] == names


@each_notebook
def test_is_valid(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


@each_notebook
def test_is_small_and_without_traces_of_its_run(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    assert [cell["id"] for cell in cells(path, "code", "markdown") if "execution" in cell["metadata"]] == []  # when it ran


@each_notebook
def test_begins_with_what_it_shows(path: Path) -> None:
    first = cells(path, "code", "markdown")[0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith(f"# {path.stem[0]} · ")


@each_notebook
@pytest.mark.parametrize("folder", [".", "notebooks"])
@pytest.mark.parametrize("whose", ["reference", "mine"])
def test_the_first_cell_chooses_whose_code_runs(path: Path, whose: str, folder: str) -> None:
    code = source(cells(path, "code")[0])
    assert code.count('WHOSE = "reference"') == 1
    assert imported(code) & {"stages", "solutions"} == set()
    code = code.replace('WHOSE = "reference"', f'WHOSE = "{whose}"') + '\nprint(os.environ["STAGES"], sys.path[0], sep="|")'
    environment = {name: value for name, value in os.environ.items() if name not in ("STAGES", "PYTHONPATH")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / folder, env=environment, capture_output=True, text=True, check=True
    )
    stage = path.stem[0] if whose == "mine" else ""
    assert run.stdout.strip() == f"{stage}|{ROOT}"


@each_notebook
def test_imports_stages_and_never_the_reference(path: Path) -> None:
    names = set().union(*(imported(source(cell)) for cell in cells(path, "code")))
    assert "stages" in names
    assert names - LIBRARIES == set()


def calls_of_the_engine(path: Path) -> list[tuple[str, ast.Call]]:
    """A notebook's calls of what it imports from `stages`, each with the full name of what is called."""
    trees = [ast.parse(source(cell)) for cell in cells(path, "code")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.")
        for alias in node.names
    }  # fmt: skip
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [(names[call.func.id], call) for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]


@each_notebook
def test_what_is_called_takes_such_arguments(path: Path) -> None:
    """A notebook takes minutes to run, so only ``make notebooks`` does. Here the calls are held against the signatures."""
    calls = calls_of_the_engine(path)
    assert calls
    for name, call in calls:
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        is_open = any(isinstance(each, ast.Starred) for each in call.args) or any(each.arg is None for each in call.keywords)
        bind = inspect.signature(found).bind_partial if is_open else inspect.signature(found).bind
        args = [each for each in call.args if not isinstance(each, ast.Starred)]
        try:
            bind(*args, **{each.arg: each for each in call.keywords if each.arg is not None})
        except TypeError as error:
            pytest.fail(f"{ast.unparse(call)}: {error}")


@each_notebook
def test_every_cell_ran_in_order_and_without_a_complaint(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [(cell["execution_count"], output) for cell in code for output in cell["outputs"]]
    assert [(n, out) for n, out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"] == []


@each_notebook
def test_what_prints_or_plots_has_its_output(path: Path) -> None:
    code, plots = cells(path, "code"), 0
    for cell in code:
        statements = ast.parse(source(cell)).body
        # what stands in a function runs, and shows, wherever it is called
        calls = [node for each in statements if not isinstance(each, ast.FunctionDef | ast.ClassDef) for node in ast.walk(each)]
        names = [ast.unparse(node.func) for node in calls if isinstance(node, ast.Call)]
        images = sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert images == names.count("plt.show"), f"cell [{cell['execution_count']}]"
        assert "print" not in names or texts(cell), f"cell [{cell['execution_count']}]"
        plots += images
    assert plots >= 3


@each_notebook
def test_outputs_name_no_place_on_a_machine(path: Path) -> None:
    shown = "".join(text for cell in cells(path, "code") for text in texts(cell))
    assert MACHINE_PATH.findall(shown) == []


@each_notebook
def test_no_result_is_typed_in(path: Path) -> None:
    assert [found[0] for cell in cells(path, "markdown") for found in RESULT.finditer(source(cell))] == []


@pytest.mark.parametrize("text", ["gains 4.3x", "wastes 83 %", "2.5 × as much", "130 tok/s", "12 ms", "5 times", "3.9 MiB"])
def test_a_typed_result_would_be_seen(text: str) -> None:
    assert RESULT.search(text)
    assert not RESULT.search("set `PROMPT = 208` in section 4, for a 7B model, at second 0")


@pytest.mark.parametrize("text", ["/home/ann/.venv/lib/x.py:21: Warning", r"C:\Users\ann", "File /opt/x.py"])
def test_a_path_would_be_seen(text: str) -> None:
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("solutions/memory/block_allocator.py, 130 tokens/s, https://example.org/work")
