"""Steps that are begun before the one before has ended: the same answers, in any mixture of settings, and when it pays."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from solutions.batching.sampling_params import SamplingParams, StructuredOutput
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.core.output import RequestOutput
from solutions.core.overlap.lookahead import Lookahead, known_ids
from solutions.core.simulated import device as simulated
from solutions.tests.embedding_models import make_bert
from solutions.tests.simulation import Simulation
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import VOCAB_SIZE, make_tiny_llama

SIZES = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "block_size": 4, "max_num_seqs": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lookahead")
    make_tiny_llama(path)
    return path


def draw_requests(rng: random.Random) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with common beginnings, and all that a request may ask for. Who draws at random has a seed: the others share a
    generator, and who asks it first depends on who is in a step."""
    beginning, requests = [rng.randrange(VOCAB_SIZE) for _ in range(12)], []
    for seed in range(rng.randint(4, 12)):
        prompt = beginning[: rng.choice([0, 8, 12])] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]), seed=seed, n=1, max_tokens=rng.randint(1, 30),
            top_k=rng.choice([0, 5]), min_tokens=rng.choice([0, 1]), repetition_penalty=rng.choice([1.0, 1.3]),
            stop_token_ids=rng.sample(range(VOCAB_SIZE), rng.choice([0, 20])), stop=rng.choice([[], ["a", "e"]]),
            logprobs=rng.choice([None, 0, 3]), prompt_logprobs=rng.choice([None, None, 2]),
            bad_words=rng.choice([[], ["t"]]), logit_bias=rng.choice([None, {7: 3.0}]),
        )  # fmt: skip
        requests.append((prompt, params))
    return requests


def answer(folder: Path, requests: list[tuple[list[int], SamplingParams]], gaps: list[int], **settings: Any) -> list[Any]:
    """What an engine says to requests of which each comes so many steps behind the one before."""
    engine = LLMEngine(EngineConfig(model=str(folder), **SIZES | settings))
    finished: dict[str, RequestOutput] = {}

    def step() -> None:
        finished.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.scheduler.check_invariants()

    for number, ((prompt, params), gap) in enumerate(zip(requests, gaps, strict=True)):
        for _ in range(gap):
            step()
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        step()
    stats = engine.stats()
    assert stats.kv_cache_usage == 0
    assert (stats.num_steps_ahead > 0) == engine.config.async_scheduling
    engine.close()
    return [described(finished[str(number)]) for number in range(len(requests))]


def described(output: RequestOutput) -> Any:
    """An output without its times; log-probabilities to what sums of the same numbers in another order may differ by."""

    def rounded(entries: Any) -> Any:
        if entries is None:
            return None
        return [entry and {token: (pytest.approx(each.logprob, abs=1e-4), each.rank) for token, each in entry.items()}
                for entry in entries]  # fmt: skip

    return [
        [each.token_ids, each.text, each.finish_reason, each.stop_reason, rounded(each.logprobs)] for each in output.outputs
    ] + [rounded(output.prompt_logprobs)]


@pytest.mark.parametrize("seed", slow_after(4, range(20)))
def test_answers_are_those_of_steps_one_after_the_other(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    requests = draw_requests(rng)
    settings = {
        "num_gpu_blocks_override": rng.choice([26, 40, 400]), "preemption_mode": rng.choice(["recompute", "swap"]),
        "enable_prefix_caching": rng.random() < 0.7, "max_num_batched_tokens": rng.choice([7, 32, 512]),
        "attention_backend": rng.choice(["torch", "auto"]), "enable_cpu_kernels": rng.random() < 0.5,
    }  # fmt: skip
    gaps = [rng.choice([0, 0, 1, 6]) for _ in requests]
    plain = answer(folder, requests, gaps, **settings)
    assert answer(folder, requests, gaps, **settings, async_scheduling=True) == plain


def test_forms_are_kept_and_answers_of_n_differ(folder: Path) -> None:
    form = StructuredOutput("json", json.dumps({"enum": [[1, 2], {"a": "b"}, "text", None]}))
    prompt, outputs = {"prompt_token_ids": [5, 6, 7]}, []
    for ahead in (False, True):
        llm = LLM(str(folder), **SIZES, async_scheduling=ahead)
        guided = SamplingParams(temperature=1.0, seed=3, max_tokens=40, structured_output=form)
        several = SamplingParams(temperature=1.0, seed=4, max_tokens=9, n=3, ignore_eos=True)
        outputs.append([described(each) for each in llm.generate([prompt, prompt], [guided, several], use_tqdm=False)])
        llm.llm_engine.close()
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[1][0][0][1]) in [[1, 2], {"a": "b"}, "text", None]
    assert len({tuple(each[0]) for each in outputs[1][1][:3]}) == 3


def test_an_encoder_pools_the_same(tmp_path: Path) -> None:
    make_bert(tmp_path)
    prompts = [{"prompt_token_ids": list(range(3, 3 + length))} for length in (2, 9, 5)]
    vectors = [
        [
            each.outputs.embedding
            for each in LLM(str(tmp_path), dtype="float32", async_scheduling=on).embed(prompts, use_tqdm=False)
        ]
        for on in (False, True)
    ]
    for plain, ahead in zip(*vectors, strict=True):
        assert ahead == pytest.approx(plain, abs=1e-6)


