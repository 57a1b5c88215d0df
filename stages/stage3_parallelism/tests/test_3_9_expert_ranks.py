"""Task 3.9 ★: experts on ranks, whole or cut. Ranks are threads of this process."""

from __future__ import annotations

import random as chance
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.layers import random, sizes, span
from stages.course.fixtures.ranks import on_threads
from stages.models.config.experts import Mixture
from stages.models.config.model_config import ModelConfig
from stages.models.sparse import SparseForCausalLM, SparseMLP
from stages.parallelism.communication import Communicator
from stages.parallelism.tensor_parallel import TensorParallel

HIDDEN, WIDTH, TOKENS = 6, 64, 7


def config_of(count: int, shared: bool = False) -> ModelConfig:
    """A model with so many experts in each of two layers; a token goes through two of them."""
    mixture = Mixture(count, min(2, count), WIDTH, renormalise=True, shared_size=WIDTH if shared else 0)
    return sizes(num_layers=2, mixture=mixture, attention_bias=False, mlp_bias=False)


def matrices(number: int) -> dict[str, Tensor]:
    """An expert's weights as a checkpoint has them."""
    shapes = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    return {name: random(*shape, seed=100 + 3 * number + at) / 4 for at, (name, shape) in enumerate(shapes.items())}


def router(columns: int) -> Tensor:
    return random(columns, HIDDEN, seed=50)


def mlp(communicator: Communicator, count: int, whole: bool, residual: bool = True) -> dict[str, Any]:
    """A rank's part of a layer with random experts: what it gives, and what that cost."""
    talks = communicator if communicator.size > 1 else None
    layer = SparseMLP(config_of(count), TensorParallel(communicator.rank, communicator.size, talks, whole))
    with torch.no_grad():
        layer.gate.weight_loader(layer.gate.weight, router(count), "routed")
        for number, expert in layer.experts.own.items():
            weights, first, second = matrices(number), expert.gate_up_proj, expert.down_proj
            first.weight_loader(first.weight, weights["gate"], "gate")
            first.weight_loader(first.weight, weights["up"], "up")
            second.weight_loader(second.weight, weights["down"])
        stream = random(TOKENS, HIDDEN, seed=3) if residual else None
        result = layer(random(TOKENS, HIDDEN, seed=2), stream)
    calls = {name: each.calls for name, each in communicator.traffic.items() if each.calls}
    return {"result": result, "stream": stream, "calls": calls, "own": sorted(layer.experts.own)}


def expected(count: int, residual: bool = True) -> Tensor:
    """The same on one device: a token after the other, an expert after the other."""
    x, out = random(TOKENS, HIDDEN, seed=2), random(TOKENS, HIDDEN, seed=3) if residual else torch.zeros(TOKENS, HIDDEN)
    scores, numbers = (x @ router(count).t()).softmax(dim=-1).topk(min(2, count), dim=-1)
    for token in range(TOKENS):
        for score, number in zip(scores[token] / scores[token].sum(), numbers[token].tolist(), strict=True):
            weights, row = matrices(number), x[token]
            out[token] += score * (weights["down"] @ (F.silu(weights["gate"] @ row) * (weights["up"] @ row)))
    return out


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 70), size=st.integers(1, 9))
def test_experts_are_dealt_out(count: int, size: int) -> None:
    """With whole experts the ranks' parts cut the numbers as evenly as there is, the first ones longer; else all have all.

    Why: the rank with the most experts has the most to read, and all others wait for it.
    """
    parts = [part.tolist() for part in torch.arange(count).tensor_split(size)]
    for rank, part in enumerate(parts):
        shard = TensorParallel(rank, size, None, True).experts(count)
        check_equal((list(range(*span(shard))), shard.full), (part, count), f"experts of rank {rank}, and how many there are")
        check_equal(span(TensorParallel(rank, size).experts(count)), (0, count), f"experts of rank {rank} that are cut")


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "with a residual stream"])
@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_layer_is_complete_on_every_rank(size: int, whole: bool, residual: bool) -> None:
    """Five experts on one to three ranks, against a loop over tokens and their experts.

    Why: the next layer's attention needs all of every token on every rank, whoever has computed it.
    """
    ranks = on_threads(size, mlp, 5, whole, residual)
    for rank, got in enumerate(ranks):
        check_close(got["result"], expected(5, residual), f"the result of rank {rank}")
    owned = [number for got in ranks for number in got["own"]]
    check_equal(owned, list(range(5)) * (1 if whole else size), "experts of the ranks, one after the other")


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
def test_the_residual_is_in_the_sum_once(whole: bool) -> None:
    """Rank 0 has the result in the stream's own memory; on the others the stream is as it was.

    Why: the stream is the same on all ranks. Added on each of them it grows with the number of ranks, layer by layer.
    """
    for rank, got in enumerate(on_threads(3, mlp, 4, whole)):
        if rank == 0:
            assert got["result"].data_ptr() == got["stream"].data_ptr(), "rank 0 returns another tensor than the stream"
        else:
            check_equal(got["stream"], random(TOKENS, HIDDEN, seed=3), f"the stream of rank {rank}")


