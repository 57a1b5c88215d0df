"""What a ``config.json`` says of experts."""

from __future__ import annotations

from dataclasses import dataclass

from .entries import Entries

MAX_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class Routing:
    """How DeepSeek's routers choose: some groups of experts first, then experts out of these.

    Attributes:
        corrected: scores are sigmoids, which a bias for each expert corrects for the choice alone, and a group counts the best
            two of its own (V3); else they are a softmax, and it counts the best one (V2).
        groups: of neighbouring experts, each as many. chosen_groups: for a token.
        scale: factor on the weights.
    """

    corrected: bool
    groups: int
    chosen_groups: int
    scale: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a layer, MLPs of which each token goes through a few.

    Attributes:
        count: of those that a router chooses from. chosen: how many it chooses for a token.
        size: width of an expert. shared_size: of the one that every token goes through as well; 0: there is none.
        renormalise: the weights of a token's chosen experts sum up to 1; else they are what the softmax over all has given.
        dense_layers: those with one MLP in the place of experts.
        clamped: (alpha, limit) of gpt-oss's gate, see `gpt_oss.ClampedGateUp`; such experts and their router have biases.
        routing: how experts are chosen, if not by the largest values of a softmax; the shared expert then counts as it is.
    """

    count: int
    chosen: int
    size: int
    renormalise: bool
    shared_size: int = 0
    dense_layers: frozenset[int] = frozenset()
    clamped: tuple[float, float] | None = None
    routing: Routing | None = None


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
