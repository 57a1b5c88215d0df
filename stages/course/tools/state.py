"""What the course remembers between commands, in `.course/` at the repository's root, which git ignores."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from stages.course.tools.catalog import ROOT, Stage
from stages.course.tools.runner import StageResult

FOLDER = ROOT / ".course"
RESULTS, SCOREBOARD = FOLDER / "results.json", FOLDER / "scoreboard.json"
CODE = (".py", ".cu", ".cpp", ".h")


def fingerprint(stage: Stage) -> str:
    """Changes when a file that can change the stage's results does: the learner's, the tests, the course or the reference."""
    digest = hashlib.sha256()
    folders = (stage.path, ROOT / "solutions", ROOT / "stages" / "course")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in CODE]
    files.append(ROOT / "stages" / "course.toml")
    for path in sorted(files):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def remembered(stage: Stage) -> dict[str, dict]:
    """Task id → {"state", "passed", "tests"} of the last whole run on these very files, or nothing."""
    if not RESULTS.exists():
        return {}
    entry = json.loads(RESULTS.read_text(encoding="utf-8")).get(str(stage.number), {})
    return entry.get("tasks", {}) if entry.get("fingerprint") == fingerprint(stage) else {}


def remember(result: StageResult) -> None:
    """Keep the results of a whole run of a stage on the learner's own files."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    tasks = {item.task.id: {"state": item.state, "passed": item.num_passed, "tests": len(item.tests)} for item in result.tasks}
    results[str(result.stage.number)] = {"fingerprint": fingerprint(result.stage), "tasks": tasks}
    FOLDER.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2), encoding="utf-8")


def back_up(stage: Stage, files: list[str]) -> Path:
    """Copy a learner's files before they are overwritten; returns the folder that holds the copies."""
    folder = FOLDER / "backup" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{time.time_ns() % 10**9:09d}" / stage.folder
    for file in files:
        if (stage.path / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(stage.path / file, folder / file)
    return folder