@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
def test_one_all_reduce_a_layer(whole: bool) -> None:
    """That is all that ranks say to each other, and one rank alone says nothing.

    Why: a sum for each expert is correct, too, and takes as many waits as there are experts.
    """
    for rank, got in enumerate(on_threads(2, mlp, 6, whole)):
        check_equal(got["calls"], {"all_reduce": 1}, f"calls of rank {rank}")
    check_equal(on_threads(1, mlp, 6, whole)[0]["calls"], {}, "calls of a rank that is alone")


def test_a_rank_without_experts_takes_part() -> None:
    """Two experts on three ranks: the last one has none, and gives what the others give.

    Why: a rank that leaves before the sum makes all others wait for ever.
    """
    ranks = on_threads(3, mlp, 2, True)
    check_equal([got["own"] for got in ranks], [[0], [1], []], "experts of each rank")
    for rank, got in enumerate(ranks):
        check_close(got["result"], expected(2), f"the result of rank {rank}")


def model_of(rank: int = 0, size: int = 1, count: int = 4, shared: bool = False, whole: bool = True) -> SparseForCausalLM:
    return SparseForCausalLM(config_of(count, shared), TensorParallel(rank, size, None, whole))


@pytest.mark.parametrize("end", ["", ".weight"])
@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_a_tensor_of_all_experts_is_a_tensor_for_each(matrix: str, end: str) -> None:
    """[4, 3, 5] under the name of all experts: four views [3, 5], each by the name that an expert's own has.

    Why: transformers 5 saves all experts of a layer in one tensor. Copied, the largest model there is takes its memory twice.
    """
    tensor, name = random(4, 3, 5, seed=chance.Random(7).randrange(999)), f"model.layers.1.mlp.experts.{matrix}{end}"
    pieces = list(model_of().pieces(name, tensor))
    check_equal([each for each, _ in pieces], [f"model.layers.1.mlp.experts.{e}.{matrix}.weight" for e in range(4)], "names")
    for number, (_, piece) in enumerate(pieces):
        check_equal(piece, tensor[number], f"expert {number}")
        assert piece.data_ptr() == tensor[number].data_ptr(), f"expert {number} is a copy"


