"""`make fuzz` itself, with made-up modules: a case that fails, hangs or crashes is a finding that can be repeated."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from solutions.tests.slow_cases import slow_after
from tests.fuzz.driver import choose, discover

ROOT = Path(__file__).parents[1]

FINE = """
def run(rng):
    print("a case may print")
    assert 0 <= rng.random() < 1
"""
BAD = """
import os, signal, sys, threading
LIMIT = 0.5

def run(rng):
    if rng.randrange(4) == 3:
        go_wrong()

def go_wrong():
    {}
"""
BROKEN = """
import no_such_module_at_all

def run(rng):
    pass
"""


def bad_seed(count: int) -> tuple[int, int]:
    """A first seed of so many, and the one of them, not the first, for which `BAD` goes wrong."""
    for first in range(1000):
        bad = [seed for seed in range(first, first + count) if random.Random(seed).randrange(4) == 3]
        if len(bad) == 1 and bad[0] > first:
            return first, bad[0]
    raise AssertionError("there is none")


def fuzz(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--folder", str(folder), "--jobs", "1", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def write(folder: Path, **modules: str) -> Path:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def seeds_named(output: str, module: str) -> list[int]:
    return sorted({int(seed) for seed in re.findall(rf"make fuzz WHAT={module} SEED=(\d+) CASES=1", output)})


def test_nothing_goes_wrong(tmp_path: Path) -> None:
    run = fuzz(write(tmp_path, fine=FINE, helper="def other(): ..."), "--cases", "5", "--seed", "7")
    assert (run.returncode, run.stderr) == (0, "")
    assert "fuzz: fine; SEED=7" in run.stdout
    assert re.search(r"fine +│ +5 │ +\d+ │ +0 │ +0", run.stdout)


@pytest.mark.parametrize(
    ("deed", "kind", "says"),
    slow_after(
        2,
        [
            ('raise ValueError("a mistake")', "fails", "ValueError: a mistake"),
            ("threading.Event().wait()", "hangs", "in go_wrong"),
            ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes", "killed by SIGSEGV"),
            ("os._exit(3)", "crashes", "the process ended with 3"),
            ("sys.exit(0)", "fails", "SystemExit: 0"),
        ],
    ),
    ids=["raises", "hangs", "crashes", "ends", "exits"],
)
def test_what_goes_wrong_is_found_and_can_be_repeated(deed: str, kind: str, says: str, tmp_path: Path) -> None:
    write(tmp_path, some_thing=BAD.format(deed), fine=FINE)
    first, bad = bad_seed(4)  # a process's first case has more time than the others
    run = fuzz(tmp_path, "--cases", "4", "--seed", str(first))
    assert run.returncode == 1
    assert seeds_named(run.stdout, "some_thing") == [bad]
    assert f"some_thing {kind}: make fuzz" in run.stdout
    assert says in run.stdout
    assert re.search(r"some_thing +│ +4 │ +\d+ │ +1 │ +1", run.stdout)  # and it went on after that
    assert re.search(r"fine +│ +4 │ +\d+ │ +0 │ +0", run.stdout)
    if kind != "hangs":
        again = fuzz(tmp_path, "--what", "some_thing", "--seed", str(bad), "--cases", "1")
        assert (again.returncode, seeds_named(again.stdout, "some_thing")) == (1, [bad])


def test_a_module_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    run = fuzz(write(tmp_path, broken=BROKEN, fine=FINE), "--cases", "3")
    assert run.returncode == 1
    assert "No module named 'no_such_module_at_all'" in run.stdout
    assert len(seeds_named(run.stdout, "broken")) == 1
    assert re.search(r"fine +│ +3 │", run.stdout)


def test_the_time_is_bounded(tmp_path: Path) -> None:
    run = fuzz(write(tmp_path, fine=FINE), "--minutes", "0.02")
    assert run.returncode == 0


def test_modules_are_chosen_by_name_or_word(tmp_path: Path) -> None:
    modules = discover(write(tmp_path, model_folders=FINE, http_bodies=FINE, twins=FINE, helper="x = 1"))
    assert [m.name for m in choose(modules, "all")] == ["http_bodies", "model_folders", "twins"]
    assert [m.name for m in choose(modules, "http,model_folders")] == ["http_bodies", "model_folders"]
    with pytest.raises(ValueError, match="there are no cases 'gguf'; there are all, http_bodies, model_folders, twins"):
        choose(modules, "gguf")
    run = fuzz(tmp_path, "--what", "nothing")
    assert (run.returncode, run.stderr[:29]) == (2, "error: there are no cases 'no")
    assert fuzz(tmp_path, "--minutes", "0").returncode == 2
