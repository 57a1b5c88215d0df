"""Which of the drafted tokens stay: the target model's distribution decides, and what comes out follows it exactly.

Two ways to the same distribution, by what a draft was drawn from:

- *Drafts without a distribution* (from the text itself; of a greedy or a seeded request). At every place the target's own token
  is drawn as ever; drafts are accepted while they are that token. With greedy requests this is "accept while draft = arg-max".
  What comes out is what plain decoding draws, so a request with a `seed` gets the same tokens with and without speculation.
- *Drafts drawn from a distribution q*: accept x with probability min(1, p(x) / q(x)), and at the first rejection draw from the
  normalised max(0, p − q) instead (`rejection_sample`). It accepts more: 1 − ½·Σ|p − q| of the tokens, the most that any rule
  can (Leviathan et al., 2023, §2.3 and theorem 3.5).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from ...batching.sampling_params import SamplingParams
from ...batching.scheduler_output import Draft
from ...batching.sequence import Sequence
from .sampler import Sampler, TokenLogprobs
from .selection import BLOCK, draw


class Prefix:
    """The first `length` tokens of a sequence, as the sampler sees a sequence: what it was before the tokens behind.

    Args:
        guided: whether the form that the answer must have is minded; the guide goes through a sequence's tokens in their order.
    """

    __slots__ = ("eos_token_ids", "guide", "length", "num_prompt_tokens", "params", "sequence")

    def __init__(self, sequence: Sequence, length: int, guided: bool = True) -> None:
        self.sequence, self.length = sequence, length
        self.params: SamplingParams = sequence.params
        self.num_prompt_tokens = sequence.num_prompt_tokens
        self.eos_token_ids = sequence.eos_token_ids
        self.guide = sequence.guide if guided else None

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[: self.length]

    @property
    def output_token_ids(self) -> list[int]:
        return self.sequence.tokens[self.num_prompt_tokens : self.length]

    @property
    def num_output_tokens(self) -> int:
        return self.length - self.num_prompt_tokens


def rejection_sample(draft: list[int], draft_probs: Tensor, target_probs: Tensor, uniforms: Iterable[float]) -> list[int]:
    """Accept drafted tokens one after the other, and draw one more behind the last accepted.

    Leviathan et al., 2023, algorithm 1. Token i is accepted if ``uniforms[i] · q(x) < p(x)``, where a q(x) of 0 cannot be: it
    was drawn from q. The first that is not is replaced by a draw from ``max(0, p − q)``; if all are accepted, one more token is
    drawn from the last row of p. Each draw is `selection.draw` with ``uniforms[K]``.

    Args:
        draft: K tokens. draft_probs: [K, V], the distributions q that they were drawn from.
        target_probs: [K + 1, V], the target's distributions p at the same places and at the one behind them.
        uniforms: K + 1 independent numbers in [0, 1).

    Returns:
        The accepted tokens and the drawn one: 1 to K + 1 tokens.
    """
    *tests, last = uniforms
    for index, (token, u) in enumerate(zip(draft, tests, strict=True)):
        p, q = target_probs[index], draft_probs[index]
        if u * float(q[token]) >= float(p[token]):
            residual = (p - q).clamp_min_(0.0)
            # where p and q differ by rounding alone nothing may be left, and either is right
            return [*draft[:index], draw_one(residual if bool(residual.any()) else p, last)]
    return [*draft, draw_one(target_probs[len(draft)], last)]


def draw_one(weights: Tensor, u: float) -> int:
    """One token from weights [V] of any sum, at the number u in [0, 1): see `selection.draw`."""
    padded = functional.pad(weights, (0, -len(weights) % BLOCK))
    return int(draw(padded[None], torch.tensor([u], dtype=torch.float64, device=weights.device)))


def verify(
    sampler: Sampler, logits: Tensor, sequences: list[Sequence], drafts: dict[Sequence, Draft]
) -> tuple[list[list[int]], dict[Sequence, list[TokenLogprobs]]]:
    """New tokens of a step with drafts.

    Args:
        logits: for each sequence one row for every drafted token and one behind them, [N + all drafted tokens, V].
        sequences: the N sequences that get new tokens, with the drafted ones at the end of their `tokens`.

    Returns:
        For each sequence its accepted tokens and one more; and their log-probabilities, where its request wants them.
    """
    places = []
    for seq in sequences:
        num_drafted = len(drafts[seq].token_ids) if seq in drafts else 0
        places += [Prefix(seq, length) for length in range(len(seq.tokens) - num_drafted, len(seq.tokens) + 1)]
    own = sampler(logits, places)
    tokens: list[list[int]] = []
    logprobs: dict[Sequence, list[TokenLogprobs]] = {}
    start = 0
    for seq in sequences:
        draft = drafts.get(seq) or Draft([])
        stop = start + len(draft.token_ids) + 1
        if draft.probs is None:
            new = _while_equal(draft.token_ids, own.token_ids[start:stop])
            entries = [entry for entry in own.logprobs[start : start + len(new)] if entry is not None]
        else:
            target_probs = sampler.probabilities(logits[start:stop], places[start:stop])
            new = rejection_sample(draft.token_ids, draft.probs, target_probs, sampler.uniforms(stop - start))
            count = seq.params.logprobs
            entries = [] if count is None else sampler.prompt_logprobs(logits[start : start + len(new)], new, count)
        tokens.append(new)
        if entries:
            logprobs[seq] = entries
        start = stop
    return tokens, logprobs


def _while_equal(draft: list[int], own: list[int]) -> list[int]:
    """The target's own tokens up to the first that is not the drafted one; that one included."""
    count = next((index for index, token in enumerate(draft) if own[index] != token), len(draft))
    return own[: count + 1]
