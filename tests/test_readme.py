"""Commands, files and links that the documents name exist."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from solutions.core.config import add_engine_flags

from .file_list import DOCUMENT, LIST, SOURCES, file_list, first_sentence, floors
from .test_floors import ROOT as ENGINE
from .test_floors import name

ROOT = Path(__file__).parents[1]
PROGRAM_FLAGS = {
    "--host", "--port", "--prompt", "--prompts-file", "--api-key", "--api-key-file", "--served-model-name",
    "--max-waiting-tokens", "--prefill", "--decode", "--output",
}  # fmt: skip
"""Flags of the command line, of the server, of the proxy and of the training of heads besides those of the engine."""
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


def test_the_engine_s_readme_lists_every_file_by_its_own_words() -> None:
    """`python -m tests.file_list --write` renews the list."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert LIST.findall(text) == [file_list()]
    rows = re.findall(r"^\| \[\S+\]\((\S+)\) \| .*\S \|$", LIST.findall(text)[0], re.MULTILINE)
    every = {name(path) for path in ENGINE.rglob("*") if path.suffix in SOURCES and name(path).split("/")[0] != "tests"}
    assert sorted(rows) == sorted(every - {"__init__.py"})


def test_a_file_s_own_words_are_its_first_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""Adds ``a``\nto b | c. Not\nmore."""\n')
    (tmp_path / "b.h").write_text("// Adds a\n// to b. Not more.\n//\n// Nor this.\nint x;\n")
    assert first_sentence(tmp_path / "a.py") == "Adds `a` to b \\| c."
    assert first_sentence(tmp_path / "b.h") == "Adds a to b."


def test_a_floor_stands_above_what_it_imports() -> None:
    assert floors({"a": {"c"}, "b": {"a", "c"}, "c": set(), "d": set()}) == ["b", "a", "c", "d"]
