"""Which rows of a step's hidden states are asked for: those that say what comes next, and those of a prompt that is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .continuous_batch import FlatBatch
from .pooling import PooledSequence
from .sequence import Sequence


@dataclass(slots=True)
class PromptSpan:
    """Prompt tokens of one sequence whose log-probabilities are wanted of this step.

    Attributes:
        first: row of the batch whose hidden state predicts the first of them. position: of that token in its sequence.
        targets: the tokens. num_likeliest: how many of the likeliest tokens are wanted with each.
    """

    seq: Sequence
    first: int
    position: int
    targets: list[int]
    num_likeliest: int


def prompt_spans(batch: FlatBatch) -> list[PromptSpan]:
    """The prompt tokens in this step of the sequences whose request wants their log-probabilities."""
    spans = []
    for index, seq in enumerate(batch.sequences):
        wanted = seq.params.prompt_logprobs
        if wanted is None or seq.finished or seq.num_computed_tokens >= seq.num_prompt_tokens - 1 or seq.index > 0:
            continue
        first, last = batch.query_start_loc[index : index + 2].tolist()
        position = seq.num_computed_tokens + 1  # the token at position p is predicted by the hidden state at p - 1
        targets = seq.tokens[position : min(position + last - first, seq.num_prompt_tokens)]
        spans.append(PromptSpan(seq, first, position, targets, wanted))
    return spans


def pool(batch: FlatBatch, hidden: Tensor) -> None:
    """Give the sequences that are pooled their part of a step's hidden states [T, hidden]."""
    for index, seq in enumerate(batch.sequences):
        if isinstance(seq, PooledSequence):
            first, last = batch.query_start_loc[index : index + 2].tolist()
            seq.take(hidden[first:last])


def sampling_rows(batch: FlatBatch) -> NDArray[np.int64]:
    """The rows of the batch whose logits say what comes next: the last of each sampled sequence, and of one with drafts as many
    rows before that as it has drafted tokens."""
    drafts = batch.decision.drafts
    if not drafts:
        return batch.logits_indices
    counts = [len(drafts[seq].token_ids) if seq in drafts else 0 for seq in batch.sampled]
    return np.concatenate([np.arange(last - n, last + 1) for last, n in zip(batch.logits_indices, counts, strict=True)])


def logit_calls(batch: FlatBatch) -> list[NDArray[np.int64]]:
    """The rows of the batch whose logits `Worker.execute` computes, call after call."""
    calls = [np.arange(span.first, span.first + len(span.targets)) for span in prompt_spans(batch)]
    return [*calls, sampling_rows(batch)] if batch.sampled else calls
