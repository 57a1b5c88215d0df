"""Forms that take for ever, beside forms of others: limits, turns, what is shared, and processes that end."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from solutions.batching.sampling_params import StructuredOutput
from solutions.batching.scheduler_config import QueueFullError
from solutions.benchmarks.servers import running_server
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.core.input import InputProcessor
from solutions.core.structured import grammar_processes, grammar_queue, trial_process
from solutions.core.structured.grammar_processes import GrammarProcesses
from solutions.core.structured.grammar_queue import CompilingStoppedError, FairQueue, Job
from solutions.core.structured.structured_output import GrammarCompiler
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_server import serve, until
from solutions.tests.slow_cases import slow_after

pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")

ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PATIENCE = 120
"""Seconds that no test needs, on a machine with much else to do."""


def bomb(number: int) -> StructuredOutput:
    """A form that takes longer than any test."""
    return StructuredOutput("regex", "|".join(f"(.*{c}.{{{3000 + 30 * number + i}}})" for i, c in enumerate(LETTERS)))


def small(number: int) -> StructuredOutput:
    return StructuredOutput("regex", rf"{number}-[a-f]{{2,4}}")


def new_processes() -> GrammarProcesses:
    source = resolve_model("smollm2-135m")
    vocabulary = source.config.vocab_size, source.config.eos_token_ids
    return GrammarProcesses(lambda: GrammarCompiler(load_tokenizer(source), *vocabulary))


@pytest.fixture(scope="module")
def shared() -> Iterator[GrammarProcesses]:
    processes = new_processes()
    yield processes
    processes.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trial ends by itself during the test."""
    monkeypatch.setattr(grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, seconds=600.0, wall_seconds=600.0))


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form has 2 s, and 0.3 s if others wait for it."""
    monkeypatch.setattr(grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, seconds=2.0))
    monkeypatch.setattr(grammar_processes, "SHORT_SECONDS", 0.3)


def lives(process: psutil.Process) -> bool:
    """Whether it is there, and not only waits to be buried."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def trials(processes: GrammarProcesses) -> list[psutil.Process]:
    """Processes in which something is tried."""
    process = processes._process._process
    return [] if process is None or process.poll() is not None else psutil.Process(process.pid).children()


def until_trials(processes: GrammarProcesses, count: int) -> list[psutil.Process]:
    until(lambda: len(trials(processes)) == count, PATIENCE)
    return trials(processes)


def drop(*futures: Future[Any]) -> None:
    for future in futures:
        future.cancel()


# ------------------------------------------------------------------------------------------------------------ fairness


@pytest.mark.slow
def test_small_forms_of_others_do_not_wait_for_five_that_take_for_ever(shared: GrammarProcesses, patient: None) -> None:
    bombs = [shared.compile(bomb(i), "greedy") for i in range(5)]
    until(lambda: len(trials(shared)) > 0, PATIENCE)
    others = [shared.compile(small(i), f"other {i}") for i in range(3)]
    assert len(wait(others, PATIENCE).done) == 3
    assert all(other.result().memory_size_bytes > 0 for other in others)
    assert not any(one.done() for one in bombs)
    drop(*bombs)
    until_trials(shared, 0)


@pytest.mark.slow
def test_the_same_client_gets_its_small_form_too(shared: GrammarProcesses, patient: None) -> None:
    bombs = [shared.compile(bomb(10 + i)) for i in range(3)]
    assert shared.compile(small(10)).result(PATIENCE)
    assert not any(one.done() for one in bombs)
    drop(*bombs)
    until_trials(shared, 0)


@pytest.mark.slow
def test_who_waits_is_not_billed(shared: GrammarProcesses, strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_processes, "SHORT_SECONDS", 0.001)  # so that all wait for the second thread
    form = StructuredOutput("choice", json.dumps(["x" * 2000]))  # long, so that it does not go before the others
    began = time.monotonic()
    bombs = [shared.compile(bomb(20 + i)) for i in range(2)]
    assert shared.compile(form).result(PATIENCE)
    assert time.monotonic() - began > 2.0 * 2
    assert all("takes more than 2 s to compile" in str(one.exception(0)) for one in bombs)


def job(text: str, client: str, arrival: float) -> Job:
    return Job(text.encode(), StructuredOutput("regex", text), {Future(): client}, arrival=arrival)


def order(jobs: list[Job]) -> list[str]:
    queue = FairQueue()
    assert not any(queue.put(one) for one in jobs)
    return [queue.take(False).wanted.definition for _ in jobs]


def test_clients_take_turns() -> None:
    jobs = [job(f"a{i}", "a", i) for i in range(3)] + [job(f"b{i}", "b", 10 + i) for i in range(2)] + [job("c", "c", 20)]
    assert order(jobs) == ["a0", "b0", "c", "a1", "b1", "a2"]


