"""Masks of the tokens that may come next in an answer of a given form.

An automaton over the vocabulary goes along with each such sequence. At each step it says which tokens may follow; all others
get a logit of minus infinity, and the sampler draws from what is left. Source: Dong et al., "XGrammar", 2024.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..platform.transfer import to_device

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar

TOKEN_SECONDS = 0.0125
"""Processor time that each token of an automaton may take in the long run; 0.0003 is usual."""
SLACK_SECONDS = 1.0
"""Time beyond that, over all tokens, after which the answer is cut off, because the whole batch waits for it."""


class Guide:
    """Says which tokens may come next in one sequence.

    Args:
        give_up: called, with the number of certain output tokens, when the automaton has held up everybody for too long.
    """

    def __init__(self, grammar: CompiledGrammar, give_up: Callable[[int], None] | None = None) -> None:
        from xgrammar import GrammarMatcher

        self._matcher = GrammarMatcher(grammar)
        self._seen = 0
        """Output tokens that the automaton has gone through."""
        self._give_up = give_up
        self._excess = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the answer is complete, with the token that ends it."""
        return self._matcher.is_terminated()

    def allow(self, outputs: list[list[int]], masks: Tensor) -> None:
        """Say which tokens may follow each of several outputs, as `_follow` does, and take the time."""
        before = time.thread_time()
        self._follow(outputs, masks)
        self._excess = max(0.0, self._excess + time.thread_time() - before - TOKEN_SECONDS * len(outputs))
        if self._excess > SLACK_SECONDS and self._give_up is not None:
            self._give_up(len(outputs[0]))

    def _follow(self, outputs: list[list[int]], masks: Tensor) -> None:
        """Say which tokens may follow each of several outputs, each of which is the one before and one token more.

        Only the first output is certain: the automaton goes on along what is new of it, and stays there; it is the same as last
        time, or longer. The others end in drafts, which the automaton forgets again, so that it is behind the first output when
        this returns. After a draft that does not fit the form any token may come, also behind all drafts that follow it: that
        draft is rejected anyway. So may any behind an answer that has ended.

        Args:
            outputs: R lists of output tokens, one or more.
            masks: [R, words] int32, as `forbid` reads them; all of it is overwritten.
        """
        masks.fill_(-1)
        for token in outputs[0][self._seen :]:
            self._matcher.accept_token(token)
        self._seen = len(outputs[0])
        trial = 0
        for row, output in enumerate(outputs):
            if row:
                if self._matcher.is_terminated() or not self._matcher.accept_token(output[-1]):
                    break
                trial += 1
            if not self._matcher.is_terminated():
                self._matcher.fill_next_token_bitmask(masks, row)
        if trial:
            self._matcher.rollback(trial)


def forbid(logits: Tensor, guided: list[tuple[Guide, list[tuple[int, Any]]]], vocab_size: int) -> None:
    """Give every token that may not come next a logit of minus infinity, and change no other.

    The guides' masks have a bit for each token: that of token t is bit t mod 32 of word t // 32, the lowest bit first; set, the
    token may come. In the last word there may be bits of no token, whatever they say.

    Args:
        logits: [N, W], changed in place. Columns from `vocab_size` on are no tokens, and stay; so do rows without a guide.
        guided: each guide with its rows and their sequences, of which each has a token more than the one before.
        vocab_size: V, at most W.
    """
    rows = [row for _, places in guided for row, _ in places]
    masks = torch.empty(len(rows), -(-vocab_size // 32), dtype=torch.int32)
    start = 0
    for guide, places in guided:
        guide.allow([seq.output_token_ids for _, seq in places], masks[start : start + len(places)])
        start += len(places)
    bits = (
        to_device(masks, torch.int32, logits.device)[:, :, None] >> torch.arange(32, device=logits.device, dtype=torch.int32)
        & 1
    )
    forbidden = bits.flatten(1)[:, :vocab_size] == 0  # [R, V]
    for index, row in enumerate(rows):
        logits[row, :vocab_size].masked_fill_(forbidden[index], -torch.inf)


def by_guide(sequences: Sequence[Any]) -> list[tuple[Guide, list[tuple[int, Any]]]]:
    """Each guide of a step's sequences once, with its rows and their sequences.

    Guides come in the order of their first rows, and rows in their own, which need not lie side by side. Sequences on trial are
    beside their own, and have the same guide, the same object. Those without one are left out.

    Args:
        sequences: of the rows 0, 1, …; each has a `guide`, or None.
    """
    found: dict[Guide, list[tuple[int, Any]]] = {}
    for row, seq in enumerate(sequences):
        if seq.guide is not None:
            found.setdefault(seq.guide, []).append((row, seq))
    return list(found.items())
