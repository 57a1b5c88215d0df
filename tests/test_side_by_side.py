"""The suite in two processes: what is marked `alone` has the machine for itself."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import json, os, time
import pytest
pytestmark = {mark}
@pytest.mark.parametrize("number", range(8))
def test_it(number):
    start = time.monotonic()
    time.sleep(0.05)
    with open("times", "a") as file:
        file.write(json.dumps([{alone}, os.getpid(), start, time.monotonic()]) + "\\n")
"""


def test_what_measures_time_runs_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "test_a.py").write_text(TESTS.format(mark="pytest.mark.alone", alone=True))
    (tmp_path / "test_b.py").write_text(TESTS.format(mark="[]", alone=False))
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile", "-p", "no:cacheprovider", "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "16 passed" in run.stdout, run.stdout + run.stderr
    times = [json.loads(line) for line in (tmp_path / "times").read_text().splitlines()]
    assert len({process for _, process, _, _ in times}) == 2
    for one, other in itertools.combinations(times, 2):
        if one[0] or other[0]:
            assert one[3] <= other[2] or other[3] <= one[2]
