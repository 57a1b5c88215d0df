"""The contest of kernel schedules: one product of a decode step, built by a learner's settings and timed beside the floor.

A learner's file is read and never run: it says how the loops of `schedule.cpp` are laid out, and every schedule computes the
same. Times are of this machine, which does other things too. So everything is timed in turns, in one run: a round reads the
weights, computes by the reference's schedule and by the learner's, and what counts is the median of the rounds' ratios. What
slows a round down slows all of it down.
"""

from __future__ import annotations

import ctypes
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from solutions.core.platform.machine import cache_root, cpu_flags
from solutions.core.platform.native import BuildError, compile_library, need_compiler
from stages.course.grading.contest.simulator import Foul

SOURCE = Path(__file__).with_name("schedule.cpp")
SUMS = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno")
"""Sums in any order. Not -ffast-math: a library linked with it turns off subnormal numbers in the whole process."""
FLAGS = ("-std=c++17", "-O3", "-march=native", *SUMS, "-pthread", "-fPIC", "-shared")
SIZE = 1 << 26
"""Bytes of weights: more than a cache holds."""
WIDTHS = (2048, 3072, 4096, 6144)
"""Inputs, of which the seed chooses, so that a schedule is not made for one number."""
TOKENS = 16
"""Of the batch that is timed beside a single token."""
ROUNDS = 9
CHOICES: dict[str, tuple[int | str, ...]] = {
    "tokens": (1, 2, 4, 8, 16), "outputs": (1, 2, 4, 8, 16), "unroll": (1, 2, 4), "inputs": (0, 256, 512, 1024, 2048),
    "prefetch": (0, 64, 128, 256, 512, 1024, 2048, 4096), "outside": ("tokens", "outputs"),
}  # fmt: skip
MOST_THREADS = 256
Schedule = dict[str, int | str]
RIVALS: dict[str, Schedule] = {
    "plain": {"tokens": 1, "outputs": 1, "unroll": 1, "inputs": 0, "prefetch": 0, "outside": "tokens", "threads": 1},
    "reference": {"tokens": 8, "outputs": 2, "unroll": 1, "inputs": 0, "prefetch": 512, "outside": "outputs", "threads": 0},
}
"""What everybody is compared with; the first is what the course gives."""
Call = Callable[[], object]


def check_schedule(chosen: dict[str, object]) -> Schedule:
    """A schedule from what a file says, with the rest as in the one that is given.

    Raises:
        Foul: a name is unknown, or a value is none of its choices.
    """
    for name, value in chosen.items():
        if name == "threads":
            if type(value) is not int or not 0 <= value <= MOST_THREADS:
                raise Foul(f"threads must be a whole number from 0, for all cores, to {MOST_THREADS}, got {value!r}")
        elif name not in CHOICES:
            raise Foul(f"there is no setting {name!r}; there are {', '.join(sorted([*CHOICES, 'threads']))}")
        elif type(value) not in (int, str) or value not in CHOICES[name]:
            raise Foul(f"{name} must be one of {', '.join(map(str, CHOICES[name]))}, got {value!r}")
    return RIVALS["plain"] | chosen  # type: ignore[operator]  # each value has been looked at


class Kernel:
    """The product, built by a schedule.

    Raises:
        Foul: there is no compiler here, or it refuses.
    """

    def __init__(self, schedule: Schedule) -> None:
        names = {"tokens": "TOKENS", "outputs": "OUTPUTS", "unroll": "UNROLL", "inputs": "INPUTS", "prefetch": "PREFETCH"}
        macros = [f"-D{macro}={schedule[name]}" for name, macro in names.items()]
        macros.append(f"-DTOKENS_OUTSIDE={int(schedule['outside'] == 'tokens')}")
        facts = [platform.machine(), *sorted(cpu_flags())]
        try:
            path = compile_library(
                cache_root() / "schedules", "schedule", need_compiler(), [*FLAGS, *macros], [SOURCE], [], facts
            )
        except BuildError as error:
            raise Foul(str(error).splitlines()[0]) from None
        self._library = ctypes.CDLL(str(path))
        self._library.read_all.restype = ctypes.c_uint64
        self.threads = int(schedule["threads"]) or num_cores()

    def product(self, x: NDArray[np.float32], weight: NDArray[np.int8], y: NDArray[np.float32]) -> None:
        """``y = x · weightᵀ``: x [T, K], weight [N, K], y [T, N], all contiguous."""
        longs = (ctypes.c_long(size) for size in (len(x), x.shape[1], len(weight)))
        self._library.product(_pointer(x), _pointer(weight), _pointer(y), *longs, ctypes.c_int(self.threads))

    def read(self, weight: NDArray[np.int8]) -> None:
        """Read the weights once, on all cores, and no more."""
        self._library.read_all(_pointer(weight), ctypes.c_long(weight.nbytes), ctypes.c_int(num_cores()))


def _pointer(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turns(calls: dict[str, Call], rounds: int, clock: Callable[[], float] = time.perf_counter) -> list[dict[str, float]]:
    """Seconds of each call in each round. Every round begins with another one, and one round before them all is not timed."""
    names, found = list(calls), []
    for name in names:
        calls[name]()
    for number in range(rounds):
        seconds = {}
        for at in range(len(names)):
            name = names[(number + at) % len(names)]
            start = clock()
            calls[name]()
            seconds[name] = clock() - start
        found.append(seconds)
    return found


def share(rounds: list[dict[str, float]], of: str, by: str) -> float:
    """How often `by` could be done in the time of `of`: the median of what each round says."""
    return median(seconds[by] / seconds[of] for seconds in rounds)


def draw(seed: str) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Inputs [TOKENS, K] and weights [N, K]."""
    width = random.Random(f"schedule {seed}").choice(WIDTHS)
    rng = np.random.default_rng(list(seed.encode()))
    outputs = SIZE // width // 256 * 256
    weight = rng.integers(-127, 128, (max(outputs, 256), width), np.int8)
    return rng.standard_normal((TOKENS, width), np.float32), weight


def measure(schedule: Schedule, seed: str) -> dict[str, float]:
    """Shares of the floor in percent, of one token and of `TOKENS`, and the speed beside the reference's schedule.

    The floor is the time in which all cores read the weights once, whatever the number of tokens.

    Raises:
        Foul: see `Kernel`.
    """
    mine, reference = Kernel(schedule), Kernel(RIVALS["reference"])
    x, weight = draw(seed)
    shares, beside = [], 1.0
    for count in (1, TOKENS):
        rows, outs = x[:count], [np.empty((count, len(weight)), np.float32) for _ in range(2)]
        calls: dict[str, Call] = {
            "floor": lambda: reference.read(weight),
            "reference": lambda rows=rows, out=outs[0]: reference.product(rows, weight, out),
            "mine": lambda rows=rows, out=outs[1]: mine.product(rows, weight, out),
        }
        rounds = in_turns(calls, ROUNDS)
        assert np.allclose(outs[0], outs[1], rtol=1e-3, atol=1.0), "a schedule changes what is computed"
        shares.append(100 * share(rounds, "mine", "floor"))
        beside *= share(rounds, "mine", "reference")
    return {"floor, 1 token": shares[0], f"floor, {TOKENS} tokens": shares[1], "of reference": beside**0.5}
