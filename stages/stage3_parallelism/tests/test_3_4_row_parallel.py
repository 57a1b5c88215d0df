"""Task 3.4: the layer that adds up. Ranks are threads of this process; the last test starts real processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.layers import COLUMNS, HIDDEN, TOKENS, all_ranks, empty, load, mlp, random, row_parallel
from stages.course.fixtures.ranks import on_processes, on_threads
from stages.parallelism.tensor_parallel import RowParallelLinear, Shard, TensorParallel


def whole(columns: int, bias: bool, residual: bool) -> torch.Tensor:
    """What one device computes, with PyTorch."""
    y = F.linear(random(TOKENS, columns, seed=2), random(HIDDEN, columns), random(HIDDEN, seed=1) if bias else None)
    return y + random(TOKENS, HIDDEN, seed=3) if residual else y


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_rank_has_its_columns(size: int) -> None:
    """Of a weight [6, 8] each rank takes the columns of its inputs: all rows, and the columns that PyTorch cuts.

    Why: the rank's inputs are the outputs of the layer before, so it needs what they are multiplied with: columns.
    """
    weight = random(HIDDEN, 8)
    for rank, parallel in enumerate(all_ranks(size)):
        layer = load(empty(RowParallelLinear(parallel.share(8), HIDDEN, False, parallel)), weight=weight)
        check_equal(layer.weight, weight.tensor_split(size, dim=1)[rank], f"weight of rank {rank}")


def test_a_square_weight_is_cut_by_columns_too() -> None:
    """A weight [6, 6] of which both ranks take three columns; its bias [6] stays whole.

    Why: the attention's output projection is square. Cut by rows it has as many elements, and every shape still fits later. And
    its bias is as long as its inputs are many, without being one of them.
    """
    weight, bias = random(HIDDEN, HIDDEN), random(HIDDEN, seed=1)
    for rank, parallel in enumerate(all_ranks(2)):
        layer = load(empty(RowParallelLinear(parallel.share(HIDDEN), HIDDEN, True, parallel)), weight=weight, bias=bias)
        check_equal(layer.weight, weight[:, 3 * rank : 3 * rank + 3], f"weight of rank {rank}")
        check_equal(layer.bias, bias if rank == 0 else torch.zeros(HIDDEN), f"bias of rank {rank}")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_bias_is_on_one_rank(size: int) -> None:
    """After loading, the biases of all ranks add up to the checkpoint's, and the others than rank 0 have zeros.

    Why: results are summed over the ranks. What is on all of them is in the sum as often as there are ranks.
    """
    bias = random(HIDDEN, seed=1)
    for rank, parallel in enumerate(all_ranks(size)):
        layer = load(empty(RowParallelLinear(parallel.share(8), HIDDEN, True, parallel)), bias=bias)
        check_equal(layer.bias, bias if rank == 0 else torch.zeros(HIDDEN), f"bias of rank {rank}")


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (HIDDEN, 4)), ("weight", (HIDDEN,)), ("bias", (HIDDEN + 1,)), ("bias", (HIDDEN, 8))]
)
def test_a_checkpoint_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    """A weight with the inputs of one rank instead of all, or of one dimension; a bias that is too long, or has two: a
    ValueError, on every rank.

    Why: `copy_` would spread a short row over a long one, and zeros of the wrong length are as wrong as numbers.
    """
    for parallel in all_ranks(2):
        layer = empty(RowParallelLinear(parallel.share(8), HIDDEN, True, parallel))
        with pytest.raises(ValueError, match="expected shape"):
            load(layer, **{name: torch.zeros(shape)})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "columns"), [(1, 8), (2, 8), (3, 8), (4, 3)])
def test_the_sum_is_the_whole_product(size: int, columns: int, bias: bool) -> None:
    """Every rank gives what one device computes; 8 inputs over 3 ranks and 3 inputs over 4 included, and the bias once.

    Why: all ranks go on with the result, so all need it, complete. A rank without inputs still takes part in the sum.
    """
    for rank, got in enumerate(on_threads(size, row_parallel, columns, bias, False)):
        check_close(got["result"], whole(columns, bias, False), f"the result of rank {rank}")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_residual_is_added_once_and_in_place(size: int, bias: bool) -> None:
    """With a residual stream, every rank gets stream + product + bias. Rank 0 has it in the stream's own memory; on the others
    the stream is as it was.

    Why: the stream is the same on all ranks. Added on each of them it is in the sum `size` times, and grows with every layer.
    Rank 0's product adds it on the way; the others need not even touch theirs.
    """
    for rank, got in enumerate(on_threads(size, row_parallel, 8, bias, True)):
        check_close(got["result"], whole(8, bias, True), f"the result of rank {rank}")
        if rank == 0:
            assert got["result"].data_ptr() == got["stream"].data_ptr(), "rank 0 returns another tensor than the stream"
        else:
            check_equal(got["stream"], random(TOKENS, HIDDEN, seed=3), f"what rank {rank} was given as its residual stream")


@pytest.mark.parametrize("residual", [False, True])
def test_one_all_reduce_and_nothing_else(residual: bool) -> None:
    """A forward costs each rank one all-reduce; a single rank needs no communicator.

    Why: two sums in each layer are all that tensor parallelism costs. Every further one is time in which all wait.
    """
    (alone,) = on_threads(1, row_parallel, 8, True, residual)
    check_equal(alone["calls"], {}, "calls of one rank")
    for rank, got in enumerate(on_threads(3, row_parallel, 8, True, residual)):
        check_equal(got["calls"], {"all_reduce": 1}, f"calls of rank {rank}")


def whole_mlp() -> torch.Tensor:
    """A gated MLP on one device, added to its residual stream, with PyTorch."""
    x = random(TOKENS, HIDDEN, seed=6)
    gate = F.linear(x, random(COLUMNS, HIDDEN), random(COLUMNS, seed=2))
    up = F.linear(x, random(COLUMNS, HIDDEN, seed=1), random(COLUMNS, seed=3))
    down = F.linear(F.silu(gate) * up, random(HIDDEN, COLUMNS, seed=4), random(HIDDEN, seed=5))
    return random(TOKENS, HIDDEN, seed=7) + down


@pytest.mark.parametrize("size", [1, 2, 3])
def test_column_then_row_needs_one_all_reduce(size: int) -> None:
    """A whole MLP, gate and up column-parallel, down row-parallel: the result of one device, for one all-reduce.

    Why: the two cuts fit. What a rank's columns give is what its rows take, so nothing is put together in between.
    """
    for rank, got in enumerate(on_threads(size, mlp)):
        check_close(got["result"], whole_mlp(), f"the result of rank {rank}", tolerance=1e-4)
        check_equal(got["calls"], {"all_reduce": 1} if size > 1 else {}, f"calls of rank {rank}")


@pytest.mark.parametrize("size", [2, 4])
def test_between_processes(size: int) -> None:
    """The same MLP in real processes over gloo, which all hold the same bits afterwards. With 4 ranks, two have no columns.

    Why: the residual stream must stay the same on all ranks, layer after layer, for all of them add to their own copy.
    """
    on_threads(1, mlp)
    results = on_processes(size, mlp)
    for rank, got in enumerate(results):
        check_close(got["result"], whole_mlp(), f"the result of rank {rank}", tolerance=1e-4)
        assert torch.equal(got["result"], results[0]["result"]), f"rank {rank} and rank 0 hold different bits"
        check_equal(got["calls"], {"all_reduce": 1}, f"calls of rank {rank}")


@pytest.mark.parametrize("residual", [False, True])
def test_the_product_may_be_somebody_elses(residual: bool) -> None:
    """The product is made by the layer's `multiply(x, add_to)`, whatever stands there by then; the weight itself is not asked.

    Why: kernels put their own function in its place, and keep the weight packed or in 4 bits. Multiplied with the weight, a
    quantized layer computes with what nobody has filled.
    """
    layer = RowParallelLinear(Shard(8, 0, 8), HIDDEN, False, TensorParallel())
    layer.register_parameter("weight", None)
    given = []

    def multiply(x: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        given.append(None if add_to is None else add_to.clone())
        y = x.sum(dim=1, keepdim=True).expand(-1, HIDDEN).clone()
        return y if add_to is None else add_to.add_(y)

    layer.multiply = multiply
    x, stream = random(TOKENS, 8), random(TOKENS, HIDDEN, seed=3)
    expected = x.sum(dim=1, keepdim=True).expand(-1, HIDDEN) + (stream if residual else 0)
    check_close(layer(x, stream.clone()) if residual else layer(x), expected, "what the layer gives")
    check_equal(len(given), 1, "calls of multiply")


def test_the_input_stays_as_it_is() -> None:
    """A forward changes neither its input nor, but for the stream of rank 0, anything else that it is given.

    Why: the input is another layer's output, and with a residual it is read again.
    """
    layer = load(RowParallelLinear(Shard(8, 0, 8), HIDDEN, False, TensorParallel()), weight=random(HIDDEN, 8))
    x = random(TOKENS, 8)
    layer(x, random(TOKENS, HIDDEN))
    check_equal(x.flatten(), random(TOKENS, 8).flatten(), "input after the forward")


def test_inputs_need_not_be_even() -> None:
    """Two parts of 6 and 2 inputs: the sum of both ranks' own products is the whole.

    Why: heads are dealt out whole, so the parts of an output projection are as uneven as the heads: 6 and 3 of 9.
    """
    weight, x = random(HIDDEN, 8), random(TOKENS, 8, seed=2)
    result = torch.zeros(TOKENS, HIDDEN)
    for rank, inputs in enumerate((Shard(8, 0, 6), Shard(8, 6, 8))):
        layer = load(RowParallelLinear(inputs, HIDDEN, False, TensorParallel(rank, 2)), weight=weight)
        result += layer(x[:, inputs.start : inputs.stop])
    check_close(result, F.linear(x, weight), "the sum of both parts")
