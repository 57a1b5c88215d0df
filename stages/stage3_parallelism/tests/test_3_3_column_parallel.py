"""Task 3.3: who computes which outputs, and how a layer takes its rows out of a checkpoint. All ranks in one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.layers import COLUMNS, CONFIG, HIDDEN, TOKENS, all_ranks, empty, load, random, span
from stages.parallelism.tensor_parallel import ColumnParallelLinear, GateUpParallelLinear, Shard, TensorParallel


@pytest.mark.parametrize(
    ("units", "size", "expected"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (7, 2, [(0, 4), (4, 7)]),
        (3, 2, [(0, 2), (2, 3)]),
        (11, 4, [(0, 3), (3, 6), (6, 9), (9, 11)]),
        (2, 3, [(0, 1), (1, 2), (2, 2)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_shares(units: int, size: int, expected: list[tuple[int, int]]) -> None:
    """The ranks' parts are as even as they can be, one behind the other, and the first ranks have the larger ones.

    Why: a step takes as long as the rank with most to do. And rank 0 must have no less than any other, for by its part the
    engine decides how many blocks fit on every rank.
    """
    shares = [parallel.share(units) for parallel in all_ranks(size)]
    check_equal([span(share) for share in shares], expected, f"{units} units over {size} ranks")
    check_equal([share.full for share in shares], [units] * size, "units in all, which every part remembers")


@pytest.mark.parametrize("units", [1, 5, 12, 49])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_shares_leave_nothing_out(units: int, size: int) -> None:
    """Every unit is in exactly one part, and parts differ by at most one.

    Why: a row that nobody has is a zero in the middle of a layer, and one that two have counts twice.
    """
    shares = [parallel.share(units) for parallel in all_ranks(size)]
    check_equal([unit for share in shares for unit in range(*span(share))], list(range(units)), "units of all parts in order")
    assert max(map(len, shares)) - min(map(len, shares)) <= 1, f"parts of {[len(share) for share in shares]} units"


def test_the_mlp_is_dealt_out_in_units() -> None:
    """A hidden layer of 64 over two ranks is 32 and 32; over three, in units of 32, it is 32, 32 and nothing.

    Why: kernels work on whole vectors, so columns are dealt out in units (`TensorParallel.mlp`, given, stands on your `share`).
    """
    check_equal([span(parallel.mlp(CONFIG)) for parallel in all_ranks(2)], [(0, 32), (32, 64)], "columns of two ranks")
    check_equal([span(parallel.mlp(CONFIG)) for parallel in all_ranks(3)], [(0, 32), (32, 64), (64, 64)], "of three")


@pytest.mark.parametrize(("dim", "expected"), [(0, [[3, 4, 5], [6, 7, 8]]), (1, [[1, 2], [4, 5], [7, 8]])])
def test_a_part_of_a_tensor(dim: int, expected: list[list[int]]) -> None:
    """Of three rows, or three columns, a rank takes those numbered 1 and 2.

    Why: rows are outputs and columns are inputs of a layer. Cutting the wrong dimension of a square weight goes unnoticed until
    the model talks nonsense.
    """
    part = Shard(3, 1, 3).of(torch.arange(9).view(3, 3), dim)
    check_equal(part, expected, f"part along dimension {dim}")


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((3, 4), 1), ((2, 3), 0)])
def test_a_tensor_of_another_size_is_refused(shape: tuple[int, int], dim: int) -> None:
    """A tensor that has not as many rows (or columns) as there are in all is a ValueError that shows both shapes.

    Why: a checkpoint of another model would otherwise be cut to what looks right, and loaded without a word.
    """
    with pytest.raises(ValueError, match=r"expected shape .* the checkpoint has"):
        Shard(3, 1, 3).of(torch.zeros(shape), dim)


def two_pieces(size: int, bias: bool = True) -> list[ColumnParallelLinear]:
    """A layer of the pieces "a" with 5 outputs and "b" with 3, on each of some ranks, with nothing loaded yet."""
    return [
        empty(ColumnParallelLinear(HIDDEN, {"a": parallel.share(5), "b": parallel.share(3)}, bias))
        for parallel in all_ranks(size)
    ]


A, B, BIAS_A, BIAS_B = random(5, HIDDEN), random(3, HIDDEN, seed=1), random(5, seed=2), random(3, seed=3)


def parts(full: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Rows of each rank, cut by PyTorch, which gives the first ones the longer parts too."""
    return list(full.tensor_split(size))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_each_rank_has_its_rows_of_each_piece(size: int) -> None:
    """A rank's weight is its rows of "a" and then its rows of "b"; its bias likewise. With 6 ranks the last have none.

    Why: a merged layer does two products at once. Cutting the merged weight as one would give rank 0 all of "a" and rank 1 all
    of "b", which is another layer.
    """
    for rank, layer in enumerate(two_pieces(size)):
        load(layer, weight__a=A, weight__b=B, bias__a=BIAS_A, bias__b=BIAS_B)
        check_equal(layer.weight, torch.cat([parts(A, size)[rank], parts(B, size)[rank]]), f"weight of rank {rank}")
        check_equal(layer.bias, torch.cat([parts(BIAS_A, size)[rank], parts(BIAS_B, size)[rank]]), f"bias of rank {rank}")


