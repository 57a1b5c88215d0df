"""What a request does to its logits before a token is drawn: bans, bias, penalties, a form; each only where it is asked for.

Everything works in place on one float32 tensor [N, W]: the logits of a step, each row padded to whole blocks of the
vocabulary (see `selection.py`). Only rows that ask for an operation pay for it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...batching.sampling_params import SamplingParams
from ...batching.sequence import TokenGuide
from ..platform.transfer import to_device
from ..structured.guide import by_guide, forbid

BANNED = -1e30
"""Logit of a token that may not come next. It is finite, so that where every allowed token is banned one of them comes
all the same, and none that `allowed_token_ids` leaves out (-inf)."""
MAX_PENALTY = 1e25
"""Of repetition; the least is one through this. In float32 more would make logits infinite, and then no numbers."""


class Sampled(Protocol):
    """What sampling reads of a sequence: of all of it, or with drafts of its beginning."""

    params: SamplingParams
    guide: TokenGuide | None
    num_prompt_tokens: int
    eos_token_ids: tuple[int, ...]

    @property
    def tokens(self) -> list[int]: ...

    @property
    def output_token_ids(self) -> list[int]: ...

    @property
    def num_output_tokens(self) -> int: ...


class TokenCounts:
    """The distinct tokens of a sequence, and how often each is in its output: kept up to date as the sequence grows."""

    __slots__ = ("_place", "_seen", "counts", "sequence", "token_ids")

    def __init__(self, sequence: Sampled) -> None:
        self.sequence = sequence
        self.token_ids = array("q")
        self.counts = array("f")  # 0: only in the prompt
        self._place: dict[int, int] = {}
        self._seen = 0

    def update(self) -> None:
        """Count the tokens that came since the last call, prompt and output, and no token twice.

        `token_ids` gets each token once, in the order in which they first came; `counts` has beside it how often it is in the
        output. The work grows with the tokens that came, not with the sequence.
        """
        # Hint: Take one row and do each thing with a pencil: which index does it touch, and what must stay as it is?
        # Then ask what changes if this row is the third of five.
        raise NotImplementedError("Stage 2 · Task 2.10: TokenCounts.update, see stages/stage2_scheduler/GUIDE.md#task-2-10")


class LogitsProcessors:
    """The operations that one batch asks for, in vLLM's order: structured_output, allowed_token_ids, bad_words, min_tokens,
    logit_bias, repetition penalty, frequency penalty, presence penalty.

    Built anew when the batch changes; sequences that stay keep their token counts.
    """

    def __init__(
        self, sequences: Many[Sampled], width: int, device: torch.device, before: LogitsProcessors | None = None,
        vocab_size: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            sequences: row i of the logits belongs to ``sequences[i]``.
            width: W, elements of a row, of which the first `vocab_size` are tokens (None: all).
            before: the processors of the last batch.
        """
        self._width, self._device, self._vocab_size = width, device, vocab_size or width
        self._guided = by_guide(sequences)
        rows = list(enumerate(sequences))
        allowed = [(i, s.params.allowed_token_ids) for i, s in rows if s.params.allowed_token_ids is not None]
        self._allowed_rows = to_device([i for i, _ in allowed], torch.int64, device)
        self._allowed = to_device([i * width + t for i, tokens in allowed for t in tokens], torch.int64, device)
        self._bad_words = [(i, s) for i, s in rows if s.params.bad_words_token_ids]
        self._min_tokens = [(i, s) for i, s in rows if s.params.min_tokens]
        biases = [(i * width + t, bias) for i, s in rows for t, bias in (s.params.logit_bias or {}).items()]
        self._biased = to_device([index for index, _ in biases], torch.int64, device)
        self._bias = to_device([bias for _, bias in biases], torch.float32, device)
        known = before._counts if before else {}
        penalised = [(i, s) for i, s in rows if _has_penalty(s)]
        self._penalised_rows = [i for i, _ in penalised]
        self._counts: dict[Sampled, TokenCounts] = {s: known.get(s) or TokenCounts(s) for _, s in penalised}
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        penalties = np.array([[getattr(s.params, name) for _, s in penalised] for name in names])
        penalties[0] = penalties[0].clip(1 / MAX_PENALTY, MAX_PENALTY)
        self._penalties = list(penalties.astype(np.float32))

    @staticmethod
    def wanted(sequences: Many[Sampled]) -> bool:
        """Whether any of `sequences` asks for one of these operations."""
        return any(
            s.guide is not None
            or p.allowed_token_ids is not None
            or p.bad_words_token_ids
            or p.min_tokens
            or p.logit_bias
            or _has_penalty(s)
            for s in sequences
            for p in (s.params,)
        )

    def __call__(self, logits: Tensor) -> None:
        """Change `logits` [N, W] float32, contiguous, in place."""
        if self._guided:
            forbid(logits, self._guided, self._vocab_size)
        flat = logits.view(-1)
        if len(self._allowed_rows):
            kept = flat[self._allowed]
            logits.index_fill_(0, self._allowed_rows, -math.inf)
            flat[self._allowed] = kept
        if (self._bad_words or self._min_tokens) and (banned := list(self._banned())):
            index = to_device(banned, torch.int64, self._device)
            flat[index] = flat[index].clamp(max=BANNED)
        if len(self._biased):
            flat.index_add_(0, self._biased, self._bias)
        if self._penalised_rows:
            self._penalise(flat)

    def _banned(self) -> Iterator[int]:
        """Flat indices, row · W + token, of the tokens that may not come next.

        - The last token of a bad word (a list of tokens), where the output ends with all of the word before it. What the
          prompt ends with is no part of a word. Before a word of one token nothing has to stand.
        - While the output has fewer than `min_tokens` tokens: end-of-sequence tokens, also of a request that ignores them, and
          its stop tokens.

        `_bad_words` and `_min_tokens` list (row, sequence) of those that ask for it. An index may come more than once.
        """
        raise NotImplementedError(
            "Stage 2 · Task 2.10: LogitsProcessors._banned, see stages/stage2_scheduler/GUIDE.md#task-2-10"
        )

    def _penalise(self, flat: Tensor) -> None:
        """The penalties, in place, on no logits but those of tokens that a sequence has, whose counts come first.
        In this order, on each token of prompt and output:

        - repetition (Keskar et al., "CTRL", 2019, §4.1): a logit above 0 is divided by it, any other is multiplied;
        - frequency: subtracted as often as the token is in the output;
        - presence: subtracted once if it is there at all.

        -inf stays -inf. Any other logit stays finite: what repetition makes of it is kept between `BANNED` and -`BANNED`.

        Entry n of `_penalised_rows`, of `_counts` and of each of the three arrays in `_penalties` (repetition, frequency,
        presence) is one sequence's.

        Args:
            flat: [N · W] the logits, row behind row.
        """
        raise NotImplementedError(
            "Stage 2 · Task 2.10: LogitsProcessors._penalise, see stages/stage2_scheduler/GUIDE.md#task-2-10"
        )


def _has_penalty(seq: Sampled) -> bool:
    params = seq.params
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
