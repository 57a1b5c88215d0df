"""The open tasks: the simulator's clock and measures, what disqualifies, and the tables of a learner and of a class."""

from __future__ import annotations

import ast
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from solutions.batching import queue_order
from solutions.batching.queue_order import PrefixOrder, QueueOrder
from solutions.batching.scheduler_config import POLICIES
from solutions.benchmarks.latency import Stream
from stages.course.grading.contest import contests, schedules, scoreboard, simulator
from stages.course.grading.contest.baselines import BASELINES, Fcfs, LongestPrefix, Priority
from stages.course.grading.contest.contests import (
    CONTESTS,
    GOODPUT,
    POLICY,
    fairness,
    judge_policy,
    judge_settings,
    parse_settings,
)
from stages.course.grading.contest.player import Request
from stages.course.grading.contest.scoreboard import Entry, class_scoreboard, handed_in, own_scoreboard, places, ranks
from stages.course.grading.contest.simulator import CONTEXT, STEP, TOKEN, Foul, Job, Outcome, Workload, alone, draw, simulate
from stages.course.tools.catalog import OPEN, ROOT, load_course
from stages.make_starters import digest

COURSE = load_course()
FILES = {
    "2.O": "stages/stage2_scheduler/open_policy.py", "4.O": "stages/stage4_optimization/open_schedule.py",
    "6.O": "stages/stage6_benchmark/open_goodput.py",
}  # fmt: skip
GIVEN = (ROOT / FILES["2.O"]).read_text(encoding="utf-8")
POLICY_OF = (
    "class Policy:\n    def admit_order(self, waiting, now):\n        {}\n    def run_order(self, running, now):\n        {}\n"
)
IDS = "return [each.id for each in {}]"
GOOD = POLICY_OF.format(IDS.format("sorted(waiting, key=lambda each: each.num_prompt_tokens)"), IDS.format("running"))


def requests(rng: random.Random, count: int) -> list[Request]:
    """Requests of all kinds, in no order."""
    drawn = [
        Request(i, "a", rng.randrange(3), rng.uniform(0, 30), 9, 0, 0, 16 * rng.randrange(4), rng.choice((0, 0, 1)))
        for i in range(count)
    ]
    return rng.sample(drawn, count)


def busy(seed: int = 0) -> Workload:
    """A short workload that preempts."""
    return draw("busy", random.Random(seed), {"a": 6.0, "b": 4.0}, 4.0, 90)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contests that are short."""
    monkeypatch.setattr(contests, "workloads", lambda seed: [busy(len(seed))])
    monkeypatch.setattr(contests, "RATES", (4, 5))
    monkeypatch.setattr(contests, "SECONDS", 4.0)
    monkeypatch.setattr(schedules, "SIZE", 1 << 20)
    monkeypatch.setattr(schedules, "ROUNDS", 2)


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


# The simulator


def test_a_request_alone_takes_what_the_device_costs() -> None:
    """A prompt of 10 tokens in one step, then two more steps that read 10 and 11 tokens: arithmetic, and `alone`."""
    job = Job(3.0, "a", 1, tuple(range(10)), 3)
    outcome = simulate(Workload("one", (job,), 8), Fcfs())
    first = 3.0 + STEP + 10 * TOKEN
    second = first + STEP + TOKEN + 10 * CONTEXT
    assert outcome.streams[0].times == pytest.approx([first, second, second + STEP + TOKEN + 11 * CONTEXT])
    assert outcome.streams[0].latency == pytest.approx(alone(job))
    assert outcome.num_preemptions == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BASELINES)
def test_every_request_is_answered_in_full_and_twice_the_same(name: str, seed: int) -> None:
    workload = busy(seed)
    outcome = simulate(workload, BASELINES[name]())
    assert [stream.num_tokens for stream in outcome.streams] == [job.num_output for job in workload.jobs]
    assert all(stream.times[0] > job.arrival for stream, job in zip(outcome.streams, workload.jobs, strict=True))
    assert all(gap >= STEP for stream in outcome.streams for gap in stream.itl)
    assert simulate(workload, BASELINES[name]()) == outcome


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["fcfs", "lpm"])
def test_a_built_in_policy_decides_as_the_engines_does(monkeypatch: pytest.MonkeyPatch, name: str, seed: int) -> None:
    """The engine's own order in the place of ours, with the simulated clock for its own."""
    ours = simulate(busy(seed), BASELINES[name](), patience=float("inf"))

    def engines(policy: object, manager: simulator.BlockManager, clock: simulator.Clock) -> QueueOrder:
        monkeypatch.setattr(queue_order, "time", SimpleNamespace(monotonic=lambda: clock.now))
        return PrefixOrder(manager.num_cached_blocks) if name == "lpm" else QueueOrder(POLICIES["fcfs"])

    monkeypatch.setattr(simulator, "PolicyOrder", engines)
    assert simulate(busy(seed), BASELINES[name](), patience=float("inf")) == ours
    assert ours.num_preemptions > 0