@pytest.mark.parametrize("size", [1, 2])
def test_who_holds_the_parameter_sees_what_is_loaded(size: int) -> None:
    """A view that was taken of the weight before has the checkpoint's rows afterwards.

    Why: layers share weights, and kernels keep views of them. A parameter that gets new memory leaves all of these with what
    was there before.
    """
    for rank, layer in enumerate(two_pieces(size, bias=False)):
        view = layer.weight.data[:]
        load(layer, weight__a=A, weight__b=B)
        check_equal(view, torch.cat([parts(A, size)[rank], parts(B, size)[rank]]), f"view of the weight of rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pieces_come_in_any_order(size: int) -> None:
    """The second piece is loaded first, and its rows stand behind those of the first, where nothing has been touched yet.

    Why: a checkpoint's files are read in the order in which they lie, and each tensor comes by itself.
    """
    for rank, layer in enumerate(two_pieces(size, bias=False)):
        load(layer, weight__b=B)
        mine = len(parts(A, size)[rank])
        assert layer.weight[:mine].isnan().all(), f"rank {rank}: rows of the piece that has not been loaded were written"
        check_equal(layer.weight[mine:], parts(B, size)[rank], f"rows of the second piece on rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_three_pieces_stand_in_the_order_of_the_layer(size: int) -> None:
    """Pieces "q", "k" and "v" with 1, 3 and 2 outputs stand in that order, not in that of the alphabet; with 2 and 4 ranks some
    have no row of a piece, and nothing but their rows is written.

    Why: what comes behind the layer cuts its outputs by position. And an empty slice of a weight is easily all of it.
    """
    full = {"q": random(1, HIDDEN), "k": random(3, HIDDEN, seed=1), "v": random(2, HIDDEN, seed=2)}
    for rank, parallel in enumerate(all_ranks(size)):
        pieces = {name: parallel.share(len(rows)) for name, rows in full.items()}
        layer = empty(ColumnParallelLinear(HIDDEN, pieces, False))
        for name in ("v", "q", "k"):
            load(layer, **{f"weight__{name}": full[name]})
        check_equal(layer.weight, torch.cat([parts(full[name], size)[rank] for name in "qkv"]), f"weight of rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_checkpoint_may_have_all_pieces_in_one(size: int) -> None:
    """Without a piece's name the tensor has all pieces one behind the other, whole; each rank takes the same rows as before.

    Why: GPT-2 keeps queries, keys and values in one matrix. Its first third are queries, whatever rank looks at it.
    """
    for rank, layer in enumerate(two_pieces(size)):
        load(layer, weight=torch.cat([A, B]), bias=torch.cat([BIAS_A, BIAS_B]))
        check_equal(layer.weight, torch.cat([parts(A, size)[rank], parts(B, size)[rank]]), f"weight of rank {rank}")
        check_equal(layer.bias, torch.cat([parts(BIAS_A, size)[rank], parts(BIAS_B, size)[rank]]), f"bias of rank {rank}")


@pytest.mark.parametrize(
    ("name", "shape"), [("weight__a", (4, HIDDEN)), ("weight__a", (5, HIDDEN + 1)), ("weight", (9, HIDDEN)), ("bias", (5,))]
)
def test_a_checkpoint_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """A piece with too few rows, a weight of other inputs, or all pieces of a wrong size in sum: a ValueError.

    Why: with two ranks a wrong size is easily hidden, as every rank takes just a part.
    """
    for size in (2, 6):  # of 6 ranks the last ones have no row
        for layer in two_pieces(size):
            with pytest.raises(ValueError, match="expected shape"):
                load(layer, **{name: torch.zeros(shape)})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_outputs_side_by_side_are_the_whole_layer(size: int) -> None:
    """The ranks' outputs of an MLP's first half, put side by side, are what the whole layer computes.

    Why: this is what column-parallel means: each rank its outputs, from the whole input, without a word. The activation sees
    one output at a time, so it can be applied before anything is put together.
    """
    gate, up, gate_bias, up_bias = (
        random(COLUMNS, HIDDEN), random(COLUMNS, HIDDEN, seed=1), random(COLUMNS, seed=2), random(COLUMNS, seed=3)
    )  # fmt: skip
    x = random(TOKENS, HIDDEN, seed=4)
    expected = F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)
    outputs = []
    for parallel in all_ranks(size):
        layer = load(empty(GateUpParallelLinear(CONFIG, parallel)), weight__gate=gate, weight__up=up)
        outputs.append(load(layer, bias__gate=gate_bias, bias__up=up_bias)(x))
    check_close(torch.cat(outputs, dim=1), expected, "outputs of all ranks side by side")


def test_one_rank_has_the_whole() -> None:
    """With one rank the part is the whole.

    Why: a model's file is written once, for one device and for eight.
    """
    check_equal(span(TensorParallel().share(7)), (0, 7), "the share of the only rank")
