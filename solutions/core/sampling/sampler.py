"""From logits to tokens: log-probabilities, greedy choice and random sampling for a whole batch.

Every step goes one way: raw log-probabilities of the unmodified logits; the bans, bias and penalties of
`logits_processors.py`; then the arg-max for greedy rows, or temperature, min-p, top-k, top-p and a draw.

A draw inverts the cumulative distribution at ONE uniform number a row, instead of making noise for every token. For a
request with a `seed` that number is a hash of (seed, output tokens so far): it gives the same tokens whatever else is
in the batch, whichever row is its own, and after a preemption. Requests without a seed share the engine's generator.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from ...batching.sampling_params import SamplingParams
from ..overlap.lookahead import Meanwhile
from ..platform.transfer import OnTheWay, to_device
from . import selection_cpu
from .logits_processors import LogitsProcessors, Sampled
from .selection import BLOCK, Filters, argmax, draw, ranked

MAX_TEMPERATURE = 1e30
"""Where all tokens are equally likely. Infinity, which a larger one may be in float32, would divide minus infinity to NaN."""
MIN_MIN_P = 1e-37
"""A smaller `min_p` is 0 in float32."""
LOGPROB_ROWS = 64
"""Rows whose log-probabilities are worked out at once, which bounds the memory for those of a long prompt."""


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: entry 0 is the token that is there, then come the n most likely ones in
    descending order, which may include it again, with the same values.

    A rank is 1 + the number of tokens strictly more likely; tokens that tie share it. Which of them are among the n, and their
    order, goes by their ids.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class SamplerOutput:
    """For each row its token, and log-probabilities where the request wants them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(slots=True)
class _Rows:
    """Some rows of a tensor; `index` is None when they are all of them, which saves copies."""

    places: list[int]
    index: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        return x if self.index is None else x.index_select(0, self.index)

    def put(self, x: Tensor, values: Tensor) -> None:
        if self.index is None:
            x.copy_(values)
        else:
            x.index_copy_(0, self.index, values)


@dataclass(slots=True)
class _Plan:
    """What stays the same while the batch does."""

    sequences: list[Sampled]
    processors: LogitsProcessors | None
    greedy: _Rows
    random: _Rows
    temperature: Tensor | None
    """[R, 1] of the random rows; None: 1 for all."""
    plain: _Rows
    """Those random rows without min-p, top-k and top-p."""
    filtered: _Rows
    """The other random rows."""
    filters: Filters
    logprobs: list[tuple[int, int]]
    """(row, n) of the requests that want log-probabilities."""