@pytest.mark.parametrize("experts", [3, 5])
def test_pieces_are_all_that_a_tensor_has(experts: int) -> None:
    """A tensor of one expert less or one more than the model's four, on both of two ranks: a piece for each that is in it.

    Why: whether an expert belongs here is asked of each piece. One too many that is no piece is never refused, and the
    checkpoint of another model loads.
    """
    tensor = random(experts, 3, 5)
    for rank in range(2):
        pieces = list(model_of(rank, 2).pieces("model.layers.0.mlp.experts.down_proj", tensor))
        names = [f"model.layers.0.mlp.experts.{number}.down_proj.weight" for number in range(experts)]
        check_equal([name for name, _ in pieces], names, f"names of the pieces on rank {rank}")
        check_equal([piece.tolist() for _, piece in pieces], tensor.tolist(), f"pieces on rank {rank}")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.0.mlp.experts.3.down_proj.weight", (3, 5)), ("model.layers.0.mlp.gate.weight", (4, 6)),
     ("model.layers.0.self_attn.q_proj.weight", (6, 6)), ("model.layers.0.conv.weight", (2, 3, 4)),
     ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 10)), ("model.layers.0.mlp.experts.down_proj.blocks", (4, 3, 5, 2))],
)  # fmt: skip
def test_any_other_tensor_is_one_piece(name: str, shape: tuple[int, ...]) -> None:
    """A single expert's, the router's, attention's, one of three dimensions that is no expert's, and one of four: as it is.

    Why: what is cut by its shape alone is cut where somebody else's tensor has three dimensions, too.
    """
    tensor = random(*shape)
    ((found, piece),) = model_of().pieces(name, tensor)
    check_equal(found, name, "the name")
    assert piece is tensor, "the tensor is another one"


def owner_names(number: int, layer: int = 1) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{number}.{matrix}_proj.weight" for matrix in ("gate", "up", "down")]


@pytest.mark.parametrize("shared", [False, True], ids=["", "with a shared expert"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_rank_is_given_what_it_has(size: int, shared: bool) -> None:
    """Every matrix of four experts, and of a shared one, is placed by the one rank that has it, and by no other.

    Why: a rank that reads all experts reads a hundred gigabytes to throw most of it away, if it has room for them at all.
    """
    count = 5 if shared else 4
    for number in range(count):
        for name in owner_names(number):
            placed = [model_of(rank, size, 4, shared).place(name, random(3, 5)) for rank in range(size)]
            takes = [TensorParallel(rank, size, None, True).share(count) for rank in range(size)]
            check_equal(
                [each is not None for each in placed],
                [shard.start <= number < shard.stop for shard in takes],
                f"who takes {name}",
            )


def test_what_is_placed_has_the_name_of_a_parameter() -> None:
    """On two ranks: each place is a parameter of that rank's model, with the piece of it; the number stays the checkpoint's.

    Why: counted from 0 on each rank, an expert answers for another one, and the model speaks nonsense in good English.
    """
    for rank, numbers in enumerate(((0, 1), (2, 3))):
        model = model_of(rank, 2)
        known = {name for name, _ in model.named_parameters()}
        for number in numbers:
            placed = [model.place(name, random(3, 5)) for name in owner_names(number)]
            targets, shards = [each[0] for each in placed], [each[1] for each in placed]
            merged = [
                f"model.layers.1.mlp.experts.{number}.{each}.weight" for each in ("gate_up_proj", "gate_up_proj", "down_proj")
            ]
            check_equal((targets, shards), (merged, ["gate", "up", None]), f"places of expert {number} on rank {rank}")
            assert set(targets) <= known, f"rank {rank} has no such parameters"


def test_cut_experts_are_everybodys() -> None:
    """Without whole experts both ranks take all of them: a part of each.

    Why: the layers' own loaders cut what they are given. Left out, a rank's part stays what memory held before.
    """
    for rank in range(2):
        model = model_of(rank, 2, whole=False)
        for number in range(4):
            assert all(model.place(name, random(3, 5)) is not None for name in owner_names(number)), f"rank {rank}, {number}"


def test_what_no_rank_has_is_not_dropped() -> None:
    """Experts 4 and 7 of four, on both ranks, and layers that are no experts'.

    Why: a checkpoint with more experts than its configuration says is another model. Dropped without a word, it would load.
    """
    for rank in range(2):
        model = model_of(rank, 2)
        for name in (*owner_names(4), *owner_names(7), "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"):
            assert model.place(name, random(6, 6)) is not None, f"rank {rank} drops {name}"
        check_equal(model.place("model.rotary_emb.inv_freq", random(3)), None, "what is computed and not loaded")
