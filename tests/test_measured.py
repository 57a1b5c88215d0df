"""The tables of measurements say what the records say."""

from __future__ import annotations

import re

import pytest

from tests.measured import DOCUMENTS, ROOT, tables_in, with_tables

TEXTS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_table_is_its_record(document: str) -> None:
    assert tables_in(TEXTS[document]) == [make() for make in DOCUMENTS[document]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_cell_holds_one_number(document: str) -> None:
    cells = [cell for table in tables_in(TEXTS[document]) for row in table[2:] for cell in row.split(" | ")[1:]]
    numbers = [cell for cell in cells if re.match(r"[−\d]", cell)]
    assert len(numbers) > 20
    assert [cell for cell in numbers if re.search(r"\d[^\d.]+\d", re.sub(r"(?<=\d),(?=\d{3})", "", cell))] == []


def test_every_record_has_a_link() -> None:
    """But the two that have pictures, whose numbers are too many for a table."""
    linked = set(re.findall(r"\(results/([\w.-]+\.json)\)", TEXTS["benchmarks/README.md"]))
    pictures = {"epyc-zen4-2core_kernels.json", "epyc-zen4-2core_profile.json"}
    assert linked | pictures == {path.name for path in (ROOT / "benchmarks/results").glob("*.json")}


def test_the_check_sees_a_wrong_number() -> None:
    text = "Speed\n\n<!-- measured -->\n| what | rate |\n|---|---:|\n| here | 352 |\n\nand so on\n"
    assert tables_in(text) == [["| what | rate |", "|---|---:|", "| here | 352 |"]]
    assert with_tables(text, [["| what | rate |", "|---|---:|", "| here | 353 |"]]) == text.replace("352", "353")
