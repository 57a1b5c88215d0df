"""Drafts that branch: they are the head's likeliest at each node, and whatever they are, tokens are those of plain decoding."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from solutions.batching.sampling_params import SamplingParams, StructuredOutput
from solutions.batching.scheduler_output import Draft
from solutions.batching.tree_rows import TreeDraft
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.speculation.settings import SpeculativeConfig
from solutions.tests.eagle_heads import GREEDY, PROMPTS, Oracle, make_random_head, tokens, watch
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny_llama

SETTINGS = {"dtype": "float32", "max_model_len": 256, "block_size": 4, "num_gpu_blocks_override": 512}
PATHS = [[1], [0], [0, 1], [1, 0], [0, 0], [2], [0, 0, 0], [1, 0, 2], [1, 0, 0], [1, 0, 0, 1]]
SORTED = [(0,), (0, 0), (0, 0, 0), (1,), (2,), (0, 1), (1, 0), (1, 0, 0), (1, 0, 2), (1, 0, 0, 1)]
"""The same in the order in which they are drafted: the likeliest chain, then level after level."""


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> str:
    return str(tiny_llama)


@pytest.fixture(scope="module")
def head(tmp_path_factory, target) -> Path:
    folder = tmp_path_factory.mktemp("head")
    make_random_head(folder, target)
    return folder


def branching(head: Path, **others) -> dict:
    return {"method": "eagle", "model": str(head), "speculative_token_tree": PATHS, "adaptive": False} | others


def put_along_a_path(draft: Draft, coming: list[int], chance: random.Random) -> None:
    """The tokens along a random path of a draft that branches are right."""
    if not isinstance(draft, TreeDraft):
        return
    path = chance.choice(SORTED[: len(draft.token_ids)])
    for depth, token in zip(range(1, len(path) + 1), coming, strict=False):
        node, siblings = SORTED.index(path[:depth]), [i for i, p in enumerate(SORTED) if p[:-1] == path[: depth - 1]]
        for other in siblings:  # no two children hold the same token
            if other < len(draft.token_ids) and draft.token_ids[other] == token:
                draft.token_ids[other] = draft.token_ids[node]
        draft.token_ids[node] = token


@pytest.mark.parametrize("kernels", [True, False])
def test_each_node_is_what_transformers_says_behind_its_path(target, head, kernels):
    llm = LLM(
        target, **SETTINGS, speculative_config=branching(head), enable_prefix_caching=False, enable_cpu_kernels=kernels
    )  # fmt: skip
    params = dataclasses.replace(GREEDY, max_tokens=16)
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:3], params, use_tqdm=False)
    seen, oracle = watch(llm, plain, put_along_a_path), Oracle(target, head)
    assert tokens(llm.generate(PROMPTS[:3], params, use_tqdm=False)) == tokens(plain)
    assert len(seen) > 10
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 10
    for text, drafted, _ in seen:
        by_path = dict(zip(SORTED, drafted, strict=False))
        for path, token in by_path.items():
            before = [by_path[path[:depth]] for depth in range(1, len(path))]
            assert oracle.best(oracle.outputs(text, before)[-1], 3)[path[-1]] == token


@pytest.mark.parametrize("cache", [{}, {"kv_cache_dtype": "int8"}, {"enable_cpu_kernels": False}])
@pytest.mark.parametrize("mode", slow_after(1, ["recompute", "swap"]))
@pytest.mark.parametrize("caching", slow_after(1, [True, False]))
def test_greedy_and_seeded_tokens_are_those_of_plain_decoding(target, head, mode, caching, cache):
    """With chunks of prompts, preemption by both ways and hits in the prefix cache; paths of every kind are accepted, so keys
    and values move, and later tokens would tell if one were in a wrong place."""
    prompts = PROMPTS + PROMPTS[:3]
    params = [dataclasses.replace(GREEDY, temperature=0.8 * (i % 2), seed=i, logprobs=1) for i in range(len(prompts))]
    plain = LLM(target, **SETTINGS, **cache).generate(prompts, params, use_tqdm=False)
    tight = SETTINGS | {"num_gpu_blocks_override": 64, "max_num_batched_tokens": 40}
    llm = LLM(
        target, **tight, **cache, preemption_mode=mode, enable_prefix_caching=caching, speculative_config=branching(head),
        max_num_seqs=8, swap_space=1 << 20,
    )  # fmt: skip
    watch(llm, plain, put_along_a_path)
    for _ in range(2):
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert tokens(outputs) == tokens(plain)
        for got, want in zip(outputs, plain, strict=True):
            assert [list(entry) for entry in got.outputs[0].logprobs] == [list(entry) for entry in want.outputs[0].logprobs]
    stats = llm.llm_engine.stats()
    assert stats.num_preemptions > 0
    assert {0, 1, 2, 3} <= stats.spec_decode_accepted.keys()
    assert (stats.prefix_cache_hits > 0) == caching
    assert stats.kv_cache_usage == 0


def test_what_was_moved_is_what_the_prefix_cache_gives_the_next_request(target, head):
    """A block that accepted branches have filled is found by a later prompt, which goes on as without a cache."""
    (plain,) = LLM(target, **SETTINGS).generate(PROMPTS[0], GREEDY, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=branching(head))
    watch(llm, [plain], put_along_a_path)
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    longer = {"prompt_token_ids": PROMPTS[0]["prompt_token_ids"] + plain.outputs[0].token_ids}
    wanted = tokens(LLM(target, **SETTINGS).generate(longer, GREEDY, use_tqdm=False))
    (again,) = llm.generate(longer, GREEDY, use_tqdm=False)
    assert again.num_cached_tokens > len(PROMPTS[0]["prompt_token_ids"]) + 20
    assert tokens([again]) == wanted


def test_sampled_tokens_follow_the_targets_distribution(target, head):
    """Chi-square over triples of tokens, all but the first of which were on trial; the chances are transformers'. Requests have
    no seed, so each draw is a new one."""
    model, prompt = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), PROMPTS[1]["prompt_token_ids"]
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    likeliest: dict[tuple[int, ...], list[int]] = {}
    for _ in range(3):
        longer = {}
        for said, chance in expected.items():
            with torch.no_grad():
                top = model(torch.tensor([[*prompt, *said]])).logits[0, -1].topk(3)
            likeliest[said] = top.indices.tolist()
            for token, p in zip(top.indices.tolist(), top.values.div(4.0).softmax(0).tolist(), strict=True):
                longer[*said, token] = chance * p
        expected = longer
    paths = [[0], [1], [0, 0], [0, 1], [1, 0]]
    llm = LLM(
        target, **SETTINGS | {"num_gpu_blocks_override": 2048}, seed=5, max_num_seqs=16, enable_prefix_caching=False,
        speculative_config=branching(head, speculative_token_tree=paths),
    )  # fmt: skip
    proposer = llm.llm_engine.drafter.proposer
    propose = proposer.propose

    def informed(output, wanted):  # the target's own likeliest, so that every place of the tree is accepted at times
        drafts = propose(output, wanted)
        for seq, draft in drafts.items():
            said = tuple(seq.tokens[seq.num_prompt_tokens : len(seq.tokens)])
            if len(said) == 1 and isinstance(draft, TreeDraft):
                for node, path in enumerate([(0,), (0, 0), (1,), (0, 1), (1, 0)][: len(draft.token_ids)]):
                    way = said
                    for rank in path[:-1]:
                        way = (*way, likeliest[way][rank])
                    draft.token_ids[node] = likeliest.get(way, [7, 8])[path[-1]]
        return drafts

    proposer.propose = informed
    params = SamplingParams(temperature=4.0, top_k=3, max_tokens=8, ignore_eos=True)
    count = 1500
    said = Counter(tuple(each[:3]) for each in tokens(llm.generate([PROMPTS[1]] * count, params, use_tqdm=False)))
    assert said.keys() <= expected.keys()
    chi_square = sum((said[key] - count * p) ** 2 / (count * p) for key, p in expected.items())
    assert chi_square < 60  # 26 degrees of freedom: the chance of more is 0.0002
    accepted = llm.llm_engine.stats().spec_decode_accepted
    assert accepted[1] > 100
    assert accepted[2] > 100


def test_as_much_of_a_tree_as_pays_is_drafted_by_default(target, head):
    """All that the learning may decide on: nothing, chains, beginnings of the tree, the whole of it."""
    plain = LLM(target, **SETTINGS).generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    llm = LLM(target, **SETTINGS, speculative_config=branching(head, adaptive=True))
    lengths, sizes, chance = llm.llm_engine.drafter.lengths, set(), random.Random(0)

    def choose(seq_ids, most, missed):
        counts = [chance.randint(0, room) for room in most]
        sizes.update(counts)
        return counts

    lengths.choose = choose
    watch(llm, plain, put_along_a_path)
    for _ in range(3):
        assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == tokens(plain)
    assert len(sizes) > 6
    assert 0 < lengths._all.hits < lengths._all.tries
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 20


def test_a_form_is_followed_along_the_likeliest_chain(target, head):
    llm = LLM(target, **SETTINGS, speculative_config=branching(head))
    params = SamplingParams(temperature=0, max_tokens=12, structured_output=StructuredOutput("regex", "[ab]{8}c"))
    seen = watch(llm)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert re.fullmatch("[ab]{8}c", output.outputs[0].text)
    assert seen
    assert all(len(drafted) <= 3 for _, drafted, _ in seen)


@pytest.mark.parametrize("limit", [44, 45, 50])
def test_at_the_end_of_the_context_the_tree_is_cut_and_nothing_else_changes(target, head, limit):
    settings = SETTINGS | {"max_model_len": limit}
    params = dataclasses.replace(GREEDY, max_tokens=None)
    plain = LLM(target, **settings).generate(PROMPTS, params, use_tqdm=False)
    llm = LLM(target, **settings, speculative_config=branching(head))
    seen = watch(llm, plain, put_along_a_path)
    assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == tokens(plain)
    assert {len(drafted) for _, drafted, _ in seen} > {1, 4, 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ngram", "model": None}, "method ngram drafts chains only; use eagle"),
        ({"num_speculative_tokens": 3}, "it has 10 tokens; leave num_speculative_tokens out, or write 10"),
        ({"speculative_token_tree": []}, "it must have 1 to 63 tokens, and has 0"),
        ({"speculative_token_tree": [[0], [1, 0]]}, r"\(1, 0\) goes on from \(1,\), which is missing"),
        ({"speculative_token_tree": 3}, r"is a list of paths such as \[\[0\], \[1\], \[0, 0\]\], not 3"),
        ({"speculative_token_tree": "import os"}, "is a list of paths"),
        ({"speculative_token_tree": [["0"]]}, "is a list of paths"),
    ],
)  # fmt: skip
def test_a_tree_that_cannot_be_is_one_clear_error(head, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        SpeculativeConfig.parse(branching(head, **changes))
    assert str(error.value).startswith("--speculative-config: ")
    assert "\n" not in str(error.value)


def test_a_backend_without_trees_is_refused(target, head):
    with pytest.raises(ValueError, match="attention backend naive has no trees; use cpu"):
        LLM(target, **SETTINGS, attention_backend="naive", speculative_config=branching(head))


def test_the_shape_is_read_as_vllm_writes_it(head):
    given = branching(head, speculative_token_tree="[(0,), (1,), (0, 0)]")
    config = SpeculativeConfig.parse(given)
    assert config.paths == [(0,), (1,), (0, 0)]
    assert config.num_speculative_tokens == 3


def test_a_step_without_trees_has_no_mask(target, head, monkeypatch):
    """Off, it costs the hot path one look at a dictionary that is empty."""
    llm, masks = LLM(target, **SETTINGS), []
    forward = llm.llm_engine.executor.worker.forward
    monkeypatch.setattr(
        llm.llm_engine.executor.worker,
        "forward",
        lambda batch, tokens, hidden: (masks.append(hidden), forward(batch, tokens, hidden))[1],
    )
    llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert masks
    assert set(masks) == {None}


@pytest.mark.skipif(native.load() is None, reason="there are no C++ kernels here")
def test_steps_with_trees_are_replayed(tmp_path):
    """The mask travels in the structure that a recording reads, so no step is recorded for it."""
    make_tiny_llama(tmp_path / "model", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96)
    make_random_head(tmp_path / "head", str(tmp_path / "model"))
    llm = LLM(str(tmp_path / "model"), **SETTINGS, speculative_config=branching(tmp_path / "head"))
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    replay = llm.llm_engine.executor.worker.model.model.run_layers
    made = replay.num_recordings
    plain = LLM(str(tmp_path / "model"), **SETTINGS, enforce_eager=True).generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    watch(llm, plain, put_along_a_path)
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == tokens(plain)
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 10
    assert replay.num_recordings == made
