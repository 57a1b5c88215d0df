"""Task 3.5: attention cut by heads. All ranks in one process; the default model has 9 query heads over 3 KV heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.layers import HIDDEN, TOKENS, all_ranks, empty, load, random, sizes, span
from stages.models.config.model_config import ModelConfig
from stages.parallelism.tensor_parallel import QKVParallelLinear, RowParallelLinear, TensorParallel


def dealt(config: ModelConfig, size: int) -> list[tuple[int, int, int, int]]:
    """Each rank's first and last + 1 query head, and first and last + 1 KV head."""
    return [(*span(heads), *span(kv_heads)) for heads, kv_heads in (parallel.heads(config) for parallel in all_ranks(size))]


def test_even_groups() -> None:
    """8 query heads over 4 KV heads on 2 ranks: 4 and 2 each.

    Why: the simple case, that of large models on few devices.
    """
    check_equal(dealt(sizes(num_heads=8, num_kv_heads=4), 2), [(0, 4, 0, 2), (4, 8, 2, 4)], "heads of the ranks")


def test_query_heads_stay_with_their_kv_head() -> None:
    """9 query heads over 3 KV heads on 2 ranks: 6 with 2, and 3 with 1. Not 5 and 4, though that would be more even.

    Why: a query head reads one KV head's cache. If that lies on another rank, its keys would have to be sent for every token.
    """
    check_equal(dealt(sizes(num_heads=9, num_kv_heads=3), 2), [(0, 6, 0, 2), (6, 9, 2, 3)], "heads of the ranks")


