"""The passes of a drafting head: its own kernels, its recordings, and what is worked out before the first of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from solutions.attention.paged_attention_cpu import FEW, cut
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.sampling.selection_cpu import NativeBest
from solutions.core.speculation.head_passes import HeadPasses, RecordedPasses
from solutions.core.speculation.tree_drafts import DraftShape
from solutions.models.kernels.layers_cpu import NativeRows
from solutions.tests.eagle_heads import GREEDY, PROMPTS, Oracle, make_random_head, tokens, watch
from solutions.tests.tiny_models import make_tiny_llama

SETTINGS = {"dtype": "float32", "block_size": 4, "num_gpu_blocks_override": 256, "enable_prefix_caching": False}
needs_kernels = pytest.mark.skipif(native.load() is None, reason="there are no C++ kernels here")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """Of sizes for which all that a head computes is native; its MLP is as wide as what the joining product gives."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
    return str(folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory, target) -> Path:
    folder = tmp_path_factory.mktemp("head")
    make_random_head(folder, target)
    return folder


def drafting(target: str, head: Path, **others) -> LLM:
    """An engine that always drafts."""
    keys = {name: others.pop(name) for name in ("num_speculative_tokens", "speculative_token_tree") if name in others}
    config = {"method": "eagle", "model": str(head), "adaptive": False} | keys
    return LLM(target, **{"max_model_len": 256} | SETTINGS | others, speculative_config=config)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "count"), [(1, 1), (5, 5), (64, 3), (65, 1), (66, 3), (67, 3), (130, 64), (8192, 3)])
def test_the_best_are_the_first_of_a_stable_sort(dtype, width, count):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(9, width, generator=generator).to(dtype)
    x[0], x[1] = x[0].sort().values, x[1].sort(descending=True).values
    x[2] = torch.randint(3, (width,), generator=generator)  # many are equal
    x[3] = -torch.inf
    ids = torch.randperm(width, generator=generator) * 3
    best = NativeBest(ids, count, dtype)(x, torch.full((9, count), -1))
    assert torch.equal(best, ids[x.float().sort(dim=1, descending=True, stable=True).indices[:, :count]])


@needs_kernels
@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_rows_of_a_table_go_to_a_part_of_other_rows(count):
    generator = torch.Generator().manual_seed(count)
    table, out = torch.randn(7, 12, generator=generator), torch.zeros(count, 40)
    index = torch.randint(7, (count,), generator=generator)
    NativeRows(table[:, 2:7])(index, out[:, 30:35])
    assert torch.equal(out[:, 30:35], table[index, 2:7])
    assert not out[:, :30].any()
    assert not out[:, 35:].any()


@pytest.mark.parametrize("counts", [[1], [2, 1], [FEW, 1, 3], [FEW + 1, 1, 3], [1] * 40])
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize("earlier", [0, 5, 3000])
def test_items_hold_each_query_with_the_keys_that_it_sees(counts, window, earlier):
    """Also of contexts that are split: each query's keys once in all, and none that is too far away left out."""
    starts = np.cumsum([0, *counts])
    lens = np.array(counts) + earlier + np.arange(len(counts))
    items, merges, _ = cut(starts, lens, window, 2)
    seen = {row: set[int]() for row in range(starts[-1])}
    for seq, row, queries, position, left, right, _ in items.tolist():
        for query in range(queries):
            assert starts[seq] <= row + query < starts[seq + 1]
            assert position + query == lens[seq] - counts[seq] + row + query - starts[seq]
            keys = range(left, min(right, position + query + 1))
            assert seen[row + query].isdisjoint(keys)
            seen[row + query].update(keys)
    for seq, length in enumerate(lens.tolist()):
        for query in range(counts[seq]):
            place = length - counts[seq] + query
            first = 0 if window is None else max(0, place - window + 1)
            assert seen[int(starts[seq]) + query] >= set(range(first, place + 1))
    assert (len(merges) > 0) == bool((items[:, 6] >= 0).any())


