"""Prompts replayed over a block manager without a model: what a prefix cache finds, and what it keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from ...attention.block_manager import BlockManager
from ...batching.sampling_params import SamplingParams
from ...batching.sequence import Sequence


def tokens(rng: random.Random, fewest: int, most: int) -> list[int]:
    """So many random token ids."""
    return [rng.randrange(10_000) for _ in range(rng.randint(fewest, most))]


def chats(rng: random.Random) -> Iterator[list[int]]:
    """8 chats that begin alike, each with 6 turns, first every chat's first; a turn's prompt is the whole chat so far."""
    texts = [[7] * 203 for _ in range(8)]
    for text in texts * 6:
        text += tokens(rng, 8, 60)  # a question
        yield list(text)
        text += tokens(rng, 16, 120)  # and its answer


def documents(rng: random.Random) -> Iterator[list[int]]:
    """96 questions, each behind one of 16 documents."""
    texts = [tokens(rng, 300, 900) for _ in range(16)]
    yield from (rng.choice(texts) + tokens(rng, 8, 60) for _ in range(96))


def edits(rng: random.Random) -> Iterator[list[int]]:
    """A text 64 times; each time a few tokens somewhere in it are others."""
    text = tokens(rng, 1200, 1200)
    for _ in range(64):
        place = rng.randrange(len(text) - 12)
        text[place : place + 12] = tokens(rng, 12, 12)
        yield list(text)


TRACES: dict[str, Callable[[random.Random], Iterator[list[int]]]] = {"chats": chats, "documents": documents, "edits": edits}


def replay(manager: BlockManager, prompts: list[list[int]]) -> int:
    """Let prompts come one after the other: each is looked up, counts as computed, is entered, and leaves.

    Args:
        manager: with room for the longest of them.

    Returns:
        Tokens of the prompts that were found.
    """
    found = 0
    for seq_id, prompt in enumerate(prompts):
        seq = Sequence(seq_id, prompt, SamplingParams())
        manager.begin_step()
        seq.num_computed_tokens = hits = manager.allocate(seq)
        manager.take_copies()
        manager.cache_full_blocks(seq, len(prompt) - hits)
        seq.num_computed_tokens = len(prompt)
        manager.free(seq)
        found += hits
    return found
