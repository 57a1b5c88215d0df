"""The engine's README names a spine for a weekend and a walk that a prompt takes; CONTRIBUTING says how large everything is."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.tests.tiny_models import make_tiny_llama
from tests.sizes import BEFORE, DOCUMENT, GOALS, LONG, ROOT, listed_files, numbers_in, sizes, spine, walk

FILES = listed_files()
NOW = sizes(FILES)


def test_the_spine_is_about_20_files_of_under_4000_lines() -> None:
    assert 18 <= len(spine()) <= 22
    assert [file for file in spine() if f"solutions/{file}" not in FILES] == []
    assert [file for file, count in Counter(spine()).items() if count > 1] == []
    assert sum(FILES[f"solutions/{file}"] for file in spine()) == NOW["spine, lines"] <= GOALS["spine, lines"]


def test_the_walk_is_ten_files_of_the_spine_each_entered_once() -> None:
    files = [file for file, _ in walk()]
    assert len(files) == len(set(files)) == 10
    assert set(files) <= set(spine())


@contextmanager
def first_calls(wanted: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Collects which of these functions, by file and qualified name, are called, in the order of their first calls."""
    found: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and "solutions" in code.co_filename:
            call = (code.co_filename.split("/solutions/")[-1], code.co_qualname)
            if call in wanted and call not in found:
                found.append(call)

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_a_prompt_meets_the_files_of_the_walk_in_this_order(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", attention_backend="naive", enable_cpu_kernels=False, gpu_memory_utilization=0.05)
    with first_calls(walk()) as calls:
        llm.generate("A prompt", SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert calls == walk()


SMALL = ["both benchmark trees, lines", "files over 350 lines, tests excepted", "files directly in `core/`"]


@pytest.mark.parametrize("name", SMALL)
def test_files_and_folders_stay_small(name: str) -> None:
    assert NOW[name] <= GOALS[name], [file for file, lines in FILES.items() if lines > LONG]


@pytest.mark.parametrize("name", NOW)
def test_contributing_says_how_large_the_engine_is(name: str) -> None:
    """To within 3 %, so that not every change needs ``python -m tests.sizes --write``."""
    before, now, goal = (int(cell.replace(",", "") or 0) for cell in numbers_in(DOCUMENT.read_text(encoding="utf-8"))[name])
    assert (before, goal) == (BEFORE.get(name, 0), GOALS.get(name, 0))
    assert abs(now - NOW[name]) <= 0.03 * NOW[name]


def test_the_readme_says_what_is_read_in_a_weekend() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "Its [spine](solutions/README.md#the-spine), about 20 files, is small enough to read in a weekend." in text