def test_short_forms_of_a_client_go_first_but_not_for_ever() -> None:
    long = "x" * 5000
    assert order([job(long, "a", 0.0), job("early", "a", 1.0), job("late", "a", 9.0)]) == ["early", long, "late"]


def test_who_had_a_turn_comes_behind_who_had_none() -> None:
    queue = FairQueue()
    queue.put(job("a0", "a", 0.0))
    assert queue.take(False).wanted.definition == "a0"
    for one in (job("a1", "a", 1.0), job("b0", "b", 2.0)):
        queue.put(one)
    assert [queue.take(False).wanted.definition for _ in range(2)] == ["b0", "a1"]


def test_in_a_full_queue_the_one_with_the_most_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_queue, "MAX_WAITING", 3)
    queue = FairQueue()
    for i in range(3):
        assert queue.put(job(f"a{i}", "a", i)) is None
    assert queue.put(job("a3", "a", 3)).wanted.definition == "a3"
    assert queue.put(job("b", "b", 4)).wanted.definition == "a2"
    assert queue.put(job("c", "c", 5)).wanted.definition == "a1"
    assert queue.put(job("d", "d", 6)).wanted.definition == "d"  # nobody has more than another


@pytest.mark.slow
def test_a_full_queue_says_so(shared: GrammarProcesses, patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_queue, "MAX_WAITING", 2)
    monkeypatch.setattr(grammar_processes, "SHORT_SECONDS", 600.0)
    running = [shared.compile(bomb(30 + i), "a") for i in range(2)]
    until_trials(shared, 2)
    waiting = [shared.compile(bomb(32 + i), "a") for i in range(2)]
    refused = shared.compile(bomb(34), "a")
    with pytest.raises(QueueFullError, match="forms of answers wait to be compiled; try again later"):
        refused.result(PATIENCE)
    assert not any(one.done() for one in waiting)
    drop(*running, *waiting)
    until_trials(shared, 0)


# -------------------------------------------------------------------------------------------------------------- limits


def test_what_takes_too_long_is_refused_and_remembered(shared: GrammarProcesses, strict: None) -> None:
    for _ in range(2):
        before = shared.num_compiled
        with pytest.raises(ValueError, match="structured_output takes more than 2 s to compile; make it simpler"):
            shared.compile(bomb(40)).result(PATIENCE)
        assert trials(shared) == []  # whoever has the answer knows that the process is gone
    assert shared.num_compiled == before


def nested(schema: dict[str, Any], levels: int) -> str:
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return json.dumps(schema, separators=(",", ":"))


def word(name: str, length: int) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string", "pattern": f"^[a-z]{{1,{length}}}$"}}}


@pytest.mark.parametrize(
    "form",
    slow_after(
        1,
        [
            StructuredOutput("json", nested({"type": "string"}, 620)),
            StructuredOutput("json", json.dumps({"anyOf": [word(f"k{i}", 50 + i) for i in range(150)]})),
            StructuredOutput("grammar", "root ::= " + " | ".join(f'[^"]* "{c}" [^"]{{{3000 + ord(c)}}}' for c in LETTERS)),
            StructuredOutput("regex", "(.{1,300}){1,300}"),
        ],
    ),
    ids=["arrays", "anyOf", "grammar", "regex"],
)
def test_each_bomb_is_refused_while_others_are_served(shared: GrammarProcesses, strict: None, form: StructuredOutput) -> None:
    refused = shared.compile(form, "greedy")
    other = shared.compile(small(len(form.definition)), "modest")
    assert other.result(PATIENCE).memory_size_bytes > 0
    with pytest.raises(ValueError, match=r"^structured_output"):
        refused.result(PATIENCE)
    assert trials(shared) == []


def test_a_failure_is_forgotten_after_a_while(shared: GrammarProcesses, strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_processes, "FAILURE_SECONDS", 0.0)
    before = shared.num_compiled
    for _ in range(2):
        assert "the regex is not valid" in str(shared.compile(StructuredOutput("regex", "((")).exception(PATIENCE))
    assert shared.num_compiled == before + 2


def test_what_takes_too_much_memory_is_refused(shared: GrammarProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, mib=4))
    form = StructuredOutput("grammar", "root ::= " + " | ".join(f"[^{c}]{{1,30000}}" for c in LETTERS))
    with pytest.raises(ValueError, match="structured_output needs more than 4 MiB to compile; make it simpler"):
        shared.compile(form).result(PATIENCE)


def test_the_clock_on_the_wall_ends_it_too(shared: GrammarProcesses, strict: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, seconds=30.0, wall_seconds=1.0))
    with pytest.raises(ValueError, match="structured_output takes more than 1 s to compile"):
        shared.compile(bomb(45)).result(PATIENCE)