def uniform(seed: int, *counters: int) -> float:
    """A number in [0, 1) of 53 random bits, a function of nothing but its arguments: a counter-based generator (Salmon
    et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with BLAKE2b as its mixing function."""
    digest = hashlib.blake2b(repr((seed, *counters)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Sampler:
    """Chooses the next token of every sequence in a batch."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        """
        Args:
            vocab_size: V, the length of a row of logits.
            seed: of the generator that requests without a seed share.
        """
        self.vocab_size = vocab_size
        self._width = -(-vocab_size // BLOCK) * BLOCK
        self._generator = random.Random(seed)
        self._plan: _Plan | None = None
        self._padded = self._scratch = torch.empty(0, self._width)

    @torch.inference_mode()
    def __call__(self, logits: Tensor, sequences: Many[Sampled], meanwhile: Meanwhile | None = None) -> SamplerOutput:
        """Sample one token a row.

        Args:
            logits: [N, V] of any float dtype; they are left as they are.
            sequences: row i belongs to ``sequences[i]``. Token ids in its parameters must be below V.
            meanwhile: called before the tokens are waited for.
        """
        if not sequences:
            return SamplerOutput([], [])
        plan = self._plan_of(sequences, logits.device)
        if plan.processors is None and not plan.random.places:
            tokens = self._greedy(logits)
        else:
            tokens = self._sample(self._process(logits, plan), plan)
        columns: tuple[Tensor, ...] = ()
        if plan.logprobs:
            rows = to_device([row for row, _ in plan.logprobs], torch.int64, logits.device)
            columns = self._columns(logits[rows], tokens[rows], max(n for _, n in plan.logprobs))
        result = OnTheWay(tokens, *columns)
        if meanwhile is not None:
            meanwhile(tokens)
        token_ids, *lists = (tensor.tolist() for tensor in result.wait())
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        for (row, n), *entry in zip(plan.logprobs, *lists, strict=True):
            logprobs[row] = TokenLogprobs(*(column[: n + 1] for column in entry))
        return SamplerOutput(token_ids, logprobs)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, target_token_ids: list[int] | Tensor, n: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens and of the most likely ones.

        Args:
            logits: [P, V] at P positions.
            target_token_ids: [P] the token that follows each position.
            n: how many of the most likely tokens.
        """
        columns = self._columns(logits, to_device(target_token_ids, torch.int64, logits.device), n)
        return [TokenLogprobs(*entry) for entry in zip(*(column.tolist() for column in columns), strict=True)]

    def _columns(self, logits: Tensor, targets: Tensor, n: int) -> tuple[Tensor, ...]:
        """What `TokenLogprobs` holds of each of P positions: ids, log-probabilities and ranks, each [P, 1 + n]."""
        parts = []
        for start in range(0, len(logits), LOGPROB_ROWS):
            x = self._copy(logits[start : start + LOGPROB_ROWS])
            ids = targets[start : start + LOGPROB_ROWS, None]
            if n:
                ids = torch.cat((ids, ranked(x, n)), 1)  # [P, 1 + n]
            values = x.gather(1, ids)
            ranks = 1 + (values[:, None, 1:] > values[:, :, None]).sum(-1)
            ranks[:, 0] = 1 + (x > values[:, :1]).sum(-1)
            log_probs = torch.log_softmax(x, -1, out=self._scratch[: len(x)]).gather(1, ids)
            parts.append((ids, log_probs, ranks))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @torch.inference_mode()
    def probabilities(self, logits: Tensor, sequences: Many[Sampled]) -> Tensor:
        """The distributions that `__call__` draws from: [N, V] float32; a greedy row has a single 1."""
        plan = self._plan_of(sequences, logits.device)
        x = self._process(logits, plan)
        result = torch.zeros_like(x)
        if plan.greedy.places:
            result.scatter_(1, argmax(x)[:, None], 1.0)
        if plan.random.places:
            scaled = self._scale(plan.random.take(x), plan)
            if plan.filtered.places:
                part = plan.filtered.take(scaled)
                plan.filters.mask(part, self._scratch)
                plan.filtered.put(scaled, part)
            plan.random.put(result, scaled.softmax(-1))
        return result[:, : self.vocab_size]

    def uniforms(self, count: int) -> list[float]:
        """Numbers in [0, 1) from the generator that requests without a seed share."""
        return [self._generator.random() for _ in range(count)]

    def _sample(self, x: Tensor, plan: _Plan) -> Tensor:
        """[N] tokens from processed logits [N, W], which are used up."""
        tokens = torch.empty(len(x), dtype=torch.int64, device=x.device)
        if plan.greedy.places:
            plan.greedy.put(tokens, argmax(plan.greedy.take(x)))
        if plan.random.places:
            u = to_device([self._uniform(plan.sequences[row]) for row in plan.random.places], torch.float64, x.device)
            scaled = self._scale(plan.random.take(x), plan)
            drawn = torch.empty(len(scaled), dtype=torch.int64, device=x.device)
            if plan.plain.places:
                part = plan.plain.take(scaled)
                weights = torch.softmax(part, -1, out=self._scratch[: len(part)])
                plan.plain.put(drawn, draw(weights, plan.plain.take(u)))
            if plan.filtered.places:
                part = plan.filtered.take(scaled)
                plan.filtered.put(drawn, plan.filters.draw(part, plan.filtered.take(u), self._scratch))
            plan.random.put(tokens, drawn)
        return tokens

    def _greedy(self, logits: Tensor) -> Tensor:
        """[N] the most likely tokens, the first among equals, straight from the logits."""
        if logits.device.type != "cpu":
            return logits.argmax(-1)
        if selection_cpu.supports(logits):
            return selection_cpu.native_argmax(logits)
        # bfloat16 is copied: torch's reductions are far faster in float32, the copy included.
        ready = logits.dtype is torch.float32 and logits.shape[1] == self._width and logits.is_contiguous()
        return argmax(logits if ready else self._copy(logits))

    def _process(self, logits: Tensor, plan: _Plan) -> Tensor:
        """The logits [N, W] before temperature."""
        x = self._copy(logits)
        if plan.processors is not None:
            plan.processors(x)
        return x

    def _copy(self, logits: Tensor) -> Tensor:
        """`logits` [N, V] as float32 [N, W], padded with -inf, in a buffer that the next call overwrites.

        Buffers are kept because fresh memory of this size is paid for page by page, which takes longer than filling it.
        """
        if len(self._padded) < len(logits) or self._padded.device != logits.device:
            self._padded = torch.full((len(logits), self._width), -math.inf, device=logits.device)
            self._scratch = torch.empty_like(self._padded)
        padded = self._padded[: len(logits)]
        padded[:, : self.vocab_size].copy_(logits)
        return padded

    def _uniform(self, seq: Sampled) -> float:
        seed = seq.params.seed
        return self._generator.random() if seed is None else uniform(seed, seq.num_output_tokens)

    @staticmethod
    def _scale(x: Tensor, plan: _Plan) -> Tensor:
        return x if plan.temperature is None else x.div_(plan.temperature)

    def _plan_of(self, sequences: Many[Sampled], device: torch.device) -> _Plan:
        """The plan for this batch: the last one, if the batch is the same."""
        last = self._plan
        if last is not None and last.sequences == sequences:
            return last
        params = [seq.params for seq in sequences]
        greedy = [row for row, p in enumerate(params) if p.greedy]
        random_rows = [row for row, p in enumerate(params) if not p.greedy]
        chosen = [params[row] for row in random_rows]
        scales = [[min(p.temperature, MAX_TEMPERATURE)] for p in chosen]
        has_filter = [p.min_p > 0.0 or p.top_p < 1.0 or self._has_top_k(p) for p in chosen]
        plain = [place for place, wanted in enumerate(has_filter) if not wanted]
        filtered = [place for place, wanted in enumerate(has_filter) if wanted]

        def rows(places: list[int], count: int) -> _Rows:
            return _Rows(places, None if len(places) == count else to_device(places, torch.int64, device))

        wanted = LogitsProcessors.wanted(sequences)
        before = last.processors if last else None
        self._plan = _Plan(
            sequences=list(sequences),
            processors=LogitsProcessors(sequences, self._width, device, before, self.vocab_size) if wanted else None,
            greedy=rows(greedy, len(params)),
            random=rows(random_rows, len(params)),
            temperature=None if scales == [[1.0]] * len(scales) else to_device(scales, torch.float32, device),
            plain=rows(plain, len(chosen)),
            filtered=rows(filtered, len(chosen)),
            filters=self._filters([chosen[place] for place in filtered], device),
            logprobs=[(row, p.logprobs) for row, p in enumerate(params) if p.logprobs is not None],
        )
        return self._plan

    def _filters(self, params: list[SamplingParams], device: torch.device) -> Filters:
        top_k = [p.top_k if self._has_top_k(p) else self._width for p in params]
        min_p = [p.min_p if p.min_p >= MIN_MIN_P else 0.0 for p in params]
        return Filters(
            min_p=to_device(min_p, torch.float32, device),
            top_k=to_device(top_k, torch.int64, device),
            top_p=to_device([p.top_p for p in params], torch.float64, device),
            need_mass=any(
                p.top_p < 1.0 and low == 0.0 and not self._has_top_k(p) for p, low in zip(params, min_p, strict=True)
            ),
        )

    def _has_top_k(self, params: SamplingParams) -> bool:
        return 0 < params.top_k < self.vocab_size