def test_a_chain_is_a_tree_without_branches():
    chain, tree = DraftShape.chain(70), DraftShape.tree([(0,), (1,), (0, 0)])
    assert chain.gains is chain.beginnings is None
    assert [level.nodes for level in chain.levels] == [[depth] for depth in range(70)]
    assert all(level.hidden is None for level in chain.levels)
    assert (chain.num_in_chain, chain.deepest[-1], chain.most) == (70, 70, 1)
    assert (tree.num_in_chain, tree.deepest, tree.most) == (2, [0, 1, 2, 2], 2)


@needs_kernels
@pytest.mark.parametrize("eager", [True, False])
def test_a_head_is_recorded_where_it_is_native(target, head, eager):
    llm = drafting(target, head, enforce_eager=eager)
    passes = llm.llm_engine.drafter.proposer.drafts.passes
    assert type(passes) is (HeadPasses if eager else RecordedPasses)


@needs_kernels
@pytest.mark.parametrize("shape", [1, 4, [[1], [0], [1, 1], [1, 1, 0]], [[0], [1], [2], [0, 0], [1, 0], [2, 0], [1, 0, 0]]])
def test_recordings_say_what_transformers_says(target, head, shape):
    """Prompts that are longer than a recording's room come behind shorter ones, alone and several at once."""
    params = dataclasses.replace(GREEDY, max_tokens=8)
    long = [{"prompt_token_ids": [(7 * i + j) % 200 for i in range(90)]} for j in range(3)]
    paths = [[0] * depth for depth in range(1, shape + 1)] if isinstance(shape, int) else shape
    keys = {"num_speculative_tokens": shape} if isinstance(shape, int) else {"speculative_token_tree": shape}
    llm, plain = drafting(target, head, **keys), LLM(target, max_model_len=256, **SETTINGS)
    seen = watch(llm)
    for prompts in (PROMPTS[:1], long[:1], long, PROMPTS[:3]):
        wanted = plain.generate(prompts, params, use_tqdm=False)
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(wanted)
    oracle = Oracle(target, head)
    order = sorted(map(tuple, paths), key=lambda path: (any(path), len(path), path))
    assert len(seen) > 10
    for text, drafted, _ in seen[::2]:
        by_path = dict(zip(order, drafted, strict=False))
        for path, token in by_path.items():
            before = [by_path[path[:depth]] for depth in range(1, len(path))]
            assert oracle.best(oracle.outputs(text, before)[-1], 3)[path[-1]] == token


def test_who_has_no_room_for_a_long_chain_leaves_other_rows_alone(target, head):
    """Beside a sequence with room for eight tokens stands one at the end of the context, in the last row of the cache."""
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (20, 4)]
    prompts = [PROMPTS[0], {"prompt_token_ids": [(3 * i) % 200 for i in range(60)]}]
    llm = drafting(target, head, num_speculative_tokens=8, max_model_len=64, max_num_seqs=2)
    seen, oracle = watch(llm), Oracle(target, head)
    plain = LLM(target, max_model_len=64, **SETTINGS).generate(prompts, params, use_tqdm=False)
    drafts = llm.llm_engine.drafter.proposer.drafts
    run, positions = drafts.passes.run, list[int]()
    drafts.passes.run = lambda step: positions.extend(step.positions) or run(step)
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == tokens(plain)
    assert drafts.longest == 64 + 8
    assert max(positions) == 63, "a model's rotation may end with its context"
    assert {len(drafted) for _, drafted, _ in seen} >= {1, 8}
    for text, drafted, _ in seen:
        assert drafted == oracle.draft(text, len(drafted))


def test_a_choice_that_the_head_does_not_have_is_one_clear_error(target, head):
    with pytest.raises(ValueError, match="speculative_token_tree: 64 is no choice of a head of 64 tokens"):
        drafting(target, head, speculative_token_tree=[[0], [64]])