def test_an_automaton_that_is_too_large_is_refused(shared: GrammarProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, seconds=600.0, wall_seconds=600.0, automaton_mib=1)
    )
    with pytest.raises(ValueError, match="structured_output needs an automaton of more than 1 MiB"):
        shared.compile(StructuredOutput("regex", r"[a-z0-9._%+-]{1,64}@[a-z0-9.-]{1,65}\.[a-z]{2,8}")).result(PATIENCE)


@pytest.mark.parametrize(
    "form",
    [
        StructuredOutput("grammar", 'root ::= w*\nw ::= [a-z]+ | [a-y]+ | [b-z]+ " " | w w | w " " w'),
        StructuredOutput("regex", r"([a-z]|[a-y]|[b-z]|[a-f]{1,10}){1,200}"),
    ],
    ids=["grammar", "regex"],
)
def test_what_is_slow_to_follow_is_refused(
    shared: GrammarProcesses, form: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_processes, "LIMITS", replace(grammar_processes.LIMITS, seconds=600.0, wall_seconds=600.0))
    with pytest.raises(ValueError, match=r"structured_output takes more than 0.1 s a token to follow; make it simpler"):
        shared.compile(form).result(PATIENCE)


# -------------------------------------------------------------------------------------------------------------- shared


def test_twenty_that_ask_for_the_same_at_once_share_it(shared: GrammarProcesses) -> None:
    before = shared.num_compiled
    start = threading.Barrier(20)
    results: list[Any] = []

    def ask() -> None:
        start.wait()
        results.append(shared.compile(small(50), threading.current_thread().name).result(PATIENCE))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(results) == 20
    assert len({id(result) for result in results}) == 1
    assert shared.num_compiled == before + 1
    assert shared.compile(small(50)).result(0) is results[0]


def test_who_leaves_takes_nothing_from_those_who_stay(shared: GrammarProcesses, patient: None) -> None:
    blocked = [shared.compile(bomb(60 + i)) for i in range(2)]
    leaves, stays = shared.compile(small(60), "a"), shared.compile(small(60), "b")
    leaves.cancel()
    assert stays.result(PATIENCE)
    assert leaves.cancelled()
    drop(*blocked)
    until_trials(shared, 0)


def test_nothing_is_compiled_for_nobody(shared: GrammarProcesses, patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_processes, "SHORT_SECONDS", 600.0)
    running = [shared.compile(bomb(70 + i)) for i in range(2)]
    until_trials(shared, 2)
    before = shared.num_compiled
    waits = [shared.compile(small(70)), shared.compile(small(70))]  # one form for two
    assert shared.num_waiting == 4
    drop(*waits)
    assert shared._queue.waiting == []
    assert shared.num_waiting == 2
    drop(*running)
    until_trials(shared, 0)
    assert shared.compile(small(71)).result(PATIENCE)
    assert shared.num_compiled == before + 1
    again = shared.compile(bomb(70))  # that it was given up says nothing of it
    until_trials(shared, 1)
    again.cancel()
    until_trials(shared, 0)


# ----------------------------------------------------------------------------------------------------- ends of processes


def test_a_trial_that_is_killed_is_one_error(shared: GrammarProcesses, patient: None) -> None:
    future = shared.compile(bomb(80))
    until_trials(shared, 1)
    trials(shared)[0].kill()
    with pytest.raises(ValueError, match=r"structured_output cannot be compiled: the process .* has ended \(SIGKILL\)"):
        future.result(PATIENCE)
    assert shared.compile(small(80)).result(PATIENCE)


@pytest.mark.slow
def test_when_the_process_is_killed_another_one_goes_on(shared: GrammarProcesses, patient: None) -> None:
    future = shared.compile(bomb(90))
    (trial,) = until_trials(shared, 1)
    process = shared._process._process.pid
    os.kill(process, signal.SIGKILL)
    until(lambda: not lives(trial), PATIENCE)
    until(lambda: shared._process._process is not None and shared._process._process.pid != process, PATIENCE)
    until_trials(shared, 1)  # it is tried again
    future.cancel()
    until_trials(shared, 0)
    assert shared.compile(small(90)).result(PATIENCE)


@pytest.mark.slow
def test_closing_leaves_nobody(patient: None) -> None:
    processes = new_processes()
    running = processes.compile(bomb(100))
    (trial,) = until_trials(processes, 1)
    waiting = processes.compile(bomb(101))
    process = processes._process._process
    processes.close()
    for future in (running, waiting, processes.compile(small(100))):
        with pytest.raises(CompilingStoppedError):
            future.result(PATIENCE)
    assert process.returncode is not None
    until(lambda: not lives(trial), PATIENCE)  # it was killed; its parent did not wait for that
    for thread in processes._threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_before_the_first_form_there_is_no_process() -> None:
    processes = new_processes()
    assert processes._process._process is None
    assert processes._threads == []
    processes.close()


