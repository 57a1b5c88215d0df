"""Task 6.3: tokens a second, without what would make the number wrong. The clock is simulated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from stages.batching.sampling_params import SamplingParams
from stages.benchmarks import throughput
from stages.benchmarks.datasets import BenchRequest, Workload, make_requests
from stages.benchmarks.throughput import WARM_UP_REQUESTS, WARM_UP_TOKENS, Measurement, run_engine, warm_up_requests, warmed
from stages.course.fixtures.checks import check_equal


class Clock:
    """Stands for `time.perf_counter`."""

    def __init__(self) -> None:
        self.seconds = -52.0  # where it began nobody has promised

    def __call__(self) -> float:
        return self.seconds


class Engine:
    """Stands for an `LLM` that takes 0.25 s a request, and 1 s more for a prompt that it has not in its prefix cache. A request
    is ten steps and a preemption, a prompt that was cached 16 tokens; it has run before, and asking for its state takes 3 s."""

    def __init__(self, clock: Clock, missing: int = 0) -> None:
        self.clock, self.missing = clock, missing
        self.cached: set[tuple[int, ...]] = set()
        self.calls: list[tuple[list[list[int]], list[Any]]] = []
        self.llm_engine = SimpleNamespace(
            limits=SimpleNamespace(max_model_len=512),
            block_manager=SimpleNamespace(prefix_cache=SimpleNamespace(clear=self.clear)),
            stats=self.stats,
        )
        self.num_steps, self.num_preemptions, self.prefix_cache_hits = 7, 3, 11
        self.bars: list[bool] = []

    def stats(self) -> SimpleNamespace:
        self.clock.seconds += 3.0
        return SimpleNamespace(
            num_steps=self.num_steps, num_preemptions=self.num_preemptions, prefix_cache_hits=self.prefix_cache_hits
        )

    def clear(self) -> None:
        self.clock.seconds += 50.0
        self.cached.clear()

    def generate(self, prompts: Sequence[dict[str, list[int]]], params: Sequence[Any], use_tqdm: bool = True) -> list[Any]:
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        self.calls.append((ids, list(params)))
        self.bars.append(use_tqdm)
        self.num_steps += 10 * len(ids)
        self.num_preemptions += len(ids)
        outputs = []
        for prompt, wanted in zip(ids, params, strict=True):
            begin = self.clock.seconds
            self.prefix_cache_hits += 16 if tuple(prompt[:16]) in self.cached else 0
            self.clock.seconds += 0.25 if tuple(prompt[:16]) in self.cached else 1.25
            self.cached.add(tuple(prompt[:16]))
            metrics = SimpleNamespace(arrival_time=begin, first_token_time=begin + 0.1, last_token_time=self.clock.seconds)
            tokens = [1] * (wanted.max_tokens - self.missing)
            outputs.append(SimpleNamespace(metrics=metrics, outputs=[SimpleNamespace(token_ids=tokens)]))
        return outputs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What runs of `throughput.time`; the clock on the wall goes backwards."""
    clock = Clock()
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(throughput.time, name, clock)
    monkeypatch.setattr(throughput.time, "time", lambda: 1e9 - clock.seconds)
    return clock


REQUESTS = make_requests(Workload("random", 4, 20, 8))


def test_the_clock_runs_for_the_generation_only(clock: Clock) -> None:
    """Four requests take 5 s and give 32 tokens: 6.4 tokens a second, though emptying the cache took 50 s.

    Why: what a benchmark does for itself is not the engine's time. And the clock on the wall may be set while a benchmark runs,
    which makes an engine faster than light.
    """
    found = run_engine(Engine(clock), REQUESTS)
    check_equal(found.seconds, 5.0, "seconds")
    check_equal(found.output_tokens_per_second, 6.4, "output tokens a second")
    check_equal((found.num_requests, found.num_prompt_tokens, found.num_output_tokens), (4, 80, 32), "what was done")


def test_a_second_run_finds_nothing_of_the_first(clock: Clock) -> None:
    """Both runs take 5 s, for the prefix cache is emptied before each.

    Why: the second repeat of a benchmark that forgets this is four times as fast, and its median is what gets published.
    """
    engine = Engine(clock)
    check_equal([run_engine(engine, REQUESTS).seconds for _ in range(3)], [5.0] * 3, "seconds of three runs")


