"""Seeded workloads of exact lengths, the same on every machine, and the names by which measurements call them.

Prompts are random token ids: speed does not depend on what a text means, and ids, unlike text, have exactly the
length that was asked for, whatever the tokenizer. Outputs have exact lengths too: greedy, end of sequence ignored.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

from ..batching.sampling_params import SamplingParams

DATASETS = ("random", "mixed", "shared-prefix", "chat", "repetitive")
TOKEN_IDS = (1000, 40_000)
"""First and last token id of a prompt; what lies below is mostly special tokens and single bytes."""
MIXED_INPUT, MIXED_OUTPUT = (16, 512), (16, 256)
CHAT_TURNS = 4
PHRASE = 8


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: a prompt, how many tokens must come back, and a text that a server gets in place of the ids, when given."""

    prompt_token_ids: list[int]
    output_len: int
    text: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.output_len

    @property
    def prompt(self) -> dict[str, list[int]]:
        """As an engine takes it."""
        return {"prompt_token_ids": self.prompt_token_ids}

    def params(self, **more: Any) -> SamplingParams:
        """Greedy, to its length and no further."""
        return SamplingParams(temperature=0.0, max_tokens=self.output_len, ignore_eos=True, **more)


@dataclass(frozen=True, slots=True)
class Workload:
    """What to generate. Raises ValueError if a number does not make sense for the dataset.

    Attributes:
        dataset: one of `DATASETS`, which `DATASETS_HELP` explains. num_prompts: requests; of "chat" every turn is one.
        input_len, output_len: lengths in tokens; None for "mixed", which draws them.
        prefix_len: tokens that all prompts of "shared-prefix" begin with, else 0.
    """

    dataset: str
    num_prompts: int
    input_len: int | None = None
    output_len: int | None = None
    prefix_len: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"unknown dataset {self.dataset!r}; choose from {', '.join(DATASETS)}")
        if self.num_prompts < 1:
            raise ValueError(f"the number of prompts must be at least 1, got {self.num_prompts}")
        if self.dataset == "mixed":
            if self.input_len is not None or self.output_len is not None:
                raise ValueError("the dataset mixed draws its lengths; leave out the input and output length")
        elif self.input_len is None or self.output_len is None or min(self.input_len, self.output_len) < 1:
            raise ValueError(f"input and output length must be at least 1, got {self.input_len} and {self.output_len}")
        if (self.prefix_len > 0) != (self.dataset == "shared-prefix"):
            raise ValueError("a prefix length of at least 1 goes with the dataset shared-prefix, and only with it")


WORKLOADS = {
    "W1": Workload("random", 1, 128, 128),
    "W2": Workload("random", 32, 128, 128),
    "W3": Workload("mixed", 64),
    "W4": Workload("shared-prefix", 32, 16, 32, 512),
    "W5": Workload("chat", 32, 32, 64),
    "W6": Workload("repetitive", 32, 128, 128),
}
"""Workloads that measurements quote: one user, many alike, many unlike, many with one system prompt, conversations, echoes."""

USUAL = {workload.dataset: workload for workload in WORKLOADS.values()}
"""Each dataset with its usual numbers: of its last workload."""


def token_ids(rng: random.Random, count: int) -> list[int]:
    """So many tokens of a prompt."""
    return [rng.randint(*TOKEN_IDS) for _ in range(count)]


def draw_lengths(
    count: int, rng: random.Random, inputs: tuple[int, int] = MIXED_INPUT, outputs: tuple[int, int] = MIXED_OUTPUT
) -> list[tuple[int, int]]:
    """(input length, output length) of `count` requests, uniform over `inputs` and `outputs`, ends included."""
    return [(rng.randint(*inputs), rng.randint(*outputs)) for _ in range(count)]


