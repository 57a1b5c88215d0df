"""The parity grid: greedy tokens of the engine against transformers, over every combination of settings that may not matter.

The oracle runs each prompt through transformers in float32. Two logits that lie within 1e-3 of each other are no defined
answer in float32, so the prompts are chosen such that the two best always lie further apart; `oracle` checks that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM

NUM_PROMPTS = 64
MAX_PROMPT, NUM_TOKENS = 512, 64
TIE = 1e-3
AXES: dict[str, list[Any]] = {
    "prefix_cache": [True, False],
    "budget": [17, 256, "unlimited"],
    "block_size": [1, 16, 128],
    "memory": ["room", "tight"],
    "preemption": ["recompute", "swap"],
}


@dataclass(frozen=True)
class Setting:
    """One cell of the grid."""

    prefix_cache: bool
    budget: int | str
    block_size: int
    memory: str
    preemption: str

    def __str__(self) -> str:
        cache = "cache" if self.prefix_cache else "nocache"
        return f"{cache}-budget_{self.budget}-block_{self.block_size}-{self.memory}-{self.preemption}"

    def flags(self, oracle: Oracle) -> dict[str, Any]:
        """Settings of the engine. Tight memory holds one or two of the longest sequences, far less than all prompts."""
        max_model_len = MAX_PROMPT + NUM_TOKENS
        total_tokens = oracle.total_tokens
        tight = max_model_len * (1 if oracle.windowed else 2)
        tokens = total_tokens + NUM_PROMPTS * self.block_size if self.memory == "room" else tight
        return {
            "dtype": "float32",
            "max_model_len": max_model_len,
            "enable_prefix_caching": self.prefix_cache,
            "max_num_batched_tokens": total_tokens if self.budget == "unlimited" else self.budget,
            "block_size": self.block_size,
            "num_gpu_blocks_override": -(-tokens // self.block_size) * oracle.groups,
            "preemption_mode": self.preemption,
            "swap_space": 1 << 30,
        }


def full_grid() -> list[Setting]:
    """All combinations."""
    return [Setting(*values) for values in itertools.product(*AXES.values())]


def pairwise_grid() -> list[Setting]:
    """A small subset in which every value of a setting meets every value of each other one."""
    left = {pair for setting in full_grid() for pair in _pairs(setting)}
    chosen = []
    while left:
        best = max(full_grid(), key=lambda setting: len(left & _pairs(setting)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


def _pairs(setting: Setting) -> set[tuple[Any, ...]]:
    values = [(name, getattr(setting, name)) for name in AXES]
    return set(itertools.combinations(values, 2))


def prompt_lengths(count: int = NUM_PROMPTS) -> list[int]:
    """Lengths from 1 to 512: block boundaries and their neighbours, the rest spread evenly on a logarithmic scale."""
    edges = [1, 512, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511]
    spread = [round(2 ** (9 * (i + 0.5) / (NUM_PROMPTS - len(edges)))) for i in range(NUM_PROMPTS - len(edges))]
    step = NUM_PROMPTS // count
    return (edges + spread)[::step]


@dataclass
class Oracle:
    """Prompts with transformers' greedy continuation."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    path: Path
    windowed: bool = False
    """The model frees what leaves its window, so sequences hardly grow and need not preempt each other."""
    groups: int = 1
    """Groups of layers that hold blocks of their own."""
    total_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.total_tokens = sum(len(p) + NUM_TOKENS for p in self.prompts)


def greedy(model: PreTrainedModel, prompt: list[int], guess: list[int]) -> tuple[list[int], float]:
    """Continue one prompt by itself.

    A guess of the answer, wherever it comes from, spares most of the time: the model looks at all of it in one pass, and what
    it would have said up to the first wrong token is known then. A wrong token is put right, what is behind it guessed anew.

    Returns:
        64 tokens, and the smallest distance between the two best logits at one of their positions.
    """
    answer = list(guess)
    known = 0
    while True:
        best = five_best(model, prompt, answer)
        tokens = best.indices[:, 0].tolist()
        known = next((i for i in range(known, NUM_TOKENS) if tokens[i] != answer[i]), NUM_TOKENS)
        if known == NUM_TOKENS:
            return tokens, float((best.values[:, 0] - best.values[:, 1]).min())
        answer[known:] = tokens[known:]


@torch.inference_mode()
def five_best(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.return_types.topk:
    """What the model would say next after the prompt and each beginning of `answer`: values and indices, [64, 5]."""
    return model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float().topk(5)


def cut_prompts(text_ids: list[int], starts: list[int], lengths: list[int]) -> list[list[int]]:
    """Pieces of a text, which is repeated as often as they need."""
    text_ids = text_ids * (1 + 2 * MAX_PROMPT // len(text_ids))
    return [text_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def make_oracle(path: Path, text_ids: list[int], count: int = NUM_PROMPTS) -> Oracle:
    """Run transformers over `count` prompts cut from a text.

    A prompt on whose way two logits nearly tie is moved on through the text by a token until its answer is defined.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    guesser = LLM(str(path), dtype="float32", max_model_len=MAX_PROMPT + NUM_TOKENS)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    lengths = prompt_lengths(count)
    # Every third prompt starts where the text starts, so that prefixes are shared.
    starts = [0 if index % 3 == 0 and length > 1 else 11 * index for index, length in enumerate(lengths)]
    answers: dict[int, list[int]] = {}
    while missing := [index for index in range(len(lengths)) if index not in answers]:
        prompts = cut_prompts(text_ids, [starts[i] for i in missing], [lengths[i] for i in missing])
        guesses = guesser.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for index, prompt, guess in zip(missing, prompts, guesses, strict=True):
            answer, margin = greedy(model, prompt, guess.outputs[0].token_ids)
            if margin > TIE:
                answers[index] = answer
            else:
                starts[index] += 1
    windowed = getattr(model.config, "sliding_window", None) is not None
    prompts = cut_prompts(text_ids, starts, lengths)
    return Oracle(
        prompts, [answers[index] for index in range(len(prompts))], path, windowed, len(guesser.llm_engine.model_config.windows)
    )


def check_setting(oracle: Oracle, setting: Setting, **flags: Any) -> None:
    """Run all prompts together under one setting and compare every token.

    Args:
        flags: further settings of the engine.

    Raises:
        AssertionError: a token differs, the pressure that the setting asks for did not arise, or blocks were left over.
    """
    llm = LLM(model=str(oracle.path), **setting.flags(oracle), **flags)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in oracle.prompts], params, use_tqdm=False)
    for index, (output, expected) in enumerate(zip(outputs, oracle.tokens, strict=True)):
        got = output.outputs[0].token_ids
        first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
        assert first is None, (
            f"{setting}: prompt {index} ({len(oracle.prompts[index])} tokens) differs from transformers at output {first}: "
            f"{got[first]} instead of {expected[first]}"
        )
    engine = llm.llm_engine
    stats = engine.stats()
    if setting.memory == "room":
        assert stats.num_preemptions == 0, f"{setting}: {stats.num_preemptions} preemptions"
    elif not oracle.windowed:
        assert stats.num_preemptions > 0, f"{setting}: memory was not tight"
    assert stats.kv_cache_usage == 0, f"{setting}: blocks left over"
    engine.scheduler.check_invariants()