def test_priority_is_the_engines_key() -> None:
    some = requests(random.Random(1), 30)
    keys = {each.id: POLICIES["priority"](SimpleNamespace(priority=each.priority, seq_id=each.id)) for each in some}  # type: ignore[arg-type]
    assert Priority().admit_order(some, 0.0) == Priority().run_order(some, 0.0) == sorted(keys, key=keys.__getitem__)


def test_nobody_overtakes_one_that_is_overdue_or_was_preempted() -> None:
    some = [
        Request(0, "a", 1, 15.0, 9, 0, 0, 0, 0),
        Request(1, "a", 1, 9.0, 9, 0, 0, 0, 0),
        Request(2, "a", 1, 16, 9, 0, 0, 32, 0),
    ]
    some.append(Request(3, "a", 1, 17.0, 9, 0, 0, 0, 1))
    assert LongestPrefix().admit_order(some, 20.0) == [1, 3, 2, 0]


def test_a_policy_that_lets_one_wait_for_ever_is_named() -> None:
    class Unkind(Fcfs):
        def admit_order(self, waiting: list[Request], now: float) -> list[int]:
            return sorted((each.id for each in waiting), key=lambda number: (number == 0, number))

    jobs = tuple(Job(0.0 if i < 4 else 0.05 * i, "a", 1, tuple(range(40 * i, 40 * i + 40)), 20) for i in range(60))
    workload = Workload("steady", jobs, 4)
    with pytest.raises(Foul, match=r"request 0 starved: no token for more than 3 simulated seconds \(steady\)"):
        simulate(workload, Unkind(), patience=3.0)


def test_one_that_gets_its_tokens_does_not_starve_however_long_it_takes() -> None:
    outcome = simulate(Workload("long", (Job(0.0, "a", 1, (1, 2), 200),), 32), Fcfs(), patience=1.0)
    assert outcome.streams[0].latency > 2.0


def test_the_index_of_fairness_is_jains() -> None:
    """Two clients, one served as fast as alone and one at a third of that: (1 + 1/3)² / (2 (1 + 1/9)) = 0.8."""
    job = Job(0.0, "a", 1, (1, 2), 2)
    jobs = (job, Job(0.0, "b", 1, (1, 2), 2))
    outcome = Outcome(Workload("two", jobs, 8), [Stream(0.0, [0.001, factor * alone(job)], 2) for factor in (1, 3)])
    assert fairness(outcome) == pytest.approx(0.8)


# What disqualifies


