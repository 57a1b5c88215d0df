"""LLM and LLMEngine on a tiny LLaMA: results, fields, aborts, memory, and bad input that harms nobody else."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import RequestOutputKind, SamplingParams
from solutions.batching.scheduler_config import QueueFullError
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import EOS, VOCAB_SIZE, make_tiny_llama

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SETTINGS = {"dtype": "float32", "max_model_len": 256, "block_size": 4, "num_gpu_blocks_override": 128}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def oracle(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def llm(path) -> LLM:
    return LLM(str(path), **SETTINGS)


def prompt(*token_ids: int) -> dict:
    return {"prompt_token_ids": list(token_ids)}


def log_probs(oracle, token_ids: list[int]) -> torch.Tensor:
    """Row i is the distribution of the token at position i + 1."""
    with torch.inference_mode():
        return oracle(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def check_idle(engine: LLMEngine) -> None:
    engine.scheduler.check_invariants()
    assert not engine.has_unfinished_requests()
    assert engine.stats().kv_cache_usage == 0
    assert engine.outputs.num_requests == 0


def test_fields_of_a_result(llm):
    (output,) = llm.generate("Hello", GREEDY)
    assert output.prompt == "Hello"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("Hello")
    assert output.finished
    (completion,) = output.outputs
    assert completion.text == llm.get_tokenizer().decode(completion.token_ids, skip_special_tokens=True)
    assert len(completion.token_ids) == 12
    assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
    assert completion.logprobs is None
    assert completion.cumulative_logprob is None
    metrics = output.metrics
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
    assert metrics.first_token_time <= metrics.last_token_time <= metrics.finished_time
    check_idle(llm.llm_engine)


def test_outputs_keep_the_order_of_prompts_and_each_has_its_params(llm):
    prompts = ["a", {"prompt": "bb"}, prompt(1, 2, 3)]
    lengths = [9, 1, 5]
    outputs = llm.generate(prompts, [dataclasses.replace(GREEDY, max_tokens=n) for n in lengths], use_tqdm=False)
    assert [len(o.prompt_token_ids) for o in outputs] == [1, 2, 3]
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert outputs[2].prompt is None
    together = [o.outputs[0].token_ids for o in outputs]
    for one, params_length, expected in zip(prompts, lengths, together, strict=True):
        alone = llm.generate(one, dataclasses.replace(GREEDY, max_tokens=params_length))[0]
        assert alone.outputs[0].token_ids == expected


@pytest.mark.parametrize("budget", [3, 64])
@pytest.mark.parametrize("blocks", [64, 128])
def test_logprobs_and_prompt_logprobs_are_those_of_transformers(path, oracle, budget, blocks):
    llm = LLM(str(path), **SETTINGS | {"num_gpu_blocks_override": blocks}, max_num_batched_tokens=budget)
    token_ids = [(7 * i) % 250 for i in range(23)]
    params = dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=2)
    for _ in range(2):  # the second time the prompt is cached, and must be computed all the same
        (output,) = llm.generate(prompt(*token_ids), params)
        completion = output.outputs[0]
        expected = log_probs(oracle, token_ids + completion.token_ids)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(token_ids)
        for position in range(1, len(token_ids)):
            entry, row = output.prompt_logprobs[position], expected[position - 1]
            assert set(entry) == {token_ids[position], *row.topk(2).indices.tolist()}
            for token, logprob in entry.items():
                assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
                assert logprob.rank == 1 + int((row > row[token]).sum())
        total = 0.0
        for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = expected[len(token_ids) + i - 1]
            assert set(entry) >= set(row.topk(3).indices.tolist())
            assert entry[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            total += float(row[token])
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


def greedy_tokens(oracle, token_ids: list[int], count: int) -> list[int]:
    """What transformers says behind some tokens."""
    tokens = list(token_ids)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(token_ids) :]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("budget", slow_after(1, [9, 512]))
def test_twins_of_a_preempted_sequence_are_all_right(path, oracle, mode, budget):
    """A preempted parent comes back and finds a block that a twin computes in this step, and its child forks at once."""
    twin = list(range(3, 17))
    prompts = [list(range(100, 113)), list(range(200, 216)), twin, twin, twin]
    lengths, counts = [21, 38, 20, 20, 20], [1, 1, 3, 3, 1]
    llm = LLM(
        str(path), dtype="float32", block_size=16, num_gpu_blocks_override=6, max_model_len=80, preemption_mode=mode,
        max_num_batched_tokens=budget,
    )  # fmt: skip
    params = [dataclasses.replace(GREEDY, max_tokens=m, n=n) for m, n in zip(lengths, counts, strict=True)]
    outputs = llm.generate([prompt(*p) for p in prompts], params, use_tqdm=False)
    assert llm.llm_engine.stats().num_preemptions > 0
    for output, token_ids, length in zip(outputs, prompts, lengths, strict=True):
        expected = greedy_tokens(oracle, token_ids, length)
        assert [completion.token_ids for completion in output.outputs] == [expected] * len(output.outputs)
    check_idle(llm.llm_engine)


def test_n_sequences_are_samples_of_their_own_seed(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate("What", params)
    samples = [o.token_ids for o in output.outputs]
    assert [o.index for o in output.outputs] == [0, 1, 2]
    assert len({tuple(s) for s in samples}) == 3
    for index, expected in enumerate(samples):
        (alone,) = llm.generate("What", dataclasses.replace(params, n=1, seed=5 + index))
        assert alone.outputs[0].token_ids == expected
    check_idle(llm.llm_engine)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_samples_equal_unpreempted_ones(path, llm, mode):
    prompts = [prompt(*range(i, i + 9)) for i in range(12)]
    params = [SamplingParams(seed=i, max_tokens=40, ignore_eos=True, logprobs=0) for i in range(12)]
    tight = LLM(str(path), **SETTINGS | {"num_gpu_blocks_override": 64}, preemption_mode=mode, enable_prefix_caching=False)
    calm = LLM(str(path), **SETTINGS | {"num_gpu_blocks_override": 512})
    expected = [o.outputs[0].token_ids for o in calm.generate(prompts, params)]
    outputs = tight.generate(prompts, params)
    assert tight.llm_engine.stats().num_preemptions > 0
    assert calm.llm_engine.stats().num_preemptions == 0
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert sum(o.metrics.num_preemptions for o in outputs) == tight.llm_engine.stats().num_preemptions
    check_idle(tight.llm_engine)


def test_ends_at_eos_stop_token_and_stop_string(llm):
    tokenizer = llm.get_tokenizer()
    forced = dataclasses.replace(GREEDY, ignore_eos=False, logit_bias={EOS: 100})
    (at_eos,) = llm.generate("x", forced)
    assert at_eos.outputs[0].token_ids == [EOS]
    assert (at_eos.outputs[0].finish_reason, at_eos.outputs[0].stop_reason) == ("stop", None)

    star = tokenizer.encode("*")[0]
    (at_token,) = llm.generate("x", dataclasses.replace(GREEDY, stop_token_ids=[star], logit_bias={star: 100}))
    assert (at_token.outputs[0].finish_reason, at_token.outputs[0].stop_reason) == ("stop", star)

    (at_string,) = llm.generate("x", dataclasses.replace(GREEDY, stop=["***"], logit_bias={star: 100}, max_tokens=50))
    assert at_string.outputs[0].text == ""
    assert (at_string.outputs[0].finish_reason, at_string.outputs[0].stop_reason) == ("stop", "***")
    assert len(at_string.outputs[0].token_ids) == 3
    check_idle(llm.llm_engine)


def test_bad_words_never_appear(llm):
    (free,) = llm.generate("hello", GREEDY)
    banned = llm.get_tokenizer().decode(free.outputs[0].token_ids[:1])
    if not banned.isprintable() or not banned.strip():
        banned = "e"
    letter = llm.get_tokenizer().encode(banned)[0]
    params = dataclasses.replace(GREEDY, logit_bias={letter: 100}, bad_words=[banned])
    assert letter not in llm.generate("hello", params)[0].outputs[0].token_ids


def test_chat_answers_behind_the_template(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(messages, GREEDY)
    assert llm.get_tokenizer().decode(output.prompt_token_ids) == "user: Hi\nassistant: "
    assert len(llm.chat([messages, messages], GREEDY)) == 2
    assert llm.chat([], GREEDY) == []
    with pytest.raises(ValueError, match="one conversation or a list of conversations"):
        llm.chat([messages[0], messages], GREEDY)


def test_context_is_never_exceeded(path):
    llm = LLM(str(path), **SETTINGS | {"max_model_len": 20})
    (output,) = llm.generate(prompt(*range(15)), SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"
    assert len(llm.generate(prompt(*range(19)), GREEDY)[0].outputs[0].token_ids) == 1
    with pytest.raises(ValueError, match="the prompt has 20 tokens; with max_model_len 20 at most 19"):
        llm.generate(prompt(*range(20)), GREEDY)


def test_engine_steps_emit_what_the_kind_asks_for(llm):
    engine = llm.llm_engine
    for kind in RequestOutputKind:
        engine.add_request(kind.name, "abc", dataclasses.replace(GREEDY, output_kind=kind))
    seen = {kind.name: [] for kind in RequestOutputKind}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen[output.request_id].append(output.outputs[0])
    whole = seen["FINAL_ONLY"][-1]
    assert len(seen["FINAL_ONLY"]) == 1
    assert [token for o in seen["DELTA"] for token in o.token_ids] == whole.token_ids
    assert "".join(o.text for o in seen["DELTA"]) == whole.text
    assert [len(o.token_ids) for o in seen["CUMULATIVE"]] == list(range(1, 13))
    assert seen["CUMULATIVE"][-1].text == whole.text
    check_idle(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_abort_frees_at_once_and_harms_nobody(path, steps):
    llm = LLM(str(path), **SETTINGS | {"max_num_batched_tokens": 8})
    expected = llm.generate("keep me", GREEDY)[0].outputs[0].token_ids
    engine = llm.llm_engine
    engine.add_request("victim", "x" * 20, dataclasses.replace(GREEDY, n=2))
    engine.add_request("other", "keep me", dataclasses.replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY))
    for _ in range(steps):
        engine.step()
    output = engine.abort_request("victim")
    assert {o.finish_reason for o in output.outputs} == {"abort"}
    engine.scheduler.check_invariants()
    assert engine.abort_request("victim") is None
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert [o.request_id for o in outputs] == ["other"]
    assert outputs[0].outputs[0].token_ids == expected
    check_idle(engine)


def test_interrupted_generate_leaves_nothing_behind(llm, monkeypatch):
    engine, calls = llm.llm_engine, []
    step = engine.step

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    monkeypatch.undo()
    check_idle(engine)
    assert len(llm.generate("a", GREEDY)[0].outputs[0].token_ids) == 12


def test_request_id_in_use_is_refused(llm):
    llm.llm_engine.add_request("same", "a", GREEDY)
    with pytest.raises(ValueError, match="'same' is in use"):
        llm.llm_engine.add_request("same", "b", GREEDY)


def test_full_queue_refuses_by_name(path):
    engine = LLM(str(path), **SETTINGS, max_num_waiting=2).llm_engine
    engine.add_request("0", "a", GREEDY)
    with pytest.raises(QueueFullError):
        engine.add_request("1", "a", dataclasses.replace(GREEDY, n=2))
    engine.add_request("1", "a", GREEDY)
    while engine.has_unfinished_requests():
        engine.step()
    check_idle(engine)


def test_priority_goes_first(path):
    llm = LLM(str(path), **SETTINGS, scheduling_policy="priority", max_num_seqs=1)
    outputs = llm.generate(["a", "b", "c"], GREEDY, priority=[2, 0, 1])
    finished = [o.metrics.finished_time for o in outputs]
    assert finished[1] < finished[2] < finished[0]


def test_prefix_cache_computes_only_what_is_new(llm):
    long = list(range(40))
    llm.generate(prompt(*long), GREEDY)
    (again,) = llm.generate(prompt(*long, 99), GREEDY)
    assert again.num_cached_tokens == 40
    (repeated,) = llm.generate(prompt(*long), GREEDY)
    assert repeated.num_cached_tokens == 36
    (salted,) = llm.generate({"prompt_token_ids": long, "cache_salt": "tenant"}, GREEDY)
    assert salted.num_cached_tokens == 0
    assert llm.llm_engine.stats().prefix_cache_hits == 76


BAD_REQUESTS = [
    ("", GREEDY, "the prompt is empty"),
    (prompt(), GREEDY, "the prompt is empty"),
    (prompt(1, VOCAB_SIZE), GREEDY, f"{VOCAB_SIZE} is not a token id"),
    (prompt(-1), GREEDY, "-1 is not a token id"),
    (prompt(1, True), GREEDY, "True is not a token id"),
    ({"tokens": [1]}, GREEDY, "a prompt must be a string"),
    (7, GREEDY, "a prompt must be a string"),
    (prompt(*[1] * 256), GREEDY, "the prompt has 256 tokens"),
    ("a", dataclasses.replace(GREEDY, stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    ("a", dataclasses.replace(GREEDY, allowed_token_ids=[VOCAB_SIZE]), "allowed_token_ids"),
    ("a", dataclasses.replace(GREEDY, bad_words_token_ids=[[1, VOCAB_SIZE]]), "bad_words_token_ids"),
    ("a", dataclasses.replace(GREEDY, logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
    ("a", dataclasses.replace(GREEDY, n=257), "n must be at most max_num_seqs"),
    ("a", {"temperature": 0}, "params must be SamplingParams"),
]


def test_bad_requests_are_named_and_the_engine_goes_on(llm):
    engine = llm.llm_engine
    expected = llm.generate("good", GREEDY)[0].outputs[0].token_ids
    engine.add_request("good", "good", dataclasses.replace(GREEDY, output_kind=RequestOutputKind.FINAL_ONLY))
    for bad_prompt, params, message in BAD_REQUESTS:
        engine.step()
        with pytest.raises(ValueError, match=message):
            engine.add_request("bad", bad_prompt, params)
        engine.scheduler.check_invariants()
    assert llm.generate("good", GREEDY)[0].outputs[0].token_ids == expected
    for field, value in (("temperature", math.nan), ("max_tokens", 0), ("max_tokens", -1), ("top_p", 0)):
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})
    with pytest.raises(ValueError, match="2 prompts, 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])


def test_failed_validation_of_one_prompt_starts_none(llm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate(["fine", ""], GREEDY)
    check_idle(llm.llm_engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_gpu_blocks_override": 10}, r"weights .* \+ activations .* \+ KV .* free.* --max-model-len 40 or less"),
        ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1}, "give at least --kv-cache-memory-bytes 1MiB"),
        ({"max_model_len": 513}, "max_model_len must be between 2 and the model's context of 512"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1, got 0"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"dtype": "float16"}, "float16 needs a GPU"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "a whole prompt must fit into one step"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(path, settings, message):
    with pytest.raises(ValueError, match=message):
        LLMEngine(EngineConfig(model=str(path), **SETTINGS | settings))


def test_kv_cache_that_holds_one_sequence_exactly_is_enough(path):
    llm = LLM(str(path), **SETTINGS | {"num_gpu_blocks_override": 64, "max_num_seqs": 4})
    params = dataclasses.replace(GREEDY, max_tokens=None)
    outputs = llm.generate([prompt(*[i] * 200) for i in range(3)], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [56, 56, 56]
    check_idle(llm.llm_engine)


def test_dynamic_rope_scaling_stretches_the_context(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    make_tiny_llama(tmp_path, max_position_embeddings=64, rope_parameters=scaling)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    llm = LLM(str(tmp_path), **SETTINGS | {"max_model_len": 128})
    token_ids = [(7 * i) % 250 for i in range(127)]
    (output,) = llm.generate(prompt(*token_ids), dataclasses.replace(GREEDY, logprobs=0))
    # transformers stretches the frequencies to the length at hand, the engine once to the longest it serves: 128.
    expected = log_probs(oracle, [*token_ids, 0])[126]
    (token,) = output.outputs[0].token_ids
    assert token == int(expected.argmax())
    assert output.outputs[0].logprobs[0][token].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    with pytest.raises(ValueError, match="the model's context of 128, got 129"):
        LLMEngine(EngineConfig(model=str(tmp_path), **SETTINGS | {"max_model_len": 129}))


def test_startup_says_what_runs_and_what_fits(llm):
    text = "\n".join(llm.llm_engine.startup_summary())
    for part in ("float32", "128 blocks of 4 tokens", "512 tokens", "2.0 sequences of 256", "load weights", "tokenizer"):
        assert part in text


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory that was never written")
def test_the_kv_cache_is_provided_at_start_only_if_asked(path):
    grown = {}
    for touch in (False, True):
        before = psutil.Process().memory_info().rss
        llm = LLM(str(path), max_model_len=64, kv_cache_memory_bytes=256 << 20, touch_kv_cache=touch)
        grown[touch] = psutil.Process().memory_info().rss - before
        (output,) = llm.generate([prompt(1, 2, 3)], GREEDY, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 12
    assert grown[False] < 128 << 20
    assert grown[True] > 240 << 20
