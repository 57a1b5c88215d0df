"""Makes the learner's starter files from the reference: ``python -m stages.make_starters --help``.

A starter is the reference's file with the functions of the course's tasks emptied: signature and docstring stay, the body
becomes a NotImplementedError that names the task. Everything else in the file is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable

from stages.course.tools.catalog import STAGES_FOLDER, CourseError, Stage, Task, find_stage, load_course
from stages.course.tools.targets import emptied

MANIFEST = "starters.json"
"""In `stages/`: path of each starter → SHA-256 of what was last generated there. A file with another hash is the learner's."""


def render(source: str, file: str, tasks: Iterable[Task]) -> str:
    """Empty the functions of `file` that `tasks` ask for.

    Args:
        source: the reference's text. file: its path inside `solutions/`.
        tasks: all tasks whose functions are to be emptied; others stay as they are.

    Raises:
        CourseError: a function is not there, or has no docstring to stand on.
    """
    lines = source.splitlines()
    cuts: list[tuple[slice, list[str]]] = []
    for task in tasks:
        names = [target.name for target in task.targets if target.file == file]
        hints = dict(zip(names, task.hints[:1], strict=False))  # the first of them has the first hint
        cuts += [emptied(source, file, task, name, hints.get(name)) for name in names]
    for place, text in sorted(cuts, key=lambda cut: cut[0].start, reverse=True):
        lines[place] = text
    return "\n".join(lines) + "\n"


def starters(stage: Stage, tasks: Iterable[Task] | None = None) -> dict[str, str]:
    """Path inside the stage's folder → text, for all starter files of a stage.

    Args:
        tasks: those whose functions are emptied; None: all of the stage, which is the fresh starter.
    """
    wanted = stage.tasks if tasks is None else list(tasks)
    return {file: render(stage.reference(file), file, wanted) for file in stage.files}


def digest(text: str) -> str:
    """What the manifest keeps of a generated file."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest() -> dict[str, str]:
    """Path in `stages/` → hash of the starter that was last generated there."""
    path = STAGES_FOLDER / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_starters(stages: Iterable[Stage], force: bool = False) -> tuple[list[str], list[str]]:
    """Generate the starters of some stages where the learner has not written yet.

    Args:
        force: overwrite the learner's files too.

    Returns:
        Paths in `stages/` that were written, and those that were left because the learner changed them.
    """
    manifest, written, kept = read_manifest(), [], []
    for stage in stages:
        for file, text in starters(stage).items():
            name = f"{stage.folder}/{file}"
            path = STAGES_FOLDER / name
            current = path.read_text(encoding="utf-8") if path.exists() else None
            # A file without an entry in the manifest is nobody's starter, so it is the learner's.
            if current is not None and digest(current) != manifest.get(name) and not force:
                kept.append(name)
                continue
            manifest[name] = digest(text)
            if current != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                written.append(name)
    lines = json.dumps(dict(sorted(manifest.items())), indent=2)
    (STAGES_FOLDER / MANIFEST).write_text(lines + "\n", encoding="utf-8")
    return written, kept


def stale_starters(stages: Iterable[Stage]) -> list[str]:
    """Paths in `stages/` whose file is not what would be generated now."""
    stale = []
    for stage in stages:
        for file, text in starters(stage).items():
            path = stage.path / file
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(f"{stage.folder}/{file}")
    return stale


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.make_starters", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, help="this stage only (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a starter differs from a fresh one")
    parser.add_argument("--force", action="store_true", help="overwrite files that a learner has changed, too")
    args = parser.parse_args(argv)
    try:
        course = load_course()
        stages = course if args.stage is None else [find_stage(course, args.stage)]
        if args.check:
            stale = stale_starters(stages)
            for name in stale:
                print(f"stages/{name} is not what the reference gives now; run: python -m stages.make_starters")
            return 1 if stale else 0
        written, kept = write_starters(stages, args.force)
    except CourseError as error:
        parser.exit(1, f"make_starters: {error}\n")
    for name in written:
        print(f"wrote stages/{name}")
    for name in kept:
        print(f"kept  stages/{name}, which you have changed (--force overwrites it)")
    if not written and not kept:
        print("all starters are fresh")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
