"""Task 1.8 ★: attention over cached latents, the absorbed way and the plain one, against each head's own keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stages.attention.latent_attention import LatentBackend, Prompt, _prompt
from stages.attention.paged_attention import AttentionMetadata
from stages.course.fixtures.checks import check_close, check_equal
from stages.models.config.latent import Latent
from stages.models.mla import LatentAttention, UpProjection
from stages.parallelism.tensor_parallel import Shard

HEADS, SCALE = 3, 0.23
WIDE = Latent(rank=10, query_rank=None, still=5, turning=4, value=7, interleaved=False)
"""Every size is another one."""
WIDER = Latent(rank=6, query_rank=None, still=3, turning=2, value=8, interleaved=False)
"""A head's values are wider than its keys."""
NOBODYS = 1e4
"""What stands in slots that nobody may read."""
NEVER = 1000
"""No step has so many tokens of a sequence."""


class Heads(LatentAttention):
    """The attention of a layer that was never loaded, with random weights for what makes keys and values of latents."""

    def __init__(self, latent: Latent, layer: int) -> None:
        nn.Module.__init__(self)
        self.latent, self.layer, self.scale, self.num_heads = latent, layer, SCALE, HEADS
        self.kv_b_proj = UpProjection(latent, Shard(HEADS, 0, HEADS))
        generator = torch.Generator().manual_seed(7)
        weight = torch.randn(self.kv_b_proj.weight.shape, generator=generator) * 0.5
        self.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)


@dataclass
class Step:
    """Sequences whose vectors lie scattered over a cache of two layers, and what the second layer must say of them."""

    heads: Heads
    still: Tensor
    turned: Tensor
    vectors: Tensor
    metadata: AttentionMetadata
    expected: Tensor
    written: Tensor

    def run(self, plain_from: int = NEVER) -> Tensor:
        """What `attend` says. Sequences with so many tokens in the step go the plain way."""
        backend = self.metadata.backend
        backend.plain_from = plain_from
        self.metadata.plan = backend.plan(self.metadata, None)
        return self.heads.attend(self.still, self.turned, self.vectors, self.metadata)


def by_head(heads: Heads, query: Tensor, vectors: Tensor) -> Tensor:
    """What attention means: each head's keys and values written out, one token at a time, in float64.

    Args:
        query: [Q, H, still + turning], of the last Q tokens. vectors: [L, rank + turning], of all.
    """
    latent = heads.latent
    weight = heads.kv_b_proj.weight.double().view(HEADS, latent.still + latent.value, latent.rank)
    query, vectors = query.double(), vectors.double()
    out = torch.empty(len(query), HEADS, latent.value, dtype=torch.float64)
    for i in range(len(query)):
        seen = vectors[: len(vectors) - len(query) + i + 1]
        for head in range(HEADS):
            made = seen[:, : latent.rank] @ weight[head].t()
            key = torch.cat((made[:, : latent.still], seen[:, latent.rank :]), dim=1)
            out[i, head] = (key @ query[i, head] * SCALE).softmax(0) @ made[:, latent.still :]
    return out


