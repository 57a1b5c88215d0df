"""The shape of drafts that branch: depths, mask and walk against paths that are written out; and attention under the mask."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solutions.attention.backends import make_backend
from solutions.attention.paged_attention import attention_metadata
from solutions.batching.step_arrays import PagedArrays
from solutions.batching.token_tree import MOST_NODES, TokenTree, accepted_path, hidden_keys, node_depths, tree_of
from solutions.core.platform import native
from solutions.memory.cache_engine import CacheEngine


@st.composite
def trees(draw, most: int = 20) -> tuple[int, ...]:
    size = draw(st.integers(0, most))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size + 1)))


def path_to(parents: tuple[int, ...], node: int) -> list[int]:
    """The nodes from the root to one, both included."""
    return [*path_to(parents, parents[node]), node] if node else [0]


@given(trees())
def test_a_node_sees_its_own_path_and_stands_at_its_depth(parents):
    depths, words = node_depths(parents), hidden_keys(parents)
    for node in range(len(parents)):
        path = path_to(parents, node)
        assert depths[node] == len(path) - 1
        assert [other for other in range(node + 1) if not words[node] >> (node - other) & 1] == path
        assert words[node] >> (node + 1) == 0  # the text before the root is seen by all


def test_a_chain_hides_nothing_and_the_largest_tree_fits_a_word():
    assert hidden_keys(range(-1, 10)) == [0] * 11
    star = TokenTree((-1, *[0] * MOST_NODES))
    assert star.depths.tolist() == [0, *[1] * MOST_NODES]
    assert star.hidden_keys.tolist()[-1] == 2**MOST_NODES - 2
    assert star.first(MOST_NODES) is star
    assert star.first(2).parents == (-1, 0, 0)


@given(trees(), st.integers(0, 10**6))
def test_the_walk_goes_where_the_target_goes(parents, seed):
    """Against all paths: the longest whose every token is what the target says at the node before."""
    rng = random.Random(seed)
    drafted = [0] * (len(parents) - 1)
    for parent in set(parents):
        children = [node for node in range(1, len(parents)) if parents[node] == parent]
        for node, token in zip(children, rng.sample(range(30), len(children)), strict=True):
            drafted[node - 1] = token
    own = [rng.randrange(30) for _ in parents]
    for node in range(1, len(parents)):  # so that long paths are common
        if rng.random() < 0.4:
            own[parents[node]] = drafted[node - 1]
    right = [
        path_to(parents, node)
        for node in range(len(parents))
        if all(drafted[b - 1] == own[a] for a, b in zip(path_to(parents, node), path_to(parents, node)[1:], strict=False))
    ]
    assert [0, *accepted_path(parents, drafted, own)] == max(right, key=len)


def test_paths_in_any_order_make_one_tree_with_the_likeliest_chain_first():
    tree, ranks = tree_of([(1,), (0, 1), (0,), (1, 0), (0, 0), (0, 0, 0)])
    assert tree.parents == (-1, 0, 1, 2, 0, 1, 4)  # 0, 00, 000, then 1, then 01 and 10
    assert ranks == [0, 0, 0, 1, 1, 0]
    assert tree_of([[0]]) == (TokenTree((-1, 0)), [0])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "1 to 63 tokens, and has 0"),
        ([(rank,) for rank in range(64)], "has 64"),
        ([()], "is wrong"),
        ([(0,), (0,)], "there once"),
        ([(-1,)], "from 0 on"),
        ([(0,), (1, 0)], r"\(1, 0\) goes on from \(1,\), which is missing"),
    ],
)
def test_what_is_no_tree_is_one_clear_error(paths, message):
    with pytest.raises(ValueError, match=message):
        tree_of(paths)


# Attention


def attend_alone(query, keys, values, seen, scale, cap):
    """One query [H, D] over the keys [L, H_kv, D] at the places `seen`, in float64."""
    keys, values = (x[seen].double().repeat_interleave(len(query) // x.shape[1], dim=1) for x in (keys, values))
    scores = torch.einsum("hd,lhd->hl", query.double(), keys) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("hl,lhd->hd", scores.softmax(-1), values)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "cached", "tolerance"), [
    (torch.float32, torch.float32, 1e-5), (torch.float32, torch.int8, 2e-2), (torch.bfloat16, torch.bfloat16, 3e-2),
])  # fmt: skip
@pytest.mark.parametrize("name", ["cpu", "cpu, batch-invariant", "torch"])
def test_attention_sees_the_context_and_the_own_path(name, dtype, cached, tolerance, cap):
    """Trees beside a prompt, a decode and a chunk: few and many queries, contexts short, over many chunks of keys, and so long
    that they are split over threads, with the tree at any place of a chunk."""
    if name.startswith("cpu") and native.load() is None:
        pytest.skip(native.why_not)
    backend = make_backend(name.split(",")[0], "cpu", dtype, 32, 4, batch_invariant="invariant" in name)
    torch.manual_seed(0)
    rng, size, heads, kv_heads, dim = random.Random(0), 4, 6, 2, 32
    shapes = [
        (-1, 0, 0),
        (-1, 0, 1, 0, 1, 2, 4, 4, 3, 0, 9),
        None,
        (-1, 0, 0, 1),
        None,
        (-1, *(rng.randrange(i) for i in range(1, 30))),
    ]
    before = [5, 61, 30, 700, 0, 127]
    counts = [20 if shape is None else len(shape) for shape in shapes]
    lengths = [first + count for first, count in zip(before, counts, strict=True)]
    tables = torch.zeros(len(shapes), -(-max(lengths) // size), dtype=torch.int32)
    free = iter(torch.randperm(sum(-(-n // size) for n in lengths)).tolist())
    for row, length in enumerate(lengths):
        tables[row, : -(-length // size)] = torch.tensor([next(free) for _ in range(-(-length // size))])
    cache = CacheEngine(1, int(tables.max()) + 1, size, kv_heads, dim, cached, "cpu")

    def slots(row, first, count):
        places = torch.arange(first, first + count)
        return tables[row, places // size].long() * size + places % size

    def metadata(rows, firsts, numbers, hidden):
        arrays = PagedArrays(
            torch.cat([slots(row, first, count) for row, first, count in zip(rows, firsts, numbers, strict=True)]),
            tables[rows], torch.tensor([0, *numbers]).cumsum(0).int(), (torch.tensor(firsts) + torch.tensor(numbers)).int(),
        )  # fmt: skip
        longest = max(numbers), int(arrays.context_lens.max())
        return attention_metadata(arrays, longest, cache.kv_caches, cache.kv_scales or None, backend, (None,), hidden)

    everything = [torch.randn(length, heads + 2 * kv_heads, dim).to(dtype) for length in lengths]
    split = [each.split([heads, kv_heads, kv_heads], dim=1) for each in everything]
    old = [row for row, first in enumerate(before) if first]
    texts = [torch.cat([split[row][part][: before[row]] for row in old]) for part in range(3)]
    backend.attend(0, *texts, metadata(old, [0] * len(old), [before[row] for row in old], None), dim**-0.5, soft_cap=cap)
    new = [torch.cat([split[row][part][before[row] :] for row in range(len(shapes))]) for part in range(3)]
    hidden = torch.tensor(
        [word for shape, count in zip(shapes, counts, strict=True) for word in hidden_keys(shape or range(-1, count - 1))]
    )
    out = backend.attend(0, *new, metadata(list(range(len(shapes))), before, counts, hidden), dim**-0.5, soft_cap=cap)
    at = 0
    for (query, key, value), shape, first, count in zip(split, shapes, before, counts, strict=True):
        for node in range(count):
            path = [first + other for other in path_to(shape, node)] if shape else list(range(first, first + node + 1))
            wanted = attend_alone(query[first + node], key, value, [*range(first), *path], dim**-0.5, cap)
            torch.testing.assert_close(out[at + node].double(), wanted, atol=tolerance, rtol=tolerance)
        at += count
