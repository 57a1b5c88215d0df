"""The documents that people meet first tell the truth: links, commands, paths, tables, templates."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from stages.course.tools.catalog import Stage, load_course
from stages.course.tools.targets import find_lines
from stages.make_starters import starters

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md", "INSTRUCTORS.md", "README.md", "benchmarks/README.md",
    "docs/classroom/README.md", "docs/serving.md",
]  # fmt: skip
COURSE = load_course()
TASKS = {task.id: task for stage in COURSE for task in stage.core}
NOT_THERE_YET: set[str] = set()
"""Commands that the documents may name before they exist, as targets of the Makefile and as programs in `benchmarks/`."""
PLANNED_STAGES = {6} - {stage.number for stage in COURSE}
TEXTS = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
PLACEHOLDERS = ("stageN", "N_M")
GITHUBS = {".github/workflows"}
"""Paths that the documents tell a reader to make."""


def code(text: str) -> str:
    """All that a document shows as code, in blocks and in lines."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))


def anchors(text: str) -> set[str]:
    """What a link can point to: GitHub's names of the headings, and the anchors that are written out."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def dead_links(document: str, text: str) -> list[str]:
    """Links to files and headings of this repository that are not there."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / document).parent / path
        found = target.exists() if path else True
        if found and anchor:
            found = anchor in anchors(target.read_text(encoding="utf-8") if path else text)
        if not found:
            dead.append(link)
    return dead


def unknown_commands(text: str) -> list[str]:
    """Targets of make, modules, programs, tasks and levels of hints that do not exist."""
    shown = code(text)
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)) | NOT_THERE_YET
    unknown = [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z0-9-]*)(?![\w-])", shown) if name not in targets]
    for module in re.findall(r"-m ((?:solutions|stages|tests)[\w.]*)", shown):
        path = ROOT / module.replace(".", "/")
        unknown += [] if path.with_suffix(".py").is_file() or (path / "__main__.py").is_file() else [f"-m {module}"]
    for path in re.findall(r"python3? ([\w/]+\.py)", shown):
        planned = path in {f"benchmarks/{name}.py" for name in NOT_THERE_YET}
        unknown += [] if planned or (ROOT / path).is_file() else [path]
    unknown += [f"TASK={task}" for task in re.findall(r"\bTASK=([\d.]+\d)", shown) if task not in TASKS]
    return unknown + [f"LEVEL={level}" for level in re.findall(r"\bLEVEL=(\d)", shown) if not 1 <= int(level) <= 3]


def missing_paths(text: str) -> list[str]:
    """Paths inside this repository that stand in code and lead nowhere; `*` stands for anything."""
    paths = re.findall(r"`((?:benchmarks|docs|solutions|stages|tests|\.github)/[\w./*-]*)`", text)
    paths = [path for path in paths if not any(word in path for word in PLACEHOLDERS) and path not in GITHUBS]
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert dead_links(document, TEXTS[document]) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    assert unknown_commands(TEXTS[document]) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    assert missing_paths(TEXTS[document]) == []


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - {"README.md"}))
def test_lines_fit_an_editor(document: str) -> None:
    lines = TEXTS[document].splitlines()
    assert [line for line in lines if len(line) > 128 and not line.startswith("|")] == []


def test_what_is_awaited_is_not_there_yet() -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert NOT_THERE_YET & targets == set(), "it is there now; take it out of NOT_THERE_YET"


