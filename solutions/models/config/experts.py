"""What a ``config.json`` says of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .entries import Entries

MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a layer, MLPs of which each token goes through a few.

    Attributes:
        count: of those that a router chooses from. chosen: how many it chooses for a token.
        size: width of an expert. shared_size: of the one that every token goes through as well; 0: there is none.
        renormalise: the weights of a token's chosen experts sum up to 1; else they are what the softmax over all has given.
        dense_layers: those with one MLP in the place of experts.
    """

    count: int
    chosen: int
    size: int
    renormalise: bool
    shared_size: int = 0
    dense_layers: frozenset[int] = frozenset()


def read_experts(hf: Entries, size: int, renormalise: bool, shared_size: int = 0) -> Mixture:
    """The experts of every ``decoder_sparse_step``-th layer that is none of ``mlp_only_layers``.

    Raises:
        ModelError: an entry is missing or wrong.
    """
    name = "num_experts" if hf.content.get("num_experts") is not None else "num_local_experts"  # transformers 4, and 5
    count = hf.whole(name, high=MAX_EXPERTS)
    step, layers = hf.whole("decoder_sparse_step", 1), range(hf.whole("num_hidden_layers"))
    named = hf.many("mlp_only_layers", int, [])
    dense = frozenset(layer for layer in layers if layer in named or (layer + 1) % step)
    return Mixture(count, hf.whole("num_experts_per_tok", high=count), size, renormalise, shared_size, dense)
