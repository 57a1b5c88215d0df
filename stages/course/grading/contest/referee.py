"""Plays a learner's policy: asks a process in a closed room, and believes only what can be checked."""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stages.course.grading.contest import player
from stages.course.grading.contest.player import Request
from stages.course.grading.contest.simulator import Foul
from stages.course.grading.sandbox import Ended, Limits, Sandbox, room

ANSWER_SECONDS, GAME_SECONDS = 5.0, 180.0
"""What one answer may take, and all answers to all workloads together."""
START_SECONDS = 60.0
"""What Python may take to start, on a busy machine."""
LONGEST_ANSWER = 1 << 20
MODULE = "open_policy"


class RemotePolicy:
    """A policy in another process, as the simulator sees one; the process is asked by lines of JSON through two pipes.

    Raises:
        Foul: from all its methods, when the policy raises, says no JSON, answers too late, or its process ends.
    """

    def __init__(self, questions: int, answers: int, game: Future[Ended], seconds: float) -> None:
        self._questions, self._answers, self._game, self._seconds = questions, answers, game, seconds
        self._rest, self._started = b"", False

    def begin(self) -> None:
        """Have a new policy made, for another workload."""
        self._ask({"ask": "new"})

    def admit_order(self, waiting: list[Request], now: float) -> list[int]:
        return self._ask({"ask": "admit_order", "requests": waiting, "now": now})

    def run_order(self, running: list[Request], now: float) -> list[int]:
        return self._ask({"ask": "run_order", "requests": running, "now": now})

    def _ask(self, question: dict) -> list[int]:
        os.write(self._questions, json.dumps(question).encode() + b"\n")
        line = self._line(question["ask"], time.monotonic() + (self._seconds if self._started else START_SECONDS))
        self._started = True
        try:
            said = json.loads(line)
            if "error" in said:
                raise Foul(f"{question['ask']} raised {str(said['error'])[:200]}")
            return said["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise error if isinstance(error, Foul) else Foul(f"{question['ask']} said what is no answer") from None

    def _line(self, what: str, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], 0.2)
            if ready:
                self._rest += os.read(self._answers, 1 << 16)
                if len(self._rest) > LONGEST_ANSWER:
                    raise Foul(f"{what} returned more than {LONGEST_ANSWER} bytes")
            elif self._game.done():
                ended = self._game.result()
                printed = ended.output.strip().splitlines()[-1:] or [ended.how]
                raise Foul(f"its process ended: {printed[0][:200]}")
            elif time.monotonic() > deadline:
                raise Foul(f"{what} did not return within {self._seconds:g} s")
        line, self._rest = self._rest.split(b"\n", 1)
        return line


@contextmanager
def playing(text: str, sandbox: Sandbox, seconds: float = ANSWER_SECONDS) -> Iterator[RemotePolicy]:
    """A policy of a learner's file, in a process that ends with the block.

    Args:
        text: of the file. seconds: that one answer may take.
    """
    with room() as scratch, ThreadPoolExecutor(1) as pool:
        work = scratch / "work"
        shutil.copyfile(player.__file__, work / "player.py")
        (work / f"{MODULE}.py").write_text(text, encoding="utf-8")
        pipes = []
        for name in ("questions", "answers"):
            os.mkfifo(work / name)
            (work / name).chmod(0o666)  # the player may be another user
            pipes.append(os.open(work / name, os.O_RDWR))  # for both ways, so that opening waits for nobody
        limits = Limits(memory_bytes=2 << 30, output_bytes=1 << 20).within(GAME_SECONDS)
        command = [sys.executable, "player.py", MODULE]
        game = pool.submit(sandbox.run, command, scratch, {}, limits, (work / f"{MODULE}.py",))
        try:
            yield RemotePolicy(pipes[0], pipes[1], game, seconds)
        finally:
            for pipe in pipes:
                os.close(pipe)  # the player reads an end, or
            if not game.done():
                _stop(game, sandbox)


def _stop(game: Future[Ended], sandbox: Sandbox) -> None:
    """End a player that does not end by itself."""
    try:
        game.result(timeout=2.0)
    except TimeoutError:
        sandbox.close()


def read_text(path: Path) -> str | None:
    """A file that is handed in; None: there is none, or it is no text of a policy's size."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
