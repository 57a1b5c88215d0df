"""The contest of kernel schedules: every schedule computes the same, and a busy machine changes no ratio."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.core.platform import native
from stages.course.grading.contest import schedules
from stages.course.grading.contest.contests import SCHEDULE, judge_schedule, read_dict
from stages.course.grading.contest.schedules import CHOICES, RIVALS, Kernel, check_schedule, draw, in_turns, share
from stages.course.grading.contest.scoreboard import Entry, entered, judge
from stages.course.grading.contest.simulator import Foul
from stages.course.tools.catalog import ROOT

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so nothing is built")
CASES = [
    *RIVALS.values(),
    {"tokens": 8, "outputs": 2, "unroll": 2, "inputs": 256, "prefetch": 64, "outside": "tokens", "threads": 3},
    {"tokens": 16, "outputs": 1, "unroll": 4, "inputs": 2048, "prefetch": 0, "outside": "outputs", "threads": 1},
]


@needs_compiler
@pytest.mark.parametrize("schedule", CASES, ids=["plain", "reference", "blocks", "wide"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 2048, 48), (16, 3072, 80), (16, 2048, 16)])
def test_every_schedule_computes_the_product(schedule: schedules.Schedule, tokens: int, inputs: int, outputs: int) -> None:
    """Blocks of 2,048 do not cut 3,072 inputs evenly, and three threads do not 40 tiles; what was there is overwritten."""
    rng = np.random.default_rng(tokens + inputs)
    x, weight = rng.standard_normal((tokens, inputs), np.float32), rng.integers(-127, 128, (outputs, inputs), np.int8)
    y = np.full((tokens, outputs), np.nan, np.float32)
    Kernel(schedule).product(x, weight, y)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-4, atol=0.05)
    assert np.float32(1e-40) * np.float32(1) > 0, "loading it has turned off subnormal numbers for everybody"


def test_a_round_times_each_call_once_and_begins_with_another_one() -> None:
    called: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> schedules.Call:
        def run() -> None:
            nonlocal now
            called.append(name)
            now += seconds

        return run

    rounds = in_turns({"a": call("a", 1.0), "b": call("b", 2.0)}, 3, lambda: now)
    assert called == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert rounds == [{"a": 1.0, "b": 2.0}] * 3


@settings(max_examples=50, deadline=None)
@given(slow=st.lists(st.floats(1, 50), min_size=5, max_size=15), bursts=st.integers(0, 2), true=st.floats(0.1, 2))
def test_what_slows_rounds_down_changes_no_share(slow: list[float], bursts: int, true: float) -> None:
    """Each round has a speed of its own, and in fewer than half of them something hits one call alone."""
    rounds = [{"floor": 0.01 * factor * true, "mine": 0.01 * factor} for factor in slow]
    for seconds in rounds[:bursts]:
        seconds["mine"] *= 30
    assert share(rounds, "mine", "floor") == pytest.approx(true)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold a line SCHEDULE"), ("SCHEDULE = 3", "must be a dict"), ("SCHEDULE = {'tile': 3}", "no setting 'tile'"),
        ("SCHEDULE = {'tokens': True}", "tokens must be one of 1, 2, 4, 8, 16, got True"),
        ("SCHEDULE = {'tokens': 3}", "got 3"),
        ("SCHEDULE = {'outside': 'inputs'}", "outside must be one of tokens, outputs"),
        ("SCHEDULE = {'threads': -1}", "threads must be"), ("SCHEDULE = {'prefetch': '64; }'}", "prefetch must be one of"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(Foul, match=reason):
        judge_schedule(text, "")


def test_a_schedule_without_a_compiler_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Foul, match="CXX is 'no-such-compiler'"):
        judge_schedule("SCHEDULE = {}", "")


def test_a_seed_draws_the_sizes() -> None:
    shapes = {draw(seed)[1].shape for seed in ("a", "b", "c", "d", "e", "f")}
    assert len(shapes) > 1
    assert all(outputs % max(CHOICES["outputs"]) == 0 and outputs * inputs <= schedules.SIZE for outputs, inputs in shapes)


@needs_compiler
def test_the_measures_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "SIZE", 1 << 20)
    monkeypatch.setattr(schedules, "ROUNDS", 3)
    measures = judge_schedule((ROOT / "stages/stage4_optimization/open_schedule.py").read_text(encoding="utf-8"), "s")
    assert list(measures) == [each.name for each in SCHEDULE.measures]
    assert all(value > 0 for value in measures.values())


def test_a_file_has_one_row_the_last_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(10))
    monkeypatch.setattr(schedules, "measure", lambda schedule, seed: {"of reference": float(next(times))})
    kept: list[Entry] = []
    for text in ("SCHEDULE = {}", "SCHEDULE = {}", "SCHEDULE = {'tokens': 2}"):
        kept = entered(kept, judge(SCHEDULE, "you", text, "s"))
    assert [row.measures for row in kept] == [{"of reference": 1.0}, {"of reference": 2.0}]
    kept = entered(kept, judge(SCHEDULE, "zoe", "SCHEDULE = {}", "s"))
    assert [row.name for row in kept] == ["you", "you", "zoe"]


def test_the_given_file_is_the_plain_schedule() -> None:
    text = (ROOT / "stages/stage4_optimization/open_schedule.py").read_text(encoding="utf-8")
    assert check_schedule(read_dict(text, "SCHEDULE")) == RIVALS["plain"]