def test_whoever_is_aborted_between_steps_leaves_a_step_that_has_begun(folder: Path) -> None:
    engine = LLMEngine(EngineConfig(model=str(folder), **SIZES, async_scheduling=True))
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    for name in ("stays", "goes"):
        engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, params)
    for _ in range(3):
        engine.step()
    ended = engine.abort_request("goes")
    assert ended is not None
    assert (len(ended.outputs[0].token_ids), ended.outputs[0].finish_reason) == (3, "abort")
    while engine.has_unfinished_requests():
        (output,) = engine.step()
        assert output.request_id == "stays"
    assert len(output.outputs[0].token_ids) == 20
    assert engine.stats().num_in_vain == 1
    assert engine.stats().num_generation_tokens == 23


def test_nobody_is_computed_beyond_max_tokens_and_nothing_runs_when_all_is_said(folder: Path) -> None:
    """An end that is known ahead costs no row; the last step of all is followed by none."""
    engine = LLMEngine(EngineConfig(model=str(folder), **SIZES, async_scheduling=True))
    for number, length in enumerate((1, 2, 5)):
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        engine.add_request(str(number), {"prompt_token_ids": [1, 2, 3]}, params)
    sizes = []
    begin = engine.executor.worker.begin
    engine.executor.worker.begin = lambda batch, tokens=None: (sizes.append(len(batch.sequences)), begin(batch, tokens))[1]
    while engine.has_unfinished_requests():
        engine.step()
    assert sizes == [3, 2, 1, 1, 1]
    stats = engine.stats()
    assert (stats.num_steps, stats.num_steps_ahead, stats.num_in_vain) == (5, 4, 0)


def test_an_interrupt_while_a_step_is_decided_leaves_no_place_holder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(folder), **SIZES, async_scheduling=True)
    engine, seen = llm.llm_engine, list[list[int]]()
    build = engine.ahead._batch.build

    def interrupted(*args: Any) -> Any:
        seen.append([seq.tokens[-1] for seq in engine.scheduler.running])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return build(*args)

    monkeypatch.setattr(engine.ahead._batch, "build", interrupted)
    aborted: list[RequestOutput | None] = []
    abort = engine.abort_request
    monkeypatch.setattr(engine, "abort_request", lambda name: aborted.append(abort(name)))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate({"prompt_token_ids": [1, 2]}, params, use_tqdm=False)
    assert seen[0][0] >= 0
    assert seen[1:] == [[-1], [-1]]
    assert aborted[0] is not None
    assert min(aborted[0].outputs[0].token_ids) >= 0
    monkeypatch.undo()
    assert len(llm.generate({"prompt_token_ids": [1, 2]}, params, use_tqdm=False)[0].outputs[0].token_ids) == 9
    assert engine.stats().kv_cache_usage == 0


class Clock:
    """Time that passes only where somebody says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("device", [0.5, 2.0, 3.0, 10.0])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_takes_what_the_host_or_the_device_takes(
    device: float, ahead: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host takes 1 to decide and 2 to make text: in turn the sum, ahead the longer of both."""
    clock, host = Clock(), 3.0
    monkeypatch.setattr(simulated, "time", clock)
    engine = LLMEngine(EngineConfig(model=str(folder), **SIZES))
    engine.executor = simulated.SimulatedDevice(device, [7, 8, 9])
    schedule, emit = engine.scheduler.schedule_running, engine.outputs.emit
    monkeypatch.setattr(engine.scheduler, "schedule_running", lambda output: (clock.sleep(1.0), schedule(output))[1])
    monkeypatch.setattr(engine.outputs, "emit", lambda *args: (clock.sleep(2.0), emit(*args))[1])
    if ahead:
        engine.batch = Lookahead(engine.scheduler, engine.batch, engine.executor)
    for name in "ab":
        engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(3):
        engine.step()
    start = clock.now
    for _ in range(10):
        engine.step()
    assert (clock.now - start) / 10 == pytest.approx(max(host, device) if ahead else host + device)


def test_place_holders_become_the_tokens_of_their_rows() -> None:
    ids, tokens = torch.tensor([4, -1, 0, -3, -1]), torch.tensor([70, 80, 90])
    assert known_ids(ids, tokens).tolist() == [4, 70, 0, 90, 70]


def test_a_block_whose_last_token_is_not_known_enters_the_prefix_cache_when_it_is() -> None:
    """Or it would be found under the hash of a place holder, and by nobody who says the same."""
    sim = Simulation(num_blocks=32, block_size=4, ahead=True, next_token=lambda seq: len(seq.tokens))
    sim.add([0, 1, 2], max_tokens=9)
    sim.run()
    (second,) = sim.add(list(range(12)), max_tokens=1)
    sim.run()
    assert second.num_cached_tokens == 8


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"speculative_config": '{"method": "ngram"}'}, "--speculative-config"),
        ({"tensor_parallel_size": 2}, "only with one rank"),
        ({"distributed_executor_backend": "ray"}, "only with one rank"),
    ],
)
def test_what_cannot_be_had_with_it_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"--async-scheduling: .*{named}|{named}"):
        EngineConfig(async_scheduling=True, **settings)