def make_requests(
    workload: Workload, vocab_size: int = TOKEN_IDS[1] + 1, seed: int = 0, token_seed: int | None = None
) -> list[BenchRequest]:
    """The requests of a workload; the same numbers give the same requests, everywhere and always.

    Args:
        vocab_size: a model with fewer than 40,001 tokens gets ids from its own vocabulary; lengths do not depend on it.
        seed: of `random.Random`, whose sequence Python promises to keep.
        token_seed: of the tokens alone: the same work with prompts that no prefix cache has seen.
    """
    rng = random.Random(seed)
    if workload.dataset == "mixed":
        lengths = draw_lengths(workload.num_prompts, rng)
    else:
        lengths = [(workload.input_len, workload.output_len)] * workload.num_prompts
    if token_seed is not None:
        rng = random.Random(token_seed)
    last = min(TOKEN_IDS[1], vocab_size - 1)
    first = min(TOKEN_IDS[0], last // 2)

    def draw(count: int) -> list[int]:
        return [rng.randint(first, last) for _ in range(count)]

    if workload.dataset == "chat":
        # All first turns, then all second ones, and so on. What a model would have answered is drawn too, so the prompts are
        # the same for every engine; the price is that of the turns before only the questions are in its cache.
        talks: list[list[int]] = [[] for _ in range(-(-workload.num_prompts // CHAT_TURNS))]
        requests = []
        for number in list(range(len(talks))) * CHAT_TURNS:
            question = talks[number] + draw(workload.input_len)
            requests.append(BenchRequest(question, workload.output_len))
            talks[number] = question + draw(workload.output_len)
        return requests[: workload.num_prompts]
    if workload.dataset == "repetitive":
        phrases = [draw(min(PHRASE, workload.input_len)) for _ in lengths]
        return [BenchRequest((p * workload.input_len)[: workload.input_len], workload.output_len) for p in phrases]
    prefix = draw(workload.prefix_len)
    return [BenchRequest(prefix + draw(own), output) for own, output in lengths]


def check_context(requests: Many[BenchRequest], max_model_len: int) -> None:
    """Refuse what would not fit with a ValueError that gives both numbers: an output cut short would count as a fast one."""
    longest = max(requests, key=lambda request: request.num_tokens)
    if longest.num_tokens > max_model_len:
        raise ValueError(
            f"a prompt of {len(longest.prompt_token_ids)} and an output of {longest.output_len} tokens do not fit the "
            f"context of {max_model_len}; use shorter lengths or a larger --max-model-len"
        )


DATASETS_HELP = f"""\
Prompts are random tokens from a fixed seed, so two runs anywhere measure the same work:
  random         --num-prompts requests of --input-len and --output-len tokens
  mixed          lengths drawn from 16..512 in and 16..256 out: what continuous batching is for
  shared-prefix  --prefix-len tokens that all prompts begin with, then --input-len own ones: what prefix caching is for
  chat           conversations of {CHAT_TURNS} turns: each prompt is all that was said before and --input-len new tokens
  repetitive     {PHRASE} tokens again and again up to --input-len: what n-gram speculation is for
"""


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name or spell out a workload, for `parse_workload`."""
    group = parser.add_argument_group("workload")
    group.add_argument("--dataset", choices=DATASETS, help="see above (default: random)")
    group.add_argument("--num-prompts", type=int, help="requests (default: 32; mixed: 64)")
    text = "prompt tokens (default: 128; shared-prefix: 16 after the prefix; chat: 32)"
    group.add_argument("--input-len", type=int, help=text)
    group.add_argument("--output-len", type=int, help="tokens to generate (default: 128; shared-prefix: 32; chat: 64)")
    group.add_argument("--prefix-len", type=int, help="tokens that all prompts share (shared-prefix: 512)")
    group.add_argument("--workload", choices=tuple(WORKLOADS), help="all of the above by the name that results quote")
    group.add_argument("--data-seed", type=int, default=0, help="seed of lengths and tokens (default: 0)")


def parse_workload(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Workload]:
    """All flags, and the workload that they name or spell out; exits with one line if they do not fit together."""
    args = parser.parse_args(argv)
    names = ("num_prompts", "input_len", "output_len", "prefix_len")
    own = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.workload is not None:
        if args.dataset is not None or own:
            parser.error(f"--workload {args.workload} sets dataset and lengths; leave the other workload flags out")
        return args, WORKLOADS[args.workload]
    try:
        return args, replace(USUAL[args.dataset or "random"], **own)
    except ValueError as error:
        parser.error(str(error))
