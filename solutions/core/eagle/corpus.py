"""Text that a model writes itself, with the hidden states that it had while it wrote: what a head learns from.

Both come from one run of the engine: a step's hidden states are taken as they are computed, so nothing is computed twice. The
text is kept in parts, each a file that is whole or not there; what an interrupted run has written is not written again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...batching.continuous_batch import FlatBatch
from ...batching.sampling_params import SamplingParams
from ...batching.sequence import Sequence
from ..engine import LLM
from ..input import Prompt
from .questions import make_questions

PART = 128
"""Answers in a part, which are written at once."""


@dataclass(frozen=True, slots=True)
class Text:
    """One prompt with its answer.

    Attributes:
        tokens: [n + 1] int64. features: [n, hidden], of all but the last token. prompt_len: tokens of the prompt.
    """

    tokens: Tensor
    features: Tensor
    prompt_len: int


class FeatureTap:
    """Keeps the hidden states of every sequence that an engine computes, as the worker's listener."""

    def __init__(self) -> None:
        self.rows: dict[Sequence, dict[int, Tensor]] = {}

    def __call__(self, batch: FlatBatch, hidden: Tensor) -> None:
        kept, positions = hidden.clone(), batch.positions.tolist()
        for seq, (start, end) in zip(batch.sequences, pairwise(batch.query_start_loc.tolist()), strict=True):
            rows = self.rows.setdefault(seq, {})
            rows |= {positions[row]: kept[row] for row in range(start, end)}

    def take(self) -> list[Text]:
        """What was kept, by the sequences' numbers; nothing is kept any more."""
        texts = []
        for seq in sorted(self.rows, key=lambda seq: seq.seq_id):
            rows = self.rows[seq]
            features = torch.stack([rows[position] for position in range(len(seq.tokens) - 1)])
            texts.append(Text(torch.tensor(seq.tokens), features, seq.num_prompt_tokens))
        self.rows.clear()
        return texts


def write_corpus(llm: LLM, folder: Path, num_answers: int, max_tokens: int, temperature: float, seed: int) -> Iterator[int]:
    """Write what is missing of a corpus, part by part; gives the number of answers in each part that is there.

    Args:
        llm: writes; its prefix cache must be off, or features would be missing.
        max_tokens: of an answer. temperature: 0 for every other one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, tap = llm.get_tokenizer(), FeatureTap()
    questions = make_questions(num_answers, seed)
    for first in range(0, num_answers, PART):
        path, asked = folder / f"part-{first // PART:04d}.safetensors", questions[first : first + PART]
        if not path.exists():
            chats = [[{"role": "user", "content": each}] for each in asked]
            ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
            prompts: list[Prompt] = [{"prompt_token_ids": each} for each in ids]
            params = [
                SamplingParams(max_tokens=max_tokens, temperature=temperature * (index % 2), seed=seed + first + index)
                for index in range(len(asked))
            ]
            llm.llm_engine.executor.worker.listener = tap
            llm.generate(prompts, params, use_tqdm=False)
            save_part(tap.take(), path)
        yield len(asked)


def save_part(texts: list[Text], path: Path) -> None:
    """Write a part so that nobody sees half of one."""
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]),
        "features": torch.cat([text.features for text in texts]).to(torch.bfloat16),
        "lengths": torch.tensor([[len(text.tokens), text.prompt_len] for text in texts]),
    }
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def load_corpus(folder: Path) -> list[Text]:
    """All parts that are there, in order."""
    texts = []
    for path in sorted(folder.glob("part-*.safetensors")):
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        tokens = tensors["tokens"].split([length for length, _ in lengths])
        features = tensors["features"].split([length - 1 for length, _ in lengths])
        texts += [Text(ids, rows, prompt_len) for ids, rows, (_, prompt_len) in zip(tokens, features, lengths, strict=True)]
    return texts
