"""The command that tries a folder of schemas: what it counts, and that it notices an answer that is invalid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from solutions.core.grammar.json_schema import to_grammar
from tests import schema_bench

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    schemas = {"good": {"type": "integer"}, "refused": {"pattern": "(?<=a)b"}}
    (tmp_path / "set").mkdir()
    for name, schema in schemas.items():
        (tmp_path / "set" / f"{name}.json").write_text(json.dumps(schema))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["schema_bench", *arguments])
    return schema_bench.main()


def test_schemas_are_counted_and_refusals_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, str(folder)) == 0
    printed = capsys.readouterr().out
    assert 'set/refused.json refused: the keyword "pattern" at $' in " ".join(printed.split())
    (row,) = (line for line in printed.splitlines() if "│ set " in line)
    assert [word for word in row.split() if word.isdecimal()] == ["1", "0", "1", "0"]


def test_an_invalid_answer_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schema_bench, "to_grammar", lambda text: to_grammar('{"type": "string"}'))
    assert run(monkeypatch, str(folder)) == 1
    assert "good.json INVALID" in capsys.readouterr().out


def test_a_folder_without_schemas_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="has no folders of schemas"):
        run(monkeypatch, str(tmp_path))