def test_prompts_are_made_before_the_clock(clock: Clock) -> None:
    """Reading the requests takes a second each time: the run takes 5 s all the same.

    Why: building prompts and parameters is the benchmark's work. Of many short requests it takes longer than some engines.
    """

    class Slow(list):
        def __iter__(self) -> Any:
            clock.seconds += 1.0
            return super().__iter__()

        def __getitem__(self, index: Any) -> Any:
            clock.seconds += 1.0
            return super().__getitem__(index)

    check_equal(run_engine(Engine(clock), Slow(REQUESTS)).seconds, 5.0, "seconds")


def test_details_are_of_this_run(clock: Clock) -> None:
    """An engine that has run before, twice the same four requests and the first of them again: steps, preemptions and tokens
    found in the cache are those of the run, and the latencies are medians in milliseconds.

    Why: its counters count from the start of the process. The second run would show the first one's steps too.
    """
    engine = Engine(clock)
    requests = [*REQUESTS, BenchRequest(list(REQUESTS[0].prompt_token_ids), 8)]
    for _ in range(2):
        details = dict(run_engine(engine, requests).details)
        counts = {name: details.pop(name) for name in ("num_steps", "num_preemptions", "prefix_cache_hit_tokens")}
        check_equal(counts, {"num_steps": 50, "num_preemptions": 5, "prefix_cache_hit_tokens": 16}, "counts among the details")
        rounded = {name: round(value, 6) for name, value in details.items()}
        check_equal(rounded, {"ttft_ms_median": 100.0, "tpot_ms_median": round(1150 / 7, 6)}, "the other details")


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_if_wanted(clock: Clock, shown: bool) -> None:
    """`show_progress` says whether the engine draws a bar.

    Why: results are read by programs, and drawing takes time.
    """
    engine = Engine(clock)
    run_engine(engine, REQUESTS, show_progress=shown)
    run_engine(engine, REQUESTS)
    check_equal(engine.bars, [shown, False], "bars that were drawn, with and without the argument")


def test_an_engine_without_a_prefix_cache_is_measured_too(clock: Clock) -> None:
    """`prefix_cache` is None there.

    Why: every optimization is measured with and without it.
    """
    engine = Engine(clock)
    engine.llm_engine.block_manager.prefix_cache = None
    check_equal(run_engine(engine, REQUESTS).seconds, 5.0, "seconds")


def test_every_request_is_greedy_and_ends_at_its_length(clock: Clock) -> None:
    """Temperature 0, `ignore_eos`, and each request's own `max_tokens`; all else is as users have it.

    Why: with an end of sequence, the engine that ends soonest has the least to do, and random draws cost time that greedy
    ones do not. And whoever leaves out what users wait for, such as the text, measures another engine.
    """
    engine = Engine(clock)
    run_engine(engine, [BenchRequest([5, 6], 3), BenchRequest([7], 9)])
    ((prompts, params),) = engine.calls
    check_equal(prompts, [[5, 6], [7]], "prompts")
    usual = asdict(SamplingParams())
    changed = [{name: value for name, value in asdict(each).items() if value != usual[name]} for each in params]
    expected = [{"temperature": 0.0, "max_tokens": length, "ignore_eos": True} for length in (3, 9)]
    check_equal(changed, expected, "parameters that are not the default")


def test_tokens_that_are_missing_are_an_error(clock: Clock) -> None:
    """An engine that gives one token less than asked for is not faster: it raises a RuntimeError.

    Why: dividing what was asked for by a shorter time is the oldest mistake there is.
    """
    run_engine(Engine(clock), REQUESTS)
    with pytest.raises(RuntimeError, match="request 0 asked for 8 tokens and got 7"):
        run_engine(Engine(clock, missing=1), REQUESTS)


def test_a_request_that_does_not_fit_is_refused_before_the_clock(clock: Clock) -> None:
    """More than the context's 512 tokens is a ValueError, and nothing is generated.

    Why: cut off by the engine, it would count for less work than it says.
    """
    engine = Engine(clock)
    with pytest.raises(ValueError, match="do not fit the context of 512"):
        run_engine(engine, [BenchRequest([1] * 510, 3)])
    check_equal(engine.calls, [], "what was generated")


