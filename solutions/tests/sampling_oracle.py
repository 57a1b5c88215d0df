"""What sampling has to compute, one row at a time in plain Python and float64, for the tests of the sampler."""

from __future__ import annotations

import numpy as np

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence


def sequence(
    params: SamplingParams, prompt: list[int], output: list[int] = (), *, seq_id: int = 0, eos: tuple[int, ...] = ()
) -> Sequence:
    """A sequence in the middle of its generation."""
    seq = Sequence(seq_id, list(prompt), params, eos_token_ids=eos)
    seq.tokens.extend(output)
    return seq


def processed_logits(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    """Bans, bias and penalties on one row [V]."""
    params, output = seq.params, seq.tokens[seq.num_prompt_tokens :]
    row = [float(value) for value in logits]
    if params.allowed_token_ids is not None:
        row = [value if token in params.allowed_token_ids else -np.inf for token, value in enumerate(row)]
    for word in params.bad_words_token_ids:
        head = list(word[:-1])
        if not head or (len(output) >= len(head) and output[-len(head) :] == head):
            row[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in [*seq.eos_token_ids, *params.stop_token_ids]:
            row[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    for token in set(seq.tokens):
        r = params.repetition_penalty
        row[token] = row[token] / r if row[token] > 0 else row[token] * r
    for token in set(output):
        row[token] -= params.frequency_penalty * output.count(token)
        row[token] -= params.presence_penalty
    return np.array(row)


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens of a row [V], temperature applied, min-p, top-k and top-p leave: straight from their definitions."""
    p = np.exp(logits - logits.max())
    keep = p >= params.min_p * (1 - 1e-9)
    more_likely = logits[None, :] > logits[:, None]  # [token, other]
    if params.top_k > 0:
        keep &= (more_likely & keep[None, :]).sum(1) < params.top_k
    if params.top_p < 1.0:
        mass = (more_likely * (p * keep)[None, :]).sum(1) / (p * keep).sum()
        keep &= mass < params.top_p
    return keep


def distribution(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    """The probabilities [V] with which the next token of `seq` must come."""
    row = processed_logits(np.asarray(logits, dtype=np.float64), seq)
    if seq.params.temperature < 1e-5:
        return (np.arange(len(row)) == row.argmax()).astype(float)
    row = row / seq.params.temperature
    p = np.exp(row - row.max()) * kept(row, seq.params)
    return p / p.sum()


def chi_square_z(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic of `counts` lies above its mean (Wilson-Hilferty); counts
    where the probability is 0 give infinity. Cells that expect fewer than 10 are pooled."""
    if counts[probabilities == 0].any():
        return np.inf
    expected = probabilities * counts.sum()
    small = expected < 10
    observed, expected = (np.append(x[~small], x[small].sum()) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    df = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum() / max(df, 1)
    return ((statistic ** (1 / 3)) - (1 - 2 / (9 * df))) / np.sqrt(2 / (9 * df)) if df else 0.0
