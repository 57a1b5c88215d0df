"""docs/clients.md: the table is the record of what ran, with today's clients, versions and features."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from solutions.tests.clients import shared
from solutions.tests.clients.environments import HERE, Client, UnavailableError, catalogue, command
from solutions.tests.clients.table import read, shown, table

CLIENTS = catalogue()


def test_the_page_shows_the_record() -> None:
    assert shown() == table(read())
    assert list(read()) == [client.name for client in CLIENTS]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_record_is_of_todays_client_and_script(client: Client) -> None:
    """A new version, feature or client needs a new run: make test-clients ARGS="--only NAME --write"."""
    run = read()[client.name]
    assert run["version"] == client.version
    if "left out" not in run:
        asked = re.findall(r'feature\("([^"]+)"', (HERE / client.script).read_text(encoding="utf-8"))
        assert list(run["features"]) == asked
        assert {*asked} <= {*shared.FEATURES}


def test_every_script_is_in_the_catalogue_and_short() -> None:
    scripts = sorted(path.name for path in HERE.glob("use_*"))
    assert scripts == sorted(client.script for client in CLIENTS)
    assert [name for name in scripts if len((HERE / name).read_text(encoding="utf-8").splitlines()) > 130] == []


def test_a_failure_and_a_client_that_is_left_out_are_named() -> None:
    runs = {
        "one": {"version": "1", "date": "2026-11-29", "features": {"chat": None, "stream": "ValueError: no"}},
        "other": {"version": "2", "date": "2026-11-29", "left out": "pip says: no"},
    }
    text = table(runs)
    assert "| one | 1 | 2026-11-29 | yes | **no** |  |" in text
    assert "- one, stream: ValueError: no" in text
    assert "- other 2, 2026-11-29: pip says: no" in text
    assert "| other |" not in text


def test_a_script_prints_a_line_for_each_feature(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shared, "_tests", {})
    monkeypatch.setattr("sys.argv", ["use_it.py"])

    @shared.feature("chat")
    def right() -> None:
        shared.a_call("get_weather", '{"city": "Paris"}')

    @shared.feature("tools")
    def wrong() -> None:
        shared.a_call("get_weather", {"city": 3})

    shared.run()
    first, second = capsys.readouterr().out.splitlines()
    assert first == '{"feature": "chat", "error": null}'
    assert second.startswith('{"feature": "tools", "error": "AssertionError: ')
    with pytest.raises(AssertionError):
        shared.feature("a new word")


def test_packages_that_cannot_be_had_are_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BYOV_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    client = Client("one", "use_openai_node.mjs", ("@openai/no@1.2.3",))
    assert client.version == "1.2.3"
    for _ in range(2):  # what is half made is made again
        with pytest.raises(UnavailableError, match="Node and npm are not installed"):
            command(client)
