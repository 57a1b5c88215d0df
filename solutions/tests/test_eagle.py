"""A head that drafts: what it drafts is what plain PyTorch says, and whatever it drafts, tokens are those of plain decoding."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from solutions.core.draft_model import HeadProposer
from solutions.core.engine import LLM
from solutions.core.speculation import head_drafts, heard_steps
from solutions.core.speculation.head_drafts import HeadDrafts
from solutions.models.heads.eagle import CONFIG, WEIGHTS
from solutions.tests.eagle_heads import GREEDY, PROMPTS, Oracle, check_chances, make_random_head, three_tokens, tokens, watch
from solutions.tests.slow_cases import slow_after

SETTINGS = {"dtype": "float32", "max_model_len": 256, "block_size": 4, "num_gpu_blocks_override": 256}


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture(scope="module")
def head(tmp_path_factory, target) -> Path:
    folder = tmp_path_factory.mktemp("head")
    make_random_head(folder, target)
    return folder


def eagle(head: Path, **others) -> dict:
    return {"method": "eagle", "model": str(head), "num_speculative_tokens": 3, "adaptive": False} | others


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("budget", [256, 16])
def test_it_drafts_what_transformers_says(target, head, kernels, budget):
    """Whole prompts or chunks, several sequences, accepted and rejected drafts: all with the whole text as context."""
    llm = LLM(
        target, **SETTINGS, speculative_config=eagle(head), enable_prefix_caching=False, max_num_batched_tokens=budget,
        enable_cpu_kernels=kernels,
    )  # fmt: skip
    params = dataclasses.replace(GREEDY, max_tokens=20)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:4], params, use_tqdm=False)
    seen, oracle = watch(llm, plain), Oracle(target, head)
    assert tokens(llm.generate(PROMPTS[:4], params, use_tqdm=False)) == tokens(plain)
    assert len(seen) > 20
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 20
    for text, draft, first in seen:
        assert first == 0
        assert draft == oracle.draft(text, len(draft))


def test_after_a_hit_in_the_prefix_cache_the_context_begins_behind_it(target, head):
    llm = LLM(target, **SETTINGS, speculative_config=eagle(head))
    text, params = PROMPTS[5]["prompt_token_ids"], dataclasses.replace(GREEDY, max_tokens=8)
    plain = tokens(llm.generate(PROMPTS[5], params, use_tqdm=False))
    seen, oracle = watch(llm), Oracle(target, head)
    assert tokens(llm.generate(PROMPTS[5], params, use_tqdm=False)) == plain
    cached = (len(text) - 1) // 4 * 4
    assert seen
    for text, draft, first in seen:
        assert first == cached > 0
        assert draft == oracle.draft(text, len(draft), first)


@pytest.mark.parametrize("mode", slow_after(1, ["recompute", "swap"]))
@pytest.mark.parametrize("caching", slow_after(1, [True, False]))
def test_greedy_and_seeded_tokens_are_those_of_plain_decoding(target, head, mode, caching):
    """With chunks of prompts, preemption by both ways and hits in the prefix cache."""
    prompts = PROMPTS + PROMPTS[:3]
    params = [dataclasses.replace(GREEDY, temperature=0.8 * (i % 2), seed=i, logprobs=1) for i in range(len(prompts))]
    plain = LLM(target, **SETTINGS).generate(prompts, params, use_tqdm=False)
    tight = SETTINGS | {"num_gpu_blocks_override": 64, "max_num_batched_tokens": 24}
    llm = LLM(
        target, **tight, preemption_mode=mode, enable_prefix_caching=caching, speculative_config=eagle(head), max_num_seqs=8,
        swap_space=1 << 20,
    )  # fmt: skip
    watch(llm, plain)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert tokens(outputs) == tokens(plain)
        for got, want in zip(outputs, plain, strict=True):
            assert [list(entry) for entry in got.outputs[0].logprobs] == [list(entry) for entry in want.outputs[0].logprobs]
    stats = llm.llm_engine.stats()
    assert stats.num_preemptions > 0
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens
    assert (stats.prefix_cache_hits > 0) == caching
    assert stats.kv_cache_usage == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_who_finds_no_row_gets_no_drafts_and_rows_come_back(target, head, rows, monkeypatch):
    monkeypatch.setattr("solutions.core.draft_model.MOST_ROWS", rows)
    params = dataclasses.replace(GREEDY, n=3, temperature=1.0, seed=3, max_tokens=12)
    plain = LLM(target, **SETTINGS).generate(PROMPTS, params, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=eagle(head), max_num_seqs=4)
    seen = watch(llm)
    assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == tokens(plain)
    drafts = llm.llm_engine.drafter.proposer.drafts
    assert len({text[0] for text, _, _ in seen}) > rows
    drafts.forget(list(drafts.contexts))
    assert sorted(drafts._free) == list(range(rows))


def test_who_ends_with_a_first_token_takes_no_row_from_another(target, head, monkeypatch):
    monkeypatch.setattr("solutions.core.draft_model.MOST_ROWS", 1)
    llm = LLM(target, **SETTINGS, speculative_config=eagle(head), enable_prefix_caching=False)
    seen = watch(llm)
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (1, 12)]
    llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert seen
    assert {first for _, _, first in seen} == {0}  # of the whole text


def test_as_many_as_pay_are_drafted_by_default(target, head):
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=eagle(head, adaptive=True))
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == tokens(plain)
    assert llm.llm_engine.stats().spec_decode_num_draft_tokens > 0  # a first look is always paid


def test_sampled_tokens_follow_the_targets_distribution(target, head):
    """Chi-square over pairs of tokens, the second of which was on trial; the chances are transformers'."""
    expected = three_tokens(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), PROMPTS[1]["prompt_token_ids"])
    llm = LLM(target, **SETTINGS | {"num_gpu_blocks_override": 2048}, speculative_config=eagle(head), seed=5)
    # the head drafts the likeliest token always, so that many are accepted
    check_chances(llm, PROMPTS[1], expected)


