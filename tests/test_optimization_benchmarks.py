"""The benchmarks of quantization, the prefix cache and speculation measure what they say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from solutions.benchmarks import lora as lora_command
from solutions.benchmarks import prefix_cache as prefix_command
from solutions.benchmarks import quality as quality_command
from solutions.benchmarks import radix as radix_command
from solutions.benchmarks import speculative as speculative_command
from solutions.benchmarks.datasets import BenchRequest, token_ids
from solutions.benchmarks.prefix_cache import TIERS, make_engine, seconds
from solutions.benchmarks.quality import perplexity
from solutions.benchmarks.speculative import PLAIN, Row
from solutions.core.eagle.questions import KEPT_BACK, make_questions
from solutions.core.engine import LLM
from solutions.core.simulated.cache_trace import TRACES
from solutions.models.lora.products import AdaptersOfStep
from solutions.quantization.texts import cut_text, python_topics
from solutions.tests.tiny_models import make_tiny_llama


def chat(num_turns, message_len, answer_len):
    """Hold a conversation: each turn's prompt is all that was said before and a new message. (prompt, cached) of each, in
    tokens."""
    rng, llm, said, turns = random.Random(1), make_engine("smollm2-135m"), [], []
    for _ in range(num_turns):
        request = BenchRequest(said + token_ids(rng, message_len), answer_len)
        (output,) = llm.generate(request.prompt, request.params(), use_tqdm=False)
        said = request.prompt_token_ids + output.outputs[0].token_ids
        turns.append((len(request.prompt_token_ids), output.num_cached_tokens))
    return turns


@pytest.mark.slow
def test_a_chat_computes_its_new_turn_and_no_more_than_a_block_beside_it():
    """All that was said but its last token has keys and values; of these whole blocks of 16 are found again."""
    said = 0
    for prompt, cached in chat(4, message_len=21, answer_len=9):
        expected = (said - 1) // 16 * 16 if said else 0
        assert (prompt, cached) == (said + 21, expected)
        assert prompt - cached <= 21 + 16
        said = prompt + 9


@pytest.mark.slow
def test_longest_prefix_match_finds_more_where_groups_come_in_turns():
    """Four beginnings in turns, in a cache that holds one of them beside what runs."""
    rng, shares = random.Random(0), {}
    beginnings = [token_ids(rng, 64) for _ in range(4)]
    requests = [BenchRequest(beginning + token_ids(rng, 8), 1) for beginning in beginnings * 3]
    for policy in ("fcfs", "lpm"):
        settings = {"max_model_len": 74, "num_gpu_blocks_override": 6, "max_num_seqs": 2, "scheduling_policy": policy}
        llm = LLM("smollm2-135m", **settings)
        seconds(llm, requests)
        stats = llm.llm_engine.stats()
        shares[policy] = stats.prefix_cache_hits / stats.prefix_cache_queries
    assert shares["fcfs"] < 0.2
    assert shares["lpm"] > 0.4


def test_prompts_are_where_the_measurement_of_tiers_says(tmp_path, monkeypatch, capsys):
    """As many tokens of them are cached as their blocks hold, or none."""
    make_tiny_llama(tmp_path, vocab_size=49152)
    cached, generate = [], LLM.generate

    def watched(llm, *args, **settings):
        outputs = generate(llm, *args, **settings)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(LLM, "generate", watched)
    flags = ["--model", str(tmp_path), "--tier-lens", "60", "33", "--repeats", "2", "--output-json", str(tmp_path / "a.json")]
    prefix_command.main(flags)
    none, every = [[0], [0], [0], [0], [0]], [[0], [32], [32], [48], [48]]
    assert cached == [*none, [0, 0], [0, 0], *every, *none, *every, *every]
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert {length: list(times) for length, times in results.items()} == {"33": list(TIERS), "60": list(TIERS)}
    assert "first token" in capsys.readouterr().out


def test_perplexity_is_that_of_transformers(tmp_path):
    model = make_tiny_llama(tmp_path)
    texts = [[(i * j) % 250 for j in range(40)] for i in (3, 7)]
    losses = []
    for tokens in texts:
        with torch.inference_mode():
            losses.append(float(model(torch.tensor([tokens]), labels=torch.tensor([tokens])).loss))
    expected = float(torch.tensor(losses).mean().exp())
    assert perplexity(LLM(str(tmp_path), dtype="float32", max_model_len=64), texts) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_every_sixth_piece_is_held_out():
    held_out, rest = cut_text("smollm2-135m", 128, 3)
    tokenizer = LLM("smollm2-135m", load_format="dummy", max_model_len=64).get_tokenizer()
    ids = tokenizer.encode(python_topics(), add_special_tokens=False, verbose=False)
    assert held_out == [ids[128 * n : 128 * (n + 1)] for n in (1, 7, 13)]
    assert rest.startswith(tokenizer.decode(ids[:128] + ids[256 : 7 * 128] + ids[8 * 128 : 9 * 128]))
    with pytest.raises(ValueError, match=r"the text gives \d+ pieces of 128 tokens, not 100000"):
        cut_text("smollm2-135m", 128, 100_000)


def test_speedups_are_taken_within_a_round():
    rows = []
    for plain, faster in ((100.0, 150.0), (50.0, 100.0), (200.0, 220.0)):
        rows += [Row(PLAIN, "random", 1, plain, 1.0, None), Row("ngram", "random", 1, faster, 2.0, 0.5)]
    base, gain = speculative_command.summarize(rows)
    assert (base["speedup"], base["tokens_per_second"], base["acceptance"]) == (1.0, 100.0, None)
    assert (gain["speedup"], gain["speedup_range"]) == (1.5, [1.1, 2.0])
    assert (gain["tokens_per_step"], gain["acceptance"]) == (2.0, 0.5)


def test_speculation_is_measured_and_kept(tmp_path: Path, capsys, monkeypatch):
    folder, out = tmp_path / "model", tmp_path / "result.json"
    make_tiny_llama(folder, max_position_embeddings=1024)
    monkeypatch.delitem(speculative_command.TEXTS, "ordinary")
    flags = ["--model", str(folder), "--batches", "1", "2", "--repeats", "1", "--output-len", "12", "--dtype", "float32"]
    speculative_command.main([*flags, "--draft-quantization", "none", "--output-json", str(out)])
    cases = json.loads(out.read_text())["results"]["cases"]
    assert len(cases) == 2 * 2 * 4
    for case in cases:
        if case["method"] == PLAIN:
            assert (case["tokens_per_step"], case["acceptance"]) == (1.0, None)
        if case["method"] == "draft model" and case["acceptance"] is not None:  # it drafts where it pays, which is not foreseen
            assert 0 <= case["acceptance"] <= 1
    assert "as fast as plain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (speculative_command, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (speculative_command, ["--model", "no-such-model"], "there is no model"),
        (quality_command, ["--groups", "0"], "--groups must be at least 1, got 0"),
        (quality_command, ["--length", "1"], "--length must be at least 2, got 1"),
        (quality_command, ["--model", "no-such-model"], "there is no model"),
        (prefix_command, ["--num-requests", "1"], "--num-requests must be at least 2, got 1"),
        (prefix_command, ["--prefix-len", "1000"], "1,000 tokens together at most"),
        (prefix_command, ["--model", "no-such-model"], "there is no model"),
    ],
)
def test_a_wrong_flag_is_one_line(command, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert message in (capsys.readouterr().err if error.value.code == 2 else str(error.value))


@pytest.mark.slow
def test_steps_with_adapters_have_as_many_as_they_say(tmp_path, monkeypatch):
    make_tiny_llama(tmp_path, max_position_embeddings=1024)
    steps, begin = [], AdaptersOfStep.begin
    monkeypatch.setattr(AdaptersOfStep, "begin", lambda step, slots: (begin(step, slots), steps.append(slots))[0])
    results = lora_command.measure(str(tmp_path), rank=2, repeats=1, steps=2, seed=0)
    assert {name: list(found) for name, found in results.items()} == {
        "decode, batch 1": ["0", "1"], "decode, batch 32": ["0", "1", "8"], "prompts, 512 tokens": ["0", "1", "8"],
    }  # fmt: skip
    assert all(each["median"] > 0 for found in results.values() for each in found.values())
    shapes = {(len(slots), len(set(slots.tolist()) - {0})) for slots in steps}
    assert shapes == {
        (8, 0),
        (8, 1),
        (1, 0),
        (1, 1),
        (256, 0),
        (256, 1),
        (256, 8),
        *((n, k) for n in (32, 512) for k in (0, 1, 8)),
    }


def shared_with_earlier(prompts: list[list[int]]) -> list[int]:
    """Tokens with which each prompt begins like one before it, its last token excepted."""
    shared = []
    for number, prompt in enumerate(prompts):
        lengths = [0]
        for other in prompts[:number]:
            alike = [a == b for a, b in zip(prompt[:-1], other, strict=False)]
            lengths.append(alike.index(False) if False in alike else len(alike))
        shared.append(max(lengths))
    return shared


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("size", [16, 64])
def test_each_cache_finds_in_ample_memory_what_the_prompts_share(trace, size):
    """The tree finds all tokens, hashes those of whole blocks; so says a comparison of each prompt with all before it."""
    prompts = list(TRACES[trace](random.Random(2)))
    shared, total = shared_with_earlier(prompts), sum(map(len, prompts))
    by_hash, by_tree = (radix_command.look_up(cache, trace, size, False, 1) for cache in radix_command.CACHES)
    assert by_hash["found"] == pytest.approx(sum(count // size * size for count in shared) / total)
    assert by_tree["found"] == pytest.approx(sum(shared) / total)
    assert by_hash["kept"] % size == by_tree["kept"] % size == 0 < by_hash["kept"] <= by_tree["kept"]


def test_short_memory_holds_a_third_and_finds_no_more(tmp_path, capsys):
    record = tmp_path / "radix.json"
    radix_command.main(["--block-sizes", "16", "--repeats", "1", "--output-json", str(record)])
    cases = json.loads(record.read_text())["results"]
    assert len(cases) == 3 * 2 * 2
    assert "edits, blocks of 16, memory short" in capsys.readouterr().out
    for trace in TRACES:
        ample, short = ([c for c in cases if (c["trace"], c["memory"]) == (trace, memory)] for memory in ("ample", "short"))
        for much, little in zip(ample, short, strict=True):
            assert little["found"] <= much["found"]
            assert little["kept"] <= ample[0]["kept"] // 3 + 3 * 16
            assert much["host"]["median"] > 0 < much["index"]


def test_a_head_is_not_trained_on_the_questions_that_drafts_are_measured_on():
    assert not set(KEPT_BACK) & set(make_questions(10_000, 0))