@pytest.mark.parametrize(
    ("wait", "run", "reason"),
    [
        (IDS.format("waiting + waiting[:1]"), IDS.format("running"), r"admit_order returned request \d+ more than once"),
        (IDS.format("waiting[1:]"), IDS.format("running"), r"admit_order dropped request \d+"),
        (IDS.format("waiting"), IDS.format("running[:-1]"), r"run_order dropped request \d+"),
        (IDS.format("waiting") + " + [9999]", IDS.format("running"), "admit_order returned request 9999, which was not in"),
        ("return 7", IDS.format("running"), "admit_order must return a list of ids, got '7'"),
        ("return [True]", IDS.format("running"), "admit_order must return a list of ids"),
        ("return 1 / 0", IDS.format("running"), "admit_order raised ZeroDivisionError"),
        ("waiting[0].num_preemptions = 0", IDS.format("running"), "admit_order raised AttributeError"),
        ("while True: pass", IDS.format("running"), "admit_order did not return within 1 s"),
        ("raise SystemExit(3)", IDS.format("running"), "its process ended"),
        ("import os; os._exit(0)", IDS.format("running"), "its process ended|raised"),
        ("import solutions", IDS.format("running"), "admit_order raised ImportError"),
    ],
)  # fmt: skip
def test_who_breaks_a_rule_is_disqualified_by_name(small: None, wait: str, run: str, reason: str) -> None:
    with pytest.raises(Foul, match=reason):
        judge_policy(POLICY_OF.format(wait, run), "", seconds=1.0)


def test_a_file_without_a_policy_is_named(small: None) -> None:
    with pytest.raises(Foul, match="new raised SyntaxError"):
        judge_policy("class Policy(:\n", "")
    with pytest.raises(Foul, match="new raised AttributeError"):
        judge_policy("x = 1\n", "")


def test_who_changes_what_it_was_given_changes_nothing(small: None) -> None:
    """It empties its lists and prints what looks like answers: all is as with the file that the course gives."""
    body = "ids = sorted(each.id for each in {0}); {0}.clear(); print('{{\"answer\": []}}'); return ids"
    cheat = POLICY_OF.format(body.format("waiting"), body.format("running"))
    assert judge_policy(cheat, "") == judge_policy(GIVEN, "") == contests.judge_built_in("fcfs", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold a line"), ("SETTINGS = {", "must hold a line"), ("SETTINGS = open('x')", "must hold a line"),
        ("SETTINGS = [1]", "must be a dict"), ("SETTINGS = {'rate': 1}", "there is no setting 'rate'"),
        ("SETTINGS = {'num_host_blocks': 9}", "there is no setting"),
        ("SETTINGS = {'policy': 'mine'}", "policy must be one of"),
        ("SETTINGS = {'policy': []}", "policy must be one of"), ("SETTINGS = {'max_num_seqs': 0}", "from 1 to 4096, got 0"),
        ("SETTINGS = {'max_num_seqs': True}", "whole number"), ("SETTINGS = {'max_num_batched_tokens': 1e9}", "whole number"),
    ],
)  # fmt: skip
def test_settings_that_are_none_are_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(Foul, match=reason):
        parse_settings(text)


def test_settings_decide_the_goodput(small: None) -> None:
    """One sequence at a time stands no load; the file that is given stands what the engine's defaults do."""
    rival = GOODPUT.judge_rival("fcfs", "x")
    assert judge_settings((ROOT / FILES["6.O"]).read_text(encoding="utf-8"), "x") == rival
    assert judge_settings("SETTINGS = {'max_num_seqs': 1}", "x")["goodput"] == 0.0 < rival["goodput"]


# The tables


def test_ranks_are_shared_by_equals() -> None:
    assert ranks([3.0, 1.0, 1.0, 2.0], least=True) == [4, 1, 1, 3]
    assert ranks([3.0, 1.0, 1.0, 2.0], least=False) == [1, 3, 3, 2]
    measures = {each.name: 1.0 for each in POLICY.measures}
    rows = [Entry("2.O", "a", "", "", "", measures), Entry("2.O", "b", "", "", "", foul="it slept")]
    assert places(rows, POLICY) == [dict.fromkeys(measures, 1), {}]


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.id)
def test_the_file_that_the_course_gives_is_not_handed_in(contest: contests.Contest) -> None:
    text = (ROOT / FILES[contest.id]).read_text(encoding="utf-8")
    assert digest(text) == contest.given, f"put {digest(text)} into contests.py"
    assert handed_in(contest, COURSE, ROOT) is None
    ast.parse(text)


def test_every_open_file_is_of_a_contest() -> None:
    found = {path.relative_to(ROOT).as_posix() for stage in COURSE for path in stage.path.glob(OPEN)}
    assert found == set(FILES.values()) == {scoreboard.file_of(contest, COURSE) for contest in CONTESTS}


