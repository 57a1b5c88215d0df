"""A visitor's first hour, as the README tells it: serve, chat, see the first stage's tests fail, take a hint, write the first
task, see it pass, look at the progress, and be graded. Every command is the one that a person types."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from stages.course.tools.catalog import find_stage, load_course
from stages.make_starters import render

ROOT = Path(__file__).parents[1]
STARTER = "memory/block_allocator.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files as a clone has them, in a folder of their own; the stages' files as nobody has touched them."""
    folder = tmp_path_factory.mktemp("visitor") / "checkout"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for stage in load_course():
        for file in stage.files:
            text = (ROOT / "solutions" / file).read_text()
            (folder / "stages" / stage.folder / file).write_text(render(text, file, stage.tasks))
    return folder


def command(*words: str) -> list[str]:
    """``make ...`` with this environment's Python, which has everything installed."""
    return ["make", *words, "VENV=", f"PYTHON={sys.executable}"]


def environment() -> dict[str, str]:
    """A terminal's, and not that of ``make test``, whose own variables every ``make`` below it would take over."""
    ours = ("STAGES", "COURSE_RESULTS", "PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"COLUMNS": "120"}


def make(folder: Path, *words: str, fails: bool = False) -> str:
    """What a command prints; it must end well, or must not."""
    run = subprocess.run(
        command(*words), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, stdin=subprocess.DEVNULL, timeout=250, check=False,
    )  # fmt: skip
    assert (run.returncode != 0) == fails, run.stdout
    return run.stdout


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def url(checkout: Path) -> Iterator[str]:
    """The address of ``make serve``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = command("serve", f"PORT={port}")
    with subprocess.Popen(words, cwd=checkout, env=environment(), stdout=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
        while not is_ready(port):
            assert server.poll() is None, f"make serve ended with {server.returncode}"
            assert time.monotonic() < deadline, "make serve is not ready after a minute"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        assert server.wait(30) in (0, -15)


def test_serve_and_chat(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        question = [{"role": "user", "content": "Name the capital of Japan."}]
        answer = client.chat.completions.create(model="smollm2-135m", messages=question, temperature=0, max_tokens=20)
    assert "Tokyo" in answer.choices[0].message.content


@pytest.mark.slow
def test_the_first_task_from_red_to_green(checkout: Path, tmp_path: Path) -> None:
    printed = make(checkout, "test-stage-1", fails=True)
    assert "next: task 1.1, BlockAllocator" in printed
    assert "OrderedDict" in make(checkout, "hint", "TASK=1.1")

    stage = find_stage(load_course(), 1)
    text = (ROOT / "solutions" / STARTER).read_text()
    written = render(text, STARTER, [task for task in stage.tasks if task.id != "1.1"])
    (checkout / "stages" / stage.folder / STARTER).write_text(written)
    make(checkout, "test-stage-1", "TASK=1.1")
    assert "1.2" in make(checkout, "progress")

    make(checkout, "grade", "STAGE=1", f"OUTPUT={tmp_path / 'grades'}", "ARGS=--no-performance")
    results = json.loads((tmp_path / "grades" / "results.json").read_text())
    scores = {test["number"]: test["score"] for test in results["tests"]}
    assert scores == {task.id: task.points if task.id == "1.1" else 0 for task in stage.tasks}
    assert (tmp_path / "grades" / "report.html").is_file()