def test_warm_up_requests_are_few_and_short() -> None:
    """The first 32 requests, with at most 4 tokens to generate.

    Why: a warm-up as long as the run doubles the time of every experiment.
    """
    warm = warm_up_requests(make_requests(Workload("random", 40, 20, 8)))
    check_equal(len(warm), WARM_UP_REQUESTS, "warm-up requests")
    check_equal({request.output_len for request in warm}, {WARM_UP_TOKENS}, "their tokens")
    check_equal(warm_up_requests([BenchRequest([9], 2)])[0].output_len, 2, "tokens of a request that wants only 2")
    check_equal([len(request.prompt_token_ids) for request in warm], [20] * WARM_UP_REQUESTS, "their prompts' lengths")
    warm = warm_up_requests([BenchRequest([1] * length, 1) for length in range(1, 41)])
    lengths = [len(request.prompt_token_ids) for request in warm]
    check_equal(lengths, list(range(1, WARM_UP_REQUESTS + 1)), "lengths of the first prompts")


def test_a_warm_up_sends_no_text() -> None:
    """A request with a text, which a server gets in place of the ids: its warm-up has none.

    Why: with it the server would be sent the real prompt, and know it afterwards.
    """
    (warm,) = warm_up_requests([BenchRequest([5, 6, 7], 8, text="the same words")])
    check_equal(warm.text, None, "text of the warm-up")


@pytest.mark.parametrize(
    "prompt", [[5] * 40, [0] * 40, list(range(3, 43)), [7, *range(38, -1, -1)], [49151, 3], [1, 2], [2], [4, 4]]
)
def test_warm_up_prompts_begin_with_another_token(prompt: list[int]) -> None:
    """No prompt shares even its first token with its warm-up, also one that is the same token 40 times.

    Why: a server's prefix cache cannot be emptied from outside. What the warm-up left there would be a gift.
    """
    (warm,) = warm_up_requests([BenchRequest(prompt, 8)])
    assert warm.prompt_token_ids[0] != prompt[0], f"prompt and warm-up both begin with {prompt[0]}"
    assert min(warm.prompt_token_ids) >= 0, "a token id is negative"
    assert max(warm.prompt_token_ids) <= max(1, *prompt), "a token id may be one that the vocabulary does not have"
    check_equal(len(warm.prompt_token_ids), len(prompt), "tokens of the warm-up's prompt")


def test_the_warm_up_runs_at_once_and_does_not_count() -> None:
    """`warmed` calls the system with the warm-up; each call of what it returns runs the real requests, once.

    Why: first runs compile, allocate and fault pages in; an average with them measures the start.
    """
    calls: list[list[int]] = []

    def run(requests: Sequence[BenchRequest]) -> Measurement:
        calls.append([request.output_len for request in requests])
        return Measurement("toy", float(len(calls)), len(requests), 80, 32, 32, {})

    measure = warmed(run, REQUESTS)
    check_equal(calls, [[4] * 4], "runs so far: the warm-up")
    check_equal([measure().seconds, measure().seconds], [2.0, 3.0], "what the two calls measured")
    check_equal(calls[1:], [[8] * 4] * 2, "runs after the warm-up")


@pytest.mark.parametrize("number", range(4))
def test_any_requests_are_counted(clock: Clock, number: int) -> None:
    """Random prompts, some of which begin alike, with random lengths.

    Why: a rate is tokens that came out over seconds that went by, whatever the work was.
    """
    dice = random.Random(630 + number)
    begins = [[dice.randrange(500) for _ in range(16)] for _ in range(3)]
    requests = [
        BenchRequest(dice.choice(begins) + [7] * dice.randrange(20), dice.randrange(2, 40))
        for _ in range(dice.randrange(1, 12))
    ]
    distinct = len({tuple(request.prompt_token_ids[:16]) for request in requests})
    found = run_engine(Engine(clock), requests)
    check_equal(found.seconds, 0.25 * len(requests) + distinct, "seconds")
    prompts, outputs = sum(len(r.prompt_token_ids) for r in requests), sum(r.output_len for r in requests)
    check_equal(
        (found.num_requests, found.num_prompt_tokens, found.num_output_tokens), (len(requests), prompts, outputs), "work"
    )
    check_equal(found.details["prefix_cache_hit_tokens"], 16 * (len(requests) - distinct), "tokens found in the cache")
    warm = warm_up_requests(requests)
    check_equal([each.output_len for each in warm], [min(each.output_len, WARM_UP_TOKENS) for each in requests], "warm-up")