def make_step(
    query_lens: list[int], context_lens: list[int], latent: Latent = WIDE, block_size: int = 4, seed: int = 0
) -> Step:
    """A step in which sequence i computes the last query_lens[i] of context_lens[i] tokens; what came before is cached."""
    generator = torch.Generator().manual_seed(seed)
    heads, half = Heads(latent, 1), latent.cached // 2
    needed = [-(-length // block_size) for length in context_lens]
    order = torch.randperm(sum(needed) + 2, generator=generator)[: sum(needed)]
    tables = torch.full((len(needed), max(needed) + 1), 1_000_000, dtype=torch.int32)
    caches = [torch.full((2, sum(needed) + 2, block_size, 1, half), NOBODYS) for _ in range(2)]
    queries, vectors, slots, expected, written = [], [], [], [], []
    for row, (table, new, length) in enumerate(zip(order.split(needed), query_lens, context_lens, strict=True)):
        tables[row, : len(table)] = table
        mine = torch.randn(length, latent.cached, generator=generator)
        query = torch.randn(new, HEADS, latent.query_dim, generator=generator)
        position = torch.arange(length)
        at = table[position // block_size] * block_size + position % block_size
        caches[1].view(2, -1, half)[:, at[: length - new]] = mine[: length - new].view(-1, 2, half).transpose(0, 1)
        queries.append(query)
        vectors.append(mine[length - new :])
        slots.append(at[length - new :])
        written.append(mine[length - new :])
        expected.append(by_head(heads, query, mine))
    metadata = AttentionMetadata(
        kv_caches=caches, slot_mapping=torch.cat(slots), block_tables=tables,
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0).int(), context_lens=torch.tensor(context_lens).int(),
        max_query_len=max(query_lens), max_context_len=max(context_lens), backend=LatentBackend(),
    )  # fmt: skip
    still, turned = torch.cat(queries).split((latent.still, latent.turning), dim=-1)
    return Step(heads, still, turned, torch.cat(vectors), metadata, torch.cat(expected).float(), torch.cat(written))


def test_vectors_come_in_the_order_of_slots() -> None:
    """Six slots, in no order and one of them twice, of the second of two layers.

    Why: a vector lies in two halves, where other models have a key and a value. Whoever copies or swaps blocks knows no
    latents; here the halves become one again.
    """
    caches = [torch.arange(2 * 3 * 4 * 1 * 2).float().view(2, 3, 4, 1, 2) + 100 * layer for layer in range(2)]
    step = make_step([1], [1])
    step.metadata.kv_caches = caches
    found = LatentBackend().vectors(1, step.metadata, torch.tensor([11, 0, 5, 5, 4, 7]))
    expected = [[100.0 + 2 * slot, 101.0 + 2 * slot, 124.0 + 2 * slot, 125.0 + 2 * slot] for slot in (11, 0, 5, 5, 4, 7)]
    check_equal(found.tolist(), expected, "vectors of the slots")


@pytest.mark.parametrize(("first", "end", "context"), [(0, 5, 5), (2, 4, 9), (3, 4, 1), (1, 6, 8), (7, 8, 12)])
def test_a_prompt_knows_where_its_context_lies(first: int, end: int, context: int) -> None:
    """Tokens of a step at the end of contexts of 1 to 12, in blocks of 4 that lie anywhere.

    Why: a chunk sees what earlier chunks have cached. And tables are rows of one array: behind a context stands anything.
    """
    step = make_step([1, 1], [1, context])
    found = _prompt(step.metadata, 1, first, end, context)
    assert isinstance(found, Prompt)
    table = step.metadata.block_tables[1].tolist()
    check_equal(found.tokens, slice(first, end), "tokens of the step")
    check_equal(found.slots.tolist(), [table[at // 4] * 4 + at % 4 for at in range(context)], "slots of the context")
    new = end - first
    seen = [[at <= context - new + row for at in range(context)] for row in range(new)]
    check_equal(found.seen.tolist(), seen, "what each token sees")


@pytest.mark.parametrize("latent", [WIDE, WIDER], ids=["wider keys", "wider values"])
@pytest.mark.parametrize("plain_from", [1, NEVER], ids=["plain", "absorbed"])
def test_a_whole_prompt_by_each_way(latent: Latent, plain_from: int) -> None:
    """Nine tokens of one prompt, whose keys are wider than its values or narrower.

    Why: both ways are the same attention. What one has cached the other one reads.
    """
    step = make_step([9], [9], latent)
    out = step.run(plain_from)
    check_equal(list(out.shape), [9, HEADS, latent.value], "shape")
    check_close(out, step.expected, "what each head says")


@pytest.mark.parametrize("plain_from", [1, NEVER], ids=["plain", "absorbed"])
def test_decodes_and_chunks_by_each_way(plain_from: int) -> None:
    """Decodes beside chunks, with contexts of 1 to 17 tokens in scattered blocks.

    Why: this is a step of a server. The first token of a chunk sees all that came before the step.
    """
    step = make_step([1, 4, 1, 2, 1], [8, 17, 1, 5, 13])
    check_close(step.run(plain_from), step.expected, "what each head says")


@pytest.mark.parametrize("plain_from", [1, 3, NEVER])
def test_every_vector_of_the_step_is_cached(plain_from: int) -> None:
    """A decode and two chunks, which go one way or the other: the second layer's cache has all their vectors, the first none.

    Why: the next step reads them, whichever way it goes.
    """
    step = make_step([1, 5, 3], [6, 9, 3])
    step.run(plain_from)
    first, second = step.metadata.kv_caches
    cached = second.flatten(1, 3)[:, step.metadata.slot_mapping].transpose(0, 1).flatten(1)
    check_equal(cached, step.written, "what is cached of the step's tokens")
    check_equal((first == NOBODYS).all().item(), True, "whether the first layer's cache is as it was")


@settings(max_examples=30, deadline=None, report_multiple_bugs=False)
@given(
    lens=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 12)), min_size=1, max_size=5), seed=st.integers(0, 1000),
    plain_from=st.integers(1, 8), latent=st.sampled_from([WIDE, WIDER]), block_size=st.sampled_from([1, 3, 4]),
)  # fmt: skip
def test_any_step_goes_both_ways_at_once(
    lens: list[tuple[int, int]], seed: int, plain_from: int, latent: Latent, block_size: int
) -> None:
    """Sequences with some tokens in the step and some before it. Those with `plain_from` or more go the plain way, the others
    the absorbed one.

    Why: one long prompt beside decodes is the usual case. Each token's answer must come back to its own place.
    """
    step = make_step([new for new, _ in lens], [new + before for new, before in lens], latent, block_size, seed)
    check_close(step.run(plain_from), step.expected, "what each head says", 2e-5)


def test_a_prompt_over_given_vectors() -> None:
    """Two tokens over three vectors, of which the first token sees the first and the last.

    Why: `attend_plainly` knows nothing of positions; what may be seen is what the mask says.
    """
    heads, latent = Heads(WIDE, 0), WIDE
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, HEADS, latent.query_dim, generator=generator)
    vectors = torch.randn(3, latent.cached, generator=generator)
    seen = torch.tensor([[True, False, True], [True, True, True]])
    out = heads.attend_plainly(query, vectors, Prompt(slice(0, 2), torch.arange(3), seen))
    expected = torch.cat((by_head(heads, query[:1], vectors[[0, 2]]), by_head(heads, query[1:], vectors)))
    check_close(out, expected.float(), "what each head says")
