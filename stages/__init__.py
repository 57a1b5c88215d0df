"""The learner's engine: chosen stages come from the learner's files and everything else from the reference.

Python looks for ``stages.memory.block_allocator`` in each folder of `__path__` in turn: first those of the chosen stages, then
`solutions/`. The variable `STAGES` chooses: ``STAGES=1,3``; ``STAGES=`` is none, the reference under this name; unset is all.
"""

from __future__ import annotations

import os
from pathlib import Path

_HERE = Path(__file__).parent


def stage_folders() -> dict[int, Path]:
    """Number → folder of every stage."""
    return {int(folder.name[len("stage")]): folder for folder in sorted(_HERE.glob("stage[1-9]_*"))}


def parse_stages(text: str | None) -> list[int]:
    """The stages that a value of `STAGES` chooses, ascending.

    Raises:
        ValueError: it names something that is not a stage.
    """
    known = sorted(stage_folders())
    if text is None:
        return known
    words = [word for word in text.replace(",", " ").split() if word]
    unknown = [word for word in words if not word.isdecimal() or int(word) not in known]
    if unknown:
        raise ValueError(
            f"STAGES={text}: there is no stage {unknown[0]!r}; write numbers such as STAGES={known[0]},{known[-1]}"
        )
    return sorted({int(word) for word in words})


def search_path(stages: list[int]) -> list[str]:
    """Where the modules of `stages` lie when these stages are the learner's. The course's own tools come last."""
    folders = stage_folders()
    return [str(folder) for folder in (*(folders[stage] for stage in stages), _HERE.parent / "solutions", _HERE)]


try:
    __path__ = search_path(parse_stages(os.environ.get("STAGES")))
except ValueError as error:
    raise SystemExit(str(error)) from None