def hand_in(folder: Path, **texts: str) -> Path:
    """A checkout with these open tasks, "policy", "schedule" and "goodput"."""
    for contest, name in zip(CONTESTS, ("policy", "schedule", "goodput"), strict=True):
        path = folder / FILES[contest.id]
        path.parent.mkdir(parents=True)
        if name in texts:
            path.write_text(texts[name], encoding="utf-8")
    return folder


@pytest.fixture
def classroom(tmp_path: Path) -> Path:
    """Five learners: one good, one who drops requests, one with the given file, one with nothing, one whose file is a link."""
    folder = tmp_path / "class"
    hand_in(folder / "ada", policy=GOOD, schedule="SCHEDULE = {'tokens': 8}", goodput="SETTINGS = {'policy': 'priority'}")
    wrong = {"schedule": "SCHEDULE = {'tokens': 3}", "goodput": "SETTINGS = {'policy': 'bob'}"}
    hand_in(folder / "bob", policy=POLICY_OF.format("return []", "return []"), **wrong)
    hand_in(folder / "cyd", policy=GIVEN, goodput="\n")
    hand_in(folder / "dan")
    link = hand_in(folder / "eve") / FILES["2.O"]
    link.symlink_to(folder / "ada" / FILES["2.O"])
    return folder


def test_a_class_in_one_table(small: None, classroom: Path, tmp_path: Path) -> None:
    where = console()
    assert class_scoreboard(where, COURSE, classroom, "s", tmp_path / "out" / "table.json") == 0
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    names = {contest.id: [row["name"] for row in rows if row["contest"] == contest.id] for contest in CONTESTS}
    both = [*BASELINES, "ada", "bob"]
    assert names == {"2.O": both, "4.O": ["plain", "reference", "ada", "bob"], "6.O": both}
    ada, bob = rows[3], rows[4]
    assert ada["ranks"].keys() == ada["measures"].keys() == {each.name for each in POLICY.measures}
    assert (bob["measures"], bob["ranks"]) == ({}, {})
    assert "dropped request" in bob["foul"]
    text = " ".join(printed(where).split())
    assert "bob is disqualified: admit_order dropped request" in text or "bob is disqualified: run_order dropped" in text
    assert "bob is disqualified: tokens must be one of 1, 2, 4, 8, 16, got 3" in text
    assert text.count("nothing handed in: cyd, dan, eve") == 3


def test_a_learners_table_keeps_each_new_result_once(small: None, tmp_path: Path) -> None:
    root, path = hand_in(tmp_path / "mine", policy=GOOD), tmp_path / "table.json"
    for _ in range(2):
        where = console()
        assert own_scoreboard(where, COURSE, "", "s", path, root) == 0
    rows = json.loads(path.read_text())
    assert [(row["contest"], row["name"], row["seed"]) for row in rows] == [("2.O", "you", "s")]
    assert rows[0]["measures"].keys() == {each.name for each in POLICY.measures}
    assert f"nothing handed in; write into {FILES['6.O']}" in printed(where)
    (root / FILES["2.O"]).write_text(POLICY_OF.format("return []", "return []"))
    own_scoreboard(console(), COURSE, "zoe", "s", path, root)
    assert [(row["name"], bool(row["foul"])) for row in json.loads(path.read_text())] == [("you", False), ("zoe", True)]


def test_a_seed_that_is_too_hard_for_a_rival_leaves_a_table() -> None:
    def judge(name: str, seed: str) -> dict[str, float]:
        if name == "lpm":
            raise Foul("request 3 waited for 60 s")
        return {each.name: 1.0 for each in POLICY.measures}

    rows = scoreboard.rivals(replace(POLICY, judge_rival=judge), "hard")
    assert [(row.name, row.foul, len(row.measures)) for row in rows] == [
        ("fcfs", "", 4), ("priority", "", 4), ("lpm", "request 3 waited for 60 s", 0)
    ]  # fmt: skip
    where = console()
    scoreboard.show(where, POLICY, rows)
    assert "lpm is disqualified: request 3 waited" in printed(where)
