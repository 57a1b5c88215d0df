"""`make lint` runs the type checker over the engine, strictly, and what it skips is a list that can only name real files."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECKER: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def unmended() -> list[str]:
    """The modules whose errors are not reported."""
    return [name for group in CHECKER.get("overrides", []) if group.get("ignore_errors") for name in group["module"]]


def test_lint_runs_the_checker() -> None:
    run = subprocess.run(["make", "-n", "lint", "VENV=", "PYTHON=python"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [command.strip() for command in run.stdout.replace("&&", "\n").splitlines()]
    assert "python -m mypy" in commands
    assert "python -m ruff check ." in commands


def test_the_checker_is_strict_on_the_whole_engine() -> None:
    assert CHECKER["strict"] is True
    assert CHECKER["files"] == ["solutions"]
    assert CHECKER["exclude"] == ["^solutions/(tests|benchmarks)/"]
    loosened = [(name, set(group) - {"module"}) for group in CHECKER.get("overrides", []) for name in group["module"]]
    for name, options in loosened:
        if name.startswith("solutions.") and options != {"ignore_errors"}:
            assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name
            assert "triton" in name, "only Triton's kernels have no types"
            assert options == {"disallow_incomplete_defs", "disallow_untyped_decorators", "disallow_untyped_defs"}


def test_each_module_that_is_left_out_exists() -> None:
    """A pattern, or a module that moved, would hide errors without a word."""
    names = unmended()
    assert names == sorted(set(names))
    assert [name for name in names if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] == []
