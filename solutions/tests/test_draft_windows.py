"""A model drafts where layers differ in their window, its own or the target's: tokens are those of transformers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.speculation.draft_tables import share_blocks, with_room
from solutions.models.config.model_config import ModelConfig
from solutions.models.costs.memory import kv_bytes_per_block
from solutions.models.loader import resolve_model
from solutions.tests.engine_twins import check_answer, folder
from solutions.tests.slow_cases import slow_after
from solutions.tests.test_families import PROMPTS, SETTINGS

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
"""A beginning and an answer of 57 to 88 tokens, where windows are of 24."""
PAIRS = [("gemma3_text", "gemma3_text"), ("gemma3_text", "gemma2"), ("gemma2", "gpt_oss"), ("llama", "gemma2"),
         ("gpt_oss", "llama"), ("mistral", "gemma3_text"), ("gemma2", "mistral")]  # fmt: skip
"""Target, and what drafts: in groups of its own, in more or fewer, and in one."""


def draft(name: str, **more: Any) -> dict[str, Any]:
    return {"method": "draft_model", "model": str(folder(name)), "num_speculative_tokens": 3, "adaptive": False} | more


def answer(target: str, drafter: str, prompts: list[list[int]] = PROMPTS, **settings: Any) -> LLM:
    """Let an engine answer, and see that transformers would have said the same."""
    llm = LLM(str(folder(target)), **(SETTINGS | settings), speculative_config=draft(drafter))
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == GREEDY.max_tokens
        check_answer(target, "auto", "torch", prompt, tokens)
    llm.llm_engine.scheduler.check_invariants()
    assert llm.llm_engine.stats().kv_cache_usage == 0
    return llm


def share_accepted(llm: LLM) -> float:
    stats = llm.llm_engine.stats()
    return stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_draft_tokens


@pytest.mark.parametrize(("target", "drafter"), slow_after(3, PAIRS))
def test_tokens_are_those_of_transformers(target: str, drafter: str) -> None:
    if (target, drafter) == ("mistral", "gemma3_text"):  # whose widest layers see all
        with pytest.raises(ValueError, match="frees KV blocks behind its window of 24 tokens"):
            answer(target, drafter)
        return
    llm = answer(target, drafter, max_model_len=128)
    assert llm.llm_engine.stats().spec_decode_num_draft_tokens > 100
    assert (share_accepted(llm) > 0.95) == (target == drafter)


@pytest.mark.parametrize(
    "settings",
    slow_after(1, [
        {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 80, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 24, "num_gpu_blocks_override": 80, "preemption_mode": "swap", "swap_space": 1 << 24},
        {"max_num_batched_tokens": 13},
    ]),
)  # fmt: skip
@pytest.mark.parametrize("target", slow_after(1, ["gemma3_text", "gpt_oss"]))
def test_little_memory_and_chunks(target: str, settings: dict[str, Any]) -> None:
    """The target itself drafts, so a key that lay in the wrong block would be seen as a token that is rejected."""
    if "num_gpu_blocks_override" in settings and target == "gpt_oss":  # which has fewer groups
        settings = settings | {"num_gpu_blocks_override": 32}
    llm = answer(target, target, max_model_len=96, **settings)
    assert share_accepted(llm) > 0.95
    if "num_gpu_blocks_override" in settings:
        assert llm.llm_engine.stats().num_preemptions > 0


@pytest.mark.parametrize("drafter", ["gemma3_text", "gemma2"])
def test_what_the_prefix_cache_knows_is_known_to_the_draft_model(drafter: str) -> None:
    """The same prompts again: their blocks were filled by both models, those behind a window are in neither."""
    llm = answer(
        "gemma3_text" if drafter == "gemma3_text" else "llama", drafter, max_model_len=128, num_gpu_blocks_override=800
    )
    proposer = llm.llm_engine.drafter.proposer
    computed = []
    run = proposer._run
    proposer._run = lambda counts, sampled: (computed.append(sum(counts.values())), run(counts, sampled))[1]
    first = sum(map(len, PROMPTS))
    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False
    )
    assert computed[0] < first / 3
    assert llm.llm_engine.stats().prefix_cache_hits > first / 2


def test_a_draft_model_knows_which_blocks_it_has_not_filled() -> None:
    """While nothing is drafted, the target fills blocks alone; what the draft model then finds there is not its own."""
    config = draft("gemma3_text", disable_by_batch_size=2)
    settings = SETTINGS | {"max_model_len": 128, "num_gpu_blocks_override": 800}
    llm = LLM(str(folder("gemma3_text")), **settings, speculative_config=config)
    many = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    llm.generate(many, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    before = llm.llm_engine.stats()
    assert before.spec_decode_num_draft_tokens == 0
    for prompt in PROMPTS[:2]:  # shorter than a window, so that nothing is lost to the draft model
        (output,) = llm.generate({"prompt_token_ids": prompt}, GREEDY, use_tqdm=False)
        check_answer("gemma3_text", "auto", "torch", prompt, list(output.outputs[0].token_ids))
    assert llm.llm_engine.stats().prefix_cache_hits - before.prefix_cache_hits >= 32
    assert share_accepted(llm) > 0.95


def test_groups_by_hand() -> None:
    assert share_blocks((None,), (None,), 99) == (0,)
    assert share_blocks((None,), (24, 24, None), 99) == (2,)
    assert share_blocks((24, None, 24), (24, 24, None, 24), 99) == (0, 2, 1)
    assert share_blocks((16, 32), (32, 16, None), 99) == (0, 2)
    assert share_blocks((24, None), (None,), 99) == (0, 0)
    assert share_blocks((24, 24, None), (24, None), 99) == (1, 1, 1)
    assert share_blocks((24, 32), (24, None), 99) == (0, 1)
    assert share_blocks((32, 32), (24, None), 99) == (1, 1)
    assert share_blocks((None,), (24,), 99) is None
    assert share_blocks((None,), (24,), 24) == (0,)
    assert share_blocks((25, 8), (24, 24), 99) is None


def test_every_group_is_as_wide_and_has_blocks_of_its_own_or_layers_have() -> None:
    """Over all pairs of up to three groups of four widths."""
    kinds = [each for count in (1, 2, 3) for each in itertools.product((8, 24, 40, None), repeat=count)]

    def wide(window: int | None) -> int:
        return 99 if window is None else window

    for ours, theirs in itertools.product(kinds, kinds):
        found = share_blocks(ours, theirs, 99)
        possible = max(map(wide, ours)) <= max(map(wide, theirs))
        assert (found is not None) == possible
        if found is not None:
            assert all(wide(theirs[group]) >= wide(window) for window, group in zip(ours, found, strict=True))
            orders = itertools.permutations(theirs, len(ours))
            fits = any(all(wide(a) <= wide(b) for a, b in zip(ours, order, strict=True)) for order in orders)
            assert (len(set(found)) == len(found)) == (fits or len(ours) == 1)


def test_memory_of_a_draft_model_in_fewer_groups() -> None:
    """In blocks of one group every layer has room of its own, and these count."""

    def config(name: str) -> ModelConfig:
        return resolve_model(str(folder(name))).config

    own, other = (with_room(config("gemma3_text"), config(target), 96) for target in ("gemma3_text", "llama"))
    assert (own.layers_apart, other.layers_apart) == (False, True)
    sizes = [kv_bytes_per_block(16, model, torch.float32) for model in (own, other)]
    assert sizes == [2 * layers * 16 * own.num_kv_heads * own.head_dim * 4 for layers in (own.num_cached_layers, 7)]
    assert own.num_cached_layers < 7
    assert [other.place_of(layer)[1] for layer in range(7)] == list(range(7))
