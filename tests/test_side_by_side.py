"""The suite in two processes: what is marked `alone` has the machine for itself."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTE = """
import json, os, time
import pytest
def note(alone, seconds):
    start = time.monotonic()
    time.sleep(seconds)
    with open("times", "a") as file:
        file.write(json.dumps([alone, os.getpid(), start, time.monotonic()]) + "\\n")
"""
ALONE = """
def test_while_the_others_get_going():
    note(False, 0.7)
@pytest.mark.alone
@pytest.mark.parametrize("number", range(8))
def test_alone(number):
    note(True, 0.05)
"""
SHARING = """
@pytest.mark.parametrize("number", range(10))
def test_beside_others(number):
    note(False, 0.4 if number else {first})
"""


@pytest.mark.slow
@pytest.mark.alone
def test_what_measures_time_runs_alone(tmp_path: Path) -> None:
    """Nothing runs beside those tests or between two of them, and they need not wait until the others have no more tests."""
    shutil.copy(ROOT / "conftest.py", tmp_path)
    for name, text in (("a", ALONE), ("b", SHARING.format(first=0.4)), ("c", SHARING.format(first=0.2))):
        (tmp_path / f"test_{name}.py").write_text(NOTE + text)
    command = [sys.executable, "-m", "pytest", "-q", "-n3", "--dist=loadfile", "-p", "xdist", "-p", "no:cacheprovider", "."]
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=quick, capture_output=True, text=True, timeout=60, check=False)
    assert "29 passed" in run.stdout, run.stdout + run.stderr
    times = sorted(map(json.loads, (tmp_path / "times").read_text().splitlines()), key=lambda line: line[2])
    assert len({process for _, process, _, _ in times}) == 3
    for one, other in itertools.combinations(times, 2):
        if one[0] or other[0]:
            assert one[3] <= other[2]
    order = [alone for alone, *_ in times]
    first = order.index(True)
    assert order[first : first + 8] == [True] * 8
    assert first < 15
