"""Clients that put a server under load, what they measure, and the benchmark that uses them."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from solutions.benchmarks.datasets import BenchRequest
from solutions.benchmarks.end_to_end import Client, arrivals, first_model, run_server
from solutions.benchmarks.latency import Limits, Stream, goodput, latencies, percentiles
from solutions.benchmarks.servers import as_flags, running_server
from solutions.benchmarks.serving import Watched, chat_sized_requests, feed_cost, totals, under_watch
from solutions.benchmarks.serving import main as serving_command
from solutions.core.output import RequestOutput
from solutions.models.loader import load_tokenizer, resolve_model
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import serve

pytestmark = pytest.mark.alone
REQUESTS = [BenchRequest([97] * (3 + i), 1 + i % 7) for i in range(40)]


def test_times_of_a_stream() -> None:
    stream = Stream(10.0, [10.5, 10.6, 10.9], num_tokens=5)  # two of its pieces held two tokens
    assert stream.ttft == 0.5
    assert stream.tpot == pytest.approx(0.4 / 4)
    assert stream.latency == pytest.approx(0.9)
    assert Stream(10.0, [10.5], num_tokens=1).tpot is None


def test_percentiles_lie_between_values() -> None:
    found = percentiles(i / 1000 for i in range(1, 102))  # 1 to 101 ms: percentile q is q + 1
    assert found == pytest.approx({"mean": 51, "p50": 51, "p90": 91, "p99": 100, "max": 101})
    assert percentiles([0.001, 0.002])["p50"] == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no percentile 50 of 0 values"):
        percentiles([])


def test_refused_requests_have_no_times_and_count_as_bad() -> None:
    streams = [
        Stream(0.0, [0.1, 0.2], 2), Stream(0.0, [0.3, 0.4], 2), Stream(0.0, [0.1, 0.6], 2), Stream(0.0, [0.1], 1),
        Stream(0.0, error="429"),
    ]  # fmt: skip
    assert latencies(streams)["ttft_ms"]["max"] == pytest.approx(300)
    assert latencies(streams)["itl_ms"]["mean"] == pytest.approx((100 + 100 + 500) / 3)
    assert latencies(streams[-1:]) == {}
    assert goodput(streams, 2.0, Limits(0.2, 0.2)) == 1.0  # the first and the fourth, in two seconds
    assert goodput(streams, 2.0, Limits(0.1, 0.5)) == 1.5  # at a limit is within it


def test_a_closed_loop_keeps_its_number_under_way() -> None:
    """The engine goes on only while five requests are there, or no more come: with fewer under way it would wait for ever."""
    engine = FakeEngine()
    with serve(engine) as url:
        seen: list[int] = []
        step = engine.step

        def step_of_five() -> list[RequestOutput]:
            if len(engine.running) < 5 and len(engine.submitted) < len(REQUESTS):
                time.sleep(0.001)
                return []
            seen.append(len(engine.running))
            return step()

        engine.step = step_of_five
        streams = asyncio.run(Client(f"{url}/v1", "fake").closed_loop(REQUESTS, 5))
    assert max(seen) == 5
    assert [stream.num_tokens for stream in streams] == [request.output_len for request in REQUESTS]
    assert [stream.num_prompt for stream in streams] == [len(request.prompt_token_ids) for request in REQUESTS]
    assert all(stream.times == sorted(stream.times) and stream.times[0] > stream.start for stream in streams)


def test_a_closed_loop_sends_nothing_after_its_time() -> None:
    with serve(FakeEngine()) as url:
        streams = asyncio.run(Client(f"{url}/v1", "fake").closed_loop([BenchRequest([97], 20)] * 10_000, 4, seconds=0.5))
    assert 4 < len(streams) < 200
    assert 0.4 < streams[-1].start - streams[0].start < 3


def gaps(streams: list[Stream]) -> list[float]:
    return [later.start - earlier.start for earlier, later in pairwise(streams)]


def test_an_open_loop_arrives_at_its_rate_whatever_the_server_does() -> None:
    with serve(FakeEngine()) as url:
        streams = asyncio.run(Client(f"{url}/v1", "fake").open_loop([BenchRequest([97], 50)] * 60, arrivals(60, 100.0, seed=1)))
        again = asyncio.run(Client(f"{url}/v1", "fake").open_loop([BenchRequest([97], 50)] * 60, arrivals(60, 100.0, seed=1)))
        burst = asyncio.run(Client(f"{url}/v1", "fake").open_loop(REQUESTS, [0.0] * 40))
    waits = gaps(streams)
    assert 0.5 * 0.01 < sum(waits) / len(waits) < 2 * 0.01
    assert waits == pytest.approx(gaps(again), abs=1e-6)
    assert len({stream.start for stream in burst}) == 1


def test_a_full_queue_is_an_error_of_that_request_and_nonsense_one_of_the_run() -> None:
    with serve(FakeEngine(max_waiting=2)) as url:
        streams = asyncio.run(Client(f"{url}/v1", "fake").open_loop([BenchRequest([97], 100)] * 6, [0.0] * 6))
        assert sum(stream.error is None for stream in streams) == 2
        assert "429" in next(stream.error for stream in streams if stream.error)
        with pytest.raises(ValueError, match="429"):
            run_server(f"{url}/v1", "fake", [BenchRequest([97], 100)] * 6)
        with pytest.raises(ValueError, match="404"):
            run_server(f"{url}/v1", "other", REQUESTS)


def test_a_server_is_measured_like_an_engine() -> None:
    with serve(FakeEngine()) as url:
        assert first_model(f"{url}/v1") == "fake"
        found = run_server(f"{url}/v1/", "fake", REQUESTS)
    assert found.num_output_tokens == sum(request.output_len for request in REQUESTS)
    assert found.num_prompt_tokens == sum(len(request.prompt_token_ids) for request in REQUESTS)
    assert 0 < found.details["ttft_ms_median"] < 1e3 * found.seconds
    with pytest.raises(ValueError, match="is no OpenAI server"):
        first_model("http://127.0.0.1:9/v1")


@pytest.mark.slow
def test_a_server_is_watched_while_it_works() -> None:
    with serve(FakeEngine()) as url:
        load = Client(f"{url}/v1", "fake").closed_loop([BenchRequest([97], 10)] * 10_000, 4, seconds=2.5)
        _, seen = asyncio.run(under_watch(f"{url}/v1", os.getpid(), load))
    assert len(seen.health) > 10
    assert len(seen.memory) == len(seen.tokens) >= 2
    assert seen.memory[0][1] > 1 << 20


def test_slope_and_rate_of_what_was_watched() -> None:
    seen = Watched(
        memory=[(second, (900 if second < 30 else 100 + second) << 20) for second in range(60)],
        tokens=[(second, 50 * second + (1000 if second >= 50 else 0)) for second in range(60)],
    )
    assert seen.memory_slope() == pytest.approx(60.0)  # 1 MiB a second, once the start is over
    assert seen.rate(10, 30) == pytest.approx(50.0)


def test_the_cost_of_the_feed_is_that_against_the_times_around_it() -> None:
    rates = [100] * 20 + [85] * 20 + [100] * 20 + [99] * 20 + [120] * 20 + [50] * 20
    seen = Watched(tokens=[(float(second), float(sum(rates[:second]))) for second in range(121)])
    found = feed_cost(seen, [(20.0, 40.0), (60.0, 80.0), (100.0, 120.0)], warm_up=15)
    assert found == pytest.approx([0.1])  # the first has no time before it to compare with, and the last none after it
    assert feed_cost(seen, [(20.0, 40.0)], warm_up=0) == pytest.approx([0.15])


def test_totals_add_labels_up() -> None:
    text = (
        '# TYPE a counter\na_total{x="1"} 2\na_total{x="2"} 3\n# TYPE h histogram\nh_bucket{le="+Inf"} 4\nh_sum 5\nh_count 4\n'
    )
    assert totals(text) == {"a_total": 5.0, "h_sum": 5.0, "h_count": 4.0}


def test_requests_are_text_of_known_tokens() -> None:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    requests = chat_sized_requests(tokenizer, 20, seed=3)
    assert requests == chat_sized_requests(tokenizer, 20, seed=3) != chat_sized_requests(tokenizer, 20, seed=4)
    assert all(tokenizer.encode(request.text) == request.prompt_token_ids for request in requests)
    assert all(64 <= request.output_len <= 192 for request in requests)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why() -> None:
    assert as_flags({"max_num_seqs": 3, "touch_kv_cache": True}) == ["--max-num-seqs=3", "--touch-kv-cache"]
    with pytest.raises(RuntimeError, match="no_such_model"), running_server("--model", "no_such_model"):
        pass


@pytest.mark.parametrize(
    ("command", "flags", "complaint"),
    [
        (serving_command, "--streams 0", "--streams must be at least 1"),
        (serving_command, "--kv-cache x", "--kv-cache"),
    ],
)
def test_a_wrong_flag_is_one_line(
    command: Callable[[list[str]], None], flags: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        command(flags.split())
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_runs_and_its_record_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serving.json"
    serving_command(f"--streams 4 --seconds 3 --warm-up 1 --kv-cache 64MiB --output-json {file}".split())
    results = json.loads(file.read_text())["results"]
    assert results["errors"] == 0
    assert results["tokens"]["client"] == results["tokens"]["server"] > 100
    assert results["means_ms"]["itl"]["server"] == pytest.approx(results["means_ms"]["itl"]["client"], rel=0.2)
    printed = capsys.readouterr()
    assert "cost of HTTP and text" in printed.out
    assert "offline" in printed.err
