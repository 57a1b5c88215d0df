"""The policy "fair": virtual token counters. What clients are served is counted here anew, from the scheduler's decisions."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from solutions.batching.queue_order import OUTPUT_COST, parse_weights
from solutions.batching.scheduler_output import SchedulerOutput
from solutions.benchmarks.servers import as_flags, running_server
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM
from solutions.serving.api_server import parse_flags
from solutions.tests.real_server import MODEL, SETTINGS, stopped
from solutions.tests.simulation import Simulation
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny_llama

Served = Counter[str | None]


def fair(weights: dict[str, float] | None = None, **limits: object) -> Simulation:
    limits = {"num_blocks": 4096, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64} | limits
    return Simulation(policy="fair", client_weights=weights or {}, enable_prefix_caching=False, **limits)


def serve(sim: Simulation, served: Served, steps: int = 1) -> SchedulerOutput:
    """Step, and count what each client gets: a token of a prompt once, any other token `OUTPUT_COST` times."""
    for _ in range(steps):
        before = {seq.seq_id: seq.num_computed_tokens for seq in sim.sequences}
        decision = sim.step()
        for seq, count in decision.scheduled.items():
            start = before[seq.seq_id]
            prompt = max(0, min(start + count, seq.num_prompt_tokens) - start)
            served[seq.client] += prompt + OUTPUT_COST * (count - prompt)
    return decision


def ids_of(sim: Simulation, client: str) -> list[int]:
    return [seq.seq_id for seq in sim.sequences if seq.client == client]


@pytest.mark.parametrize("seed", slow_after(2, range(4)))
def test_who_has_requests_waiting_gets_as_much_as_the_other(seed: int) -> None:
    """The bound of theorem 4.4 in the paper: the counters of two backlogged clients differ by at most the largest prompt or
    what all running sequences may write, twice."""
    rng = random.Random(seed)
    sim, served = fair(), Served()
    longest, most = 40, 24
    for _ in range(80):  # one sends much longer requests, and all of them first
        sim.add([1] * rng.randint(20, longest), max_tokens=rng.randint(8, most), client="long")
    for _ in range(300):
        sim.add([1] * rng.randint(1, 5), max_tokens=rng.randint(1, 6), client="short")
    bound = 2 * max(longest, OUTPUT_COST * 4 * most)
    for _ in range(250):
        serve(sim, served)
        waiting = {seq.client for seq in sim.scheduler.waiting}
        if waiting == {"long", "short"}:
            assert abs(served["long"] - served["short"]) <= bound
    assert served["long"] > 2 * bound


def test_a_flood_does_not_hold_up_another_client() -> None:
    """First come, first served, the last request would begin after 30 others."""
    sim = fair(max_num_seqs=1)
    for _ in range(30):
        sim.add([1] * 8, max_tokens=8, client="flood")
    sim.step()
    (light,) = sim.add([2] * 8, max_tokens=8, client="light")
    order: list[int] = []
    while not light.finished:
        order += [seq.seq_id for seq in sim.step().scheduled if seq.seq_id not in order]
    assert order == [0, light.seq_id], "only the one that ran already goes before"


def test_a_client_alone_gets_everything() -> None:
    """As many steps as without the policy."""
    steps = []
    for policy in ("fcfs", "fair"):
        sim = Simulation(num_blocks=64, block_size=4, max_num_seqs=4, policy=policy, enable_prefix_caching=False)
        for length in range(1, 13):
            sim.add([1] * length, max_tokens=4, client="a")
        steps.append(sim.run())
    assert steps[0] == steps[1]


def test_requests_of_one_client_go_by_arrival() -> None:
    sim, order = fair(max_num_seqs=1), list[int]()
    for client in "aabbab":
        sim.add([1] * 8, max_tokens=1, client=client)
    while sim.scheduler.has_unfinished():
        order += [seq.seq_id for seq in sim.step().scheduled]
    assert [each for each in order if each in ids_of(sim, "a")] == ids_of(sim, "a")
    assert [each for each in order if each in ids_of(sim, "b")] == ids_of(sim, "b")
    assert order == [0, 2, 1, 3, 4, 5], "they take turns; equal counters go by arrival"


@pytest.mark.parametrize("idle", ["never there before", "there before"])
def test_what_a_client_did_not_use_is_not_owed_to_it(idle: str) -> None:
    """Both get the same from the moment when both wait."""
    sim, served = fair(max_num_seqs=2), Served()
    if idle == "there before":
        sim.add([1], max_tokens=1, client="b")
    for _ in range(100):
        sim.add([1] * 8, max_tokens=8, client="a")
    serve(sim, served, 150)
    assert served["a"] > 300
    for _ in range(50):
        sim.add([1] * 8, max_tokens=8, client="b")
    served.clear()
    serve(sim, served, 150)
    assert abs(served["a"] - served["b"]) <= 2 * OUTPUT_COST * 2 * 8


def test_a_client_that_never_waits_long_saves_nothing_up() -> None:
    """It sends one request at a time, each admitted at once, beside another that fills the queue; then it fills it, too."""
    sim, served = fair(max_num_seqs=2), Served()
    for _ in range(100):
        sim.add([1] * 8, max_tokens=8, client="a")
    (last,) = sim.add([1], max_tokens=1, client="b")
    for _ in range(150):
        serve(sim, served)
        if last.finished:
            (last,) = sim.add([1], max_tokens=1, client="b")
    for _ in range(50):
        sim.add([1] * 8, max_tokens=8, client="b")
    served.clear()
    serve(sim, served, 150)
    assert abs(served["a"] - served["b"]) <= 4 * OUTPUT_COST * 2 * 8


@pytest.mark.parametrize("weight", [0.5, 1, 3])
def test_shares_follow_weights(weight: float) -> None:
    sim, served = fair({"a": weight}, max_num_seqs=4), Served()
    for client in "ab" * 120:
        sim.add([1] * 8, max_tokens=8, client=client)
    serve(sim, served, 200)
    assert served["a"] / served["b"] == pytest.approx(weight, rel=0.1)


def test_the_flood_is_preempted_and_not_who_came_behind_it() -> None:
    sim = fair(num_blocks=16, max_num_seqs=8, max_model_len=40, watermark=0.0)
    for _ in range(6):
        sim.add([1] * 8, max_tokens=30, client="flood")
    sim.step()
    (light,) = sim.add([2] * 8, max_tokens=20, client="light")
    while not light.finished:
        assert light not in sim.step().preempted
    assert sim.scheduler.num_preemptions > 0
    sim.run()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_what_is_computed_again_is_charged_once(mode: str) -> None:
    sim = fair(num_blocks=8, num_host_blocks=8, max_num_seqs=4, max_model_len=32, watermark=0.0, preemption_mode=mode)
    sim.add([1] * 2, max_tokens=2, client="b")
    for _ in range(3):
        sim.add([1] * 8, max_tokens=12, client="a")
    while sim.scheduler.has_unfinished():
        sim.step()
        counters = sim.scheduler.order.served.copy()
    assert sim.scheduler.num_preemptions > 0
    # the last token of each is never computed
    assert counters["a"] == 3 * (8 + OUTPUT_COST * 11)


@pytest.mark.parametrize("n", [1, 3])
def test_cached_and_shared_prompts_are_free(n: int) -> None:
    sim = Simulation(num_blocks=64, block_size=4, policy="fair", max_num_seqs=8)
    sim.add([1] * 16, max_tokens=1, client="b")
    sim.step()
    sim.add([1] * 17, max_tokens=2, n=n, client="a")
    (floor,) = sim.scheduler.order.served.values()
    assert floor == 16
    counters = dict[str | None, float]()
    while sim.scheduler.has_unfinished():
        sim.step()
        counters = sim.scheduler.order.served.copy()
    # who shares a prompt computes its last token again, and one token that was written
    assert counters["a"] == floor + n * (1 + OUTPUT_COST)


def test_a_spray_of_clients_is_forgotten() -> None:
    sim = fair(max_num_seqs=2)
    for number in range(200):
        sim.add([1] * 4, max_tokens=2, client=f"10.0.{number}")
        sim.step()
    assert len(sim.scheduler.order.served) < 50
    sim.run()


def test_without_clients_it_is_first_come_first_served(tmp_path) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), device="cpu", scheduling_policy="fair", max_num_seqs=1, kv_cache_memory_bytes=1 << 20)
    outputs = llm.generate(["one", "two", "three"], use_tqdm=False)
    assert [output.finished for output in outputs] == [True] * 3
    assert list(llm.llm_engine.stats().served) == [""]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"), ("3", "positive numbers"), ('{"a": 0}', "positive numbers"),
        ('{"a": "2"}', "positive numbers"), ('{"a": true}', "positive numbers"), ('{"a": NaN}', "positive numbers"),
        ('{"a": Infinity}', "positive numbers"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_weights(text)


def test_weights_need_the_policy_and_batches_have_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_weights('{"a": 2, "b": 0.5}') == {"a": 2, "b": 0.5}
    with pytest.raises(ValueError, match="--client-weights needs --scheduling-policy fair"):
        EngineConfig(client_weights="{}")
    with pytest.raises(SystemExit):
        parse_flags(["--files-dir", "x", "--scheduling-policy", "fair"])
    assert "--scheduling-policy fair knows none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_server_is_fair_to_its_keys() -> None:
    """One key sends 16 requests, which a batch of one would answer one by one; a key that comes last does not wait for them."""
    flags = [*as_flags(SETTINGS), "--scheduling-policy", "fair", "--max-num-seqs", "1", "--api-key", "flood", "light"]
    done: list[str] = []

    with running_server(*flags) as (server, url):
        with httpx.Client(base_url=url, timeout=120) as client:

            def ask(key: str) -> None:
                body = {"model": MODEL, "prompt": "Count: 1, 2, 3", "max_tokens": 12, "ignore_eos": True}
                answer = client.post("completions", json=body, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == 200, answer.text
                done.append(key)

            def waiting() -> float:
                text = httpx.get(f"{url.removesuffix('/v1')}/metrics", headers={"Authorization": "Bearer light"}).text
                return next(
                    float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_waiting{")
                )

            with ThreadPoolExecutor(20) as pool:
                flood = [pool.submit(ask, "flood") for _ in range(16)]
                while waiting() < 8 and not all(each.done() for each in flood):
                    pass
                pool.submit(ask, "light").result()
                place = len(done) - 1
                for each in flood:
                    each.result()
            text = httpx.get(f"{url.removesuffix('/v1')}/metrics", headers={"Authorization": "Bearer light"}).text
        assert sorted(done) == ["flood"] * 16 + ["light"]
        assert place < 12
        assert text.count("vllm:client_served_tokens{") >= 1  # who has been lifted past is forgotten
        assert stopped(server) == ""