def test_features_that_nobody_reads_are_kept_in_bounds(target, head, monkeypatch):
    """At most 16 positions and those of 4 steps for each of six sequences; and they are sorted once in four steps."""
    monkeypatch.setattr(head_drafts, "MOST_PENDING", 16)
    monkeypatch.setattr(heard_steps, "MOST_ALIKE", 4)
    llm = LLM(target, **SETTINGS, speculative_config=eagle(head, disable_by_batch_size=2))
    assert isinstance(llm.llm_engine.drafter.proposer, HeadProposer)
    take, counts, pending = HeadDrafts.take, [], []

    def taken(self, seq_id, start, features):
        take(self, seq_id, start, features)
        context = self.contexts[seq_id]
        assert context.num_pending == sum(map(len, context.pending))
        counts.append(len(features))
        if context.first > 0:  # the prompt's own are a step's
            pending.append(context.num_pending)

    monkeypatch.setattr(HeadDrafts, "take", taken)
    llm.generate(PROMPTS, dataclasses.replace(GREEDY, max_tokens=60), use_tqdm=False)
    assert 16 < max(pending) <= 20
    assert len(counts) == 6 * (1 + 59 // 4)  # of the last three steps nobody asks
    assert sum(counts) == sum(len(prompt["prompt_token_ids"]) + 56 for prompt in PROMPTS)


def test_what_was_decoded_without_drafts_is_read_when_they_are_made_again(target, head, monkeypatch):
    """Five sequences get no drafts, two do: those that go on alone have the whole text as context, also that of a sequence
    which began when the steps of others were kept already."""
    monkeypatch.setattr(heard_steps, "MOST_ALIKE", 7)
    settings = SETTINGS | {"max_num_batched_tokens": 32, "enable_prefix_caching": False}
    llm = LLM(target, **settings, speculative_config=eagle(head, disable_by_batch_size=2))
    seen, oracle = watch(llm), Oracle(target, head)
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (40, 12, 40, 20, 9)]
    plain = LLM(target, **settings).generate(PROMPTS[:5], params, use_tqdm=False)
    assert tokens(llm.generate(PROMPTS[:5], params, use_tqdm=False)) == tokens(plain)
    assert len(seen) > 20
    for text, draft, first in seen:
        assert first == 0
        assert draft == oracle.draft(text, len(draft))


def test_a_prompt_of_one_token_joins_those_that_decode(target, head):
    """No step tells by its size that there is one more sequence. Two sequences get no drafts, the last one alone does."""
    llm = LLM(target, **SETTINGS, enable_prefix_caching=False, speculative_config=eagle(head, disable_by_batch_size=1))
    seen, oracle, engine = watch(llm), Oracle(target, head), llm.llm_engine
    for number, count in enumerate((40, 20)):
        engine.add_request(str(number), PROMPTS[number], dataclasses.replace(GREEDY, max_tokens=count))
    for _ in range(6):
        engine.step()
    engine.add_request("2", {"prompt_token_ids": [7]}, dataclasses.replace(GREEDY, max_tokens=12))
    while engine.has_unfinished_requests():
        engine.step()
    assert len(seen) > 10
    for text, draft, first in seen:
        assert first == 0
        assert draft == oracle.draft(text, len(draft))


# What is refused when a head is loaded


def broken(head: Path, folder: Path, config=None, weights=None) -> Path:
    shutil.copytree(head, folder)
    if config is not None:
        said = json.loads((folder / CONFIG).read_text())
        config(said)
        (folder / CONFIG).write_text(json.dumps(said))
    if weights is not None:
        tensors = load_file(folder / WEIGHTS)
        weights(tensors)
        save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config": lambda said: said["target"].update(hidden_size=576)},
            "is for a model with hidden_size 576, and the target's",
        ),
        ({"config": lambda said: said["target"].update(fingerprint=1)}, "was trained for another model of the same sizes"),
        ({"config": lambda said: said.pop("target")}, "does not describe a drafting head"),
        ({"config": lambda said: said.update(architectures=["LlamaForCausalLM"])}, "does not describe a drafting head"),
        ({"config": lambda said: said.update(draft_vocab_size=0)}, "does not describe a drafting head"),
        ({"config": lambda said: said.update(draft_vocab_size=65)}, "expected shape .65., the checkpoint has .64."),
        ({"weights": lambda tensors: tensors.pop("norm.weight")}, "norm.weight is one too many or too few"),
        ({"weights": lambda tensors: tensors.update(more=torch.zeros(1))}, "more is one too many or too few"),
        ({"weights": lambda tensors: tensors["token_ids"].fill_(3)}, "token_ids must be different tokens"),
        ({"weights": lambda tensors: tensors["token_ids"].add_(310)}, "token_ids must be different tokens"),
    ],
)
def test_a_head_that_does_not_fit_is_one_clear_error(target, head, tmp_path, change, message):
    folder = broken(head, tmp_path / "broken", **change)
    with pytest.raises(ValueError, match=message) as error:
        LLM(target, **SETTINGS, speculative_config=eagle(folder))
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_folder_without_a_head(target, head, tmp_path):
    folder = broken(head, tmp_path / "torn")
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        LLM(target, **SETTINGS, speculative_config=eagle(folder))
    with pytest.raises(ValueError, match="there is no drafting head in"):
        LLM(target, **SETTINGS, speculative_config=eagle(tmp_path / "nothing"))
