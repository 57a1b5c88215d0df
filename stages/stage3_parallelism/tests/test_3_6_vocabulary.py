"""Task 3.6: embedding and logits cut by tokens. Ranks are threads of this process; the last test starts real processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.layers import HIDDEN, all_ranks, embed, empty, load, logits, random, sizes, span, top_and_bottom
from stages.course.fixtures.ranks import on_processes, on_threads
from stages.parallelism.tensor_parallel import ParallelLMHead, TensorParallel, VocabParallelEmbedding, load_vocabulary


@pytest.mark.parametrize(
    ("vocab_size", "size", "expected"),
    [
        (10, 1, [(0, 10)]),
        (10, 2, [(0, 5), (5, 10)]),
        (10, 3, [(0, 4), (4, 8), (8, 12)]),
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        (2, 4, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (5, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (100, 3, [(0, 34), (34, 68), (68, 102)]),
    ],
)
def test_parts_of_equal_size(vocab_size: int, size: int, expected: list[tuple[int, int]]) -> None:
    """The vocabulary is dealt out in parts of the same size, rounded up; the last ones may reach past its end, or begin there.

    Why: a gathering puts tensors of one shape together, on every rank the same.
    """
    parts = [parallel.vocabulary(sizes(vocab_size=vocab_size)) for parallel in all_ranks(size)]
    check_equal([span(part) for part in parts], expected, f"{vocab_size} tokens over {size} ranks")
    check_equal([part.full for part in parts], [vocab_size] * size, "tokens in all, without padding")


@pytest.mark.parametrize(("vocab_size", "size"), [(10, 1), (10, 2), (10, 3), (5, 4), (2, 4)])
def test_rows_of_a_rank_and_zeros_as_padding(vocab_size: int, size: int) -> None:
    """A rank's rows are those of its tokens; rows past the end of the vocabulary are zeros.

    Why: what is not written is whatever was in memory, NaN perhaps, and a NaN in one logit is a NaN in the softmax of all.
    """
    table = random(vocab_size, HIDDEN)
    padded = torch.cat([table, torch.zeros(size * -(-vocab_size // size) - vocab_size, HIDDEN)])
    for rank, parallel in enumerate(all_ranks(size)):
        layer = load(empty(VocabParallelEmbedding(sizes(vocab_size=vocab_size), parallel)), weight=table)
        check_equal(layer.weight, padded.tensor_split(size)[rank], f"rows of rank {rank}")


@pytest.mark.parametrize("rows", [9, 11, 5])
def test_a_table_of_another_size_is_refused(rows: int) -> None:
    """A checkpoint with another number of tokens is a ValueError on every rank, also where a rank's own rows would be there.

    Why: a slice of a tensor that is too short is short without a word, and the rest would pass for padding.
    """
    for parallel in all_ranks(2):
        part = parallel.vocabulary(sizes())
        with pytest.raises(ValueError, match="expected shape"), torch.no_grad():
            load_vocabulary(torch.zeros(len(part), HIDDEN), torch.zeros(rows, HIDDEN), part)


def test_a_table_of_another_width_is_refused() -> None:
    """A checkpoint with one column, which would fit by being spread over all, is a ValueError.

    Why: assigning to a slice of a weight spreads what is too small without a word.
    """
    for parallel in all_ranks(2):
        part = parallel.vocabulary(sizes())
        with pytest.raises(ValueError, match="expected shape"), torch.no_grad():
            load_vocabulary(torch.zeros(len(part), HIDDEN), torch.zeros(10, 1), part)


def test_ids_stay_as_they_are() -> None:
    """The embedding of rank 1 changes nothing about the ids that it is given.

    Why: they are the step's own array, and whatever looks at them next would find the numbers of rank 1.
    """
    ids = torch.tensor([9, 5, 0, 7])
    for rank in range(2):
        parallel = TensorParallel(rank, 2)
        layer = load(empty(VocabParallelEmbedding(sizes(), parallel)), weight=random(10, HIDDEN))
        layer(ids)
        check_equal(ids, [9, 5, 0, 7], f"ids after the embedding of rank {rank}")


def test_logits_come_from_whoever_multiplies() -> None:
    """The head's product is made by its `multiply`, whatever stands there; the weight itself is not asked.

    Why: a head of 4 bits, or one that a kernel has packed, has no weight any more that could be multiplied with.
    """
    for tied in (False, True):
        config = sizes(tie_word_embeddings=tied)
        head = ParallelLMHead(config, VocabParallelEmbedding(config, TensorParallel()), TensorParallel())
        head.register_parameter("weight", None)
        head.multiply = lambda x, add_to=None: x.sum(dim=1, keepdim=True).expand(-1, 10).clone()
        hidden = random(3, HIDDEN)
        check_close(head(hidden), hidden.sum(dim=1, keepdim=True).expand(-1, 10), "logits")


@pytest.mark.parametrize(("vocab_size", "size"), [(10, 1), (10, 2), (10, 3), (5, 4), (2, 4)])
def test_every_rank_gets_every_row(vocab_size: int, size: int) -> None:
    """All ids in any order, some twice: each rank gets the rows that one table gives.

    Why: every rank needs the whole input of the first layer. A token whose row lies elsewhere must come from there, and just
    once.
    """
    ids = [*range(vocab_size)[::-1], 0, vocab_size - 1, 0]
    expected = F.embedding(torch.tensor(ids), random(vocab_size, HIDDEN))
    for rank, got in enumerate(on_threads(size, embed, vocab_size, ids)):
        check_close(got, expected, f"rows on rank {rank}", tolerance=0.0)


def test_ids_of_one_rank_only() -> None:
    """A step whose tokens all lie on rank 1: rank 0 has nothing to give, and still gets the rows.

    Why: an id less the first id of a rank may be negative, and PyTorch counts negative indices from the end: a row, but a wrong
    one.
    """
    expected = F.embedding(torch.tensor([9, 5, 7]), random(10, HIDDEN))
    for rank, got in enumerate(on_threads(2, embed, 10, [9, 5, 7])):
        check_close(got, expected, f"rows on rank {rank}", tolerance=0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("vocab_size", "size"), [(10, 1), (10, 2), (10, 3), (5, 4), (2, 4)])
def test_logits_of_all_tokens_on_every_rank(vocab_size: int, size: int, tied: bool) -> None:
    """[3, V] logits in the order of tokens on every rank, as one matrix gives them, and nothing behind the last token.

    Why: a rank that samples from its own part never says half of the words. And padding has a logit of 0, which is more than
    most real ones: it would be sampled.
    """
    expected = F.linear(random(3, HIDDEN, seed=2), random(vocab_size, HIDDEN, seed=0 if tied else 1))
    for rank, got in enumerate(on_threads(size, logits, vocab_size, tied)):
        check_close(got["result"], expected, f"logits on rank {rank}")


def test_what_it_costs() -> None:
    """Embedding and logits cost a rank one all-reduce and one all-gather; alone, nothing.

    Why: logits are large: 49,152 numbers for each sequence of the default model. They are gathered once.
    """
    (alone,) = on_threads(1, logits, 10, False)
    check_equal(alone["calls"], {}, "calls of one rank")
    for rank, got in enumerate(on_threads(3, logits, 10, False)):
        check_equal(got["calls"], {"all_gather": 1}, f"calls of rank {rank} for logits")


@pytest.mark.parametrize("size", [2, 4])
def test_between_processes(size: int) -> None:
    """Rows and logits of a vocabulary of 10 in real processes over gloo.

    Why: all ranks call the same collectives in the same order; one that skips the sum because no token is its own hangs all.
    """
    on_threads(1, top_and_bottom, 10)
    expected = F.linear(random(3, HIDDEN, seed=2), random(10, HIDDEN, seed=1))
    for rank, (rows, scores) in enumerate(on_processes(size, top_and_bottom, 10)):
        check_close(rows, random(10, HIDDEN), f"rows on rank {rank}", tolerance=0.0)
        check_close(scores, expected, f"logits on rank {rank}")