def test_one_kv_head_for_each_rank() -> None:
    """9 over 3 on 3 ranks: a group each; and all of them on one rank.

    Why: the boundary between dealing KV heads out and sharing them.
    """
    check_equal(dealt(sizes(num_heads=9, num_kv_heads=3), 3), [(0, 3, 0, 1), (3, 6, 1, 2), (6, 9, 2, 3)], "three ranks")
    check_equal(dealt(sizes(num_heads=9, num_kv_heads=3), 1), [(0, 9, 0, 3)], "one rank")


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "expected"),
    [
        (8, 2, 4, [(0, 2, 0, 1), (2, 4, 0, 1), (4, 6, 1, 2), (6, 8, 1, 2)]),
        (4, 1, 2, [(0, 2, 0, 1), (2, 4, 0, 1)]),
        (9, 3, 9, [(i, i + 1, i // 3, i // 3 + 1) for i in range(9)]),
    ],
)
def test_kv_heads_are_replicated(num_heads: int, num_kv_heads: int, size: int, expected: list[tuple[int, ...]]) -> None:
    """With more ranks than KV heads several ranks hold the same KV head, whole, and share its query heads.

    Why: half a head is no head, as the softmax needs the product over all its elements. The price is memory: the same keys lie
    on several devices.
    """
    config = sizes(num_heads=num_heads, num_kv_heads=num_kv_heads)
    check_equal(dealt(config, size), expected, "heads of the ranks")
    check_equal({parallel.heads(config)[1].full for parallel in all_ranks(size)}, {num_kv_heads}, "KV heads in all")


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size"), [(9, 3, 4), (9, 3, 6), (9, 3, 27), (8, 2, 3), (4, 4, 8), (12, 2, 3), (12, 3, 4)]
)
def test_ranks_that_do_not_fit_are_refused(num_heads: int, num_kv_heads: int, size: int) -> None:
    """Where heads cannot be dealt out, every rank says so with a ValueError that names the number of ranks.

    Why: said at start it costs a second. Found later it is a shape error in the middle of loading, on one rank of eight.
    """
    config = sizes(num_heads=num_heads, num_kv_heads=num_kv_heads)
    for parallel in all_ranks(size):
        with pytest.raises(ValueError, match=rf"\b{size}\b"):
            parallel.heads(config)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size"), [(6, 3, 1), (6, 3, 2), (6, 3, 3), (6, 3, 6), (8, 8, 3), (12, 2, 4)]
)
def test_every_head_is_computed_once_beside_its_kv_head(num_heads: int, num_kv_heads: int, size: int) -> None:
    """All query heads are on exactly one rank, in order, and query head h finds KV head h // group among that rank's, at the
    place where the attention looks for it.

    Why: the attention on a rank knows only its own heads and takes KV head h // (H / H_kv) for its own query head h.
    """
    config, group = sizes(num_heads=num_heads, num_kv_heads=num_kv_heads), num_heads // num_kv_heads
    seen = []
    for rank, parallel in enumerate(all_ranks(size)):
        heads, kv_heads = parallel.heads(config)
        check_equal(len(heads) % len(kv_heads), 0, f"query heads of rank {rank} that are left over")
        for place, head in enumerate(range(*span(heads))):
            read = kv_heads.start + place // (len(heads) // len(kv_heads))
            check_equal(read, head // group, f"the KV head that query head {head} reads on rank {rank}")
            seen.append(head)
    check_equal(seen, list(range(num_heads)), "query heads of all ranks in order")


def checkpoint(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights and biases of all heads."""
    outputs = {"q": config.num_heads * config.head_dim, "k": config.num_kv_heads * config.head_dim}
    outputs["v"] = outputs["k"]
    tensors = {f"weight__{name}": random(rows, HIDDEN, seed=i) for i, (name, rows) in enumerate(outputs.items())}
    return tensors | {f"bias__{name}": random(rows, seed=9 + i) for i, (name, rows) in enumerate(outputs.items())}


def whole_heads(config: ModelConfig, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of all heads on one device: three of [T, heads, D]."""
    tensors = checkpoint(config)
    return [
        F.linear(x, tensors[f"weight__{name}"], tensors[f"bias__{name}"]).view(TOKENS, -1, config.head_dim) for name in "qkv"
    ]


@pytest.mark.parametrize(("num_kv_heads", "size"), [(3, 1), (3, 2), (3, 3), (3, 6), (2, 6), (6, 4)])
def test_a_rank_projects_its_heads(num_kv_heads: int, size: int) -> None:
    """The outputs of a rank's projection are its query heads, then its keys, then its values, each head `head_dim` wide.

    Why: the attention cuts what comes into heads by position. Shards counted in heads where elements are meant give a
    projection that is `head_dim` times too small.
    """
    config, x = sizes(num_kv_heads=num_kv_heads), random(TOKENS, HIDDEN, seed=5)
    whole = whole_heads(config, x)
    for rank, parallel in enumerate(all_ranks(size)):
        heads, kv_heads = parallel.heads(config)
        layer = load(empty(QKVParallelLinear(config, parallel)), **checkpoint(config))
        parts = zip(whole, (heads, kv_heads, kv_heads), strict=True)
        expected = torch.cat([full[:, part.start : part.stop].flatten(1) for full, part in parts], dim=1)
        check_close(layer(x), expected, f"queries, keys and values of rank {rank}")


@pytest.mark.parametrize("bias", [False, True])
def test_the_projection_has_a_bias_when_the_model_has(bias: bool) -> None:
    """Inputs are the hidden size, outputs the local heads, and a bias is there just when the model's attention has one.

    Why: a bias that is there and that no checkpoint fills is memory with anything in it.
    """
    layer = QKVParallelLinear(sizes(attention_bias=bias), TensorParallel(0, 2))
    check_equal(layer.weight.shape, torch.Size([(4 + 2 + 2) * 4, HIDDEN]), "shape of the weight: 4 and 2 and 2 heads of 4")
    check_equal(layer.bias is not None, bias, "whether there is a bias")


@pytest.mark.parametrize(("num_kv_heads", "size"), [(3, 1), (3, 2), (3, 3), (3, 6), (1, 2)])
def test_attention_of_all_ranks_is_the_whole_attention(num_kv_heads: int, size: int) -> None:
    """Project, attend with PyTorch's own attention on each rank's heads, project back and add up: what one device computes.

    Why: this is a whole attention block cut by heads: column-parallel in front, row-parallel behind, nothing in between.
    """
    config = sizes(num_kv_heads=num_kv_heads)
    x, out = random(TOKENS, HIDDEN, seed=5), random(HIDDEN, config.num_heads * config.head_dim, seed=6)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads = (each.transpose(0, 1) for each in (q, k, v))  # [heads, T, D]
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)

    expected = F.linear(attend(*whole_heads(config, x)), out)
    total = torch.zeros(TOKENS, HIDDEN)
    for parallel in all_ranks(size):
        heads, kv_heads = parallel.heads(config)
        layer = load(empty(QKVParallelLinear(config, parallel)), **checkpoint(config))
        widths = [len(part) * config.head_dim for part in (heads, kv_heads, kv_heads)]
        q, k, v = (each.view(TOKENS, -1, config.head_dim) for each in layer(x).split(widths, dim=1))
        behind = RowParallelLinear(heads.times(config.head_dim), HIDDEN, False, parallel)
        total += load(empty(behind), weight=out)(attend(q, k, v))
    check_close(total, expected, "the sum over all ranks", tolerance=1e-4)


@pytest.mark.parametrize("number", range(4))
def test_any_heads_are_dealt_out(number: int) -> None:
    """Random models on random numbers of ranks: KV heads as evenly as can be and their query heads with them, or several ranks
    to a KV head; the projection has as many rows as the rank's heads are wide.

    Why: models come with 1 to 128 heads. Whoever has dealt out nine over three has not dealt out the next.
    """
    dice = torch.Generator().manual_seed(350 + number)
    for _ in range(6):
        num_kv_heads, group, head_dim, times = torch.randint(1, 7, (4,), generator=dice).tolist()
        config = sizes(num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads, head_dim=head_dim)
        for size in {*range(1, num_kv_heads + 1), num_kv_heads * times}:
            if size <= num_kv_heads:
                kv_heads = torch.arange(num_kv_heads).tensor_split(size)
                heads = [torch.arange(group) + group * part[:, None] for part in kv_heads]
            elif group % times == 0:
                kv_heads = torch.arange(num_kv_heads).repeat_interleave(times).tensor_split(size)
                heads = torch.arange(num_kv_heads * group).tensor_split(size)
            else:
                with pytest.raises(ValueError, match="cannot be cut"):
                    dealt(config, size)
                continue
            ends = [[(int(part.min()), int(part.max()) + 1) for part in parts] for parts in (heads, kv_heads)]
            expected = [(*of_heads, *of_kv) for of_heads, of_kv in zip(*ends, strict=True)]
            check_equal(dealt(config, size), expected, f"{num_kv_heads * group} heads over {num_kv_heads} on {size} ranks")
            for (first, last, kv_first, kv_last), parallel in zip(expected, all_ranks(size), strict=True):
                rows = (last - first + 2 * (kv_last - kv_first)) * head_dim
                check_equal(len(QKVParallelLinear(config, parallel).weight), rows, f"rows of rank {parallel.rank} of {size}")
