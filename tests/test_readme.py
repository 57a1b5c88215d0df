"""Commands, files and links that the documents name exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from solutions.core.config import add_engine_flags

ROOT = Path(__file__).parents[1]
PROGRAM_FLAGS = {
    "--host", "--port", "--prompt", "--prompts-file", "--api-key", "--served-model-name", "--max-waiting-tokens"
}  # fmt: skip
"""Flags of the command line and of the server besides those of the engine."""
DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    "docs/serving.md",
    "solutions/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("stages/stage*/README.md"))),
]


def code(document: str) -> str:
    """All that a document shows as code, in blocks and in lines."""
    text = (ROOT / document).read_text()
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def test_the_first_two_commands_are_there() -> None:
    assert {"serve", "test"} <= set(re.findall(r"\bmake ([a-z-]+)", code("README.md")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_command_is_a_target(document: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", code(document))) - targets == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_script_exists(document: str) -> None:
    text = code(document)
    paths = [name.replace(".", "/") + ".py" for name in re.findall(r"(?:-m|from|import) (solutions[\w.]*)", text)]
    paths += re.findall(r"python ([\w/]+\.py)", text)
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_of_the_engine_exists(document: str) -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    known = {option for action in parser._actions for option in action.option_strings} | PROGRAM_FLAGS
    commands = re.findall(r"-m solutions\.(?:core|serving)\.\S+(.*)|(?<!PIP_)ARGS=\"(.*?)\"", code(document))
    used = {flag for line in commands for text in line for flag in re.findall(r"--[a-z][a-z-]*", text)}
    assert used - known == set()


def test_the_engine_s_readme_names_every_file_of_it() -> None:
    text = (ROOT / "solutions/README.md").read_text()
    files = (path for suffix in ("py", "h", "cu") for path in (ROOT / "solutions").rglob(f"*.{suffix}"))
    engine = [path for path in files if "tests" not in path.parts and path.name != "__init__.py"]
    assert len(engine) > 100
    assert [str(path.relative_to(ROOT)) for path in engine if f"`{path.name}`" not in text] == []