@pytest.mark.slow
def test_the_process_may_start_before_the_first_form(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = new_processes()
    processes.start()
    until(lambda: processes._process._process is not None, PATIENCE)
    process = processes._process._process
    assert processes.compile(small(110)).result(PATIENCE)
    assert processes._process._process is process
    processes.close()
    processes.start()  # changes nothing any more
    monkeypatch.setattr(trial_process, "STOP_SECONDS", PATIENCE)
    unwanted = new_processes()
    unwanted.start()
    until(lambda: unwanted._process._process is not None, PATIENCE)
    process = unwanted._process._process
    unwanted.close()  # while the process loads XGrammar, or its vocabulary is made
    assert process.returncode == -signal.SIGTERM
    with pytest.raises(CompilingStoppedError):
        unwanted.compile(small(111)).result(PATIENCE)


@pytest.mark.slow
def test_a_server_starts_it_unasked() -> None:
    with running_server("--kv-cache-memory-bytes=64M", "--max-model-len=256") as (server, _):
        started = psutil.Process(server.pid)
        until(lambda: any("grammar_worker" in " ".join(each.cmdline()) for each in started.children()), PATIENCE)


@pytest.mark.slow
def test_an_engine_that_is_dropped_leaves_no_process() -> None:
    source = resolve_model("smollm2-135m")
    door = InputProcessor(load_tokenizer(source), source.config, 100, 10)
    assert door.compile(small(0)).result(PATIENCE)
    process = door._grammars._process._process
    del door
    gc.collect()
    assert process.returncode is not None


DOOMED = """
import time
from solutions.tests.test_grammar_processes import bomb, new_processes, until_trials
if __name__ == "__main__":
    processes = new_processes()
    future = processes.compile(bomb(0))
    print(until_trials(processes, 1)[0].pid, processes._process._process.pid, flush=True)
    time.sleep(3600)
"""


@pytest.mark.slow
def test_they_end_with_a_server_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", DOOMED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        processes = [psutil.Process(int(pid)) for pid in server.stdout.readline().split()]
        assert len(processes) == 2
        assert all(map(lives, processes))
        server.kill()
    until(lambda: not any(map(lives, processes)), PATIENCE)


def test_where_no_process_can_be_had_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    processes = new_processes()
    with pytest.raises(ValueError, match=r"structured_output needs a process of its own .* cannot be had: .*/nowhere/python"):
        processes.compile(small(0)).result(PATIENCE)
    processes.close()


@pytest.mark.slow
def test_a_process_that_cannot_start_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    processes = new_processes()
    with pytest.raises(ValueError, match="structured_output needs a process of its own"):
        processes.compile(small(0)).result(PATIENCE)
    processes.close()


# ------------------------------------------------------------------------------------------------------------ a server


@pytest.mark.slow
def test_a_server_answers_others_and_ends_with_a_form_half_compiled(patient: None) -> None:
    engine = LLMEngine(EngineConfig(model="smollm2-135m", max_model_len=128, num_gpu_blocks_override=32))
    answers: list[httpx.Response] = []

    def post(url: str, key: str, form: StructuredOutput) -> httpx.Response:
        body = {"model": "fake", "prompt": "A:", "max_tokens": 20, "guided_regex": form.definition}
        return httpx.post(f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE)

    def ask(url: str, number: int) -> None:
        answers.append(post(url, "greedy", bomb(number)))

    with serve(AsyncEngine(engine), ["greedy", "modest"]) as url:
        threads = [threading.Thread(target=ask, args=(url, 110 + i)) for i in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: engine.input._grammars is not None and trials(engine.input._grammars), PATIENCE)
        answer = post(url, "modest", StructuredOutput("regex", r"\d{3}-[a-f]{2}"))
        assert answer.status_code == 200
        assert re.fullmatch(r"\d{3}-[a-f]{2}", answer.json()["choices"][0]["text"])
        assert answers == []
        process = psutil.Process(engine.input._grammars._process._process.pid)
        ended = [process, *process.children()]
    for thread in threads:
        thread.join(PATIENCE)
    until(lambda: not any(map(lives, ended)), PATIENCE)
    engine.close()


def test_a_server_s_forms_have_limits_that_its_clients_can_bear() -> None:
    """The tests of what happens at a limit bring smaller ones; these are those that everybody has."""
    assert grammar_processes.LIMITS.seconds <= 10
    assert grammar_processes.LIMITS.wall_seconds <= 30
    assert grammar_processes.LIMITS.mib <= 512
    assert grammar_processes.LIMITS.token_seconds <= 0.1
