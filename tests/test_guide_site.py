"""The guide as a website: what `make guide` shows. `make guide` installs MkDocs; CI does so before it runs the tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.course.tools.catalog import Stage
from tests.guide import COURSE, FILES, ROOT, TASKS, anchors

pytest.importorskip("material", reason="there is no MkDocs; make guide installs it")

PAGES = [*FILES, "solutions/README.md"]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a repository as `make guide ARGS=build` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = build(ROOT, folder)
    assert run.returncode == 0, run.stderr
    return folder


def page(site: Path, file: str) -> str:
    """The page that a file of the guide has become."""
    name = {FILES[0]: "index.html", "solutions/README.md": "solutions/index.html"}.get(file, file.replace(".md", ".html"))
    return (site / name).read_text(encoding="utf-8")


def test_every_part_has_a_page_and_there_are_no_others(site: Path) -> None:
    assert all(page(site, file) for file in PAGES)
    assert len(list(site.rglob("*.html"))) == len(PAGES) + 1  # the one for addresses that do not exist


@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: str(stage.number))
def test_every_tasks_anchor_is_in_its_chapters_page(site: Path, stage: Stage) -> None:
    text = page(site, stage.chapter)
    assert [task.id for task in stage.tasks if f'<a id="{task.guide}"></a>' not in text] == []


def test_the_table_of_tasks_leads_to_the_pages(site: Path) -> None:
    text = page(site, FILES[0])
    assert [task.id for task in TASKS if f'href="{task.section.replace(".md", ".html")}"' not in text] == []


def test_the_search_knows_every_task(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    titles = {entry["title"] for entry in entries}
    assert [task.id for task in TASKS if f"Task {task.id} · {task.name}" not in titles] == []


@pytest.mark.parametrize("file", PAGES)
def test_a_page_is_all_there_and_loads_nothing_from_elsewhere(site: Path, file: str) -> None:
    text, source = page(site, file), (ROOT / file).read_text(encoding="utf-8")
    assert re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^>]*>', text) == []
    assert [name for name in anchors(source) if f'id="{name}"' not in text] == []
    prose = re.sub(r"^```.*?^```$", "", source, flags=re.MULTILINE | re.DOTALL)
    body = text[text.index("<article") : text.index("</article>")]
    assert body.count("<li>") == len(re.findall(r"^(?:-|\d+\.) ", prose, re.MULTILINE))
    assert body.count("<table>") == len(re.findall(r"^\|[-|]+\|$", prose, re.MULTILINE))


def test_a_link_to_a_file_that_is_no_page_is_its_path(site: Path) -> None:
    text = page(site, "solutions/README.md")
    assert "<code>solutions/core/engine.py</code>" in text
    assert 'href="core/engine.py"' not in text


def test_dead_links_are_refused(tmp_path: Path) -> None:
    dead = ("nowhere.md", "stages/stage1_block_management/GUIDE.md#task-9-9", "#nowhere")
    for file in ("mkdocs.yml", "docs/guide_site.py", "docs/guide.css", *PAGES):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    (tmp_path / "solutions/README.md").write_text("# The engine\n")  # its links lead to the engine's files
    with (tmp_path / FILES[0]).open("a") as hub:
        hub.writelines(f"\n[dead]({link})\n" for link in dead)
    run = build(tmp_path, tmp_path / "site")
    assert run.returncode == 1
    assert [link for link in dead if f"'{link}'" not in run.stderr] == []
