"""Which tokens of drafts that branch stay: a walk along what the target itself draws. Keys and values move to their places.

What comes out is what plain decoding draws: with a `seed`, and greedy, token for token; else in distribution. See
`token_tree.accepted_path`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...batching.continuous_batch import FlatBatch
from ...batching.scheduler_output import Draft
from ...batching.sequence import Sequence
from ...batching.token_tree import accepted_path
from ...batching.tree_rows import TreeDraft, moves
from ...memory.cache_engine import CacheEngine
from .rejection_sampler import Prefix
from .sampler import Sampler, TokenLogprobs


class Branch(Prefix):
    """A sequence up to a node of its tree, as the sampler sees a sequence.

    Args:
        length: tokens of the sequence up to the root. branch: those behind it, up to the node.
    """

    __slots__ = ("_branch", "_root")

    def __init__(self, sequence: Sequence, length: int, branch: list[int]) -> None:
        super().__init__(sequence, length + len(branch))
        self._root, self._branch = length, branch

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[: self._root] + self._branch

    @property
    def output_token_ids(self) -> list[int]:
        return self.sequence.tokens[self.num_prompt_tokens : self._root] + self._branch


def verify_trees(
    sampler: Sampler, logits: Tensor, batch: FlatBatch, cache: CacheEngine
) -> tuple[list[list[int]], dict[Sequence, list[TokenLogprobs]]]:
    """New tokens of a step some of whose drafts are trees, and none of which was drawn from a distribution. The nodes that stay
    are entered in each draft (`TreeDraft.kept`), and their keys and values moved to where their positions have them.

    Args:
        logits: for each of ``batch.sampled`` one row for its last token and one for every drafted one, in their order.

    Returns:
        As `rejection_sampler.verify`.
    """
    drafts = batch.decision.drafts
    every = [drafts.get(seq) or Draft([]) for seq in batch.sampled]
    shapes = [d.tree.parents if isinstance(d, TreeDraft) else range(-1, len(d.token_ids)) for d in every]
    places: list[Branch] = []
    for seq, draft, parents in zip(batch.sampled, every, shapes, strict=True):
        branches: list[list[int]] = [[]]
        for token, parent in zip(draft.token_ids, parents[1:], strict=True):
            branches.append([*branches[parent], token])
        root = len(seq.tokens) - len(draft.token_ids)
        places += [Branch(seq, root, branch) for branch in branches]
    own = sampler(logits, places)
    tokens: list[list[int]] = []
    logprobs: dict[Sequence, list[TokenLogprobs]] = {}
    start = 0
    for seq, draft, parents in zip(batch.sampled, every, shapes, strict=True):
        path = accepted_path(parents, draft.token_ids, own.token_ids[start : start + len(parents)])
        if isinstance(draft, TreeDraft):
            draft.kept[:] = path
        rows = [start, *(start + node for node in path)]
        tokens.append([own.token_ids[row] for row in rows])
        if entries := [entry for entry in (own.logprobs[row] for row in rows) if entry is not None]:
            logprobs[seq] = entries
        start += len(parents)
    sources, targets = moves(batch)
    if sources:
        _move(cache, *(torch.from_numpy(batch.slot_mapping[rows]) for rows in (sources, targets)))
    return tokens, logprobs


def _move(cache: CacheEngine, sources: Tensor, targets: Tensor) -> None:
    """Copy keys and values, and the scales that they may have, from slots to other slots in every layer."""
    for layer in (*cache.kv_caches, *cache.kv_scales):
        slots = layer.flatten(1, 2)
        slots[:, targets] = slots[:, sources]  # all are read before any is written