def test_the_flags_of_the_grader_exist() -> None:
    named = set(re.findall(r"^\| `(--[a-z-]+)` \|", TEXTS["INSTRUCTORS.md"], re.MULTILINE))
    assert named == {"--submission", "--stage", "--output", "--salt", "--salt-file", "--no-performance"}
    if "grade" not in NOT_THERE_YET:
        command = [sys.executable, "benchmarks/grade.py", "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {flag for flag in named if flag not in text} == set()


def test_the_readme_shows_what_a_new_learner_sees() -> None:
    stage, task = COURSE[0], COURSE[0].tasks[0]
    box = re.search(r"^╭─ next: task 1\.1.*?^╰", TEXTS["README.md"], re.DOTALL | re.MULTILINE)
    assert box is not None
    words = " ".join(box[0].replace("│", " ").split())
    assert f"has {len(COURSE)} stages and {len(TASKS)} tasks" in TEXTS["README.md"]
    target = task.targets[0]
    line = find_lines(starters(stage)[target.file], target.file, target.name).start + 1
    assert f"{task.title} (about {task.minutes} minutes)" in words
    assert f"open stages/{stage.folder}/{target.file}:{line} " in words
    assert f"what {task.purpose} hint {task.hints[0]} make hint TASK=1.1 LEVEL=2" in words


# The tables of INSTRUCTORS.md


def test_the_table_of_stages_is_the_course() -> None:
    rows = [
        f"| {stage.number} | [{stage.title}](stages/{stage.folder}/README.md) | {len(stage.core)} "
        f"| {sum(task.minutes for task in stage.core)} | {stage.points} |"
        for stage in COURSE
    ]
    table = re.search(r"^\| stage \|.*?\n\n", TEXTS["INSTRUCTORS.md"], re.DOTALL | re.MULTILINE)
    assert table is not None
    found = table[0].strip().splitlines()[2:]
    assert found[: len(rows)] == rows
    assert [row.split(" | ")[0] for row in found[len(rows) :]] == [f"| {number}" for number in sorted(PLANNED_STAGES)]


def tasks_between(cell: str) -> list[str]:
    """All tasks of a cell such as "1.5 to 1.6, 2.1 to 2.2"."""
    found = []
    for first, last in re.findall(r"(\d+\.\d+) to (\d+\.\d+)", cell):
        stage, start = first.split(".")
        found += [f"{stage}.{number}" for number in range(int(start), int(last.split(".")[1]) + 1)]
    return found


@pytest.mark.parametrize("weeks", [7, 10, 14])
def test_a_schedule_has_every_task_and_adds_up(weeks: int) -> None:
    section = re.search(rf"^### {weeks} weeks$(.*?)^(?:#|For )", TEXTS["INSTRUCTORS.md"], re.DOTALL | re.MULTILINE)
    assert section is not None
    rows = [re.split(r" *\| *", line)[1:-1] for line in section[1].strip().splitlines()[2:]]
    assert [row[0] for row in rows] == [str(week) for week in range(1, weeks + 1)]
    given = [task for row in rows for task in tasks_between(row[1])]
    assert [task for task in given if int(task.split(".")[0]) not in PLANNED_STAGES] == list(TASKS)
    for _, tasks, minutes, _ in rows:
        if PLANNED_STAGES.isdisjoint(int(task.split(".")[0]) for task in tasks_between(tasks)):
            assert minutes == str(sum(TASKS[task].minutes for task in tasks_between(tasks))), tasks


def test_every_stage_has_three_questions() -> None:
    for number in sorted({stage.number for stage in COURSE} | PLANNED_STAGES):
        section = re.search(rf"^### Stage {number}, (.*?)(?=^##)", TEXTS["INSTRUCTORS.md"], re.DOTALL | re.MULTILINE)
        assert section is not None
        assert re.findall(r"^(\d)\. \*.+?\*", section[1], re.DOTALL | re.MULTILINE) == ["1", "2", "3"]


# What is copied elsewhere


@pytest.mark.parametrize("number", range(2))
def test_the_autograders_scripts_are_bash(number: int) -> None:
    scripts = re.findall(r"```bash\n(#!.*?)```", TEXTS["INSTRUCTORS.md"], re.DOTALL)
    assert len(scripts) == 2
    subprocess.run(["bash", "-n"], input=scripts[number], text=True, check=True)


def test_the_workflow_tests_stages_that_exist() -> None:
    path = ROOT / "docs/classroom/workflow.yml"
    job = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["stage"]
    assert set(job["strategy"]["matrix"]["stage"]) <= {stage.number for stage in COURSE}
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert any(command.startswith("make setup") for command in commands)
    assert any("make test-stage-${{ matrix.stage }} |" in command for command in commands)
    assert f"cp {path.relative_to(ROOT)} .github/workflows/" in TEXTS["docs/classroom/README.md"]
    assert not (ROOT / ".github/workflows" / path.name).exists()


@pytest.mark.parametrize("stage", COURSE, ids=lambda stage: str(stage.number))
def test_the_list_of_tests_gives_the_stages_points(stage: Stage) -> None:
    command = [sys.executable, "docs/classroom/tests_json.py", "--stage", str(stage.number)]
    entries = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert sum(entry["points"] for entry in entries) == stage.points
    assert len({entry["name"] for entry in entries}) == len(entries) == len(stage.core) + 1
    assert all(len(entry["name"].encode()) <= 100 and 1 <= entry["timeout"] <= 600 for entry in entries)
    assert [entry["run"] for entry in entries[1:]] == [f"make test-stage-{task.stage} TASK={task.id}" for task in stage.core]


def test_a_list_of_tests_for_no_stage_is_refused_in_one_line() -> None:
    command = [sys.executable, "docs/classroom/tests_json.py", "--stage", "9"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (1, "", 1)


def test_hooks_run_in_the_projects_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {" ".join(hook["entry"].split()[:3]) for hook in hooks} == {
        ".venv/bin/python -m ruff",
        ".venv/bin/python -m stages.make_starters",
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(line.startswith("ruff") for line in extras["dev"])


def test_the_changelog_says_whom_a_change_is_for() -> None:
    entries = re.findall(r"^- (.+)$", TEXTS["CHANGELOG.md"], re.MULTILINE)
    assert entries != []
    assert [entry for entry in entries if not entry.startswith(("guide: ", "code: "))] == []
    assert "## Unreleased" in TEXTS["CHANGELOG.md"]


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_programs_name_are_there(path: Path) -> None:
    """Those on lines of their own, as `--help` shows them."""
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    commands = [f"`{line}`" for line in lines if line.startswith(("  python ", "  make "))]
    assert unknown_commands("\n".join(commands)) == []


# Each check can fail


def test_the_check_of_links_sees_dead_ones() -> None:
    text = "# Here it is\n[a](#here-it-is) [b](#there) [c](LICENSE) [d](nothing.md) [e](README.md#results) [f](README.md#x)"
    assert dead_links("README.md", text) == ["#there", "nothing.md", "README.md#x"]


def test_the_check_of_commands_sees_wrong_ones() -> None:
    text = "`make coffee` `make serve` `python benchmarks/no.py` `python -m tests.no` `-m tests.gate` `TASK=1.9` `LEVEL=4`"
    assert unknown_commands(text) == ["make coffee", "-m tests.no", "benchmarks/no.py", "TASK=1.9", "LEVEL=4"]


def test_the_check_of_paths_sees_a_wrong_one() -> None:
    assert missing_paths("`stages/stage*/` `tests/mutants/stage1.toml` `tests/mutants/stage0.toml`") == [
        "tests/mutants/stage0.toml"
    ]
